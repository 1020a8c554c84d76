"""Names for ids that no tokenizer has a string for: what a plain tokenizer calls them after an export.

<|unused_151669|>                rows of the base that its own tokenizer does not use
<|img_start|> …                  special tokens that have a name
<|special_12|>                   those that are reserved
<|image_00000|>                  image codes
<|audio_0_0000|>                 codebook and code of sound
"""

from collections.abc import Collection

from qwen3_vlm.tokenization.token_space import TokenSpace

__all__ = ["token_names"]


def token_names(space: TokenSpace, taken: Collection[str] = ()) -> list[str]:
    """The names of the ids from `text_tokenizer_size` to the last, in order; each of them once.

    Args:
        taken: strings that the base's tokenizer has already; a name among them gets "_mm" before its end.
    """
    names = [f"<|unused_{value}|>" for value in range(space.text.tokenizer_size, space.text.vocab_size)]
    names += list(space.special_names)
    names += [f"<|special_{index}|>" for index in range(len(space.special_names), space.special_count)]
    if space.image is not None:
        names += [f"<|image_{code:05d}|>" for code in range(space.image.codebook_size)]
    if space.audio is not None:
        names += [
            f"<|audio_{book}_{code:04d}|>"
            for book, size in enumerate(space.audio.codebook_sizes)
            for code in range(size)
        ]
    seen = set(taken)
    free = []
    for name in names:
        while name in seen:
            name = name.removesuffix("|>") + "_mm|>"
        seen.add(name)
        free.append(name)
    return free

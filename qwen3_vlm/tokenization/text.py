"""Text to ids and back without losing anything, with any Hugging Face tokenizer.

Tokenizers may change text before they cut it: Qwen's composes Unicode (NFC), so "e" + U+0301 would come back as "é".
Text that the tokenizer would change is encoded by a twin of it without that step; the ids are ordinary ones
that decode to the same string. Strings that look like special tokens ("<|im_end|>") are plain text here: a
caption must not be able to end a turn.
"""

import copy
from pathlib import Path
from typing import Any

from qwen3_vlm.errors import ModelError, TokenError
from qwen3_vlm.fingerprint import fingerprint_tokenizer
from qwen3_vlm.tokenization.token_space import TextIdentity
from qwen3_vlm.tokenization.uti_config import TextConfig

MAX_CHARACTERS = 10_000_000


class LosslessText:
    """`decode(encode(text)) == text`, or an error that says why not.

    Args:
        tokenizer: any Hugging Face tokenizer; nothing is added to it.
        vocab_size: rows of the base's embedding; ids lie in 0 … vocab_size − 1.
        name: of the base, for token_space.json.

    Raises:
        TokenSpaceError: the tokenizer has more ids than the base has rows.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, name: str) -> None:
        self.tokenizer = tokenizer
        self.identity = TextIdentity(
            name=name,
            vocab_size=vocab_size,
            tokenizer_size=max(tokenizer.get_vocab().values()) + 1,
            tokenizer_sha256=fingerprint_tokenizer(tokenizer)["sha256"],
        )
        self._twin = _without_normalizer(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; `decode` gives exactly `text` back.

        Raises:
            TokenError: it is no text, too long, has a lone surrogate, or the tokenizer can't keep all of it.
        """
        _check_text(text)
        for tokenizer in (self.tokenizer, self._twin):
            if tokenizer is None:
                continue
            ids = [int(i) for i in tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)]
            if _decode(tokenizer, ids) == text:
                return ids
        kept = _decode(self.tokenizer, ids)
        pairs = zip(text, kept, strict=False)  # one may be longer: then it differs where the other ends
        same = [a == b for a, b in pairs]
        place = [*same, False].index(False)
        raise TokenError(
            f"The tokenizer of {self.identity.name} can't keep this text: at character {place} it has "
            f"{text[place : place + 12]!r} and gives {kept[place : place + 12]!r} back. Use a byte-level tokenizer.",
            "text_not_lossless",
        )

    def decode(self, ids: list[int]) -> str:
        """The text of ids that `encode` gave, or that a model generated.

        Raises:
            TokenError: an id is none of the tokenizer's.
        """
        for place, value in enumerate(ids):
            if not 0 <= value < self.identity.tokenizer_size:
                raise TokenError(
                    f"Text ids lie in 0–{self.identity.tokenizer_size - 1:,}; {value:,} was given at position {place}.",
                    "out_of_range",
                )
        return _decode(self.tokenizer, ids)


def open_text(config: TextConfig, *, download: bool = True) -> LosslessText:
    """Load the tokenizer and the number of rows of its base.

    Raises:
        ModelError: the tokenizer can't be loaded, or the number of rows is not known.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    options = {"trust_remote_code": config.trust_remote_code, "local_files_only": not download}
    try:
        logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"The tokenizer of {config.tokenizer} can't be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    return LosslessText(tokenizer, _vocab_size(config, options), config.name or public_name(config.tokenizer))


def public_name(source: str) -> str:
    """What a hub id or a folder is called in a token space: no path of a machine, which others do not have."""
    path = Path(source)
    return path.resolve().name if path.is_dir() or path.is_absolute() or source.startswith(".") else source


def _vocab_size(config: TextConfig, options: dict[str, bool]) -> int:
    from transformers import AutoConfig

    try:
        base = AutoConfig.from_pretrained(config.tokenizer, **options)
        rows = getattr(base.get_text_config(), "vocab_size", None)
    except (OSError, ValueError, ImportError):
        rows = None
    if rows is None and config.vocab_size is None:
        raise ModelError(
            f"{config.tokenizer} has no config.json with a vocab_size, so the number of rows of its embedding is not "
            "known. Give text.vocab_size in uti.yaml."
        )
    if rows is not None and config.vocab_size not in (None, rows):
        raise ModelError(
            f"text.vocab_size is {config.vocab_size:,}, but the base {config.tokenizer} has {rows:,} rows."
        )
    return int(rows or config.vocab_size or 0)


def _without_normalizer(tokenizer: Any) -> Any | None:
    """A copy that does not change text before cutting it; None if there is nothing to leave out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is None:
        return None
    twin = copy.deepcopy(tokenizer)
    twin.backend_tokenizer.normalizer = None
    return twin


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TokenError(f"Text is expected, not {type(text).__name__}.", "not_text")
    if len(text) > MAX_CHARACTERS:
        raise TokenError(
            f"The text has {len(text):,} characters; at most {MAX_CHARACTERS:,} are encoded at once.", "text_too_long"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenError(
            f"The text has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}; that is half "
            "a character and can't be encoded. It usually comes from text that was cut or decoded wrongly.",
            "lone_surrogate",
        ) from error

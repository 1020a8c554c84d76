"""Text of many kinds, without pictures: what holds the demo's language model to its base while it learns to talk.

Names of emoji in thirteen languages, sums, bits of code-like characters, captions of scenes: nothing in it is worth
learning. Read beside the conversations with `lora.kl_weight`, it says where the model has to stay as it was.
"""

import random
import string
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from qwen3_vlm.demo.world import Scene, scenes

MAX_BYTES = 180


@cache
def names_by_language() -> dict[str, tuple[str, ...]]:
    """Language → the names of emoji in it, as `emoji` has them."""
    import emoji

    emoji.config.load_language()
    found: dict[str, list[str]] = {}
    for entry in emoji.EMOJI_DATA.values():
        for language, name in entry.items():
            if len(language) == 2 and isinstance(name, str):
                found.setdefault(language, []).append(name.strip(":").replace("_", " "))
    return {language: tuple(dict.fromkeys(names)) for language, names in sorted(found.items())}


def texts(seed: str) -> Iterator[str]:
    """An endless, repeatable stream; none is longer than `MAX_BYTES` in UTF-8, and so in byte-level ids."""
    rng, captions = random.Random(seed), scenes(seed)
    while True:
        names = names_by_language()[rng.choice(sorted(names_by_language()))]
        glue, length = rng.choice((" ", ". ", "\n", ", ")), rng.randint(MAX_BYTES // 4, MAX_BYTES)
        text = _piece(rng, names, captions)
        while len((longer := text + glue + _piece(rng, names, captions)).encode()) <= length:
            text = longer
        if len(text.encode()) <= MAX_BYTES:
            yield text


def _piece(rng: random.Random, names: Sequence[str], captions: Iterator[Scene]) -> str:
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(names)
    if kind < 0.75:
        return f"{rng.randint(0, 999)} {rng.choice('+-*/=<')} {rng.randint(0, 99)}"
    if kind < 0.9:
        return "".join(rng.choices(string.digits + string.ascii_letters + string.punctuation, k=rng.randint(3, 12)))
    return next(captions).caption()


def llava_texts(seed: str, count: int) -> Iterator[dict[str, Any]]:
    """Records of conversations without a picture; the last word of each text stands as the answer."""
    stream = texts(seed)
    for index in range(count):
        head = tail = ""
        while not (head and tail):
            head, _, tail = next(stream).rpartition(" ")
        turns = [{"from": "human", "value": head}, {"from": "gpt", "value": tail}]
        yield {"id": f"text-{index:06d}", "conversations": turns}

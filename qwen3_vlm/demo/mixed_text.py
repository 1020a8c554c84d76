"""Text of many kinds, without pictures: what holds the demo's language model to its base while it learns to talk.

Names of emoji in thirteen languages, sums, characters in no order; after them a scene in words and a question about it,
which the base can answer as it is. There is nothing to learn: read beside the conversations with `lora.kl_weight`, it
says where the model has to stay as it was.
"""

import random
import string
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from qwen3_vlm.demo.text_base import text_sample
from qwen3_vlm.demo.world import scenes

MAX_BYTES = 140


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
    """An endless, repeatable stream without sense; none is longer than `MAX_BYTES` in UTF-8."""
    rng = random.Random(seed)
    while True:
        names = names_by_language()[rng.choice(sorted(names_by_language()))]
        glue, length = rng.choice((" ", ". ", "\n", ", ")), rng.randint(MAX_BYTES // 4, MAX_BYTES)
        text = _piece(rng, names)
        while len((longer := text + glue + _piece(rng, names)).encode()) <= length:
            text = longer
        if len(text.encode()) <= MAX_BYTES:
            yield text


def _piece(rng: random.Random, names: Sequence[str]) -> str:
    kind = rng.random()
    if kind < 0.7:
        return rng.choice(names)
    if kind < 0.85:
        return f"{rng.randint(0, 999)} {rng.choice('+-*/=<')} {rng.randint(0, 99)}"
    return "".join(rng.choices(string.digits + string.ascii_letters + string.punctuation, k=rng.randint(3, 12)))


def llava_texts(seed: str, count: int) -> Iterator[dict[str, Any]]:
    """Records of conversations without a picture."""
    rng, known, stream = random.Random(seed), scenes(f"{seed}-known"), texts(seed)
    for index in range(count):
        sample = text_sample(next(known), rng)
        turns = [
            {"from": "human", "value": f"{next(stream)}\n{sample.question}"},
            {"from": "gpt", "value": sample.answer},
        ]
        yield {"id": f"text-{index:06d}", "conversations": turns}

"""Small evaluation sets over the tiny model, made the way a run makes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwen3_vlm.data.collate import Batch, Collator
from qwen3_vlm.data.encode import SampleEncoder
from qwen3_vlm.data.records import ImageRef, Record, Turn

ANSWERS = (
    "a dog",
    "a red heart left of a small dog",
    "two big apples above a green tree, and a blue car below on a white background",
    "an apple",
    "a blue car above a big tree",
)


def picture(seed: int, side: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_records(folder: Path, count: int, *, text_only: Sequence[int] = ()) -> list[Record]:
    """`count` records with a picture each (but for `text_only`), answers of several lengths."""
    records = []
    for number in range(count):
        images: tuple[ImageRef, ...] = ()
        if number not in text_only:
            path = folder / f"{number}.png"
            picture(number).save(path)
            images = (ImageRef(str(path)),)
        question = ("<image>\n" if images else "") + "what is in the picture?"
        turns = (Turn("user", question), Turn("assistant", ANSWERS[number % len(ANSWERS)]))
        records.append(Record(f"r{number}", turns, images, f"records.json[{number}]"))
    return records


def make_batches(processor: Any, records: Sequence[Record], batch_size: int, *, packing: bool = False) -> list[Batch]:
    """Batches of the real encoder and collator, in the order of the records."""
    encoder = SampleEncoder(processor, max_seq_len=256)
    collator = Collator(processor, packing=packing, max_image_pixels=10_000)
    loaded = [collator.load(number, encoder.encode(record)) for number, record in enumerate(records)]
    chunks = [loaded[start : start + batch_size] for start in range(0, len(loaded), batch_size)]
    return [collator([chunk] if packing else [[sample] for sample in chunk]) for chunk in chunks]

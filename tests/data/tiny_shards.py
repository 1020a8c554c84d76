"""A small token space and a tokenized data set in it, made by hand: no codec, no pipeline."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_vlm.data.shards import (
    SPLITS,
    TokenizedRecord,
    split_of,
    write_dataset,
    write_report,
    write_shard,
)
from qwen3_vlm.fingerprint import fingerprint_file
from qwen3_vlm.storage import atomic_write_json
from qwen3_vlm.tokenization.token_space import AudioIdentity, ImageIdentity, TextIdentity, TokenSpace

FRACTIONS = {"val": 0.2, "test": 0.1}


def tiny_space(text_size: int = 50, codes: int = 16) -> TokenSpace:
    """Text 0–49, specials 50–113, 2 × 3 pictures of 16 codes, sound of 3 codebooks (4, 5, 6)."""
    text = TextIdentity("tiny-text", text_size, text_size - 5, "0" * 64)
    image = ImageIdentity("tiny-vq", "janus_vqvae", codes, (16, 24), (2, 3), "1" * 64)
    audio = AudioIdentity("tiny-codec", "dac", (4, 5, 6), 16_000, 1, 320, 2.0, "2" * 64)
    return TokenSpace.build(text, image, audio)


def tiny_record(
    number: int, space: TokenSpace, modalities: Sequence[str] = ("text", "image", "audio")
) -> TokenizedRecord:
    """Record `number`; its ids follow from the number alone."""
    generator = np.random.Generator(np.random.PCG64(number))
    ids: dict[str, Any] = {}
    if "text" in modalities:
        ids["text"] = generator.integers(0, space.text.tokenizer_size, size=number % 5)
    if "image" in modalities:
        ids["image"] = space.image_to_global(generator.integers(0, 16, size=(2, 3)))
    if "audio" in modalities:
        codes = np.stack([generator.integers(0, size, size=1 + number % 3) for size in (4, 5, 6)])
        ids["audio"] = space.audio_to_global(codes)
    metadata = {name: {"of": name, "number": number} for name in ("image", "audio") if name in modalities}
    text = f"text — {number}" if "text" in modalities else None
    return TokenizedRecord(
        f"{number:09d}", f"id/{number}", "made up", None, text, {"n": number, "ü": [1, None]}, ids, metadata
    )


def write_tiny(out: Path, space: TokenSpace, count: int = 60, shard_records: int = 8, audited: bool = True) -> Path:
    """A complete data set of `count` records with all three modalities."""
    out.mkdir(parents=True, exist_ok=True)
    records = [tiny_record(number, space) for number in range(count)]
    stats: dict[str, Any] = {"splits": {}}
    for split in SPLITS:
        part = [record for record in records if split_of(record.id, FRACTIONS) == split]
        tokens = dict.fromkeys(("text", "image", "audio"), 0)
        for number, start in enumerate(range(0, len(part), shard_records)):
            summary = write_shard(out, split, number, part[start : start + shard_records], space)
            write_report(out, summary)
            tokens = {name: tokens[name] + summary.tokens[name] for name in tokens}
        stats["splits"][split] = {"records": len(part), "errors": 0, "tokens": tokens}
    space.save(out)
    (out / "uti.yaml").write_text("text: {}\n", encoding="utf-8")
    (out / "tokenize_errors.jsonl").write_text("", encoding="utf-8")
    atomic_write_json(out / "stats.json", stats)
    write_dataset(out, space, settings={"fractions": FRACTIONS, "shard_records": shard_records})
    if audited:
        pass_audit(out)
    return out


def pass_audit(out: Path, passed: bool = True) -> None:
    """An audit.json for what is there now, without an audit."""
    tree = {"dataset_sha256": fingerprint_file(out / "dataset.json"), "passed": passed}
    (out / "audit.json").write_text(json.dumps(tree), encoding="utf-8")

"""A small data set of real files (PNG, WAV, text) and tiny tokenizers for it, for the tokenizing tests."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml
from PIL import Image

from tests.tiny import save_tiny_llm
from tests.tokenization.tiny_models import save_tiny

RATE_HZ = 800  # the tiny codec's own


def save_tokenizers(folder: Path, **audio: Any) -> Path:
    """A uti.yaml with a text tokenizer, an image tokenizer and an audio codec beside it."""
    config = {
        "text": {"tokenizer": str(save_tiny_llm(folder / "llm")), "name": "tiny"},
        "image": {"type": "janus_vqvae", "source": str(save_tiny(folder / "image", "janus_vqvae")), "batch_size": 4},
        "audio": {
            "type": "dac",
            "source": str(save_tiny(folder / "audio", "dac")),
            "clip_seconds": 0.5,
            "max_seconds": 4.0,
            "batch_size": 4,
            **audio,
        },
    }
    path = folder / "uti.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def png(seed: int, side: int = 20) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def wav(seed: int, samples: int = 480, rate: int = RATE_HZ) -> bytes:
    values = np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)
    stream = io.BytesIO()
    soundfile.write(stream, values, rate, format="WAV", subtype="PCM_16")
    return stream.getvalue()


def line(name: str, **fields: Any) -> dict[str, Any]:
    """A manifest record; image= and audio= are paths."""
    media = {kind: fields.pop(kind) for kind in ("image", "audio") if kind in fields}
    return {"id": name, "source": "test", "modalities": media, "text": None, "task": None, "meta": {}, **fields}


def write_manifest(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_speaking_pictures(folder: Path, count: int, *, files: int = 12) -> Path:
    """A manifest of `count` records over a few files: pictures with text, sounds with text, and all three."""
    for number in range(files):
        (folder / "media").mkdir(parents=True, exist_ok=True)
        (folder / "media" / f"{number}.png").write_bytes(png(number))
        (folder / "media" / f"{number}.wav").write_bytes(wav(number, 200 + 37 * number))
    records = []
    for number in range(count):
        media = {"image": f"media/{number % files}.png", "audio": f"media/{number * 5 % files}.wav"}
        chosen = [("image",), ("audio",), ("image", "audio"), ()][number % 4]
        kinds = {kind: media[kind] for kind in chosen}
        records.append(line(f"r{number}", **kinds, text=f"record {number}", task="i2t" if chosen else None))
    return write_manifest(folder / "manifest.jsonl", records)

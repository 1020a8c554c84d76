"""The spoken part of the demo's data set: WAV files and raw manifests that tie picture, words and voice.

    DIR/audio/train/000000.wav …   DIR/manifest_train.jsonl           training scenes, in the training voices
    DIR/audio/unseen/…             DIR/manifest_unseen.jsonl          scenes with a held-out pair, in the same voices
    DIR/audio/voice/…              DIR/manifest_voice.jsonl           the same captions, in the held-out voice
    DIR/audio/names/…              DIR/manifest_names.jsonl           names of drawings
    DIR/audio/names_unseen/…       DIR/manifest_names_unseen.jsonl    held-out names

One JSON object a line: `{"id", "source", "modalities": {"image", "audio"}, "text", "task", "meta"}`, with paths
relative to the manifest. The pictures are those of the other records; none is written twice.
"""

import json
import random
import wave
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_vlm.demo.voices import HELD_OUT_VOICE, SAMPLING_RATE, TRAINING_VOICES, Line, Wave, phrase_is_held_out, vary

SOURCE = "qwen3-vlm-demo"


@dataclass(frozen=True)
class Captioned:
    """A picture that is on disk, and the words that go with it."""

    id: str
    image: str  # relative to the data set
    text: str


def write_speech(folder: Path, written: dict[str, list[Captioned]], train: int, unseen: int, seed: int) -> None:
    """Speak the first `train` training pictures and drawings, and the first `unseen` unseen ones."""
    rng = random.Random(f"voices-{seed}")
    drawings = written.get("drawings", [])
    parts = {
        "train": _in_training_voices(islice(written["train"], train), rng),
        "unseen": _in_training_voices(islice(written["unseen"], unseen), rng),
        "voice": _in_held_out_voice(islice(written["unseen"], unseen)),
        "names": _in_training_voices(islice((d for d in drawings if not phrase_is_held_out(d.text)), train), rng),
        "names_unseen": _in_training_voices(islice((d for d in drawings if phrase_is_held_out(d.text)), unseen), rng),
    }
    for part, lines in parts.items():
        _write_part(folder, part, lines)


def _in_training_voices(pictures: Iterable[Captioned], rng: random.Random) -> Iterator[tuple[Captioned, Line]]:
    for picture in pictures:
        yield picture, vary(picture.text, rng.choice(TRAINING_VOICES), rng)


def _in_held_out_voice(pictures: Iterable[Captioned]) -> Iterator[tuple[Captioned, Line]]:
    voice = HELD_OUT_VOICE
    for picture in pictures:
        yield picture, Line(picture.text, voice, voice.words_per_minute, voice.pitch)


def _write_part(folder: Path, part: str, lines: Iterable[tuple[Captioned, Line]]) -> None:
    """WAV files and their manifest; a part without a line leaves nothing."""
    records = []
    for index, (picture, line) in enumerate(lines):
        audio = f"audio/{part}/{index:06d}.wav"
        write_wav(folder / audio, line.speak().wave)
        records.append(json.dumps(manifest_record(f"{part}-{index:06d}", picture, audio, line)))
    if records:
        (folder / f"manifest_{part}.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")


def manifest_record(identity: str, picture: Captioned, audio: str, line: Line) -> dict[str, Any]:
    """A line of a raw manifest; any task can be made of it, so it names none."""
    return {
        "id": identity,
        "source": SOURCE,
        "modalities": {"image": picture.image, "audio": audio},
        "text": picture.text,
        "task": None,
        "meta": {
            "picture": picture.id,
            "voice": line.voice.name,
            "words_per_minute": line.words_per_minute,
            "pitch": line.pitch,
        },
    }


def write_wav(path: Path, sound: Wave) -> None:
    """16-bit PCM at 16 kHz, mono."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes(np.round(sound * 32767).astype("<i2").tobytes())

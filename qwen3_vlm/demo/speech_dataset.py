"""The spoken part of the demo's data set: WAV files and raw manifests that tie picture, words and voice.

    DIR/audio/train/000000.wav …   DIR/manifest_train.jsonl           training scenes, in the training voices
    DIR/audio/unseen/…             DIR/manifest_unseen.jsonl          scenes with a held-out pair, in the same voices
    DIR/audio/voice/…              DIR/manifest_voice.jsonl           the same captions, in the held-out voice
    DIR/audio/names/…              DIR/manifest_names.jsonl           names of drawings
    DIR/audio/names_unseen/…       DIR/manifest_names_unseen.jsonl    held-out names
                                   DIR/manifest_pictures.jsonl        training scenes and their captions, unspoken
                                   DIR/manifest_pictures_unseen.jsonl
    DIR/audio/phrases/…            DIR/manifest_phrases.jsonl         `a cat`, `a small cat`, `a cat and a horse`
    DIR/audio/phrases_unseen/…     DIR/manifest_phrases_unseen.jsonl  held-out pairs, and known phrases in another voice
    DIR/audio/phrases_voice/…      DIR/manifest_phrases_voice.jsonl   in the held-out voice

One JSON object a line: `{"id", "source", "modalities": {"image", "audio"}, "text", "task", "meta"}`, with paths
relative to the manifest. The pictures are those of the other records; none is written twice.
"""

import json
import random
import wave
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_vlm.demo.voices import (
    HELD_OUT_VOICE,
    SAMPLING_RATE,
    TRAINING_VOICES,
    Line,
    Voice,
    Wave,
    phrase_is_held_out,
    telling_is_held_out,
    trimmed,
    vary,
)
from qwen3_vlm.demo.world import PHRASE_KINDS, sample_phrases

SOURCE = "qwen3-vlm-demo"


@dataclass(frozen=True)
class Captioned:
    """A picture that is on disk, and the words that go with it."""

    id: str
    image: str  # relative to the data set; "": there is none
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


def write_pictures(folder: Path, written: dict[str, list[Captioned]]) -> None:
    """Manifests of pictures and captions without a voice."""
    for part, name in (("train", "pictures"), ("unseen", "pictures_unseen")):
        records = [manifest_record(f"{name}-{picture.id}", picture) for picture in written[part]]
        _write_manifest(folder, name, records)


def write_phrases(folder: Path, train: int, unseen: int, seed: int) -> None:
    """Speak short phrases in equal parts of each kind, without the silence around them."""
    rng = random.Random(f"phrases-{seed}")
    parts = {
        "phrases": islice(_phrases(rng, TRAINING_VOICES, unseen=False), train),
        "phrases_unseen": islice(_phrases(rng, TRAINING_VOICES, unseen=True), unseen),
        "phrases_voice": islice(_phrases(rng, (HELD_OUT_VOICE,), unseen=False), unseen),
    }
    for part, lines in parts.items():
        _write_part(folder, part, lines)


def _phrases(rng: random.Random, voices: tuple[Voice, ...], unseen: bool) -> Iterator[tuple[Captioned, Line]]:
    """Endless; what is held out is a pair of objects, or that a known voice says a known phrase."""
    for kind, name in cycle(enumerate(PHRASE_KINDS)):
        text, voice = sample_phrases(rng, unseen)[kind], rng.choice(voices)
        while name != "pair" and voice != HELD_OUT_VOICE and telling_is_held_out(text, voice) != unseen:
            text, voice = sample_phrases(rng, unseen)[kind], rng.choice(voices)
        yield Captioned("", "", text), vary(text, voice, rng)


def _in_training_voices(pictures: Iterable[Captioned], rng: random.Random) -> Iterator[tuple[Captioned, Line]]:
    for picture in pictures:
        yield picture, vary(picture.text, rng.choice(TRAINING_VOICES), rng)


def _in_held_out_voice(pictures: Iterable[Captioned]) -> Iterator[tuple[Captioned, Line]]:
    voice = HELD_OUT_VOICE
    for picture in pictures:
        yield picture, Line(picture.text, voice, voice.words_per_minute, voice.pitch)


def _write_part(folder: Path, part: str, lines: Iterable[tuple[Captioned, Line]]) -> None:
    """WAV files and their manifest; a part without a line leaves nothing."""
    records: list[dict[str, Any]] = []
    for index, (picture, line) in enumerate(lines):
        audio = f"audio/{part}/{index:06d}.wav"
        sound = line.speak().wave
        write_wav(folder / audio, sound if picture.image else trimmed(sound))
        records.append(manifest_record(f"{part}-{index:06d}", picture, audio, line))
    _write_manifest(folder, part, records)


def _write_manifest(folder: Path, part: str, records: list[dict[str, Any]]) -> None:
    if records:
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        (folder / f"manifest_{part}.jsonl").write_text(lines, encoding="utf-8")


def manifest_record(identity: str, picture: Captioned, audio: str = "", line: Line | None = None) -> dict[str, Any]:
    """A line of a raw manifest, with a picture, a voice or both; any task can be made of it, so it names none."""
    modalities: dict[str, str] = {}
    meta: dict[str, Any] = {}
    if picture.image:
        modalities["image"], meta["picture"] = picture.image, picture.id
    if line is not None:
        modalities["audio"] = audio
        meta |= {"voice": line.voice.name, "words_per_minute": line.words_per_minute, "pitch": line.pitch}
    return {
        "id": identity,
        "source": SOURCE,
        "modalities": modalities,
        "text": picture.text,
        "task": None,
        "meta": meta,
    }


def write_wav(path: Path, sound: Wave) -> None:
    """16-bit PCM at 16 kHz, mono."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes(np.round(sound * 32767).astype("<i2").tobytes())

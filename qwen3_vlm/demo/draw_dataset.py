"""What stage 4 of the demo learns from, beside the data of stage 3: plain drawing, one voice, names to draw, texts.

    DIR/images/neat/…     DIR/manifest_neat.jsonl            scenes for t2i: one picture for each caption
                          DIR/manifest_neat_unseen.jsonl     the same with held-out pairs
    DIR/audio/spoken/…    DIR/manifest_spoken.jsonl          phrases, in one voice, word by word, and pictures: t2a, i2a
                          DIR/manifest_spoken_unseen.jsonl   held-out pairs, and phrases that it was not heard to say
    DIR/audio/heard/…     DIR/manifest_heard.jsonl           names in every voice and their drawings for a2i
                          DIR/manifest_heard_unseen.jsonl    every name in a voice that did not say it there
                          DIR/texts.jsonl                    text of many kinds: what holds text behaviour

A caption does not say by how many pixels a drawing is off its cell's middle, `left of` does not say in which row, nor a
text in which of eight voices it is to be said. Where that varies, a model that writes must learn to be unsure before it
learns to be right. So what is to be written is the same for the same words. What is read keeps all its variety: i2t and
a2t go on with stage 3's data.

Manifest lines are those of `speech_dataset`; everything follows from the seed.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwen3_vlm.demo.drawings import CENTRES, Pixels, sprite
from qwen3_vlm.demo.mixed_text import texts as mixed_texts
from qwen3_vlm.demo.speech_dataset import Captioned, manifest_record, write_wav
from qwen3_vlm.demo.voices import (
    SAMPLING_RATE,
    TRAINING_VOICES,
    VOICES,
    Line,
    Voice,
    Wave,
    telling_is_held_out,
    trimmed,
    vary,
)
from qwen3_vlm.demo.world import (
    BACKGROUND_WORDS,
    BACKGROUNDS,
    CANVAS,
    CELLS,
    NAMES,
    PHRASE_KINDS,
    SIZE_WORDS,
    Layout,
    Scene,
    Thing,
    plain_scene,
    sample_phrases,
    scenes,
)
from qwen3_vlm.storage import atomic_directory

SPEAKER = VOICES["amy"]  # one of the two that the recogniser follows best after the codec; at her own pitch
PACE = 200  # words a minute; what is said word by word can be said fast
NEAT_SIZES = {"small": 16, "big": 28, "whole": 60}  # pixels; so an object's patches are the same in every cell
MIDDLE: dict[Layout, tuple[tuple[str, str], ...]] = {
    "row": (("left", "middle"), ("right", "middle")),
    "column": (("middle", "top"), ("middle", "bottom")),
}
FRAME, PAUSE = SAMPLING_RATE // 40, 1  # samples of a frame of the demo's codec; frames of silence after a piece
_NAME = re.compile(rf"\b({'|'.join(NAMES)})\b")
KINDS = (0, 1, 2, 2, 2, 2)  # of PHRASE_KINDS: most phrases are pairs, of which there are most


@dataclass(frozen=True)
class DrawSizes:
    """How many records of each kind."""

    neat: int = 10000
    neat_unseen: int = 300
    spoken: int = 3000
    spoken_unseen: int = 300
    heard: int = 10 * len(NAMES)
    heard_unseen: int = 6 * len(NAMES)
    texts: int = 2000


def build(folder: Path, sizes: DrawSizes | None = None, seed: int = 0) -> Path:
    """Write the data set below `folder`, whole or not at all; one that is already there is kept.

    Raises:
        StorageError: the disk is full or the folder can't be written.
    """
    sizes = sizes or DrawSizes()
    stamp = json.dumps({"seed": seed, **vars(sizes)}, sort_keys=True)
    if (folder / "stamp.json").is_file() and (folder / "stamp.json").read_text(encoding="utf-8") == stamp:
        return folder
    with atomic_directory(folder) as temporary:
        rng = random.Random(f"draw-{seed}")
        for part in ("neat", "spoken", "heard"):
            for name in (part, f"{part}_unseen"):
                samples = islice(_STREAMS[part](rng, name.endswith("unseen")), getattr(sizes, name))
                _write_part(temporary, name, samples)
        texts = [json.dumps({"text": text}) for text in islice(mixed_texts(f"draw-{seed}"), sizes.texts)]
        (temporary / "texts.jsonl").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        (temporary / "stamp.json").write_text(stamp, encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Sample:
    """A scene, what is said of it, who says it and how that sounds; None: it is only written."""

    scene: Scene
    text: str
    line: Line | None = None
    sound: Wave | None = None


def neat_picture(scene: Scene) -> Pixels:
    """(CANVAS, CANVAS, 3): one size for each word of size, the middle of each cell, one shade of each background."""
    canvas = np.empty((CANVAS, CANVAS, 3), dtype=np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        size = NEAT_SIZES[thing.size]
        left, top = CENTRES[thing.column] - size // 2, CENTRES[thing.row] - size // 2
        drawing = sprite(thing.name, size)
        patch = canvas[top : top + size, left : left + size]
        patch *= 1 - drawing[..., 3:] / 255
        patch += drawing[..., :3]
    return canvas.clip(0, 255).astype(np.uint8)


def settled(scene: Scene) -> Scene:
    """The scene of this caption: what the caption leaves open stands in the middle, three of a kind as a trio in rows.

    `left of` says nothing of the row, `above` nothing of the column, `two small cats` nothing of either.
    """
    if scene.layout == "group":
        cells = MIDDLE["row"] if len(scene.things) == 2 else CELLS["trio_row"][0]
    else:
        cells = MIDDLE.get(scene.layout, tuple((thing.column, thing.row) for thing in scene.things))
    placed = zip(scene.things, cells, strict=True)
    things = tuple(replace(thing, column=column, row=row) for thing, (column, row) in placed)
    return replace(scene, things=things)


def scene_of(text: str, rng: random.Random) -> Scene:
    """A scene that a phrase is true of: `a cat` whole, `a small cat` anywhere, `a cat and a horse` side by side."""
    words = text.split()
    names, background = [word for word in words if word in NAMES], rng.choice(BACKGROUND_WORDS)
    if len(names) == 2:
        pair = zip(names, MIDDLE["row"], strict=True)
        return Scene("row", tuple(Thing(name, rng.choice(SIZE_WORDS), *cell) for name, cell in pair), background)
    if words[1] in SIZE_WORDS:
        return Scene("one", (Thing(names[0], words[1], *rng.choice(CELLS["one"])[0]),), background)
    return Scene("plain", plain_scene(names[0]).things, background)


def word_by_word(line: Line) -> Wave:
    """A phrase with a break at each name, as a railway station announces trains: a name is the same sound everywhere.

    Each piece begins on a frame of the demo's codec. So a name has (but for the frames at its edges) the same ids in
    every phrase, and a phrase that training never had is made of known pieces.
    """
    pieces = [_piece(replace(line, text=text.strip())) for text in _NAME.split(line.text) if text.strip()]
    return np.concatenate(pieces)


@cache
def _piece(line: Line) -> Wave:
    sound = trimmed(line.speak().wave)
    return np.pad(sound, (0, -len(sound) % FRAME + PAUSE * FRAME))


def unheard_voice(name: str) -> Voice:
    """The training voice that does not say a name to a2i; one that did not in stage 3 either, where there is such."""
    text, first = f"a {name}", TRAINING_VOICES[NAMES.index(name) % len(TRAINING_VOICES)]
    return next((voice for voice in TRAINING_VOICES if telling_is_held_out(text, voice)), first)


def _neat(rng: random.Random, unseen: bool) -> Iterator[Sample]:
    for scene in map(settled, scenes(f"neat-{rng.random()}", unseen=unseen)):
        yield Sample(scene, scene.caption())


def _spoken(rng: random.Random, unseen: bool) -> Iterator[Sample]:
    for kind in cycle(KINDS):
        text = sample_phrases(rng, unseen)[kind]
        while PHRASE_KINDS[kind] != "pair" and telling_is_held_out(text, SPEAKER) != unseen:
            text = sample_phrases(rng, unseen)[kind]
        line = Line(text, SPEAKER, PACE, SPEAKER.pitch)
        yield Sample(scene_of(text, rng), text, line, word_by_word(line))


def _heard(rng: random.Random, unseen: bool) -> Iterator[Sample]:
    for name in cycle(NAMES):
        held_out = unheard_voice(name)
        voice = held_out if unseen else rng.choice([voice for voice in TRAINING_VOICES if voice != held_out])
        line = vary(f"a {name}", voice, rng)
        yield Sample(plain_scene(name), f"a {name}", line, trimmed(line.speak().wave))


_STREAMS = {"neat": _neat, "spoken": _spoken, "heard": _heard}


def _write_part(folder: Path, part: str, samples: Iterator[Sample]) -> None:
    """PNG and WAV files, and their manifest."""
    (folder / "images" / part).mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for index, sample in enumerate(samples):
        image, audio = f"images/{part}/{index:06d}.png", f"audio/{part}/{index:06d}.wav"
        Image.fromarray(neat_picture(sample.scene)).save(folder / image, compress_level=1)
        if sample.sound is not None:
            write_wav(folder / audio, sample.sound)
        identity = f"{part}-{index:06d}"
        records.append(manifest_record(identity, Captioned(identity, image, sample.text), audio, sample.line))
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    (folder / f"manifest_{part}.jsonl").write_text(lines, encoding="utf-8")

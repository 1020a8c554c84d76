"""Grids of words and rows of sounds: text alone that has the shape of what new vocabulary rows will stand for.

A frozen language model can draw and speak through new rows only if it can already keep count of 64 cells, knows which
cell is where, and can go through the sounds of a word one after another. So the text base learns that on text:

    an 8 × 8 grid, row by row: what a cell of a described scene holds (object, size, part of it, background)
    a row of frames × 4 slots: which sound of the spoken phrase it is, said by whom, in which slot

Each place holds a *bag* of words with gains, since one id of a codec never means one word. To read, a bag is a rough
sum of word embeddings; to write, it is the distribution over words that is to be predicted. Pictures and recordings
are not used: boxes are those of the description, and the sounds of words are spelled out below by hand.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from qwen3_vlm.demo.drawings import place
from qwen3_vlm.demo.world import CANVAS, COLUMNS, ROWS, Scene, Thing, sample_phrases

GRID = 8  # cells, both ways
PARTS = {"small": 3, "big": 4, "whole": 4}  # how finely a thing's own cells are told apart, both ways
SLOTS = 4  # of one frame
MAX_KEYWORDS = 7  # of a place
SILENCE = "_"
VOWELS = frozenset("aAeioOuUQEIWXRF")
# One letter a sound: a as in ago, A cat, e bell, i fish, o frog, u umbrella, U balloon, E snail, I lion, O boat, W cow,
# X ball, R shirt, F tree; S she, C cheese.
SOUNDS: dict[str, str] = {
    "apple": "Apal", "banana": "banAna", "pear": "per", "watermelon": "wXtamelan",
    "strawberry": "strXberF", "pineapple": "pInApal", "carrot": "kArat", "mushroom": "muSrUm",
    "bread": "bred", "cheese": "CFz", "pizza": "pFtsa", "burger": "bRga",
    "cat": "kAt", "horse": "hXrs", "cow": "kW", "pig": "pig",
    "rabbit": "rAbit", "elephant": "elafant", "lion": "lIan", "fish": "fiS",
    "duck": "duk", "owl": "Wl", "frog": "frog", "butterfly": "butaflI",
    "snail": "snEl", "spider": "spIda", "tree": "trF", "cactus": "kAktas",
    "sunflower": "sunflWa", "car": "kor", "bicycle": "bIsikal", "train": "trEn",
    "rocket": "rokit", "boat": "bOt", "house": "hWs", "umbrella": "umbrela",
    "bell": "bel", "camera": "kAmara", "guitar": "gitor", "ball": "bXl",
    "hat": "hAt", "shirt": "SRt", "crown": "krWn", "balloon": "balUn",
    "gift": "gift", "robot": "rObot", "turtle": "tRtal", "penguin": "pengwin",
    "a": "a", "small": "smXl", "big": "big", "and": "and",
}  # fmt: skip
VOICES = tuple(f" {word}" for word in (
    "man", "woman", "girl", "boy", "baby", "police", "teacher", "singer", "pilot", "farmer", "judge", "student",
))  # fmt: skip

Bag = list[tuple[str, float]]  # words as they are tokenized, and how much of the place each has


@dataclass(frozen=True)
class Described:
    """Words, and the places that they describe."""

    text: str
    places: list[Bag]


def scene_grid(scene: Scene, rng: random.Random) -> Described:
    """A caption and its 64 cells."""
    boxes = [(thing, *place(thing, rng)) for thing in scene.things]
    cells = [_cell(scene, boxes, column, row) for row in range(GRID) for column in range(GRID)]
    return Described(scene.caption(), cells)


def _cell(scene: Scene, boxes: list[tuple[Thing, int, int, int]], column: int, row: int) -> Bag:
    """The background, and the thing that covers most of the cell."""
    step = CANVAS // GRID
    x, y = column * step, row * step
    background = f" {scene.background}"
    covered, thing, left, top, size = 0.0, None, 0, 0, 1
    for other, its_left, its_top, its_size in boxes:
        wide = min(x + step, its_left + its_size) - max(x, its_left)
        high = min(y + step, its_top + its_size) - max(y, its_top)
        share = max(0, wide) * max(0, high) / step**2
        if share > covered:
            covered, thing, left, top, size = share, other, its_left, its_top, its_size
    if thing is None or covered < 0.1:
        return [(background, 1.0)]
    parts = PARTS[thing.size]
    across, down = (min(max((at + step / 2 - start) / size, 0), 0.999) for at, start in ((x, left), (y, top)))
    detail = made_up_word(f"{thing.name} {parts} {int(across * parts)} {int(down * parts)}")
    return [
        (background, 1 - 0.8 * covered),
        (f" {thing.name}", covered),
        (detail, covered),
        (" whole" if thing.size == "whole" else f" {thing.size}", 0.5 * covered),
        (f" {COLUMNS[int(across * 3)]}", 0.3 * covered),
        (f" {ROWS[int(down * 3)]}", 0.3 * covered),
    ]


def spoken_row(text: str, rng: random.Random) -> Described:
    """A phrase and the slots of its frames: each sound lasts as long as it likes, in one voice."""
    voice, tempo = rng.choice(VOICES), rng.uniform(0.8, 1.2)
    sounds = SILENCE + "".join(SOUNDS[word] for word in text.split()) + SILENCE
    frames: list[Bag] = []
    for before, sound, after in zip(" " + sounds[:-1], sounds, sounds[1:] + " ", strict=True):
        low, high = (0, 3) if sound == SILENCE else (2, 5) if sound in VOWELS else (1, 3)
        count = max(0 if sound == SILENCE else 1, round(tempo * rng.uniform(low, high)))
        for index in range(count):
            neighbour = after if 2 * index >= count else before
            frames.append([(sound, 1.0), *([(neighbour, 0.3)] if neighbour != " " and index in (0, count - 1) else [])])
    slots = [_slot(frame, slot, voice) for frame in frames for slot in range(SLOTS)]
    return Described(text, slots)


def _slot(frame: Bag, slot: int, voice: str) -> Bag:
    """The first slot says most of what is spoken, the others more of how."""
    what = 1.0 if slot == 0 else 0.5
    sounds = [(sound, gain * what) for sound, gain in frame]
    detail = made_up_word(f"{frame[0][0]} slot {slot}")
    return [*sounds, (detail, 0.6), (voice, 0.2 if slot == 0 else 0.6), (str(slot), 0.3)]


@cache
def _spare_words() -> tuple[str, ...]:
    """Ids of the tokenizer, as `#number`, for details that no word names; the world's own are among the first 700."""
    return tuple(f"#{number}" for number in range(700, 1500))


@cache
def made_up_word(detail: str) -> str:
    """A word for a detail: any, but always the same."""
    words = _spare_words()
    return words[int.from_bytes(hashlib.sha256(detail.encode()).digest()[:4], "big") % len(words)]


def grids(scenes: Iterator[Scene], rng: random.Random) -> Iterator[Described]:
    """The endless stream of scenes as grids."""
    for scene in scenes:
        yield scene_grid(scene, rng)


def spoken_rows(rng: random.Random) -> Iterator[Described]:
    """The endless stream of spoken phrases."""
    while True:
        yield spoken_row(rng.choice(sample_phrases(rng)), rng)

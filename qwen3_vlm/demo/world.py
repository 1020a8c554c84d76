"""The demo's world: scenes of one to three drawings, and what can truly be said about them.

A scene is drawn from its own description, so every caption is right by construction. A tenth of all
object *pairs* is held out, chosen by hash: no training scene (of the connector or of the tower) shows
such a pair together, and each scene of the unseen test shows at least one. So exact captions there
cannot come from remembering which things appear together.

This module knows nothing of pixels, models or files.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

CANVAS = 64  # pixels, both sides
SIZES: dict[str, tuple[int, int]] = {"small": (15, 18), "big": (26, 30)}  # drawn size in pixels, inclusive
WHOLE = (58, 64)  # of a plain drawing, which fills the canvas
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (176, 176, 182),
    "yellow": (255, 236, 130),
    "green": (150, 220, 150),
    "blue": (140, 190, 255),
    "pink": (255, 175, 205),
}

# One word each, easy to tell apart at 16 pixels. The codes are OpenMoji file names.
OBJECTS: dict[str, str] = {
    "apple": "1F34E", "banana": "1F34C", "pear": "1F350", "watermelon": "1F349",
    "strawberry": "1F353", "pineapple": "1F34D", "carrot": "1F955", "mushroom": "1F344",
    "bread": "1F35E", "cheese": "1F9C0", "pizza": "1F355", "burger": "1F354",
    "cat": "1F408", "horse": "1F40E", "cow": "1F404", "pig": "1F416",
    "rabbit": "1F407", "elephant": "1F418", "lion": "1F981", "fish": "1F41F",
    "duck": "1F986", "owl": "1F989", "frog": "1F438", "butterfly": "1F98B",
    "snail": "1F40C", "spider": "1F577", "tree": "1F333", "cactus": "1F335",
    "sunflower": "1F33B", "car": "1F697", "bicycle": "1F6B2", "train": "1F686",
    "rocket": "1F680", "boat": "26F5", "house": "1F3E0", "umbrella": "2602",
    "bell": "1F514", "camera": "1F4F7", "guitar": "1F3B8", "ball": "26BD",
    "hat": "1F3A9", "shirt": "1F455", "crown": "1F451", "balloon": "1F388",
    "gift": "1F381", "robot": "1F916", "turtle": "1F422", "penguin": "1F427",
}  # fmt: skip
NAMES: tuple[str, ...] = tuple(OBJECTS)
SIZE_WORDS: tuple[str, ...] = tuple(SIZES)
BACKGROUND_WORDS: tuple[str, ...] = tuple(BACKGROUNDS)
COLUMNS: tuple[str, ...] = ("left", "middle", "right")
ROWS: tuple[str, ...] = ("top", "middle", "bottom")
COUNT_WORDS: dict[int, str] = {2: "two", 3: "three"}
PLURALS: dict[str, str] = {
    "strawberry": "strawberries", "bread": "breads", "fish": "fishes", "butterfly": "butterflies",
    "sunflower": "sunflowers", "mushroom": "mushrooms",
}  # fmt: skip
PROMPTS: tuple[str, ...] = ("Describe the image.", "Describe the image concisely.", "What do you see?")

# plain: one drawing that fills the canvas; group: two or three of the same; trio_row: two side by side, both
# above a third; trio_column: two above each other, both left of a third.
Layout = Literal["plain", "one", "group", "row", "column", "trio_row", "trio_column"]
CELLS: dict[Layout, tuple[tuple[tuple[str, str], ...], ...]] = {
    "plain": ((("middle", "middle"),),),
    "one": tuple(
        ((column, row),) for column, row in product(COLUMNS, ROWS) if (column == "middle") == (row == "middle")
    ),
    "row": tuple((("left", row), ("right", row)) for row in ROWS),
    "column": tuple(((column, "top"), (column, "bottom")) for column in COLUMNS),
    "trio_row": ((("left", "top"), ("right", "top"), ("middle", "bottom")),),
    "trio_column": ((("left", "top"), ("left", "bottom"), ("right", "middle")),),
}
HELD_OUT_TENTHS = 1


@dataclass(frozen=True)
class Thing:
    """One drawing in a scene: how big (`whole`: it fills the canvas) and in which cell of a 3 × 3 grid."""

    name: str
    size: str
    column: str
    row: str


@dataclass(frozen=True)
class Scene:
    """What is in a picture; `things` are in the order in which the caption names them."""

    layout: Layout
    things: tuple[Thing, ...]
    background: str

    def caption(self) -> str:
        """The one right caption, from the description alone."""
        return f"{_SUBJECTS[self.layout](self.things)} on a {self.background} background"

    def pairs(self) -> set[frozenset[str]]:
        """The unordered pairs of different objects seen together."""
        return {frozenset(pair) for pair in combinations({thing.name for thing in self.things}, 2)}

    def has_held_out_pair(self) -> bool:
        """True where at least one pair of the scene is held out of all training."""
        return any(is_held_out(pair) for pair in self.pairs())


def plural(name: str) -> str:
    """`cat` → `cats`."""
    return PLURALS.get(name, name + "s")


def phrase(thing: Thing) -> str:
    """`a small cat`."""
    return f"a {thing.size} {thing.name}"


def place_of(thing: Thing) -> str:
    """`in the middle`, `at the top left`."""
    if (thing.column, thing.row) == ("middle", "middle"):
        return "in the middle"
    return f"at the {thing.row} {thing.column}"


def _one(things: tuple[Thing, ...]) -> str:
    return f"{phrase(things[0])} {place_of(things[0])}"


def _group(things: tuple[Thing, ...]) -> str:
    return f"{COUNT_WORDS[len(things)]} {things[0].size} {plural(things[0].name)}"


def _row(things: tuple[Thing, ...]) -> str:
    return f"{phrase(things[0])} left of {phrase(things[1])}"


def _column(things: tuple[Thing, ...]) -> str:
    return f"{phrase(things[0])} above {phrase(things[1])}"


def _plain(things: tuple[Thing, ...]) -> str:
    return f"a drawing of a {things[0].name}"


def _trio_row(things: tuple[Thing, ...]) -> str:
    return f"{_row(things)}, both above {phrase(things[2])}"


def _trio_column(things: tuple[Thing, ...]) -> str:
    return f"{_column(things)}, both left of {phrase(things[2])}"


_SUBJECTS: dict[Layout, Callable[[tuple[Thing, ...]], str]] = {
    "plain": _plain,
    "one": _one,
    "group": _group,
    "row": _row,
    "column": _column,
    "trio_row": _trio_row,
    "trio_column": _trio_column,
}


def is_held_out(pair: frozenset[str]) -> bool:
    """A tenth of the pairs, by hash of the two names: the same on every machine and for every seed."""
    digest = hashlib.sha256("+".join(sorted(pair)).encode()).digest()
    return digest[0] % 10 < HELD_OUT_TENTHS


HELD_OUT_PAIRS: frozenset[frozenset[str]] = frozenset(
    pair for pair in map(frozenset, combinations(NAMES, 2)) if is_held_out(pair)
)

# How often each layout is drawn. Scenes of one object are many: they are what teaches the names.
TRAIN_MIX: dict[Layout, float] = {
    "plain": 0.10,
    "one": 0.24,
    "group": 0.08,
    "row": 0.17,
    "column": 0.17,
    "trio_row": 0.12,
    "trio_column": 0.12,
}
UNSEEN_MIX: dict[Layout, float] = {"row": 0.3, "column": 0.3, "trio_row": 0.2, "trio_column": 0.2}


def sample_scene(rng: random.Random, mix: dict[Layout, float] | None = None) -> Scene:
    """Any scene at all, held-out pairs included."""
    weights = mix or TRAIN_MIX
    layout = rng.choices(tuple(weights), tuple(weights.values()))[0]
    cells = _cells(rng, layout)
    if layout == "plain":
        things: tuple[Thing, ...] = (Thing(rng.choice(NAMES), "whole", *cells[0]),)
    elif layout == "group":
        name, size = rng.choice(NAMES), rng.choice(SIZE_WORDS)
        things = tuple(Thing(name, size, column, row) for column, row in cells)
    else:
        names = rng.sample(NAMES, len(cells))
        things = tuple(
            Thing(name, rng.choice(SIZE_WORDS), column, row) for name, (column, row) in zip(names, cells, strict=True)
        )
    return Scene(layout, things, rng.choice(BACKGROUND_WORDS))


def plain_scene(name: str) -> Scene:
    """One drawing as it is, on white."""
    return Scene("plain", (Thing(name, "whole", "middle", "middle"),), "white")


def _cells(rng: random.Random, layout: Layout) -> tuple[tuple[str, str], ...]:
    """The (column, row) of each thing, in caption order."""
    if layout == "group":
        layout = rng.choice(("row", "column", "trio_row", "trio_column"))
    return rng.choice(CELLS[layout])


def scenes(seed: str, mix: dict[Layout, float] | None = None, unseen: bool = False) -> Iterator[Scene]:
    """An endless, repeatable stream: with `unseen` each scene has a held-out pair, without it none has."""
    rng = random.Random(seed)
    while True:
        scene = sample_scene(rng, mix or (UNSEEN_MIX if unseen else TRAIN_MIX))
        if scene.has_held_out_pair() == unseen:
            yield scene


PHRASE_KINDS = ("name", "sized", "pair")


def sample_phrases(rng: random.Random, unseen: bool = False) -> tuple[str, str, str]:
    """One of each kind: `a cat`, `a small cat`, `a cat and a horse`; with `unseen` the pair is a held-out one."""
    first, second = rng.sample(NAMES, 2)
    while is_held_out(frozenset((first, second))) != unseen:
        first, second = rng.sample(NAMES, 2)
    return f"a {first}", f"a {rng.choice(SIZE_WORDS)} {first}", f"a {first} and a {second}"

"""Captions back to facts, so that a wrong caption can be right in parts.

A caption says facts of four kinds: which objects, how big each is, where they are, and on what
background. Mentions are compared one by one, in the order in which they stand; a caption that names
too few objects, or too many, is wrong in each mention that is missing or too much.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen3_vlm.demo.world import BACKGROUND_WORDS, COUNT_WORDS, NAMES, SIZE_WORDS, plural
from qwen3_vlm.evaluate.intervals import Interval, bootstrap_ratio, wilson_interval

KINDS = ("object", "size", "place", "background")
_SINGULAR = {form: name for name in NAMES for form in (name, plural(name))}
_COUNTS = {"a": 1} | {word: count for count, word in COUNT_WORDS.items()}
_MENTION = re.compile(rf"\b({'|'.join(_COUNTS)}) (?:({'|'.join(SIZE_WORDS)}) )?({'|'.join(_SINGULAR)})\b")
_PLACE = re.compile(r"in the middle|at the (?:top|bottom) (?:left|right)|(?:left|right) of|above|below")
_BACKGROUND = re.compile(rf"on a ({'|'.join(BACKGROUND_WORDS)}) background")


@dataclass(frozen=True)
class Facts:
    """What a caption claims; `mentions` are (count, size or "", name)."""

    mentions: tuple[tuple[int, str, str], ...]
    places: tuple[str, ...]
    background: str | None

    def of(self, kind: str) -> tuple[object, ...]:
        """The facts of one kind, in order. How many there are of a thing belongs to the object."""
        if kind == "object":
            return tuple((count, name) for count, _, name in self.mentions)
        if kind == "size":
            return tuple(size for _, size, _ in self.mentions if size)
        return self.places if kind == "place" else (self.background,)


def read_facts(caption: str) -> Facts:
    """What a caption claims; whatever is not understood is simply no fact."""
    mentions = tuple((_COUNTS[count], size, _SINGULAR[name]) for count, size, name in _MENTION.findall(caption))
    background = _BACKGROUND.search(caption)
    return Facts(mentions, tuple(_PLACE.findall(caption)), background[1] if background else None)


def count_right(kind: str, prediction: Facts, reference: Facts) -> tuple[int, int]:
    """(right, of) facts of a kind in one caption; facts too many or too few count as wrong ones."""
    said, true = prediction.of(kind), reference.of(kind)
    right = sum(a == b for a, b in zip(said, true, strict=False))  # what one side lacks can't be right: it is in "of"
    return right, max(len(said), len(true))


@dataclass(frozen=True)
class Scores:
    """Shares of right captions and right facts, with 95 % intervals."""

    captions: int
    exact: Interval
    facts: dict[str, Interval]

    def row(self, title: str) -> dict[str, str]:
        """One line of a results table: per cent, with its interval."""
        cells = {"test set": title, "captions": str(self.captions), "exact": _percent(self.exact)}
        return cells | {kind: _percent(interval) for kind, interval in self.facts.items()}


def score(predictions: Sequence[str], references: Sequence[str], seed: int = 0) -> Scores:
    """Compare captions with what is true."""
    exact = np.array([a.strip() == b.strip() for a, b in zip(predictions, references, strict=True)], dtype=float)
    facts: dict[str, Interval] = {}
    for kind in KINDS:
        pairs = zip(predictions, references, strict=True)
        counts = np.array([count_right(kind, read_facts(said), read_facts(true)) for said, true in pairs], dtype=float)
        counts = counts[counts[:, 1] > 0]
        if len(counts):
            facts[kind] = _share(counts[:, 0], counts[:, 1], seed)
    return Scores(len(exact), wilson_interval(int(exact.sum()), len(exact)), facts)


def _share(right: NDArray[np.float64], of: NDArray[np.float64], seed: int) -> Interval:
    """Facts of one caption stand or fall together, so captions are resampled; where all captions agree,
    resampling would claim certainty, and Wilson's interval over captions is taken instead."""
    if (right == of).all() or not right.any():
        return wilson_interval(int((right == of).sum()), len(of))
    return bootstrap_ratio(right, of, confidence=0.95, samples=2000, seed=seed)


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} ({100 * interval.low:.1f}–{100 * interval.high:.1f})"

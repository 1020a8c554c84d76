"""The two kinds of adapters that conformance is checked of, each with inputs to try it on.

Shapes: B items of a batch, R C grid rows and columns, A channels, S samples, K codebooks, F frames.
"""

import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "FaultError", "Subject", "subject_of"]

Array = NDArray[Any]
CLIP_SECONDS, LONG_CLIPS = 0.5, 10  # a test clip, and how many of it a long one is
MIN_FRAMES = 4


class FaultError(Exception):
    """What a check found wrong."""


class Subject(ABC):
    """An adapter with inputs to try it on."""

    kind: str

    def __init__(self, adapter: Any, batch_size: int) -> None:
        self.adapter, self.batch_size = adapter, batch_size
        self._cache: dict[str, Array] = {}

    def cached(self, name: str, make: Callable[[], Array]) -> Array:
        """Inputs and reference results are made once, after the attributes are known to be usable."""
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    @property
    def items(self) -> Array:
        """A batch of differing items."""
        return self.cached("items", lambda: self.make_items(0))

    @property
    def codes(self) -> Array:
        """The ids of `items`."""
        return self.cached("codes", lambda: self.encode(self.items))

    def encode(self, items: Array) -> Array:
        return np.array(self.adapter.encode(items.copy()))

    def decode(self, codes: Array) -> Array:
        return np.array(self.adapter.decode(codes.copy()))

    @abstractmethod
    def attributes(self) -> Iterator[str]:
        """What is wrong with the attributes."""

    @abstractmethod
    def sizes(self) -> Array:
        """Codebook sizes that broadcast against codes."""

    @abstractmethod
    def make_items(self, seed: int) -> Array:
        """A batch of items for a seed."""

    @abstractmethod
    def codes_shape(self, items: Array) -> tuple[int, ...]:
        """The shape that the ids of items must have."""

    @abstractmethod
    def odd_items(self) -> Iterator[tuple[str, Array]]:
        """Batches that are valid but unusual."""

    @abstractmethod
    def wrong_items(self) -> Iterator[tuple[str, str, Array]]:
        """(check, what is wrong, items) that must be refused."""

    @abstractmethod
    def wrong_shaped_codes(self) -> Iterator[tuple[str, Array]]:
        """Codes whose shape must be refused."""


class Pictures(Subject):
    kind = "image"

    def attributes(self) -> Iterator[str]:
        yield from _count(self.adapter, "codebook_size")
        faults = [*_counts(self.adapter, "resolution", 2), *_counts(self.adapter, "grid", 2)]
        yield from faults
        yield from _rest(self.adapter)
        if not faults and any(map(operator.gt, self.adapter.grid, self.adapter.resolution)):
            yield f"grid {self.adapter.grid} is finer than resolution {self.adapter.resolution}"

    def sizes(self) -> Array:
        return np.asarray(self.adapter.codebook_size)

    def make_items(self, seed: int) -> Array:
        rng = np.random.default_rng(seed)
        height, width = self.adapter.resolution
        ramps = np.linspace(0, 1, height)[:, None, None] * rng.uniform(-1, 1, (self.batch_size, 1, 1, 3))
        ramps = ramps + np.linspace(0, 1, width)[:, None] * rng.uniform(-1, 1, (self.batch_size, 1, 1, 3))
        noise = rng.normal(0, 0.1, ramps.shape) + rng.uniform(0.2, 0.8, (self.batch_size, 1, 1, 3))
        return np.clip((ramps + noise) * 255, 0, 255).astype(np.uint8)

    def codes_shape(self, items: Array) -> tuple[int, ...]:
        return (len(items), *self.adapter.grid)

    def odd_items(self) -> Iterator[tuple[str, Array]]:
        shape = self.items.shape
        yield "black", np.zeros(shape, np.uint8)
        yield "white", np.full(shape, 255, np.uint8)
        yield "noise", np.random.default_rng(1).integers(0, 256, shape, np.uint8)
        yield "a chessboard of pixels", _chessboard(shape)

    def wrong_items(self) -> Iterator[tuple[str, str, Array]]:
        items = self.items
        yield "refuses_shapes", "a single picture", items[0]
        yield "refuses_shapes", "four channels", np.concatenate([items, items[..., :1]], -1)
        yield "refuses_shapes", "pictures twice as high", np.concatenate([items, items], 1)
        yield "refuses_shapes", "pictures half as wide", items[:, :, : max(1, items.shape[2] // 2)]
        yield "refuses_dtypes", "float pixels of 0 to 1", (items / 255).astype(np.float32)
        yield "refuses_dtypes", "int64 pixels", items.astype(np.int64)

    def wrong_shaped_codes(self) -> Iterator[tuple[str, Array]]:
        yield "codes of a single picture", self.codes[0]
        yield "a row too many", np.concatenate([self.codes, self.codes[:, :1]], 1)
        yield "codes that are not a grid", self.codes.reshape(len(self.codes), -1)


class Sounds(Subject):
    kind = "audio"

    def attributes(self) -> Iterator[str]:
        for name in ("sampling_rate_hz", "channels", "samples_per_frame"):
            yield from _count(self.adapter, name)
        yield from _counts(self.adapter, "codebook_sizes", None)
        yield from _rest(self.adapter)

    def sizes(self) -> Array:
        return np.asarray(self.adapter.codebook_sizes)[:, None]

    def make_items(self, seed: int) -> Array:
        rng = np.random.default_rng(seed)
        hop, rate = self.adapter.samples_per_frame, self.adapter.sampling_rate_hz
        seconds = np.arange(max(MIN_FRAMES, round(CLIP_SECONDS * rate / hop)) * hop) / rate
        pitch = rng.uniform(rate / 200, rate / 10, (self.batch_size, self.adapter.channels, 1))
        tones = rng.uniform(0.2, 0.8, pitch.shape) * np.sin(2 * np.pi * pitch * seconds)
        return np.clip(tones + rng.normal(0, 0.05, tones.shape), -1, 1).astype(np.float32)

    def codes_shape(self, items: Array) -> tuple[int, ...]:
        return (len(items), len(self.adapter.codebook_sizes), items.shape[-1] // self.adapter.samples_per_frame)

    def odd_items(self) -> Iterator[tuple[str, Array]]:
        shape, hop = self.items.shape, self.adapter.samples_per_frame
        yield "silence", np.zeros(shape, np.float32)
        yield "full scale", np.ones(shape, np.float32)
        yield "full-scale noise", np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
        yield "a square wave", _square_wave(shape)
        yield "a single frame", self.items[..., :hop]
        yield f"a clip {LONG_CLIPS} times as long", np.tile(self.items, LONG_CLIPS)

    def wrong_items(self) -> Iterator[tuple[str, str, Array]]:
        """(check, what it is, sounds) that `encode` must refuse."""
        items = self.items
        yield "refuses_shapes", "a single clip", items[0]
        yield "refuses_shapes", "a channel too many", np.concatenate([items, items[:, :1]], 1)
        yield "refuses_shapes", "no samples", items[..., :0]
        yield "refuses_dtypes", "int16 samples", (items * 32767).astype(np.int16)
        if self.adapter.samples_per_frame > 1:
            yield "refuses_part_of_a_frame", "a sample too few", items[..., :-1]
        for name, value in (("NaN", np.nan), ("infinity", np.inf)):
            yield "refuses_not_finite", name, np.where(np.arange(items.shape[-1]) == 1, np.float32(value), items)

    def wrong_shaped_codes(self) -> Iterator[tuple[str, Array]]:
        yield "codes of a single clip", self.codes[0]
        yield "a codebook too many", np.concatenate([self.codes, self.codes[:, :1]], 1)
        yield "no frames", self.codes[..., :0]


def _chessboard(shape: tuple[int, ...]) -> Array:
    board = np.indices(shape[1:3]).sum(0) % 2 * 255
    return np.broadcast_to(board[..., None].astype(np.uint8), shape)


def _square_wave(shape: tuple[int, ...]) -> Array:
    wave = 1 - 2 * (np.arange(shape[-1]) // 2 % 2)
    return np.broadcast_to(wave.astype(np.float32), shape)


def subject_of(adapter: Any, kind: str, batch_size: int) -> Subject:
    """The adapter with the inputs of its kind."""
    subjects: dict[str, type[Subject]] = {"image": Pictures, "audio": Sounds}
    return subjects[kind](adapter, batch_size)


def _count(adapter: Any, name: str) -> Iterator[str]:
    value = getattr(adapter, name, None)
    if type(value) is not int or value < 1:
        yield f"{name} is {value!r}, not an int above 0"


def _counts(adapter: Any, name: str, length: int | None) -> Iterator[str]:
    value: Any = getattr(adapter, name, None)
    good = type(value) is tuple and all(type(number) is int and number > 0 for number in value)
    if not good or (len(value) != length if length is not None else not value):
        yield f"{name} is {value!r}, not a tuple of {length or 'one or more'} ints above 0"


def _rest(adapter: Any) -> Iterator[str]:
    digest = getattr(adapter, "weights_sha256", None)
    if not (isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)):
        yield f"weights_sha256 is {digest!r}, not 64 lower-case hex digits"
    for name in ("encode", "decode"):
        if not callable(getattr(adapter, name, None)):
            yield f"{name} can't be called"

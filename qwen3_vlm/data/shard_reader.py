"""Records of tokenized shards in a shuffled order that every process can compute, and that resumes exactly.

An epoch is a permutation of all records, given by seed and epoch alone (see `shuffle`). Its positions count over all
ranks together: rank r of W takes r, r + W, r + 2W, … and, where the records run out, the last round is filled up
from the epoch's beginning, so that every rank gets the same number and none is empty. Worker processes only
fetch: the order is the same whatever their number. A state is (seed, epoch, position), counted when an item is handed
out, not when it is read ahead; since the position is global, it may be resumed with another number of workers
or of ranks, and what is left of the epoch is still read exactly once.

Several data sets are mixed by weight: weight w means that each record comes w times per epoch (0.5: every other epoch,
another half each time; 2: twice). A record that can't be used keeps its turn, as an item with the reason and no value:
ranks must not fall out of step, and nothing is lost silently.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qwen3_vlm.data.shards import Shards, TokenizedRecord
from qwen3_vlm.data.shuffle import Permutation
from qwen3_vlm.errors import DataError, RecordError, TokenError

STATE_FORMAT = 1
CHUNK = 32  # records per task of a worker process


@dataclass(frozen=True, slots=True)
class Place:
    """Which record of which data set, and when."""

    epoch: int
    position: int  # in the epoch, over all ranks
    part: int  # the number of the data set
    index: int  # in it


class Skipped(NamedTuple):
    """A record that can't be used."""

    origin: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class ReadItem:
    """One turn: a value, or why there is none."""

    place: Place
    value: Any  # what `transform` made, else the TokenizedRecord; None where it was skipped
    skipped: Skipped | None = None


Transform = Callable[[TokenizedRecord, Place], Any]


class ShardReader:
    """Iterating gives what is left of the current epoch for this rank; the next iteration goes on with the next epoch.

    Args:
        data: one data set, or several with their weights.
        seed: decides the order.
        shuffle: false reads in the order of the shards.
        transform: is called in the worker with each record and its place; a RecordError or TokenError skips the record.
        num_workers: processes that read ahead; 0 reads in this one, without torch.
        worker_init_fn: is called in each of them with its number.
        multiprocessing_context: "fork" or "spawn"; None is torch's own choice.

    Raises:
        DataError: there is nothing to read, or a rank or weight that can't be.
    """

    def __init__(
        self,
        data: Shards | Sequence[tuple[Shards, float]],
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        transform: Transform | None = None,
        num_workers: int = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: str | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"There is no rank {rank} among {world_size}.")
        self.rank, self.world_size = rank, world_size
        self.order = EpochOrder([(data, 1.0)] if isinstance(data, Shards) else list(data), seed, shuffle)
        self.epoch, self.position = 0, 0
        self.skipped: Counter[str] = Counter()  # reason → items, since this reader was made
        self._fetch = _Fetch(self.order, transform)
        self._loading: dict[str, Any] = {"num_workers": num_workers, "worker_init_fn": worker_init_fn}
        self._loading["multiprocessing_context"] = multiprocessing_context
        self._generation = 0

    def __len__(self) -> int:
        """Items that are left in this epoch for this rank; the same on every rank."""
        return -(-(len(self.order) - self.position) // self.world_size)

    def __iter__(self) -> Iterator[ReadItem]:
        self._generation += 1
        generation, epoch, left = self._generation, self.epoch, len(self)
        for chunk in self._chunks(epoch, self.position + self.rank, left):
            for item in chunk:
                if generation != self._generation:
                    raise DataError("This reader was moved or read elsewhere while it was being read here.")
                left -= 1
                self.position += self.world_size
                if not left:
                    self.epoch, self.position = epoch + 1, 0
                if item.skipped is not None:
                    self.skipped[item.skipped.reason] += 1
                yield item

    def seek(self, epoch: int, position: int = 0) -> None:
        """Go to a position, counted over all ranks, of an epoch.

        Raises:
            DataError: there is no such position.
        """
        if epoch < 0 or not 0 <= position < len(self.order):
            raise DataError(f"There is no position {position} in epoch {epoch} of {len(self.order):,} records.")
        self.epoch, self.position = epoch, position
        self._generation += 1

    def state_dict(self) -> dict[str, Any]:
        """Where this reader is, as JSON; the same on every rank that has handed out as many items."""
        return {"format": STATE_FORMAT, **self.order.identity, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a reader of the same data stood; seed and shuffling are taken over.

        Raises:
            DataError: another format or other data, with a line per difference.
        """
        try:
            if state["format"] != STATE_FORMAT:
                raise DataError(f"The reader's state has the format {state['format']}; {STATE_FORMAT} is read.")
            lines = _differences(self.order.identity["parts"], state["parts"])
            seed, shuffle, epoch, position = (state[name] for name in ("seed", "shuffle", "epoch", "position"))
            if any(type(number) is not int for number in (seed, epoch, position)) or type(shuffle) is not bool:
                raise TypeError("seed, shuffle, epoch or position")
        except (KeyError, TypeError) as error:
            raise DataError(f"The reader's state is damaged: {error}.") from error
        if lines:
            raise DataError("The reader's state is that of other data (here, there):\n  " + "\n  ".join(lines))
        self.order = EpochOrder(self.order.parts, seed, shuffle)
        self._fetch = _Fetch(self.order, self._fetch.transform)
        self.seek(epoch, position)

    def _chunks(self, epoch: int, first: int, count: int) -> Iterator[list[ReadItem]]:
        """The next `count` items of this rank from global position `first` on, some at a time."""
        step = CHUNK * self.world_size
        keys = (
            (epoch, first + number * step, self.world_size, min(CHUNK, count - number * CHUNK))
            for number in range(-(-count // CHUNK))
        )
        if not self._loading["num_workers"]:
            return (self._fetch[key] for key in keys)
        import torch
        from torch.utils.data import DataLoader

        # A generator of its own: making an iterator draws from it, and a resumed run must not notice.
        loader: DataLoader[Any] = DataLoader(
            self._fetch,  # type: ignore[arg-type]
            batch_size=None,
            sampler=keys,
            collate_fn=_unchanged,
            generator=torch.Generator(),
            **self._loading,
        )
        return iter(loader)


class EpochOrder:
    """Which record comes at which position of which epoch: a pure function, in constant memory."""

    def __init__(self, parts: Sequence[tuple[Shards, float]], seed: int, shuffle: bool = True) -> None:
        self.parts, self.seed, self.shuffle = list(parts), seed, shuffle
        for shards, weight in self.parts:
            if not 0 < weight <= 1_000_000:
                raise DataError(f"{shards.folder} has the weight {weight}; a number above 0 is needed.")
            if not len(shards):
                raise DataError(f"{shards.folder} has no records in its split {shards.split!r}.")
        counts = [max(1, round(weight * len(shards))) for shards, weight in self.parts]
        self._ends = np.cumsum(counts, dtype=np.int64)
        if not counts:
            raise DataError("There is no data set to read.")

    def __len__(self) -> int:
        """Positions of an epoch."""
        return int(self._ends[-1])

    def places(self, epoch: int, positions: npt.NDArray[np.int64]) -> list[Place]:
        """The records at these positions; past the epoch's end they begin again with its first."""
        wrapped = positions % len(self)
        mixed = Permutation(len(self), f"{self.seed}/{epoch}")(wrapped) if self.shuffle else wrapped
        parts = np.searchsorted(self._ends, mixed, side="right")
        found = [self._place(epoch, int(part), int(number)) for part, number in zip(parts, mixed, strict=True)]
        return [Place(epoch, int(at), *rest) for at, rest in zip(positions, found, strict=True)]

    def _place(self, epoch: int, part: int, number: int) -> tuple[int, int]:
        """Data set and index. One with a weight other than 1 is read pass after pass, whatever the epochs."""
        start = int(self._ends[part - 1]) if part else 0
        shards, weight = self.parts[part]
        if weight == 1:
            return part, number - start
        turn, index = divmod(epoch * (int(self._ends[part]) - start) + number - start, len(shards))
        return part, int(self._pass(part, turn)(index)[0]) if self.shuffle else index

    def _pass(self, part: int, turn: int) -> Permutation:
        return Permutation(len(self.parts[part][0]), f"{self.seed}/part {part}/pass {turn}")

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the order follows from."""
        parts = [{**shards.identity, "weight": float(weight)} for shards, weight in self.parts]
        return {"seed": self.seed, "shuffle": self.shuffle, "parts": parts}


class _Fetch:
    """Reads the records of one key (epoch, first position, step, count); the same in whatever process."""

    def __init__(self, order: EpochOrder, transform: Transform | None) -> None:
        self.order, self.transform = order, transform

    def __getitem__(self, key: tuple[int, int, int, int]) -> list[ReadItem]:
        epoch, first, step, count = key
        places = self.order.places(epoch, first + step * np.arange(count, dtype=np.int64))
        return [self._read(place) for place in places]

    def _read(self, place: Place) -> ReadItem:
        shards = self.order.parts[place.part][0]
        try:
            record = shards[place.index]
            return ReadItem(place, self.transform(record, place) if self.transform else record)
        except (RecordError, TokenError) as error:
            return ReadItem(place, None, Skipped(shards.origin(place.index), error.reason, str(error)))


def _differences(here: list[dict[str, Any]], there: list[dict[str, Any]]) -> list[str]:
    if len(here) != len(there):
        return [f"{len(here)} data sets, {len(there)}"]
    return [
        f"data set {number}, {name}: {first.get(name)}, {second.get(name)}"
        for number, (first, second) in enumerate(zip(here, there, strict=True))
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]


def _unchanged(chunk: Any) -> Any:
    return chunk

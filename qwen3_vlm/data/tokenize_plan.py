"""How a manifest is cut into units of work, and what must be the same for two runs to write one data set.

A unit is up to `shard_records` consecutive lines of one split. Which lines those are stands in a file of three
numbers a line, so that neither the plan nor a unit grows with the manifest. `plan.json` holds all that the
bytes of the result depend on; how many workers there are, or of which kind, is not in it.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen3_vlm.data.manifest import ManifestLine
from qwen3_vlm.data.manifest_index import ManifestIndex, index_manifest, require_unchanged
from qwen3_vlm.data.shards import SPLITS, split_of
from qwen3_vlm.errors import ConfigError, DataError
from qwen3_vlm.storage import atomic_file, atomic_write_json, read_json

PLAN_NAME = "plan.json"
LINES_NAME = ".plan-lines"  # int64 (lines, 3): offset, line number, line that has the same id earlier or 0
LINE_COLUMNS = 3
PLAN_FORMAT = "qwen3_vlm.plan.v1"
MAX_SHARD_RECORDS = 100_000
MAX_UNITS = 1_000_000  # of a split: their numbers have six digits
DEFAULT_FRACTIONS = {"train": 0.98, "val": 0.01, "test": 0.01}
CHUNK_LINES = 100_000


@dataclass(frozen=True, slots=True)
class Unit:
    """Some lines of one split; they become one shard."""

    split: str
    number: int
    start: int  # first row in the file of lines
    records: int

    @property
    def name(self) -> str:
        """As the shard's files are called."""
        return f"{self.split}-{self.number:06d}"


@dataclass(frozen=True, slots=True)
class Plan:
    """All units of one data set. Cheap to send to a worker."""

    manifest: Path
    out: Path
    settings: Mapping[str, Any]  # JSON; what the result depends on
    counts: Mapping[str, int]  # lines of each split
    status: tuple[int, int]  # of the manifest's file

    @property
    def sha256(self) -> str:
        """Of the settings; every report carries it."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    @property
    def records(self) -> int:
        return sum(self.counts.values())

    @property
    def num_units(self) -> int:
        return sum(-(-count // self.settings["shard_records"]) for count in self.counts.values())

    def units(self) -> Iterator[Unit]:
        """Units in the order of splits and numbers."""
        size, start = int(self.settings["shard_records"]), 0
        for split, count in self.counts.items():
            for number, first in enumerate(range(0, count, size)):
                yield Unit(split, number, start + first, min(size, count - first))
            start += count

    def lines(self, unit: Unit) -> npt.NDArray[np.int64]:
        """(records, 3): offset, line number, earlier line with the same id or 0."""
        path = self.out / LINES_NAME
        count, offset = unit.records * LINE_COLUMNS, unit.start * LINE_COLUMNS * 8
        found = np.fromfile(path, dtype="<i8", count=count, offset=offset).reshape(-1, LINE_COLUMNS)
        if len(found) != unit.records:
            raise DataError(f"{path} is cut off; start the run again.")
        return found

    def require_manifest(self) -> None:
        """Look whether the manifest is still the file that was planned.

        Raises:
            DataError: it is not.
        """
        require_unchanged(self.manifest, self.status)


def make_plan(
    manifest: Path,
    out: Path,
    *,
    fractions: Mapping[str, float],
    shard_records: int,
    settings: Mapping[str, Any],
    begun: Mapping[str, Any] | None = None,
) -> Plan:
    """Read the manifest once and write the file of lines into `out`.

    Args:
        settings: what else the result depends on.
        begun: the settings that `out` was begun with, if it was.

    Raises:
        ConfigError: a number that can't be used.
        DataError: the manifest can't be read or holds nothing, the fractions are none, or `out` was begun with
            other settings.
    """
    if not 1 <= shard_records <= MAX_SHARD_RECORDS:
        raise ConfigError(f"shard_records is {shard_records}; it must be from 1 to {MAX_SHARD_RECORDS:,}.")
    complete = complete_fractions(fractions)
    splits = array("b")

    def note_split(line: ManifestLine) -> None:
        # A line without an id belongs somewhere too: its error must be counted once.
        splits.append(SPLITS.index(split_of(line.entry.id or f"\0{line.entry.line}", complete)))

    index = index_manifest(manifest, note_split)
    if not len(index):
        raise DataError(f"The manifest {manifest} holds no records.")
    kinds = np.frombuffer(splits, dtype=np.int8)
    counts = {split: int((kinds == number).sum()) for number, split in enumerate(SPLITS)}
    if max(counts.values()) > MAX_UNITS * shard_records:
        raise ConfigError(f"shard_records={shard_records} gives more than {MAX_UNITS:,} shards; make it larger.")
    about = {
        "format": PLAN_FORMAT,
        "manifest_sha256": index.sha256,
        "records": len(index),
        "fractions": complete,
        "shard_records": shard_records,
        **settings,
    }
    if begun is not None:
        require_same(out, differences(begun, about))
    _write_lines(out / LINES_NAME, index, kinds)
    return Plan(manifest.absolute(), out, about, counts, index.status)


def complete_fractions(fractions: Mapping[str, float]) -> dict[str, float]:
    """Shares of all three splits; what is not given of "train" is the rest.

    Raises:
        DataError: they are no shares of 1.
    """
    split_of("", fractions)
    val, test = (float(fractions.get(split, 0.0)) for split in ("val", "test"))
    return {"train": round(1.0 - val - test, 12), "val": val, "test": test}


def write_plan(plan: Plan) -> None:
    """Write `plan.json`: from now on the folder is this data set's."""
    atomic_write_json(plan.out / PLAN_NAME, dict(plan.settings))


def read_plan_settings(out: Path) -> dict[str, Any] | None:
    """What a folder was planned with, or None."""
    path = out / PLAN_NAME
    return read_json(path, error=DataError) if path.exists() else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A line per setting that is not the same."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: {_show(old)} before, {_show(new)} now")
    return found


def require_same(out: Path, lines: Sequence[str]) -> None:
    """Refuse a folder that was begun with other settings.

    Raises:
        DataError: with the lines that say what differs.
    """
    if lines:
        raise DataError(
            f"{out} was begun with other settings:\n  " + "\n  ".join(lines) + "\nGive another folder, or begin "
            "it anew with --restart, which removes the shards that are there."
        )


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _write_lines(path: Path, index: ManifestIndex, kinds: npt.NDArray[np.int8]) -> None:
    earlier = np.zeros(len(index), dtype=np.int64)
    for place, line, _ in index.duplicates():
        earlier[place] = line
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        for number in range(len(SPLITS)):
            places = np.flatnonzero(kinds == number)
            for start in range(0, len(places), CHUNK_LINES):
                chosen = places[start : start + CHUNK_LINES]
                columns = np.stack([index.offsets[chosen], index.lines[chosen], earlier[chosen]], axis=1)
                file.write(columns.astype("<i8").tobytes())

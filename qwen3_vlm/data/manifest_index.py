"""One pass over a manifest that remembers where its lines begin and which ids stand twice.

Kept in memory: 24 bytes a line, never an id. Two ids count as one only after both lines were read again and
compared, so that a collision of 64-bit hashes loses nothing.
"""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qwen3_vlm.data.manifest import BadLine, ManifestLine, open_manifest, read_line, read_manifest
from qwen3_vlm.errors import DataError

Visit = Callable[[ManifestLine], None]


@dataclass(frozen=True, slots=True)
class ManifestIndex:
    """Lines that are not blank, in their order; all arrays are (n,)."""

    path: Path
    sha256: str  # of the whole file
    offsets: npt.NDArray[np.int64]  # first byte of each line
    lines: npt.NDArray[np.int64]  # its number, counted from 1
    hashes: npt.NDArray[np.uint64]  # of its id
    status: tuple[int, int]  # size and time of change of the file, while it was read

    def __len__(self) -> int:
        return len(self.offsets)

    def require_unchanged(self) -> None:
        """Look whether the manifest is still the file that was read.

        Raises:
            DataError: it is not.
        """
        require_unchanged(self.path, self.status)

    def duplicates(self) -> Iterator[tuple[int, int, str]]:
        """Each record whose id an earlier record has: its place in the arrays, the earlier line, the id.

        Lines that are no records claim no id.
        """
        order = np.argsort(self.hashes, kind="stable")
        ordered = self.hashes[order]
        breaks = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
        starts = np.concatenate([[0], breaks])
        sizes = np.diff(np.concatenate([starts, [len(ordered)]]))
        with open_manifest(self.path) as file:
            for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
                first: dict[str, int] = {}
                for place in order[start : start + size].tolist():
                    line = int(self.lines[place])
                    entry = read_line(file, int(self.offsets[place]), line, self.path.name)
                    if isinstance(entry, BadLine):
                        continue
                    if entry.id in first:
                        yield place, first[entry.id], entry.id
                    first.setdefault(entry.id, line)


def index_manifest(path: str | Path, visit: Visit | None = None) -> ManifestIndex:
    """Read a manifest once; `visit` sees each line that is not blank.

    Raises:
        DataError: it can't be read, or changes meanwhile.
    """
    path = Path(path)
    offsets, lines, hashes = array("q"), array("q"), array("Q")
    digest = hashlib.sha256()
    open_manifest(path).close()  # says what it is if it is no manifest
    status = _status(path)
    for line in read_manifest(path, digest):
        offsets.append(line.offset)
        lines.append(line.entry.line)
        hashes.append(_hash(line.entry.id or f"\0{line.entry.line}"))
        if visit is not None:
            visit(line)
    require_unchanged(path, status)
    return ManifestIndex(
        path,
        digest.hexdigest(),
        np.frombuffer(offsets, dtype=np.int64),
        np.frombuffer(lines, dtype=np.int64),
        np.frombuffer(hashes, dtype=np.uint64),
        status,
    )


def require_unchanged(path: Path, status: tuple[int, int]) -> None:
    """Look whether size and time of change of a file are still `status`.

    Raises:
        DataError: they are not.
    """
    if _status(path) != status:
        raise DataError(f"The manifest {path} was changed while it was being read. Start again when it is complete.")


def _status(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as problem:
        raise DataError(f"The manifest {path} can't be read: {problem.strerror or problem}.") from problem
    return found.st_size, found.st_mtime_ns


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "little")

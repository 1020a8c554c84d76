"""Image–caption and conversation records from files in the formats that people have.

LLaVA JSON arrays, JSON Lines and WebDataset tars, mixed as one likes, become one sequence with
random access that holds no record in memory; see `records` for the schema. What cannot be used as
a file is a `DataError` when it is opened; what cannot be used as a record is a `RecordError` when it is asked for.
"""

import bisect
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, overload

from qwen3_vlm.data.json_files import JsonFile
from qwen3_vlm.data.records import CAPTION_PROMPT, IMAGE_MARK, ImageRef, Record, Turn
from qwen3_vlm.data.tar_files import TarFile
from qwen3_vlm.errors import DataError

__all__ = ["CAPTION_PROMPT", "IMAGE_MARK", "ImageRef", "Record", "Records", "Turn", "open_records"]

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
SUFFIXES = (*JSON_SUFFIXES, ".tar")
MAX_FILES = 100_000


class RecordFile(Protocol):
    """What every file format offers."""

    path: Path
    fingerprint: str  # of the content

    def __len__(self) -> int: ...

    def origin(self, index: int) -> str: ...

    def record(self, index: int) -> Record: ...


class Records(Sequence[Record]):
    """Records of several files, one after another. Cheap to send to worker processes.

    `records[i]` raises RecordError where this one can't be used, and goes on working for the others.
    """

    def __init__(self, files: Sequence[RecordFile]) -> None:
        self.files = list(files)
        self.ends = list(itertools.accumulate(len(file) for file in self.files))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        file, inner = self._locate(int(index))
        return file.record(inner)

    def origin(self, index: int) -> str:
        """Where a record stands, even one that can't be read."""
        file, inner = self._locate(index)
        return file.origin(inner)

    @property
    def fingerprint(self) -> str:
        """sha256 over the content of all files in their order."""
        return hashlib.sha256("\n".join(file.fingerprint for file in self.files).encode()).hexdigest()

    def _locate(self, index: int) -> tuple[RecordFile, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        number = bisect.bisect_right(self.ends, index)
        return self.files[number], index - (self.ends[number - 1] if number else 0)


def open_records(paths: Sequence[str], image_root: str | None = None, cache_dir: str | Path | None = None) -> Records:
    """Index record files: names, folders (their .json, .jsonl and .tar), globs and {000..009} ranges.

    `image_root` is what the picture paths inside JSON are relative to; None means each file's own folder.
    `cache_dir` keeps the indices of tars between runs.

    Raises:
        DataError: nothing matches, or a file is unreadable, damaged, empty or of an unknown kind.
    """
    if image_root is not None and not os.path.isdir(image_root):
        raise DataError(f"The image root {image_root} is not a folder.")
    files = [_open(path, image_root, cache_dir) for path in expand_paths(paths)]
    records = Records(files)
    if not len(records):
        raise DataError(f"There are no records in {', '.join(str(file.path) for file in files)}.")
    return records


def expand_paths(paths: Sequence[str]) -> list[Path]:
    """Files that the given names stand for, each once, globs and folders in sorted order."""
    found: dict[Path, None] = {}
    for path in itertools.chain.from_iterable(_expand_braces(path) for path in paths):
        for match in _matches(path):
            found[match] = None
    if not found:
        raise DataError("No record files were given.")
    return list(found)


def _matches(path: str) -> list[Path]:
    if os.path.isdir(path):
        matches = [entry for entry in sorted(Path(path).iterdir()) if entry.suffix.lower() in SUFFIXES]
        if not matches:
            raise DataError(f"The folder {path} holds no {', '.join(SUFFIXES)} file.")
        return matches
    if os.path.exists(path):
        return [Path(path)]
    matches = [Path(match) for match in sorted(glob.glob(path, recursive=True))]
    if not matches:
        raise DataError(f"There is no record file {path}.")
    return matches


def _expand_braces(path: str) -> list[str]:
    """WebDataset's shard-{000..011}.tar, as bash would expand it."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if match is None:
        return [path]
    first, last = match.group(1), match.group(2)
    if not 0 <= int(last) - int(first) < MAX_FILES:
        raise DataError(f"The range in {path} is empty or has more than {MAX_FILES:,} files.")
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    names = [path[: match.start()] + number + path[match.end() :] for number in numbers]
    return [expanded for name in names for expanded in _expand_braces(name)]


def _open(path: Path, image_root: str | None, cache_dir: str | Path | None) -> RecordFile:
    suffix = path.suffix.lower()
    if not path.is_file():
        raise DataError(f"The record file {path} is not a regular file.")
    if suffix in JSON_SUFFIXES:
        return JsonFile(path, image_root)
    if suffix == ".tar":
        return TarFile(path, None if cache_dir is None else Path(cache_dir))
    raise DataError(f"{path} is of an unknown kind; record files end in {', '.join(SUFFIXES)}.")

"""Tokenized data sets on disk: WebDataset tars with an index beside each, written once and read in place.

    OUT/  uti.yaml  token_space.json  token_space.sha256   what made the ids, and what they mean
          dataset.json           format, settings, hash of every other file: written last, so it is there = complete
          stats.json  tokenize_errors.jsonl                counts and lengths; what was left out, and why
          audit.json             checks and result, bound to the sha256 of dataset.json (by `data audit`)
    OUT/shards/
          {split}-{number:06d}.tar           {key}.json and {key}.npy per record, see `shard_format`
          {split}-{number:06d}.index.npy     int64 (records, 7): INDEX_COLUMNS, offsets of the contents in the tar
          {split}-{number:06d}.report.json   written last = this unit is done: counts, hashes, errors

A shard is a unit of work: consecutive manifest records of one split, bad ones counted, so that its
boundaries don't depend on errors. Which split a record belongs to is decided by the hash of its id alone. No
file holds a time, a host or an absolute path: the same manifest gives the same bytes, whoever does the work.

Reading never unpacks and never unpickles: the index is mapped, a record is one `pread`. A data set is
refused if its token space is another, or if it was not audited, failed, or was changed since.
"""

import collections
import contextlib
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from qwen3_vlm.data.shard_dataset import (
    AUDIT_NAME,
    SPLITS,
    DatasetFile,
    ShardEntry,
    ShardSummary,
    read_dataset,
    read_report,
    shard_path,
    split_of,
    write_dataset,
    write_report,
)
from qwen3_vlm.data.shard_format import (
    BLOCK_BYTES,
    INDEX_COLUMNS,
    MAX_JSON_BYTES,
    MAX_NPY_BYTES,
    TokenizedRecord,
    check_record,
    decode_record,
    encode_record,
    npy_bytes,
    padded,
    tar_member,
)
from qwen3_vlm.errors import DataError, RecordError
from qwen3_vlm.storage import atomic_file, atomic_write_bytes, read_json
from qwen3_vlm.tokenization.token_space import FILE_NAME, MODALITIES, TokenSpace

__all__ = [
    "SPLITS",
    "DatasetFile",
    "ShardEntry",
    "ShardSummary",
    "Shards",
    "TokenizedRecord",
    "check_record",
    "open_shards",
    "read_dataset",
    "read_report",
    "shard_path",
    "split_of",
    "write_dataset",
    "write_report",
    "write_shard",
]

TAR_RECORD_BYTES = 10_240  # tar pads its files to this
OPEN_FILES = 64

Index = npt.NDArray[np.int64]  # (records, 7)
OnError = Callable[[TokenizedRecord, RecordError], None]


# Writing ----------------------------------------------------------------------------------------------------


def write_shard(
    out: str | Path,
    split: str,
    number: int,
    records: Iterable[TokenizedRecord],
    token_space: TokenSpace,
    *,
    on_error: OnError | None = None,
) -> ShardSummary:
    """Write the tar and then the index, each complete or not at all; one record at a time is in memory.

    Args:
        on_error: is told of a record that can't be stored, which is then left out; None raises.

    Raises:
        RecordError: a record that can't be stored, where there is no `on_error`.
        StorageError: the disk can't be written.
    """
    tar_path = shard_path(out, split, number)
    rows: list[tuple[int, ...]] = []
    offset, digest = 0, hashlib.sha256()
    with atomic_file(tar_path) as temporary, open(temporary, "wb") as file:
        for record in records:
            try:
                contents = encode_record(record, token_space)
            except RecordError as error:
                if on_error is None:
                    raise
                on_error(record, error)
                continue
            rows.append(_row(record, offset, contents))
            for name, content in zip((f"{record.key}.json", f"{record.key}.npy"), contents, strict=True):
                member = tar_member(name, content)
                file.write(member)
                digest.update(member)
                offset += len(member)
        end = bytes(-(-(offset + 2 * BLOCK_BYTES) // TAR_RECORD_BYTES) * TAR_RECORD_BYTES - offset)
        file.write(end)
        digest.update(end)
    index = npy_bytes(np.array(rows, dtype="<i8").reshape(-1, len(INDEX_COLUMNS)))
    atomic_write_bytes(shard_path(out, split, number, "index.npy"), index)
    tokens: dict[str, int] = {
        modality: sum(row[4 + column] for row in rows) for column, modality in enumerate(MODALITIES)
    }
    return ShardSummary(
        split, number, len(rows), tokens, offset + len(end), digest.hexdigest(), hashlib.sha256(index).hexdigest()
    )


def _row(record: TokenizedRecord, offset: int, contents: tuple[bytes, bytes]) -> tuple[int, ...]:
    json_size, npy_size = (len(content) for content in contents)
    json_offset = offset + BLOCK_BYTES
    npy_offset = json_offset + padded(json_size) + BLOCK_BYTES
    return json_offset, json_size, npy_offset, npy_size, *(record.length(modality) for modality in MODALITIES)


# Reading ----------------------------------------------------------------------------------------------------


def open_shards(
    folder: str | Path,
    token_space: TokenSpace | None = None,
    *,
    split: str = "train",
    allow_unaudited: Collection[str] = (),
    verify: bool = True,
) -> "Shards":
    """Open one split of a tokenized data set.

    Args:
        token_space: the one that the ids will be used with; None takes the data set's own.
        allow_unaudited: names of folders that may be used without a passing audit, or changed since.
        verify: hash the tars (about a second per GB); false leaves them to the checks of each record's ids.

    Raises:
        TokenSpaceError: it has another token space, with a line per difference.
        DataError: it is incomplete, damaged, has no such split, or has no passing audit of what is there now.
    """
    folder = Path(folder)
    dataset = read_dataset(folder)
    space = TokenSpace.load(folder)
    if token_space is not None:
        token_space.require_same(space, f"The data set {folder}")
    if space.sha256 != dataset.token_space_sha256:
        raise DataError(f"{folder / FILE_NAME} is not the token space that {folder / 'dataset.json'} was made with.")
    if split not in dataset.splits:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(dataset.splits) or 'none'}.")
    name = folder.name or folder.resolve().name
    if name not in allow_unaudited:
        _require_audit(dataset)
        changed = dataset.changed_files(splits=(split,), tars=verify)
        if changed:
            raise DataError(
                f"{folder} was changed since its audit:\n  " + "\n  ".join(changed[:20]) + "\nTokenize it again, "
                f"or name {name!r} in allow_unaudited."
            )
    return Shards(dataset, space, split)


def _require_audit(dataset: DatasetFile) -> None:
    path, advice = dataset.folder / AUDIT_NAME, f"Run `qwen3-vlm data audit {dataset.folder}`"
    if not path.is_file():
        raise DataError(f"{dataset.folder} was never audited. {advice}, or name it in allow_unaudited.")
    audit = read_json(path, error=DataError)
    if audit.get("dataset_sha256") != dataset.sha256:
        raise DataError(f"{path} is the audit of another dataset.json than the one beside it. {advice} again.")
    if audit.get("passed") is not True:
        raise DataError(f"{dataset.folder} failed its audit, see {path}. {advice} again when it is mended.")


class Shards(Sequence[TokenizedRecord]):
    """The records of one split, by number: shard after shard, in the order of the manifest.

    Costs 56 bytes of mapped memory per record. May be pickled and forked; every process opens the files itself.
    """

    def __init__(self, dataset: DatasetFile, token_space: TokenSpace, split: str) -> None:
        """Map and check the indices.

        Raises:
            DataError: an index is damaged or does not fit its tar.
        """
        self.folder, self.split, self.token_space = dataset.folder, split, token_space
        self.dataset_sha256 = dataset.sha256
        self.entries = dataset.splits[split]
        self.ends = np.cumsum([entry.records for entry in self.entries], dtype=np.int64)
        self._open()

    def _open(self) -> None:
        self._files = _OpenFiles()
        self._indices = [map_index(self.folder, entry) for entry in self.entries]

    def tar_path(self, shard: int) -> Path:
        """The tar of one shard."""
        return self.folder / "shards" / f"{self.entries[shard].name}.tar"

    def index_rows(self, shard: int) -> Index:
        """The mapped index of one shard, see INDEX_COLUMNS."""
        return self._indices[shard]

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @overload
    def __getitem__(self, index: int) -> TokenizedRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedRecord]: ...
    def __getitem__(self, index: int | slice) -> TokenizedRecord | list[TokenizedRecord]:
        """Read and check one record.

        Raises:
            RecordError: this one record is damaged; names the shard and the place, with a countable reason.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        shard, row = self.locate(index)
        path, numbers = self.tar_path(shard), self._indices[shard][row]
        start = int(numbers[0]) - BLOCK_BYTES
        try:
            block = self._files.read(path, start, int(numbers[2] + numbers[3]) - start)
        except OSError as error:
            raise RecordError(f"{path} can't be read: {error.strerror or error}.", "unreadable_shard") from error
        return decode_record(block, numbers, self.token_space, str(path))

    def __iter__(self) -> Iterator[TokenizedRecord]:
        return (self[number] for number in range(len(self)))

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the shard that a record is in, and its row there."""
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"There is no record {index} among {len(self):,}.")
        shard = int(np.searchsorted(self.ends, number, side="right"))
        return shard, number - (int(self.ends[shard - 1]) if shard else 0)

    def origin(self, index: int) -> str:
        """Where a record stands, for messages; reads nothing."""
        shard, row = self.locate(index)
        return f"{self.tar_path(shard)}[{row}]"

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(records, 3): ids of text, image and audio, from the indices alone."""
        parts = [np.asarray(index[:, 4:]) for index in self._indices]
        return np.concatenate([np.empty((0, len(MODALITIES)), dtype=np.int64), *parts])

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this data from any other, as JSON."""
        return {"dataset_sha256": self.dataset_sha256, "split": self.split, "records": len(self)}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_files", "_indices")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()


def map_index(folder: Path, entry: ShardEntry) -> Index:
    """A shard's index, mapped (not read into memory), after a check that it can be one.

    Raises:
        DataError: it is missing or damaged.
    """
    path = folder / "shards" / f"{entry.name}.index.npy"
    try:
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("another version of the format")
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
            start, size = file.tell(), os.fstat(file.fileno()).st_size
        if dtype != np.dtype("<i8") or is_fortran or shape != (entry.records, len(INDEX_COLUMNS)):
            raise ValueError(f"{dtype} {shape}; int64 ({entry.records}, {len(INDEX_COLUMNS)}) is needed")
        if size != start + entry.records * len(INDEX_COLUMNS) * 8:
            raise ValueError(f"{size:,} bytes")
        empty = not entry.records  # nothing can't be mapped
        index = np.empty(shape, "<i8") if empty else np.memmap(path, "<i8", "r", start, (entry.records, shape[1]))
    except OSError as error:
        raise DataError(f"{error.filename or path} can't be read: {error.strerror or error}.") from error
    except Exception as error:  # a hostile header makes numpy's parser raise nearly anything
        raise DataError(f"{path} is no index of {entry.name}.tar: {' '.join(str(error).split())[:200]}.") from error
    _check_index(index, path)
    return index


def _check_index(index: Index, path: Path) -> None:
    """Every member begins where the last one ends, and is of a size that is read."""
    if not len(index):
        return
    json_offset, json_size, npy_offset, npy_size = (np.asarray(index[:, column]) for column in range(4))
    sizes = np.stack([json_size, npy_size])
    fits = sizes.min() > 0 and json_size.max() <= MAX_JSON_BYTES and npy_size.max() <= MAX_NPY_BYTES
    fits = bool(fits) and int(index[:, 4:].min()) >= 0
    blocks = -(-sizes // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES
    starts = np.concatenate([[0], np.cumsum(blocks.sum(axis=0))])
    fits = fits and np.array_equal(json_offset, starts[:-1] + BLOCK_BYTES)
    fits = fits and np.array_equal(npy_offset, json_offset + blocks[0])
    if not fits:
        raise DataError(f"{path} is damaged: its members do not follow one another.")


class _OpenFiles:
    """A few open descriptors of this process; `pread` has no position that a fork could share."""

    def __init__(self) -> None:
        self._descriptors: collections.OrderedDict[Path, int] = collections.OrderedDict()

    def read(self, path: Path, start: int, size: int) -> bytes:
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            descriptor = self._descriptors[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            if len(self._descriptors) > OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(path)
        return os.pread(descriptor, size, start)

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)

"""Which records are held out, by hash of their id and evenly over answer lengths.

A record's side depends on its id and the seed, never on the order of records, so shuffling a file or
adding workers changes nothing. Records that share an id (LLaVA-Instruct has several conversations per
picture) stay on one side together.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen3_vlm.data.encode import LengthTable
from qwen3_vlm.errors import DataError
from qwen3_vlm.storage import atomic_write_json, read_json

BUCKETS: tuple[tuple[int, int | None], ...] = ((0, 10), (11, 20), (21, None))  # answer tokens, both ends included
BUCKET_NAMES = ("le10", "11_20", "ge21")
SPLIT_FORMAT = 1
MAX_SPLIT_BYTES = 500_000_000

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Split:
    """Two disjoint sets of record indices, each in ascending order."""

    train_indices: Indices
    eval_indices: Indices


def bucket_of(answer_tokens: int) -> int:
    """Which of BUCKETS an answer of so many tokens belongs to."""
    return next(number for number, (_, last) in enumerate(BUCKETS) if last is None or answer_tokens <= last)


def split_records(
    record_ids: Sequence[str],
    answer_lengths: Sequence[int] | npt.NDArray[np.int32],
    fraction: float,
    maximum: int,
    seed: int,
) -> Split:
    """Hold out `fraction` of the records, `maximum` at most, each length bucket in proportion.

    At least one record is held out and one is left to train on.

    Raises:
        DataError: the records have fewer than two different ids.
    """
    groups = _groups(record_ids)
    if len(groups) < 2:
        raise DataError(f"{len(record_ids)} usable records with {len(groups)} different ids can't be split in two.")
    wanted = max(1, min(maximum, round(fraction * len(record_ids))))
    ranked = sorted(groups, key=lambda name: _rank(name, seed))
    strata: list[list[str]] = [[] for _ in BUCKETS]
    for name in ranked:
        strata[bucket_of(min(int(answer_lengths[index]) for index in groups[name]))].append(name)
    sizes = [sum(len(groups[name]) for name in names) for names in strata]
    held_out: list[int] = []
    for names, quota in zip(strata, proportional_quotas(sizes, wanted), strict=True):
        held_out += _fill([groups[name] for name in names], quota)
    if not held_out:  # every group is larger than its quota
        held_out = groups[min(ranked, key=lambda name: len(groups[name]))]
    held_out = held_out if len(held_out) < len(record_ids) else groups[ranked[0]]
    mask = np.zeros(len(record_ids), dtype=bool)
    mask[held_out] = True
    return Split(np.flatnonzero(~mask), np.flatnonzero(mask))


def split_table(table: LengthTable, fraction: float, maximum: int, seed: int) -> Split:
    """Split the usable records of a table; the indices are those of the records."""
    usable = table.usable
    ids = [table.ids[index] for index in usable]
    split = split_records(ids, table.answer_tokens[usable], fraction, maximum, seed)
    return Split(usable[split.train_indices], usable[split.eval_indices])


def pick_stratified(
    indices: Sequence[int] | Indices,
    record_ids: Sequence[str],
    answer_lengths: Sequence[int] | npt.NDArray[np.int32],
    count: int,
    seed: int,
    balanced: bool = False,
) -> list[int]:
    """A fixed subset of `indices` for quick evaluations and golden sets, in ascending order.

    `record_ids` and `answer_lengths` are indexed by the members of `indices`. Buckets are represented in
    proportion or, when `balanced`, alike as far as they reach.
    """
    strata: list[list[int]] = [[] for _ in BUCKETS]
    for index in sorted((int(index) for index in indices), key=lambda index: (_rank(record_ids[index], seed), index)):
        strata[bucket_of(int(answer_lengths[index]))].append(index)
    sizes = [len(stratum) for stratum in strata]
    quotas = balanced_quotas(sizes, count) if balanced else proportional_quotas(sizes, count)
    return sorted(index for stratum, quota in zip(strata, quotas, strict=True) for index in stratum[:quota])


def proportional_quotas(sizes: Sequence[int], count: int) -> list[int]:
    """Share `count` out in proportion to `sizes`, by largest remainders; a bucket that would get none comes first."""
    total = sum(sizes)
    shares = [divmod(min(count, total) * size, max(1, total)) for size in sizes]
    quotas = [whole for whole, _ in shares]
    by_need = sorted(range(len(sizes)), key=lambda number: (quotas[number] > 0, -shares[number][1], number))
    candidates = [number for number in by_need if shares[number][1]]
    for number in candidates[: min(count, total) - sum(quotas)]:
        quotas[number] += 1
    return quotas


def balanced_quotas(sizes: Sequence[int], count: int) -> list[int]:
    """Share `count` out evenly, the smallest bucket first; what it lacks goes to the others."""
    quotas = [0] * len(sizes)
    by_size = sorted(range(len(sizes)), key=lambda number: (sizes[number], number))
    for position, number in enumerate(by_size):
        quotas[number] = min(sizes[number], (count - sum(quotas)) // (len(sizes) - position))
    return quotas


def save_split(
    path: str | Path,
    split: Split,
    record_ids: Sequence[str],
    answer_lengths: Sequence[int] | npt.NDArray[np.int32],
    **about: Any,
) -> None:
    """Persist the held-out ids, with a digest of the training ids; `about` (seed, fingerprint …) is kept beside them.

    Raises:
        StorageError: the file could not be written; none is left.
    """
    tree = {
        "format": SPLIT_FORMAT,
        **about,
        "train": _description(split.train_indices, record_ids, answer_lengths),
        "eval": _description(split.eval_indices, record_ids, answer_lengths),
        "eval_ids": sorted({record_ids[index] for index in split.eval_indices}),
    }
    atomic_write_json(path, tree, indent=1)


def load_split(path: str | Path, record_ids: Sequence[str]) -> Split:
    """The persisted split of the same records, in whatever order they now are. Ids "" are on neither side.

    Raises:
        DataError: the file can't be read, or was made from other records.
    """
    tree = read_json(path, error=DataError, max_bytes=MAX_SPLIT_BYTES)
    try:
        eval_ids = frozenset(str(name) for name in tree["eval_ids"])
        expected = [str(tree[side]["ids_sha256"]) for side in ("train", "eval")]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is no split file: {error} is missing or of the wrong kind.") from error
    held_out = np.array([name in eval_ids for name in record_ids], dtype=bool)
    known = np.array([bool(name) for name in record_ids], dtype=bool)
    split = Split(np.flatnonzero(known & ~held_out), np.flatnonzero(known & held_out))
    found = [_digest(record_ids[index] for index in side) for side in (split.train_indices, split.eval_indices)]
    if found != expected:
        raise DataError(f"{path} was made from other records than these. Use another output_dir, or remove it.")
    return split


def _groups(record_ids: Sequence[str]) -> Mapping[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(record_ids):
        groups.setdefault(name, []).append(index)
    return groups


def _fill(groups: Sequence[list[int]], quota: int) -> list[int]:
    """Whole groups in their order, leaving out those that would exceed the quota."""
    chosen: list[int] = []
    for group in groups:
        if len(chosen) + len(group) <= quota:
            chosen += group
    return chosen


def _rank(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()


def _description(
    side: Indices, record_ids: Sequence[str], answer_lengths: Sequence[int] | npt.NDArray[np.int32]
) -> dict[str, Any]:
    buckets = dict.fromkeys(BUCKET_NAMES, 0)
    for index in side:
        buckets[BUCKET_NAMES[bucket_of(int(answer_lengths[index]))]] += 1
    return {"records": len(side), "buckets": buckets, "ids_sha256": _digest(record_ids[index] for index in side)}


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()

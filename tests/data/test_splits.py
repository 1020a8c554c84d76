"""Splits depend on ids alone, hold out each length bucket in proportion, and can be read back."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.data.captions import open_records
from qwen3_vlm.data.encode import SampleEncoder, lengths
from qwen3_vlm.data.splits import (
    balanced_quotas,
    bucket_of,
    load_split,
    pick_stratified,
    proportional_quotas,
    save_split,
    split_records,
    split_table,
)
from qwen3_vlm.errors import DataError, StorageError
from tests.data.helpers import WordProcessor, caption_records, write_json

IDS = [f"id-{number}" for number in range(1000)]
LENGTHS = [(5, 15, 15, 30)[number % 4] for number in range(1000)]  # a quarter, a half, a quarter


def test_bucket_borders() -> None:
    assert [bucket_of(tokens) for tokens in (0, 10, 11, 20, 21, 10_000)] == [0, 0, 1, 1, 2, 2]


def test_buckets_are_held_out_in_proportion() -> None:
    split = split_records(IDS, LENGTHS, fraction=0.1, maximum=2000, seed=0)
    assert len(split.eval_indices) == 100
    buckets = [bucket_of(LENGTHS[index]) for index in split.eval_indices]
    assert [buckets.count(number) for number in range(3)] == [25, 50, 25]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from("abcdefghij"), st.integers(0, 40)), min_size=2, max_size=40),
    st.floats(0.01, 0.9),
    st.integers(1, 20),
    st.integers(0, 5),
)
def test_sides_are_disjoint_complete_and_share_no_id(
    rows: list[tuple[str, int]], fraction: float, maximum: int, seed: int
) -> None:
    ids = [name for name, _ in rows]
    if len(set(ids)) < 2:
        return
    split = split_records(ids, [length for _, length in rows], fraction, maximum, seed)
    train, held_out = split.train_indices.tolist(), split.eval_indices.tolist()
    assert sorted(train + held_out) == list(range(len(rows)))
    assert train
    assert held_out
    assert not {ids[index] for index in train} & {ids[index] for index in held_out}


def test_order_does_not_matter() -> None:
    order = list(range(1000))
    random.Random(3).shuffle(order)
    straight = split_records(IDS, LENGTHS, 0.05, 2000, seed=1)
    shuffled = split_records([IDS[n] for n in order], [LENGTHS[n] for n in order], 0.05, 2000, seed=1)
    assert {IDS[n] for n in straight.eval_indices} == {IDS[order[n]] for n in shuffled.eval_indices}


def test_seed_matters_and_maximum_holds() -> None:
    sides = [set(split_records(IDS, LENGTHS, 0.5, 40, seed=seed).eval_indices.tolist()) for seed in range(3)]
    assert [len(side) for side in sides] == [40, 40, 40]
    assert sides[0] != sides[1] != sides[2]


def test_adding_records_moves_few_others() -> None:
    """Ranks are by hash, so held-out records mostly stay held out when a data set grows."""
    before = split_records(IDS[:900], LENGTHS[:900], 0.1, 2000, seed=0)
    after = split_records(IDS, LENGTHS, 0.1, 2000, seed=0)
    kept = set(before.eval_indices.tolist()) & set(after.eval_indices.tolist())
    assert len(kept) > 0.8 * len(before.eval_indices)


def test_records_of_one_id_stay_together() -> None:
    ids = [f"image-{number // 4}" for number in range(1000)]
    split = split_records(ids, LENGTHS, 0.1, 2000, seed=0)
    assert 90 <= len(split.eval_indices) <= 100
    assert not {ids[n] for n in split.train_indices} & {ids[n] for n in split.eval_indices}


@pytest.mark.parametrize("ids", [[], ["a"], ["a", "a"]])
def test_too_few_ids_are_refused(ids: list[str]) -> None:
    with pytest.raises(DataError, match="can't be split"):
        split_records(ids, [5] * len(ids), 0.1, 10, seed=0)


@pytest.mark.parametrize(
    ("sizes", "count", "proportional", "balanced"),
    [
        ([25, 50, 25], 20, [5, 10, 5], [7, 6, 7]),
        ([1, 98, 1], 10, [1, 8, 1], [1, 8, 1]),
        ([0, 5, 5], 64, [0, 5, 5], [0, 5, 5]),
        ([100, 3, 100], 64, [31, 2, 31], [30, 3, 31]),
        ([0, 0, 0], 5, [0, 0, 0], [0, 0, 0]),
    ],
)
def test_quotas(sizes: list[int], count: int, proportional: list[int], balanced: list[int]) -> None:
    for quotas, expected in (
        (proportional_quotas(sizes, count), proportional),
        (balanced_quotas(sizes, count), balanced),
    ):
        assert sum(quotas) == sum(expected)
        assert all(quota <= size for quota, size in zip(quotas, sizes, strict=True))
        assert all(abs(quota - wanted) <= 1 for quota, wanted in zip(quotas, expected, strict=True))


@given(st.lists(st.integers(0, 50), min_size=3, max_size=3), st.integers(0, 200))
def test_quotas_hand_out_all_there_is(sizes: list[int], count: int) -> None:
    for quotas in (proportional_quotas(sizes, count), balanced_quotas(sizes, count)):
        assert sum(quotas) == min(count, sum(sizes))
        assert all(0 <= quota <= size for quota, size in zip(quotas, sizes, strict=True))


def test_stratified_picks() -> None:
    indices = list(range(0, 1000, 2))  # lengths 5 and 15 alone
    quick = pick_stratified(indices, IDS, LENGTHS, 50, seed=0)
    golden = pick_stratified(range(1000), IDS, LENGTHS, 60, seed=0, balanced=True)
    assert quick == sorted(set(quick) & set(indices))
    assert len(quick) == 50
    assert [sum(bucket_of(LENGTHS[n]) == bucket for n in golden) for bucket in range(3)] == [20, 20, 20]
    assert golden == pick_stratified(reversed(range(1000)), IDS, LENGTHS, 60, seed=0, balanced=True)
    assert pick_stratified(indices[:3], IDS, LENGTHS, 50, seed=0) == [0, 2, 4]


def test_unusable_records_are_on_neither_side(tmp_path: Path) -> None:
    trees = caption_records(60)
    trees[5]["conversations"][1]["value"] = " "
    records = open_records([str(write_json(tmp_path / "a.json", trees))])
    table = lengths(records, SampleEncoder(WordProcessor(), 30))
    split = split_table(table, 0.2, 100, seed=0)
    both = sorted([*split.train_indices.tolist(), *split.eval_indices.tolist()])
    assert both == table.usable.tolist()
    assert 5 not in both


def test_saved_splits_read_back_in_any_order(tmp_path: Path) -> None:
    split = split_records(IDS, LENGTHS, 0.1, 2000, seed=0)
    path = tmp_path / "run" / "split.json"
    save_split(path, split, IDS, LENGTHS, seed=0)
    again = load_split(path, IDS)
    np.testing.assert_array_equal(again.train_indices, split.train_indices)
    np.testing.assert_array_equal(again.eval_indices, split.eval_indices)
    backwards = load_split(path, IDS[::-1])
    assert {IDS[::-1][n] for n in backwards.eval_indices} == {IDS[n] for n in split.eval_indices}
    tree = json.loads(path.read_text())
    assert tree["seed"] == 0
    assert tree["eval"]["buckets"] == {"le10": 25, "11_20": 50, "ge21": 25}
    assert len(tree["eval_ids"]) == 100


def test_splits_of_other_records_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    save_split(path, split_records(IDS, LENGTHS, 0.1, 2000, seed=0), IDS, LENGTHS)
    for others in (IDS[:-1], [*IDS, "new"], IDS[:500]):
        with pytest.raises(DataError, match="made from other records"):
            load_split(path, others)
    for text in ("{}", "[]", "{", '{"eval_ids": 3, "train": {}, "eval": {}}'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"split\.json"):
            load_split(path, IDS)
    with pytest.raises(DataError):
        load_split(tmp_path / "missing.json", IDS)


def test_a_split_that_can_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        save_split(tmp_path / "file" / "split.json", split_records(IDS, LENGTHS, 0.1, 9, seed=0), IDS, LENGTHS)

"""Plans: every sample exactly once, no row too long, pure functions of their arguments, and quick."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.data.plan import MicroBatch, fill_rate, plan_epoch
from qwen3_vlm.errors import DataError

LENGTHS = st.lists(st.integers(1, 64), max_size=200)


def samples(plan: list[MicroBatch]) -> list[int]:
    return [sample for batch in plan for row in batch for sample in row]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(64, 130), st.booleans(), st.integers(0, 3), st.integers(0, 3))
def test_every_sample_once_and_no_row_too_long(
    lengths: list[int], batch_size: int, max_seq_len: int, packing: bool, seed: int, epoch: int
) -> None:
    options = {"batch_size": batch_size, "max_seq_len": max_seq_len, "packing": packing, "seed": seed, "epoch": epoch}
    plan = plan_epoch(lengths, **options)
    assert sorted(samples(plan)) == list(range(len(lengths)))
    assert all(sum(lengths[sample] for sample in row) <= max_seq_len for batch in plan for row in batch)
    assert all(1 <= len(batch) <= batch_size for batch in plan)
    assert all(row for batch in plan for row in batch)
    if not packing:
        assert all(len(row) == 1 for batch in plan for row in batch)
    assert plan == plan_epoch(np.array(lengths, dtype=np.int32), **options)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_is_never_worse_than_leaving_rows_half_empty(lengths: list[int]) -> None:
    """At most one row can be half empty or emptier: two of them would have been joined."""
    plan = plan_epoch(lengths, batch_size=1, max_seq_len=20, packing=True, seed=0, epoch=0)
    fills = sorted(sum(lengths[sample] for sample in row) for batch in plan for row in batch)
    assert all(fill > 10 for fill in fills[1:])


@pytest.mark.parametrize("packing", [True, False])
def test_indices_rename_samples_and_change_nothing_else(packing: bool) -> None:
    lengths = [5, 9, 3, 7, 8, 2]
    names = [40, 10, 77, 3, 21, 60]
    options = {"batch_size": 2, "max_seq_len": 16, "packing": packing, "seed": 1, "epoch": 2}
    plain = plan_epoch(lengths, **options)
    renamed = plan_epoch(lengths, indices=names, **options)
    assert renamed == [tuple(tuple(names[sample] for sample in row) for row in batch) for batch in plain]


@pytest.mark.parametrize("packing", [True, False])
def test_epochs_and_seeds_differ(packing: bool) -> None:
    lengths = list(np.random.default_rng(0).integers(5, 60, 300))
    plans = [
        plan_epoch(lengths, batch_size=4, max_seq_len=64, packing=packing, seed=seed, epoch=epoch)
        for seed, epoch in itertools.product((0, 1), (0, 1))
    ]
    assert all(one != other for one, other in itertools.combinations(plans, 2))


def test_no_samples_no_batches() -> None:
    for packing in (True, False):
        assert plan_epoch([], batch_size=4, max_seq_len=64, packing=packing, seed=0, epoch=0) == []


@pytest.mark.parametrize("lengths", [[3, 0], [65], [-1]])
def test_impossible_lengths_are_refused(lengths: list[int]) -> None:
    with pytest.raises(DataError, match=r"1…64"):
        plan_epoch(lengths, batch_size=4, max_seq_len=64, packing=True, seed=0, epoch=0)


def test_padding_groups_similar_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 513, 4000)
    plan = plan_epoch(lengths, batch_size=8, max_seq_len=512, packing=False, seed=0, epoch=0)
    padded = sum(len(batch) * max(lengths[row[0]] for row in batch) for batch in plan)
    assert lengths.sum() / padded > 0.95  # in random batches of eight it would be 0.56
    means = [float(np.mean([lengths[row[0]] for row in batch])) for batch in plan]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.15  # batches come in no order of length


def llava_like(count: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.int32]]":
    """64 image tokens, a question, and a caption of 10 to 60 tokens, as in LLaVA-Pretrain."""
    return np.clip(84 + np.random.default_rng(0).gamma(2, 10, count), 66, 512).astype(np.int32)


def test_half_a_million_captions_are_packed_full_and_quickly() -> None:
    lengths = llava_like(558_000)
    start = time.process_time()
    plan = plan_epoch(lengths, batch_size=4, max_seq_len=512, packing=True, seed=0, epoch=0)
    assert time.process_time() - start < 10
    assert fill_rate(plan, lengths, 512) > 0.98


@pytest.mark.parametrize(
    ("lengths", "max_seq_len"),
    [
        (np.random.default_rng(1).integers(1, 513, 20_000), 512),
        (np.clip(200 + np.random.default_rng(2).gamma(1, 400, 20_000), 66, 2048).astype(np.int32), 2048),
        (llava_like(2_000), 512),
    ],
)
def test_other_length_mixes_are_packed_full(
    lengths: "np.ndarray[tuple[int, ...], np.dtype[np.int32]]", max_seq_len: int
) -> None:
    plan = plan_epoch(lengths, batch_size=4, max_seq_len=max_seq_len, packing=True, seed=0, epoch=0)
    assert fill_rate(plan, lengths, max_seq_len) > 0.95


def test_packed_rows_are_random_in_length() -> None:
    """What fills rows well must not put all the long samples at one end of the epoch."""
    lengths = llava_like(20_000)
    plan = plan_epoch(lengths, batch_size=4, max_seq_len=512, packing=True, seed=0, epoch=0)
    means = [float(np.mean([lengths[sample] for row in batch for sample in row])) for batch in plan]
    halves = np.array_split(means, 2)
    assert abs(halves[0].mean() - halves[1].mean()) < 1.5

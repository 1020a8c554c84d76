"""Every record once, in an order that nothing but seed and epoch decides, whoever reads and wherever it stops."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.data.shard_reader import EpochOrder, Place, ShardReader
from qwen3_vlm.data.shards import Shards, TokenizedRecord, open_shards, shard_path
from qwen3_vlm.data.shuffle import Permutation
from qwen3_vlm.errors import DataError, RecordError, TokenError
from tests.data.tiny_shards import tiny_space, write_tiny

SPACE = tiny_space()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return open_shards(write_tiny(tmp_path_factory.mktemp("reader") / "data", SPACE, count=140), SPACE)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return open_shards(write_tiny(tmp_path_factory.mktemp("few") / "few", SPACE, count=4), SPACE)


class FakeShards(Shards):
    """As many records as are asked for, without files."""

    def __init__(self, count: int, name: str = "fake") -> None:
        self.folder, self.split, self.count = Path(name), "train", count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        return index

    @property
    def identity(self) -> dict[str, Any]:
        return {"dataset_sha256": str(self.folder), "split": "train", "records": self.count}


def indices(reader: ShardReader) -> list[int]:
    return [item.place.index for item in reader]


# The permutation --------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.text(max_size=8))
def test_a_permutation_is_one(size: int, key: str) -> None:
    assert sorted(Permutation(size, key)(np.arange(size)).tolist()) == list(range(size))


@given(st.integers(1, 2**40), st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=50, unique=True))
def test_any_position_of_a_huge_one(size: int, positions: list[int]) -> None:
    wanted = sorted({position % size for position in positions})
    found = Permutation(size, "k")(wanted)
    assert len(set(found.tolist())) == len(wanted)
    assert 0 <= found.min() <= found.max() < size
    assert [int(Permutation(size, "k")(position)[0]) for position in wanted] == found.tolist()


def test_the_order_is_the_same_on_every_machine() -> None:
    """By plain Python integers, as the docstring describes it."""
    import hashlib

    def by_hand(position: int, size: int, key: str) -> int:
        digest = hashlib.shake_256(key.encode()).digest(128)
        keys = [int.from_bytes(digest[8 * k : 8 * k + 8], "little") for k in range(16)]
        a = math.isqrt(size - 1) + 1
        b = math.ceil(size / a)
        while True:
            left, right = divmod(position, b)
            for number in range(16):
                z = ((left if number % 2 else right) + keys[number]) % 2**64
                z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
                z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
                z ^= z >> 31
                if number % 2:
                    right = (right + z) % b
                else:
                    left = (left + z) % a
            position = left * b + right
            if position < size:
                return position

    for size in (1, 2, 3, 7, 100, 1013):
        assert Permutation(size, "a/b")(np.arange(size)).tolist() == [by_hand(p, size, "a/b") for p in range(size)]


def test_a_position_that_is_not_there() -> None:
    with pytest.raises(IndexError, match="not below 5"):
        Permutation(5, "")([5])


@pytest.mark.parametrize("size", [3, 4, 5])
def test_small_permutations_are_all_reached_alike(size: int) -> None:
    """Chi-squared over all orders, from many keys; the bound is exceeded once in 10⁵ times by a true shuffle."""
    keys = 600 * size
    counts = Counter(tuple(Permutation(size, f"{number}")(np.arange(size)).tolist()) for number in range(keys))
    kinds = math.factorial(size)
    expected = keys / kinds
    chi_squared = sum((counts[order] - expected) ** 2 / expected for order in itertools.permutations(range(size)))
    freedom = kinds - 1
    assert len(counts) == kinds
    assert chi_squared < freedom + 4.3 * math.sqrt(2 * freedom) + 12


@pytest.mark.parametrize("size", [1000, 10_007, 65_536])
def test_no_obvious_correlation(size: int) -> None:
    orders = [Permutation(size, f"0/{epoch}")(np.arange(size)) for epoch in range(12)]
    limit = 4.5 / math.sqrt(size)
    for order, following in itertools.pairwise(orders):
        assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < limit  # with the order on disk
        assert abs(np.corrcoef(order, following)[0, 1]) < limit  # with the next epoch
        for lag in (1, 2, 3, 16, 64):
            assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < limit  # with itself
    neighbours = np.mean([np.mean(np.abs(np.diff(order)) == 1) for order in orders])
    assert neighbours < 2 / size + 5 * math.sqrt(2 / size / (12 * size))  # as many as chance would leave together
    grid = np.histogram2d(np.tile(np.arange(size), 12), np.concatenate(orders), bins=16)[0]
    expected = 12 * size / 256
    chi_squared = float(((grid - expected) ** 2 / expected).sum())
    assert chi_squared < 225 + 4.5 * math.sqrt(2 * 225)  # (16 − 1)² degrees of freedom


# Coverage ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 99), st.integers(0, 3), st.booleans())
def test_every_record_once_before_any_comes_again(
    count: int, world_size: int, seed: int, epoch: int, shuffle: bool
) -> None:
    readers = [
        ShardReader(FakeShards(count), seed=seed, rank=rank, world_size=world_size, shuffle=shuffle)
        for rank in range(world_size)
    ]
    for reader in readers:
        reader.seek(epoch)
    lengths = {len(reader) for reader in readers}
    turns = [list(reader) for reader in readers]
    assert lengths == {math.ceil(count / world_size)} == {len(turn) for turn in turns}
    stream = [item for round_ in zip(*turns, strict=True) for item in round_]
    assert [item.place.position for item in stream] == list(range(len(stream)))
    first = [item.place.index for item in stream]
    assert sorted(first[:count]) == list(range(count))
    assert first[count:] == [first[number % count] for number in range(len(first) - count)]
    assert {(reader.epoch, reader.position) for reader in readers} == {(epoch + 1, 0)}


def test_seeds_and_epochs_differ() -> None:
    orders = set()
    for seed in range(4):
        reader = ShardReader(FakeShards(50), seed=seed)
        orders |= {tuple(indices(reader)) for _ in range(4)}
    assert len(orders) == 16
    assert indices(ShardReader(FakeShards(50), seed=0, shuffle=False)) == list(range(50))


def test_an_epoch_takes_no_memory() -> None:
    reader = ShardReader(FakeShards(2**40), seed=1, rank=3, world_size=8)
    assert len(reader) == 2**37
    assert len({item.place.index for item in itertools.islice(iter(reader), 1000)}) == 1000
    reader.seek(7, 2**40 - 8)
    assert len(indices(reader)) == 1
    assert reader.epoch == 8


# Resuming ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 200), st.integers(1, 5))
def test_stopped_anywhere_and_started_again(data: st.DataObject, count: int, world_size: int) -> None:
    def reader(rank: int, seed: int = 3) -> ShardReader:
        return ShardReader(FakeShards(count), seed=seed, rank=rank, world_size=world_size)

    rank = data.draw(st.integers(0, world_size - 1))
    whole = reader(rank)
    expected = [item.place for _ in range(3) for item in whole]
    stop = data.draw(st.integers(0, len(expected) - 1))
    stopped, seen = reader(rank), []
    while len(seen) < stop:
        seen += [item.place for item in itertools.islice(iter(stopped), stop - len(seen))]
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = reader(rank, seed=99)
    resumed.load_state_dict(state)
    while len(seen) < len(expected):
        seen += [item.place for item in resumed]
    assert seen == expected
    assert resumed.state_dict() == whole.state_dict()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 200), st.integers(1, 6), st.integers(1, 6))
def test_resumed_with_another_number_of_ranks(data: st.DataObject, count: int, before: int, after: int) -> None:
    readers = [ShardReader(FakeShards(count), seed=5, rank=rank, world_size=before) for rank in range(before)]
    rounds = data.draw(st.integers(0, len(readers[0]) - 1))
    turns = [[item.place.index for item in itertools.islice(iter(reader), rounds)] for reader in readers]
    first = [index for round_ in zip(*turns, strict=True) for index in round_]
    states = [reader.state_dict() for reader in readers]
    assert all(state == states[0] for state in states)
    resumed = [ShardReader(FakeShards(count), seed=0, rank=rank, world_size=after) for rank in range(after)]
    for reader in resumed:
        reader.load_state_dict(states[0])
    rest = [index for round_ in zip(*(indices(reader) for reader in resumed), strict=True) for index in round_]
    assert sorted((first + rest)[:count]) == list(range(count))
    assert (first + rest)[:count] == indices(ShardReader(FakeShards(count), seed=5))


def test_a_state_counts_what_was_handed_out(shards: Shards) -> None:
    """Workers read ahead; the state does not."""
    reader = ShardReader(shards, seed=1, num_workers=2)
    iterator = iter(reader)
    seen = [next(iterator).place for _ in range(5)]
    assert reader.state_dict()["position"] == 5
    del iterator
    resumed = ShardReader(shards, seed=1)
    resumed.load_state_dict(reader.state_dict())
    expected = [item.place for item in ShardReader(shards, seed=1)]
    assert seen + [item.place for item in resumed] == expected
    assert seen + [item.place for item in reader] == expected  # the same reader goes on as well


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": 2}, "has the format 2"),
        ({"epoch": "1"}, "damaged"),
        ({"seed": True}, "damaged"),
        ({"position": 1000}, "no position 1000"),
        ({"epoch": -1}, "no position"),
        ({"parts": []}, "1 data sets, 0"),
        ({"parts": None}, "damaged"),
    ],
)
def test_states_that_can_not_be(shards: Shards, change: dict[str, Any], sentence: str) -> None:
    reader = ShardReader(shards, seed=1)
    with pytest.raises(DataError, match=sentence):
        reader.load_state_dict({**reader.state_dict(), **change})
    with pytest.raises(DataError, match="damaged"):
        reader.load_state_dict({"format": 1})


def test_another_data_set_is_refused(shards: Shards, few: Shards) -> None:
    reader = ShardReader(few, seed=1)
    with pytest.raises(DataError, match=r"(?s)other data.*dataset_sha256.*records"):
        reader.load_state_dict(ShardReader(shards, seed=1).state_dict())
    with pytest.raises(DataError, match="weight"):
        ShardReader([(few, 2.0)], seed=1).load_state_dict(reader.state_dict())


def test_two_iterations_at_once_are_refused() -> None:
    reader = ShardReader(FakeShards(100), seed=1)
    first = iter(reader)
    next(first)
    next(iter(reader))
    with pytest.raises(DataError, match="read elsewhere"):
        next(first)


# Processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "method"), [(0, None), (1, "fork"), (2, "fork"), (2, "spawn")])
def test_the_number_of_workers_changes_nothing(shards: Shards, workers: int, method: str | None) -> None:
    expected = [shards[index].id for index in indices(ShardReader(shards, seed=4))]
    reader = ShardReader(shards, seed=4, num_workers=workers, multiprocessing_context=method)
    items = list(reader)
    assert [item.value.id for item in items] == expected
    assert items[3].value.ids["audio"].tolist() == shards[items[3].place.index].ids["audio"].tolist()


def test_reading_leaves_the_global_generators_alone(shards: Shards) -> None:
    import torch

    before = torch.get_rng_state()
    next(iter(ShardReader(shards, seed=4, num_workers=1)))
    assert torch.equal(before, torch.get_rng_state())


def test_fewer_records_than_ranks(few: Shards) -> None:
    turns = [list(ShardReader(few, seed=0, rank=rank, world_size=7)) for rank in range(7)]
    assert [len(turn) for turn in turns] == [1] * 7
    assert {turn[0].place.index for turn in turns} == set(range(len(few)))


# Records that can't be used ---------------------------------------------------------------------------------


def double(record: TokenizedRecord, place: Place) -> int:
    if record.id.endswith("7"):
        raise TokenError("It ends with a seven.", "seven")
    if record.id.endswith("8"):
        raise RecordError("It ends with an eight.", "eight")
    return 2 * int(record.meta["n"]) + place.epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_record_keeps_its_turn(tmp_path: Path, workers: int) -> None:
    folder = write_tiny(tmp_path / "data", SPACE, count=80)
    data = bytearray(shard_path(folder, "train", 0).read_bytes())
    names = [record.id for record in open_shards(folder)]
    place = data.index(b"NUMPY") - 1 + 128  # the first id of the first record
    data[place] ^= 1
    shard_path(folder, "train", 0).write_bytes(data)
    shards = open_shards(folder, allow_unaudited=("data",))
    reader = ShardReader(shards, seed=0, transform=double, num_workers=workers)
    items = list(reader)
    assert len(items) == len(shards)
    expected: Counter[str] = Counter({"ids_sha256": 1})
    for item in items:
        record_id = names[item.place.index]
        if item.skipped is None:
            assert item.value == 2 * int(record_id[3:])
        elif item.place.index:
            expected[{"7": "seven", "8": "eight"}[record_id[-1]]] += 1
        else:
            assert item.skipped.origin == f"{shard_path(folder, 'train', 0)}[0]"
            assert "train-000000.tar/00000000" in item.skipped.message
    assert reader.skipped == expected
    assert expected.total() > 5


# Several data sets ------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.sampled_from([0.5, 1.0, 2.0, 0.3, 1.7])), min_size=1, max_size=4),
    st.integers(0, 9),
)
def test_weights_are_times_per_epoch(parts: list[tuple[int, float]], seed: int) -> None:
    fakes = [(FakeShards(count, f"part {number}"), weight) for number, (count, weight) in enumerate(parts)]
    reader = ShardReader(fakes, seed=seed)
    seen: list[list[int]] = [[] for _ in parts]
    for epoch in range(4):
        assert reader.epoch == epoch
        found = Counter(item.place.part for item in reader)
        assert found == {n: max(1, round(weight * count)) for n, (count, weight) in enumerate(parts)}
    for item in (item for _ in range(4) for item in reader):
        seen[item.place.part].append(item.place.index)
    for (count, _), order in zip(parts, seen, strict=True):
        times = Counter(order)  # four epochs from the fourth on: whole passes, and at most two begun ones
        assert max(times.values()) - min(times[index] for index in range(count)) <= 2


def test_each_pass_reads_every_record_once() -> None:
    """Weight 0.5: two epochs are a pass; weight 2: an epoch is two."""
    order = EpochOrder([(FakeShards(30, "a"), 0.5), (FakeShards(20, "b"), 2.0)], seed=1)
    assert len(order) == 55
    epochs = [order.places(epoch, np.arange(55)) for epoch in range(4)]
    halves = [{place.index for place in places if place.part == 0} for places in epochs]
    assert [len(half) for half in halves] == [15] * 4
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(30))
    assert halves[0] != halves[2]
    for places in epochs:
        assert set(Counter(place.index for place in places if place.part == 1).values()) == {2}


def test_a_mix_is_mixed_all_the_way() -> None:
    order = EpochOrder([(FakeShards(9000, "a"), 1.0), (FakeShards(1000, "b"), 1.0)], seed=2)
    parts = np.array([place.part for place in order.places(0, np.arange(10_000))]).reshape(20, 500)
    assert np.abs(parts.mean(axis=1) - 0.1).max() < 4.5 * math.sqrt(0.09 / 500)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"data": []}, "no data set"),
        ({"data": [(FakeShards(0), 1.0)]}, "has no records"),
        ({"data": [(FakeShards(3), 0.0)]}, "weight 0"),
        ({"data": [(FakeShards(3), float("nan"))]}, "weight nan"),
        ({"data": FakeShards(3), "rank": 2, "world_size": 2}, "no rank 2"),
    ],
)
def test_readers_that_can_not_be(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        ShardReader(**{"seed": 0, **arguments})

"""The derangement against brute force over all permutations."""

import itertools
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.evaluate.shuffling import derangement, exchange_groups


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.integers(0, 1000))
def test_no_permutation_keeps_fewer_in_their_group(groups: list[int], seed: int) -> None:
    sources = derangement(groups, seed)
    assert sorted(sources) == list(range(len(groups)))
    kept = sum(groups[source] == groups[place] for place, source in enumerate(sources))
    every = itertools.permutations(range(len(groups)))
    assert kept == min(sum(groups[s] == groups[p] for p, s in enumerate(permutation)) for permutation in every)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 300), st.integers(0, 2**31 - 1))
def test_nothing_stays_in_place(size: int, seed: int) -> None:
    for groups in (list(range(size)), [0] * size):
        sources = derangement(groups, seed)
        assert all(source != place for place, source in enumerate(sources))
        assert sources == derangement(groups, seed)


def test_the_seed_decides_and_partners_are_spread() -> None:
    """Over many seeds every other sample is about equally often the source."""
    counts = Counter(derangement(list(range(6)), seed)[0] for seed in range(3000))
    assert 0 not in counts
    assert all(480 <= counts[other] <= 720 for other in range(1, 6))


def test_groups_join_samples_and_identical_pictures() -> None:
    owners = [0, 0, 1, 2, 3]
    digests = [b"a", b"b", b"b", b"c", b"d"]
    groups = exchange_groups(owners, digests)
    assert groups[0] == groups[1] == groups[2]
    assert len(set(groups)) == 3


def test_small_sets() -> None:
    assert derangement([], 0) == []
    assert derangement([0], 0) == [0]
    assert derangement([0, 1], 0) == [1, 0]

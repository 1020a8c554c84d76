"""Intervals against plain loops, published values and their own promise: coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.evaluate import intervals
from qwen3_vlm.evaluate.intervals import bootstrap_mean, bootstrap_ratio, wilson_interval


def test_bootstrap_ratio_agrees_with_a_plain_loop() -> None:
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 30, 200)
    sums = counts * rng.normal(2.0, 0.5, 200)
    result = bootstrap_ratio(sums, counts, samples=4000, seed=1)
    loop = []
    for _ in range(4000):
        drawn = rng.integers(0, 200, 200)
        loop.append(sums[drawn].sum() / counts[drawn].sum())
    assert result.value == pytest.approx(sums.sum() / counts.sum(), rel=1e-12)
    assert result.low == pytest.approx(np.quantile(loop, 0.025), abs=0.01)
    assert result.high == pytest.approx(np.quantile(loop, 0.975), abs=0.01)


def test_bootstrap_is_seeded_and_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50)
    whole = bootstrap_mean(values, samples=300, seed=5)
    monkeypatch.setattr(intervals, "_MAX_CELLS", 50 * 7)
    assert bootstrap_mean(values, samples=300, seed=5) == whole
    assert bootstrap_mean(values, samples=300, seed=6) != whole


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    hits = 0
    for trial in range(200):
        interval = bootstrap_mean(rng.normal(1.0, 2.0, 80), samples=400, seed=trial, confidence=0.9)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.83 <= hits / 200 <= 0.95


def test_paired_differences_use_the_same_draws() -> None:
    """The interval of a constant difference has no width, however noisy the samples are."""
    counts = np.full(40, 5)
    noisy = np.random.default_rng(2).normal(0, 100, 40)
    interval = bootstrap_ratio((noisy + 10) - noisy, counts, seed=4)
    assert (interval.low, interval.value, interval.high) == pytest.approx((2.0, 2.0, 2.0))


# Agresti & Coull, The American Statistician 52 (1998), and R's prop.test(correct=FALSE).
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_published_values(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson_interval(successes, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 500), st.integers(0, 500), st.floats(0.5, 0.999))
def test_wilson_holds_the_share_and_narrows_with_n(successes: int, failures: int, confidence: float) -> None:
    n = successes + failures
    interval = wilson_interval(successes, n, confidence)
    assert 0.0 <= interval.low <= interval.value <= interval.high <= 1.0
    if n:
        tenfold = wilson_interval(10 * successes, 10 * n, confidence)
        assert tenfold.high - tenfold.low < interval.high - interval.low


def test_impossible_input_is_refused() -> None:
    with pytest.raises(ValueError, match="impossible"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="above 0"):
        bootstrap_ratio([1.0], [0.0])
    with pytest.raises(ValueError, match="one numerator"):
        bootstrap_ratio([], [])

"""Confidence intervals: how much of a figure could be luck of the draw.

Everything is vectorised numpy, seeded, and resamples *samples* (not tokens): the tokens of one
answer are not independent of each other.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MAX_CELLS = 4_000_000  # resampling weights held at once: 32 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its confidence interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """{"value", "low", "high"}."""
        return asdict(self)


def bootstrap_ratio(
    numerators: ArrayLike, denominators: ArrayLike, *, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of sum(numerators) ÷ sum(denominators), such as loss per token.

    One entry of both per sample: they are drawn together, with replacement. For a paired difference,
    give the per-sample differences as numerators; the same seed draws the same samples.

    Raises:
        ValueError: the two differ in length, are empty, or a denominator is not above 0.
    """
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if top.shape != bottom.shape or top.ndim != 1 or not top.size:
        raise ValueError(f"one numerator and denominator per sample are needed, got shapes {top.shape}, {bottom.shape}")
    if not (bottom > 0).all():
        raise ValueError("every denominator must be above 0")
    ratios = np.concatenate([draw @ top / (draw @ bottom) for draw in _resamples(top.size, samples, seed)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))


def bootstrap_mean(values: ArrayLike, *, confidence: float = 0.95, samples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap of a mean over samples; see `bootstrap_ratio`."""
    array = np.asarray(values, dtype=np.float64)
    return bootstrap_ratio(array, np.ones_like(array), confidence=confidence, samples=samples, seed=seed)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion: right at 0 % and 100 % too, where the usual one is empty.

    E. B. Wilson, JASA 22 (1927). With n = 0 nothing is known: value 0, interval 0…1.

    Raises:
        ValueError: successes are not within 0…n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n} are impossible")
    if n == 0:
        return Interval(0.0, 0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    return Interval(share, min(share, max(0.0, center - half)), max(share, min(1.0, center + half)))


def _resamples(n: int, samples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each of n samples is drawn in each resample: blocks of (resamples, n); rows sum to n."""
    rng = np.random.default_rng(seed)
    block = max(1, _MAX_CELLS // n)
    for start in range(0, samples, block):
        rows = min(block, samples - start)
        yield rng.multinomial(n, np.full(n, 1 / n), size=rows).astype(np.float64)

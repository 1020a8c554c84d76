"""The same samples graded under several conditions, and the gates on what that costs.

What a condition takes away is the business of the modules that use this one: pictures (`ablation`), the ids of a
segment (`token_ablation`), the prompt of a generated segment (`prompt_ablation`). Here are the gaps to `correct`, per
token, with paired bootstrap intervals over samples, and the share of samples that do better with their own.

Shapes: n samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwen3_vlm.config import EvalConfig
from qwen3_vlm.evaluate.gates import gate_failure
from qwen3_vlm.evaluate.intervals import Interval, bootstrap_ratio, wilson_interval

Sums = NDArray[np.float64]  # (n,) nats
Counts = NDArray[np.int64]  # (n,) graded tokens


class Threshold(NamedTuple):
    """What a gate asks for."""

    gap: float  # nats per token
    win_rate: float = 0.0  # share of the samples


@dataclass(frozen=True)
class Gap:
    """How much worse the answers get, in nats per token, when something is taken away."""

    interval: Interval  # loss(condition) − loss(correct), paired bootstrap
    win_rate: Interval  # share of samples that do better with their own, Wilson
    threshold: float
    samples: int
    min_win_rate: float = 0.0

    @property
    def passed(self) -> bool:
        """Enough samples, a gap of at least the threshold, an interval clear of zero, and enough samples that win."""
        return not self.reason

    @property
    def reason(self) -> str:
        """Why the gate fails, as a sentence; empty when it passes."""
        return gate_failure(
            self.interval.value,
            self.interval.low,
            self.threshold,
            self.samples,
            win_rate=self.win_rate.value,
            min_win_rate=self.min_win_rate,
        )

    def to_gate(self, name: str) -> dict[str, Any]:
        """The entry of evidence.json."""
        wins = {"min_win_rate": self.min_win_rate} if self.min_win_rate else {}
        return {
            "name": name,
            **json_interval(self.interval),
            "threshold": self.threshold,
            "samples": self.samples,
            "win_rate": self.win_rate.value,
            "win_rate_low": self.win_rate.low,
            "win_rate_high": self.win_rate.high,
            **wins,
            "passed": self.passed,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class ConditionReport:
    """Per-sample losses under each condition, and what follows from them."""

    sample_ids: tuple[str, ...]
    token_counts: Counts
    loss_sums: dict[str, Sums]  # condition → (n,)
    losses: dict[str, Interval]
    gaps: dict[str, Gap]  # the conditions that are gated
    seed: int

    @property
    def samples(self) -> int:
        """Samples that were graded."""
        return len(self.sample_ids)

    @property
    def passed(self) -> bool:
        """All gates pass."""
        return all(gap.passed for gap in self.gaps.values())

    @property
    def prefix(self) -> str:
        """What the name of each gate begins with."""
        return ""

    @property
    def order(self) -> dict[str, bool]:
        """The order of the losses that is to be expected; information beside the gates."""
        return {}

    def is_below(self, lower: str, higher: str) -> bool:
        """Whether one condition's loss lies below another's."""
        return self.losses[lower].value < self.losses[higher].value

    def failures(self) -> list[str]:
        """One sentence per gate that fails."""
        return [f"Gate {self.prefix}{name}: {gap.reason}" for name, gap in self.gaps.items() if not gap.passed]

    def gates(self) -> list[dict[str, Any]]:
        """The `gates` of evidence.json."""
        return [gap.to_gate(f"{self.prefix}{name} - correct") for name, gap in self.gaps.items()]

    def details(self) -> dict[str, Any]:
        """What `to_dict` tells beside the figures that every report has."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """The section of evidence.json."""
        return {
            "passed": self.passed,
            "samples": self.samples,
            "tokens": int(self.token_counts.sum()),
            "losses": {name: json_interval(interval) for name, interval in self.losses.items()},
            "order": self.order,
            **self.details(),
            "seed": self.seed,
            "gates": self.gates(),
        }

    def summary(self) -> dict[str, Any]:
        """Flat, for a line of metrics.jsonl."""
        return {
            "passed": self.passed,
            "samples": self.samples,
            **{f"loss_{name}": finite(interval.value) for name, interval in self.losses.items()},
            **{f"gap_{name}": finite(gap.interval.value) for name, gap in self.gaps.items()},
            **{f"gap_{name}_low": finite(gap.interval.low) for name, gap in self.gaps.items()},
            **{f"gap_{name}_high": finite(gap.interval.high) for name, gap in self.gaps.items()},
        }


def compare_conditions(
    loss_sums: Mapping[str, Sums],
    counts: Counts,
    thresholds: Mapping[str, Threshold],
    config: EvalConfig,
    seed: int,
) -> tuple[dict[str, Interval], dict[str, Gap]]:
    """The loss of every condition, and the gap to `correct` of those that have a threshold.

    Args:
        loss_sums: condition → (n,) nats of each sample, "correct" among them.
        counts: (n,) graded tokens of each sample; the same under all conditions.
    """
    resampling: Any = {"confidence": config.confidence, "samples": config.bootstrap_samples, "seed": seed}
    gaps = {}
    for name, threshold in thresholds.items():
        difference = loss_sums[name] - loss_sums["correct"]
        gaps[name] = Gap(
            interval=bootstrap_ratio(difference, counts, **resampling),
            win_rate=wilson_interval(int((difference > 0).sum()), len(counts), config.confidence),
            threshold=threshold.gap,
            samples=len(counts),
            min_win_rate=threshold.win_rate,
        )
    return {name: bootstrap_ratio(sums, counts, **resampling) for name, sums in loss_sums.items()}, gaps


def json_interval(interval: Interval) -> dict[str, float | None]:
    """{"value", "low", "high"}; None stands for what is not finite."""
    return {name: finite(value) for name, value in interval.to_dict().items()}


def finite(value: float) -> float | None:
    """The value, or None where it is NaN or infinite: JSON has neither."""
    return value if np.isfinite(value) else None

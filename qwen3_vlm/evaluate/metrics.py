"""The evaluation loss: per token over the whole set, never a mean of batch means.

Each sample keeps its own sum and count, so the figure does not depend on the batch size (up to the
rounding of the model itself: 1e-5 in fp32, 1e-2 in bf16), parts from several ranks merge exactly, and
intervals can resample samples.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwen3_vlm.data.collate import Batch
from qwen3_vlm.data.splits import BUCKET_NAMES, bucket_of
from qwen3_vlm.evaluate.batches import device_of, num_rows, select
from qwen3_vlm.evaluate.intervals import Interval, bootstrap_ratio
from qwen3_vlm.models.modes import evaluation_mode

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class LossReport:
    """Losses of n samples with at least one graded token, and what was left out.

    Raises:
        ValueError: the per-sample fields differ in length.
    """

    sample_ids: tuple[str, ...]
    loss_sums: NDArray[np.float64]  # (n,) nats
    token_counts: NDArray[np.int64]  # (n,) graded tokens
    answer_lengths: NDArray[np.int64]  # (n,) tokens of the answers; what the buckets go by
    zero_label: int = 0  # samples in which nothing is graded
    truncated: int = 0  # samples whose text had to be cut, and those refused for it
    skipped: dict[str, int] = field(default_factory=dict)  # reason → records that could not be used

    def __post_init__(self) -> None:
        lengths = {len(self.sample_ids), len(self.loss_sums), len(self.token_counts), len(self.answer_lengths)}
        if len(lengths) != 1:
            raise ValueError(f"the fields of a LossReport hold one entry per sample, got lengths {sorted(lengths)}")

    @property
    def samples(self) -> int:
        """Samples that were graded."""
        return len(self.sample_ids)

    @property
    def tokens(self) -> int:
        """Tokens that were graded."""
        return int(self.token_counts.sum())

    @property
    def loss(self) -> float:
        """Nats per graded token over the whole set; NaN where nothing was graded."""
        return _ratio(self.loss_sums, self.token_counts)

    def bucket_losses(self) -> dict[str, float]:
        """Bucket name → nats per token of the samples with answers of that length; NaN for an empty one."""
        return {
            name: _ratio(self.loss_sums[inside], self.token_counts[inside]) for name, inside in self._buckets().items()
        }

    def interval(self, confidence: float = 0.95, samples: int = 2000, seed: int = 0) -> Interval:
        """The loss with its bootstrap interval over samples."""
        return bootstrap_ratio(self.loss_sums, self.token_counts, confidence=confidence, samples=samples, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """Flat and JSON-serialisable, for a line of metrics.jsonl; None stands for NaN."""
        lengths = self.answer_lengths
        percentiles = np.percentile(lengths, _PERCENTILES) if lengths.size else [None] * len(_PERCENTILES)
        return {
            "loss": _finite(self.loss),
            **{f"loss_{name}": _finite(loss) for name, loss in self.bucket_losses().items()},
            "samples": self.samples,
            **{f"samples_{name}": int(inside.sum()) for name, inside in self._buckets().items()},
            "tokens": self.tokens,
            "truncated": self.truncated,
            "zero_label": self.zero_label,
            "skipped": sum(self.skipped.values()),
            **{
                f"label_length_p{p}": None if value is None else float(value)
                for p, value in zip(_PERCENTILES, percentiles, strict=True)
            },
            "label_length_min": int(lengths.min()) if lengths.size else None,
            "label_length_max": int(lengths.max()) if lengths.size else None,
            "label_length_mean": float(lengths.mean()) if lengths.size else None,
        }

    @staticmethod
    def of_refused(reasons: Mapping[str, int]) -> "LossReport":
        """No sample at all, and the records that could not be used: reason → count."""
        none = np.zeros(0, np.int64)
        return LossReport(
            sample_ids=(),
            loss_sums=np.zeros(0),
            token_counts=none,
            answer_lengths=none,
            zero_label=reasons.get("no_labels", 0),
            truncated=sum(count for reason, count in reasons.items() if reason.startswith("truncates")),
            skipped=dict(reasons),
        )

    @staticmethod
    def merge(reports: Sequence["LossReport"]) -> "LossReport":
        """One report of several over disjoint parts of a set (such as one per rank), in the order given."""
        skipped: Counter[str] = Counter()
        for report in reports:
            skipped.update(report.skipped)
        return LossReport(
            sample_ids=tuple(name for report in reports for name in report.sample_ids),
            loss_sums=np.concatenate([np.zeros(0), *(report.loss_sums for report in reports)]),
            token_counts=np.concatenate([np.zeros(0, np.int64), *(report.token_counts for report in reports)]),
            answer_lengths=np.concatenate([np.zeros(0, np.int64), *(report.answer_lengths for report in reports)]),
            zero_label=sum(report.zero_label for report in reports),
            truncated=sum(report.truncated for report in reports),
            skipped=dict(skipped),
        )

    def _buckets(self) -> dict[str, NDArray[np.bool_]]:
        numbers = np.array([bucket_of(int(length)) for length in self.answer_lengths], dtype=np.int64)
        return {name: numbers == number for number, name in enumerate(BUCKET_NAMES)}


def evaluate_loss(model: Any, batches: Iterable[Batch], *, max_samples: int | None = None) -> LossReport:
    """Grade every sample of `batches`; at most `max_samples` of them, in their order.

    Args:
        model: a Qwen3VLMForConditionalGeneration; its mode is put back afterwards. Autocast, where it is
            wanted, is the caller's.
        batches: padded batches (one sample per row) of the collator.

    Raises:
        DataError: a batch is packed.
    """
    parts: list[LossReport] = []
    left = max_samples
    with evaluation_mode(model):
        for batch in batches:
            parts.append(_grade_batch(model, batch, left))
            if left is not None:
                left -= min(left, num_rows(batch))
                if left == 0:
                    break
    return LossReport.merge(parts)


def row_losses(model: Any, inputs: dict[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Per row of a batch: summed loss in nats (B,) and number of graded tokens (B,)."""
    losses = model.token_losses(**inputs)
    rows = inputs["labels"].shape[0]
    sums = torch.zeros(rows, dtype=torch.float64).index_add_(0, losses.row.cpu(), losses.loss.double().cpu())
    return sums.numpy(), torch.bincount(losses.row.cpu(), minlength=rows).numpy()


def _grade_batch(model: Any, batch: Batch, max_rows: int | None) -> LossReport:
    rows = num_rows(batch) if max_rows is None else min(num_rows(batch), max_rows)
    refused = LossReport.of_refused(Counter(skipped.reason for skipped in batch.skipped))
    sums, counts = np.zeros(0), np.zeros(0, np.int64)
    if rows:
        sums, counts = row_losses(model, select(batch.inputs, tuple(batch.inputs), device_of(model)))
    kept = np.flatnonzero(counts[:rows]).tolist()
    return LossReport(
        sample_ids=tuple(batch.sample_ids[row] for row in kept),
        loss_sums=sums[kept],
        token_counts=counts[kept],
        answer_lengths=np.asarray(batch.answer_lengths, dtype=np.int64)[kept],
        zero_label=refused.zero_label + rows - len(kept),
        truncated=refused.truncated + sum(turns > 0 for turns in batch.dropped_turns[:rows]),
        skipped=refused.skipped,
    )


def _ratio(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    return float(sums.sum() / counts.sum()) if counts.sum() else float("nan")


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None

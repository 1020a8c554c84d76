"""Losses and graded tokens of each task, summed over micro-batches, ranks and steps, for the log.

A model that grades several tasks at once returns `task_losses` and `task_counts`, by number in `GRADED`. The mean
of a task is its summed loss over its own tokens, whatever weight the task has in training. Beside them stands the KL of
text from the base, where that is in the loss.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from qwen3_vlm.tokenization.sequences import GRADED


class TaskSums:
    """`losses` (K,) in nats and `counts` (K,) of graded tokens; zeros where a model has no tasks."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.losses = torch.zeros(len(GRADED), dtype=torch.float64, device=device)
        self.counts = torch.zeros(len(GRADED), dtype=torch.int64, device=device)
        self.text = torch.zeros(2, dtype=torch.float64, device=device)  # KL in nats, and predictions

    def add(self, outputs: Any) -> None:
        """Take over what one forward pass graded."""
        if getattr(outputs, "task_losses", None) is not None:
            self.losses += outputs.task_losses
            self.counts += outputs.task_counts

    def add_text(self, nats: Tensor, count: float) -> None:
        """Take over the summed KL of text-only samples, and how many predictions it is of."""
        self.text += torch.stack([nats, torch.full_like(nats, count)])

    def over_ranks(self, accelerator: Accelerator) -> "TaskSums":
        """The same, summed over all ranks; collective."""
        summed, found = TaskSums(self.losses.device), (self.losses, self.counts, self.text)
        summed.losses, summed.counts, summed.text = (accelerator.reduce(part, reduction="sum") for part in found)
        return summed

    def counters(self, prefix: str) -> dict[str, float]:
        """Flat, for the run's counters: `…nats/i2t`, `…graded/i2t`, and `…nats/text_kl`, `…graded/text_kl`."""
        found: dict[str, float] = {}
        for task, loss, count in zip(GRADED, self.losses.tolist(), self.counts.tolist(), strict=True):
            if count:
                found |= {f"{prefix}nats/{task}": loss, f"{prefix}graded/{task}": count}
        nats, count = self.text.tolist()
        return found | ({f"{prefix}nats/text_kl": nats, f"{prefix}graded/text_kl": round(count)} if count else {})


def task_means(counters: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Nats per graded token and graded tokens of each task: `loss_i2t`, `tokens_i2t`; and of text's KL: `text_kl`."""
    found: dict[str, float] = {}
    for task in GRADED:
        count = counters.get(f"{prefix}graded/{task}", 0)
        if count:
            found |= {f"loss_{task}": counters[f"{prefix}nats/{task}"] / count, f"tokens_{task}": count}
    if counters.get(f"{prefix}graded/text_kl", 0):
        found["text_kl"] = counters[f"{prefix}nats/text_kl"] / counters[f"{prefix}graded/text_kl"]
    return found

"""Losses and graded tokens of each task, summed over micro-batches, ranks and steps, for the log.

A model that grades several tasks at once returns `task_losses` and `task_counts`, by number in `SEQUENCES`. The mean
of a task is its summed loss over its own tokens, whatever weight the task has in training.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from qwen3_vlm.tokenization.sequences import SEQUENCES


class TaskSums:
    """`losses` (K,) in nats and `counts` (K,) of graded tokens; zeros where a model has no tasks."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.losses = torch.zeros(len(SEQUENCES), dtype=torch.float64, device=device)
        self.counts = torch.zeros(len(SEQUENCES), dtype=torch.int64, device=device)

    def add(self, outputs: Any) -> None:
        """Take over what one forward pass graded."""
        if getattr(outputs, "task_losses", None) is not None:
            self.losses += outputs.task_losses
            self.counts += outputs.task_counts

    def over_ranks(self, accelerator: Accelerator) -> "TaskSums":
        """The same, summed over all ranks; collective."""
        summed, found = TaskSums(self.losses.device), (self.losses, self.counts)
        summed.losses, summed.counts = (accelerator.reduce(part, reduction="sum") for part in found)
        return summed

    def counters(self, prefix: str) -> dict[str, float]:
        """Flat, for the run's counters: `…nats/i2t`, `…graded/i2t`."""
        found: dict[str, float] = {}
        for task, loss, count in zip(SEQUENCES, self.losses.tolist(), self.counts.tolist(), strict=True):
            if count:
                found |= {f"{prefix}nats/{task}": loss, f"{prefix}graded/{task}": count}
        return found


def task_means(counters: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Nats per graded token and graded tokens of each task: `loss_i2t`, `tokens_i2t`."""
    found: dict[str, float] = {}
    for task in SEQUENCES:
        count = counters.get(f"{prefix}graded/{task}", 0)
        if count:
            found |= {f"loss_{task}": counters[f"{prefix}nats/{task}"] / count, f"tokens_{task}": count}
    return found

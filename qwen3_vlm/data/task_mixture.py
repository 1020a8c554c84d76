"""Which records, as which task, make up each optimizer step: a pure function of lengths, settings and a seed.

Every task has a stream of its own records, shuffled anew in each pass, so that within a task every record comes once
before any comes twice. A step takes its samples from the streams in the proportion that the tasks' weights have at
that step; what can't be split evenly is made up for in later steps, so that the shares are met over the run.
A ramp lets a task come in later: first read, then write.

Any step can be asked for by itself: a resumed run, and every rank, arrives at the same samples.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qwen3_vlm.data.shuffle import draw
from qwen3_vlm.errors import DataError

Indices = npt.NDArray[np.int64]


class TaskSample(NamedTuple):
    """One record as one example of a task."""

    task: str
    record: int  # its number
    draw: int  # how many samples of this task came before it: with the seed, what a denoising task's noise depends on


@dataclass(frozen=True)
class TaskShare:
    """A task of the mixture: its records and its weight over time."""

    indices: Indices  # (n,) records that can be used
    weight: float = 1.0
    ramp_from: float = 0.0  # shares of all steps
    ramp_until: float = 0.0
    fixed: float | None = None  # share of all samples at every step, whatever the weights of the others are

    def weight_at(self, progress: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The weight at each share of the run that has passed."""
        if self.ramp_until <= self.ramp_from:
            return np.where(progress >= self.ramp_from, self.weight, 0.0)
        return np.interp(progress, (self.ramp_from, self.ramp_until), (0.0, self.weight))


class TaskMixture:
    """The samples of every step.

    Args:
        tasks: by name; the order is part of the plan.
        samples: per step, over all ranks.
        steps: None takes `epochs` passes over all (record, task) pairs but those of a fixed share, rounded up to whole
            steps.

    Raises:
        DataError: a task has no records, or no task is there to begin with.
    """

    def __init__(
        self, tasks: Mapping[str, TaskShare], *, samples: int, seed: int, epochs: int = 1, steps: int | None = None
    ) -> None:
        empty = [name for name, task in tasks.items() if not len(task.indices)]
        if empty or not tasks:
            raise DataError(f"No record can be used for the task {', '.join(empty) or '(none is named)'}.")
        self.tasks, self.samples, self.seed = dict(tasks), samples, seed
        pairs = sum(len(task.indices) for task in tasks.values() if task.fixed is None)
        room = samples * (1 - sum(task.fixed or 0.0 for task in tasks.values()))
        self.steps = math.ceil(pairs * epochs / room) if steps is None else steps

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        """(steps + 1, tasks): how many samples of each task came before each step."""
        progress = np.arange(self.steps) / max(self.steps, 1)
        fixed = np.array([task.fixed or 0.0 for task in self.tasks.values()])
        weights = np.stack([task.weight_at(progress) for task in self.tasks.values()], axis=1) * (fixed == 0)
        totals = weights.sum(axis=1, keepdims=True)
        if (totals == 0).any():
            raise DataError("At the first step no task has a weight: let one of them begin at 0.")
        wanted = (weights / totals * (1 - fixed.sum()) + fixed) * self.samples
        counts = np.zeros((self.steps + 1, len(self.tasks)), dtype=np.int64)
        owed = np.zeros(len(self.tasks))
        for step, share in enumerate(wanted):
            owed += share
            given = np.maximum(np.floor(owed + 1e-9), 0).astype(np.int64)
            left = self.samples - int(given.sum())  # whole samples that the fractions add up to
            for _ in range(abs(left)):
                rest = np.where(share > 0, owed - given, -np.inf)
                given[int(rest.argmax()) if left > 0 else int(given.argmax())] += 1 if left > 0 else -1
            owed -= given
            counts[step + 1] = given
        return counts.cumsum(axis=0)

    def counts(self, step: int) -> dict[str, int]:
        """Samples of each task in a step."""
        before, after = self._starts[step : step + 2]
        return dict(zip(self.tasks, (after - before).tolist(), strict=True))

    def step(self, number: int) -> list[TaskSample]:
        """The samples of one step, task after task."""
        found = []
        for (name, task), first, last in zip(self.tasks.items(), *self._starts[number : number + 2], strict=True):
            draws, places = draw(len(task.indices), f"{self.seed}/{name}", first, last)
            records = task.indices[places].tolist()
            found += [TaskSample(name, *rest) for rest in zip(records, draws.tolist(), strict=True)]
        return found

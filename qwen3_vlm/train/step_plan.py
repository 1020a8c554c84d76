"""Which micro-batches make up each optimizer step, on each rank.

The plan of an epoch is one global list of micro-batches. A step takes the next `accumulation × ranks`
of them; rank r works on numbers r, r + ranks, … of those. So two processes with accumulation k see
in each step what one process with accumulation 2k sees, and a run can go on from any step. The last
step of an epoch may be shorter; a rank that is left without data then works on an empty micro-batch,
so that all ranks meet in the same gradient sync.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_vlm.config import RunConfig
from qwen3_vlm.data.plan import MicroBatch, plan_epoch
from qwen3_vlm.data.task_mixture import TaskMixture, TaskSample


@dataclass(frozen=True, slots=True)
class RankStep:
    """One optimizer step of one rank: its micro-batches, and how many forward passes every rank makes."""

    epoch: int
    micro_batches: tuple[Any, ...]  # in whatever form the run's data takes them
    passes: int


class StepPlan:
    """The steps of a whole run, a pure function of its arguments.

    Args:
        plan: epoch → global list of micro-batches.
        max_steps: None takes `epochs`; else as many epochs as it needs.
    """

    def __init__(
        self,
        plan: Callable[[int], Sequence[MicroBatch]],
        *,
        accumulation: int,
        epochs: int,
        max_steps: int | None,
        ranks: int = 1,
        rank: int = 0,
    ) -> None:
        self._plan = plan
        self._per_step = accumulation * ranks
        self._ranks, self._rank = ranks, rank
        self._cached: tuple[int, Sequence[MicroBatch]] | None = None
        self.total = max_steps if max_steps is not None else sum(self._steps_in(epoch) for epoch in range(epochs))

    def epochs_from(self, step: int) -> Iterator[list[RankStep]]:
        """The steps that follow the first `step` ones, an epoch (or what is left of it) at a time."""
        epoch, done = 0, 0
        while done < self.total:
            count = min(self._steps_in(epoch), self.total - done)
            if count == 0:
                return
            if done + count > step:
                first = max(step - done, 0)
                yield [self._rank_step(epoch, number) for number in range(first, count)]
            epoch, done = epoch + 1, done + count

    def _rank_step(self, epoch: int, number: int) -> RankStep:
        batches = self._epoch(epoch)[number * self._per_step : (number + 1) * self._per_step]
        return RankStep(epoch, tuple(batches[self._rank :: self._ranks]), -(-len(batches) // self._ranks))

    def _steps_in(self, epoch: int) -> int:
        return -(-len(self._epoch(epoch)) // self._per_step)

    def _epoch(self, epoch: int) -> Sequence[MicroBatch]:
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._plan(epoch))
        return self._cached[1]


def plan_steps(
    config: RunConfig,
    lengths: Sequence[int],
    indices: Sequence[int],
    *,
    more: Callable[[int], tuple[Sequence[int], Sequence[int]]] | None = None,
    ranks: int = 1,
    rank: int = 0,
) -> StepPlan:
    """The plan of a run over the records `indices`, whose token counts are `lengths`.

    Args:
        more: epoch → token counts and indices of further samples that are mixed in.
    """

    def epoch_plan(epoch: int) -> Sequence[MicroBatch]:
        """The global list of micro-batches of one epoch."""
        further = more(epoch) if more else ([], [])
        return plan_epoch(
            [*lengths, *further[0]],
            batch_size=config.optim.batch_size,
            max_seq_len=config.data.max_seq_len,
            packing=config.data.packing,
            seed=config.seed,
            epoch=epoch,
            indices=[*indices, *further[1]],
        )

    return StepPlan(
        epoch_plan,
        accumulation=config.optim.accumulation,
        epochs=config.optim.epochs,
        max_steps=config.optim.max_steps,
        ranks=ranks,
        rank=rank,
    )


class MixtureSteps:
    """The steps of a run over tasks: each has its own samples (see `task_mixture`), cut into micro-batches.

    Args:
        cut: a step's samples → micro-batches; the same on every rank.
    """

    BLOCK = 256  # steps that are planned together

    def __init__(
        self,
        mixture: TaskMixture,
        cut: Callable[[Sequence[TaskSample]], Sequence[tuple[TaskSample, ...]]],
        *,
        ranks: int = 1,
        rank: int = 0,
    ) -> None:
        self.mixture, self._cut, self._ranks, self._rank = mixture, cut, ranks, rank
        self.total = mixture.steps

    def epochs_from(self, step: int) -> Iterator[list[RankStep]]:
        """The steps that follow the first `step` ones, a block at a time."""
        for start in range(step, self.total, self.BLOCK):
            yield [self._rank_step(number) for number in range(start, min(start + self.BLOCK, self.total))]

    def _rank_step(self, number: int) -> RankStep:
        batches = self._cut(self.mixture.step(number))
        return RankStep(0, tuple(batches[self._rank :: self._ranks]), -(-len(batches) // self._ranks))

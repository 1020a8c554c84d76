"""Every split over ranks and accumulation sees the same samples in the same step, from any step on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qwen3_vlm.config import load_config
from qwen3_vlm.train.step_plan import StepPlan, plan_steps

MicroBatches = Sequence[Any]


def plan(epoch: int, sizes: list[int]) -> MicroBatches:
    """Micro-batches that tell where they stand."""
    return [((epoch, number),) for number in range(sizes[epoch % len(sizes)])]


def steps(sizes: list[int], start: int = 0, **arguments: Any) -> list[Any]:
    made = StepPlan(lambda epoch: plan(epoch, sizes), **arguments)
    return [step for epoch in made.epochs_from(start) for step in epoch]


SIZES = st.lists(st.integers(1, 23), min_size=1, max_size=4)


@given(SIZES, st.integers(1, 5), st.integers(1, 4), st.none() | st.integers(1, 30))
def test_ranks_share_a_step_exactly(sizes: list[int], accumulation: int, ranks: int, max_steps: int | None) -> None:
    common: dict[str, Any] = {"epochs": len(sizes), "max_steps": max_steps}
    alone = steps(sizes, accumulation=accumulation * ranks, **common)
    shared = [steps(sizes, accumulation=accumulation, ranks=ranks, rank=rank, **common) for rank in range(ranks)]
    assert {len(part) for part in shared} == {len(alone)}
    for number, whole in enumerate(alone):
        parts = [part[number] for part in shared]
        together = sorted(batch for part in parts for batch in part.micro_batches)
        assert together == sorted(whole.micro_batches)
        assert len({part.passes for part in parts}) == 1
        assert all(len(part.micro_batches) <= part.passes for part in parts)
        assert parts[0].passes <= accumulation


@given(SIZES, st.integers(1, 5), st.integers(0, 40))
def test_going_on_is_the_tail(sizes: list[int], accumulation: int, start: int) -> None:
    arguments: dict[str, Any] = {"accumulation": accumulation, "epochs": len(sizes), "max_steps": None}
    whole = steps(sizes, **arguments)
    assert steps(sizes, start, **arguments) == whole[start:]


@given(SIZES, st.integers(1, 5))
def test_an_epoch_sees_every_micro_batch_once(sizes: list[int], accumulation: int) -> None:
    found = steps(sizes, accumulation=accumulation, epochs=len(sizes), max_steps=None)
    batches = [batch for step in found for batch in step.micro_batches]
    assert batches == [batch for epoch in range(len(sizes)) for batch in plan(epoch, sizes)]


def test_max_steps_repeats_epochs() -> None:
    found = steps([3], accumulation=2, epochs=1, max_steps=7)
    assert [step.epoch for step in found] == [0, 0, 1, 1, 2, 2, 3]


def test_no_data_is_no_step() -> None:
    assert steps([0], accumulation=2, epochs=1, max_steps=5) == []


def test_from_a_config() -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "stage1_align.yaml", ["data.packing=false"])
    made = plan_steps(config, [50] * 64, range(100, 164))
    assert made.total == 4  # 64 samples ÷ (4 × 4)
    seen = [
        index for epoch in made.epochs_from(0) for step in epoch for batch in step.micro_batches for (index,) in batch
    ]
    assert sorted(seen) == list(range(100, 164))

"""The mixture of tasks: shares, ramps, passes, and independence of where one begins."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.data.task_mixture import TaskMixture, TaskShare
from qwen3_vlm.errors import DataError


def share(count: int, weight: float = 1.0, ramp: tuple[float, float] = (0.0, 0.0), first: int = 0) -> TaskShare:
    return TaskShare(np.arange(first, first + count), weight, *ramp)


shares = st.builds(
    share,
    st.integers(1, 30),
    st.floats(0.05, 20),
    st.tuples(st.floats(0, 0.9), st.floats(0, 1)).map(lambda ramp: (min(ramp), max(ramp))),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(shares, max_size=4), st.integers(1, 40), st.integers(1, 60), st.integers(0, 9))
def test_every_step_is_full_and_shares_are_met(others: list[TaskShare], samples: int, steps: int, seed: int) -> None:
    """Each step has exactly `samples`; over the run every task gets its share to within one sample of each task."""
    tasks = {"first": share(7), **{f"task {number}": task for number, task in enumerate(others)}}
    mixture = TaskMixture(tasks, samples=samples, seed=seed, steps=steps)
    wanted = dict.fromkeys(tasks, 0.0)
    found: Counter[str] = Counter()
    for step in range(steps):
        weights = {}
        for name, task in tasks.items():
            progress = step / steps
            rising = task.ramp_until > task.ramp_from
            through = (progress - task.ramp_from) / (task.ramp_until - task.ramp_from) if rising else 1.0
            weights[name] = task.weight * min(max(through, 0.0), 1.0) * (progress >= task.ramp_from)
        for name, weight in weights.items():
            wanted[name] += samples * weight / sum(weights.values())
        drawn = mixture.step(step)
        assert len(drawn) == samples
        found.update(sample.task for sample in drawn)
        assert all(weights[sample.task] > 0 for sample in drawn), "a task came before its ramp"
        assert all(abs(found[name] - wanted[name]) <= len(tasks) for name in tasks)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 5))
def test_every_record_once_before_any_twice(count: int, samples: int, seed: int) -> None:
    steps = -(-3 * count // samples)
    mixture = TaskMixture({"i2t": share(count, first=100)}, samples=samples, seed=seed, steps=steps)
    stream = [sample for step in range(steps) for sample in mixture.step(step)]
    assert [sample.draw for sample in stream] == list(range(len(stream)))
    for turn in range(3):
        part = [sample.record for sample in stream[turn * count : (turn + 1) * count]]
        assert sorted(part) == list(range(100, 100 + count))


def test_a_step_does_not_depend_on_the_ones_before() -> None:
    tasks = {"a": share(50), "b": share(20, 0.5, (0.2, 0.8))}
    whole = TaskMixture(tasks, samples=8, seed=3, steps=40)
    stream = [whole.step(step) for step in range(40)]
    again = TaskMixture(tasks, samples=8, seed=3, steps=40)
    assert [again.step(step) for step in (39, 0, 17)] == [stream[39], stream[0], stream[17]]
    assert TaskMixture(tasks, samples=8, seed=4, steps=40).step(0) != stream[0]


def test_epochs_count_pairs() -> None:
    tasks = {"a": share(50), "b": share(20)}
    assert TaskMixture(tasks, samples=8, seed=0, epochs=2).steps == 18  # 140 pairs


def test_a_ramp_by_hand() -> None:
    """Weight 1 against 1 that grows from 0 at a quarter to 1 at three quarters."""
    mixture = TaskMixture({"a": share(9), "b": share(9, 1.0, (0.25, 0.75))}, samples=12, seed=0, steps=8)
    assert [mixture.counts(step)["b"] for step in range(8)] == pytest.approx([0, 0, 0, 2, 4, 5, 6, 6], abs=1)
    assert mixture.counts(2)["b"] == 0


def test_refused() -> None:
    with pytest.raises(DataError, match="task b"):
        TaskMixture({"a": share(3), "b": share(0)}, samples=2, seed=0)
    with pytest.raises(DataError, match="first step no task"):
        TaskMixture({"a": share(3, 1.0, (0.5, 0.6))}, samples=2, seed=0, steps=10).step(0)

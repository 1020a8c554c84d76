"""When a gate passes, and its words."""

import math

import pytest

from qwen3_vlm.evaluate.gates import describe_gate, gate_failure, unmeasured_gate


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ((0.05, 0.001, 0.05, 256), ""),
        ((0.05, 0.001, 0.05, 255), "255 samples were graded; a gate needs 256."),
        ((0.049, 0.001, 0.05, 256), "The gap is 0.0490 nats per token; 0.05 is needed."),
        ((0.05, 0.0, 0.05, 256), "The interval of the gap reaches down to 0.0000; it must lie above zero."),
        ((math.nan, 0.1, 0.05, 256), "The gap is nan nats per token; 0.05 is needed."),
        ((0.1, math.nan, 0.05, 256), "The interval of the gap reaches down to nan; it must lie above zero."),
    ],
)
def test_a_gate_passes_when_all_three_hold(figures: tuple[float, float, float, int], words: str) -> None:
    assert gate_failure(*figures) == words


def test_gates_in_words() -> None:
    gate = {"name": "zero", "value": 0.5, "low": 0.4, "high": None, "threshold": 0.05, "passed": True}
    assert describe_gate(gate) == "passed, 0.500 [0.400, –], threshold 0.05"
    assert describe_gate(unmeasured_gate("ablation", "There is no picture.")) == "FAILED, There is no picture."

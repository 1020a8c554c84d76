"""When a gate passes, and its words."""

import math
from typing import Any

import pytest

from qwen3_vlm.evaluate.gates import (
    describe_gate,
    equality_gate,
    gate_failure,
    limit_gate,
    rate_gate,
    recorded_failure,
    unmeasured_gate,
)
from qwen3_vlm.evaluate.intervals import Interval, wilson_interval


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


def test_a_gap_may_ask_for_a_share_of_the_samples() -> None:
    figures = (0.3, 0.2, 0.1, 256)
    assert gate_failure(*figures, win_rate=0.8, min_win_rate=0.8) == ""
    assert gate_failure(*figures, win_rate=0.79, min_win_rate=0.8) == (
        "79.0 % of the samples do better with their own; 80 % are needed."
    )
    assert gate_failure(*figures, win_rate=math.nan, min_win_rate=0.8)


def test_equality_gates() -> None:
    right, wrong, empty = (equality_gate("integrity", "tensors", *counts) for counts in ((0, 311), (2, 311), (0, 0)))
    assert (right["passed"], right["reason"], describe_gate(right)) == (True, "", "passed, 0 of 311 tensors differ")
    assert (wrong["passed"], wrong["reason"]) == (False, "2 of 311 tensors differ; none may.")
    assert describe_gate(wrong) == "FAILED, 2 of 311 tensors differ"
    assert empty["reason"] == "No tensors were compared."


def test_rate_gates() -> None:
    right, wrong, few = (rate_gate("decodes", wilson_interval(*counts), counts[1]) for counts in
                         ((64, 64), (63, 64), (63, 63)))  # fmt: skip
    assert describe_gate(right) == "passed, 100.0 % of 64 [94.3 %, 100.0 %]"
    assert wrong["reason"] == "98.44 % came out right; 100 % are needed."
    assert few["reason"] == "63 samples were tried; a gate needs 64."
    assert [gate["passed"] for gate in (right, wrong, few)] == [True, False, False]


def test_limit_gates() -> None:
    right, wrong = (limit_gate("drift", Interval(value, 0.0, 0.3), 0.1, 32) for value in (0.1, 0.11))
    assert describe_gate(right) == "passed, 0.100 [0.000, 0.300], at most 0.1"
    assert wrong["reason"] == "It is 0.1100; at most 0.1 is allowed."
    assert limit_gate("drift", Interval(0.0, 0.0, 0.0), 0.1, 0)["reason"] == "Nothing was measured."


GAP = {"name": "i2t: noise - correct", "value": 0.5, "low": 0.4, "high": 0.6, "threshold": 0.15, "samples": 256,
       "win_rate": 0.9, "min_win_rate": 0.85, "passed": True, "reason": ""}  # fmt: skip
EQUAL = equality_gate("integrity", "tensors", 0, 311)
RATE = rate_gate("decodes", wilson_interval(64, 64), 64)
LIMIT = limit_gate("drift", Interval(0.05, 0.0, 0.1), 0.1, 32)


@pytest.mark.parametrize(
    ("gate", "change", "words"),
    [
        (GAP, {}, ""),
        (GAP, {"kind": "gap"}, ""),
        (GAP, {"value": 0.1}, "The gap is 0.1000"),
        (GAP, {"low": None}, "reaches down to nan"),
        (GAP, {"win_rate": 0.84}, "84.0 % of the samples"),
        (GAP, {"win_rate": None}, "nan % of the samples"),
        (GAP, {"samples": None}, "0 samples"),
        (EQUAL, {}, ""),
        (EQUAL, {"value": 1}, "1 of 311 tensors differ"),
        (EQUAL, {"value": math.nan}, "nan of 311 tensors differ"),
        (EQUAL, {"samples": 0}, "No tensors were compared"),
        (RATE, {}, ""),
        (RATE, {"value": 0.99}, "99.00 % came out right"),
        (RATE, {"threshold": None}, "are needed"),
        (RATE, {"samples": 3}, "3 samples were tried"),
        (LIMIT, {}, ""),
        (LIMIT, {"value": 0.2}, "It is 0.2000; at most 0.1"),
        (LIMIT, {"value": math.nan}, "It is nan"),
        (LIMIT, {"threshold": None}, "at most nan"),
        (EQUAL, {"kind": "nonsense"}, "There is no kind of gate 'nonsense'"),
        (unmeasured_gate("ablation", "There is no picture."), {}, "There is no picture."),
    ],
)
def test_recorded_gates_are_judged_by_their_figures(gate: dict[str, Any], change: dict[str, Any], words: str) -> None:
    """What is marked as passed is not believed."""
    found = recorded_failure({**gate, **change})
    assert words in found
    assert bool(found) == bool(words)


def test_a_figure_that_is_no_number_is_no_gate() -> None:
    with pytest.raises(TypeError, match="'much' is no number"):
        recorded_failure({**GAP, "value": "much"})
    with pytest.raises(TypeError):
        recorded_failure({**EQUAL, "samples": [311]})

"""A gate of evidence.json: when it passes, and how that is put in words."""

from collections.abc import Mapping
from typing import Any

MIN_SAMPLES = 256  # a gate on fewer samples can't pass


def gate_failure(value: float, low: float, threshold: float, samples: int) -> str:
    """Why a gate fails, as a sentence; empty when it passes.

    Args:
        value: gap to the correct pictures, nats per token.
        low: lower end of its confidence interval.
        threshold: the gap that is asked for.
        samples: how many were graded.
    """
    if not samples >= MIN_SAMPLES:
        return f"{samples} samples were graded; a gate needs {MIN_SAMPLES}."
    if not value >= threshold:
        return f"The gap is {value:.4f} nats per token; {threshold:g} is needed."
    if not low > 0:
        return f"The interval of the gap reaches down to {low:.4f}; it must lie above zero."
    return ""


def unmeasured_gate(name: str, reason: str) -> dict[str, Any]:
    """The entry of a gate that could not be measured: it fails, and says why."""
    empty: dict[str, Any] = dict.fromkeys(("value", "low", "high", "threshold"))
    return {"name": name, **empty, "samples": 0, "passed": False, "reason": reason}


def describe_gate(gate: Mapping[str, Any]) -> str:
    """How a gate came out, such as "passed, 0.500 [0.400, 0.600], threshold 0.05", or why it was not measured."""
    return f"{'passed' if gate['passed'] else 'FAILED'}, {gate_figures(gate)}"


def gate_figures(gate: Mapping[str, Any]) -> str:
    """The gap with its interval and threshold, or why it was not measured."""
    if gate.get("value") is None:
        return str(gate.get("reason") or "it was not measured.")
    interval = f"{_number(gate['value'])} [{_number(gate.get('low'))}, {_number(gate.get('high'))}]"
    return f"{interval}, threshold {gate.get('threshold')}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"

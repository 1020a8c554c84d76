"""The gates of evidence.json: their kinds, when each passes, and how that is put in words.

    gap     a loss gets clearly worse when something is taken away   value − correct, nats per token
    equal   nothing that must stay the same has changed              value: differences found; 0 is asked for
    limit   something that moves stays within bounds                 value: how far; at most the threshold
    rate    everything that was tried came out right                 value: share of the samples; 1 is asked for

Every entry has `name`, `kind` ("gap" where there is none), `value`, `low`, `high`, `threshold`, `samples`, `passed`
and `reason`; a gap may have `win_rate` and `min_win_rate`; an equality has `what` was compared.
"""

import math
from collections.abc import Mapping
from typing import Any

from qwen3_vlm.evaluate.intervals import Interval

MIN_SAMPLES = 256  # a gap on fewer samples can't pass
MIN_TRIES = 64  # nor a rate on fewer


def gate_failure(
    value: float,
    low: float,
    threshold: float,
    samples: int,
    *,
    win_rate: float = 1.0,
    min_win_rate: float = 0.0,
) -> str:
    """Why a gap fails, as a sentence; empty when it passes.

    Args:
        value: gap to the correct input, nats per token.
        low: lower end of its confidence interval.
        threshold: the gap that is asked for.
        samples: how many were graded.
        win_rate: share of the samples that do better with the correct input.
    """
    if not samples >= MIN_SAMPLES:
        return f"{samples} samples were graded; a gate needs {MIN_SAMPLES}."
    if not value >= threshold:
        return f"The gap is {value:.4f} nats per token; {threshold:g} is needed."
    if not low > 0:
        return f"The interval of the gap reaches down to {low:.4f}; it must lie above zero."
    if not win_rate >= min_win_rate:
        return f"{100 * win_rate:.1f} % of the samples do better with their own; {100 * min_win_rate:g} % are needed."
    return ""


def recorded_failure(gate: Mapping[str, Any]) -> str:
    """Why a gate of evidence.json fails, judged by its figures alone; empty when it passes.

    Raises:
        TypeError: a figure is no number.
    """
    if gate.get("value") is None:
        return str(gate.get("reason") or "It was not measured.")
    value, low, threshold = (_figure(gate.get(key)) for key in ("value", "low", "threshold"))
    count = _figure(gate.get("samples"))
    samples = int(count) if math.isfinite(count) else 0
    kind = gate.get("kind", "gap")
    if kind == "equal":
        return _inequality(value, samples, str(gate.get("what", "things")))
    if kind == "rate":
        return _rate_failure(value, threshold, samples)
    if kind == "limit":
        return _excess(value, threshold, samples)
    if kind != "gap":
        return f"There is no kind of gate {kind!r}."
    least = _figure(gate.get("min_win_rate", 0.0))
    share = _figure(gate.get("win_rate")) if least else 1.0
    return gate_failure(value, low, threshold, samples, win_rate=share, min_win_rate=least)


def equality_gate(name: str, what: str, different: int, compared: int) -> dict[str, Any]:
    """The entry of a gate that asks that none of the `compared` things (in the plural) differs."""
    reason = _inequality(different, compared, what)
    figures = {"value": different, "low": None, "high": None, "threshold": 0, "samples": compared}
    return {"name": name, "kind": "equal", "what": what, **figures, "passed": not reason, "reason": reason}


def rate_gate(name: str, rate: Interval, samples: int, threshold: float = 1.0) -> dict[str, Any]:
    """The entry of a gate that asks that a share of the samples, all by default, came out right."""
    reason = _rate_failure(rate.value, threshold, samples)
    figures = {**rate.to_dict(), "threshold": threshold, "samples": samples}
    return {"name": name, "kind": "rate", **figures, "passed": not reason, "reason": reason}


def limit_gate(name: str, measured: Interval, limit: float, samples: int) -> dict[str, Any]:
    """The entry of a gate that asks that a figure is at most `limit`."""
    reason = _excess(measured.value, limit, samples)
    figures = {**measured.to_dict(), "threshold": limit, "samples": samples}
    return {"name": name, "kind": "limit", **figures, "passed": not reason, "reason": reason}


def unmeasured_gate(name: str, reason: str) -> dict[str, Any]:
    """The entry of a gate that could not be measured: it fails, and says why."""
    empty: dict[str, Any] = dict.fromkeys(("value", "low", "high", "threshold"))
    return {"name": name, **empty, "samples": 0, "passed": False, "reason": reason}


def describe_gate(gate: Mapping[str, Any]) -> str:
    """How a gate came out, such as "passed, 0.500 [0.400, 0.600], threshold 0.05", or why it was not measured."""
    return f"{'passed' if gate['passed'] else 'FAILED'}, {gate_figures(gate)}"


def gate_figures(gate: Mapping[str, Any]) -> str:
    """The gap with its interval and threshold, the count or the share, or why it was not measured."""
    if gate.get("value") is None:
        return str(gate.get("reason") or "it was not measured.")
    if gate.get("kind") == "equal":
        return f"{gate['value']:,} of {gate.get('samples') or 0:,} {gate.get('what', 'things')} differ"
    if gate.get("kind") == "rate":
        interval = f"[{_percent(gate.get('low'))}, {_percent(gate.get('high'))}]"
        return f"{_percent(gate['value'])} of {gate.get('samples') or 0:,} {interval}"
    at_most = "at most" if gate.get("kind") == "limit" else "threshold"
    interval = f"{_number(gate['value'])} [{_number(gate.get('low'))}, {_number(gate.get('high'))}]"
    least = gate.get("min_win_rate")
    wins = f", better with its own {_percent(gate.get('win_rate'))}, at least {_percent(least)}" if least else ""
    return f"{interval}, {at_most} {gate.get('threshold')}{wins}"


def _inequality(different: float, compared: int, what: str) -> str:
    if not compared > 0:
        return f"No {what} were compared."
    return "" if different == 0 else f"{different:g} of {compared:,} {what} differ; none may."


def _excess(value: float, limit: float, samples: int) -> str:
    if not samples > 0:
        return "Nothing was measured."
    return "" if value <= limit else f"It is {value:.4f}; at most {limit:g} is allowed."


def _rate_failure(value: float, threshold: float, samples: int) -> str:
    if not samples >= MIN_TRIES:
        return f"{samples} samples were tried; a gate needs {MIN_TRIES}."
    if not value >= threshold:
        return f"{100 * value:.2f} % came out right; {100 * threshold:g} % are needed."
    return ""


def _figure(value: Any) -> float:
    """A figure of a gate; NaN, with which no gate passes, for what is missing or not finite."""
    if not isinstance(value, (int, float, type(None))):
        raise TypeError(f"{value!r} is no number")
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"

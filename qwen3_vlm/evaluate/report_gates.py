"""The verdict and the gates of report.html: what the evidence says, in a sentence, a table and charts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from markupsafe import Markup

from qwen3_vlm.evaluate.ablation import CONDITIONS
from qwen3_vlm.evaluate.charts import Bar, Series, interval_chart, line_chart
from qwen3_vlm.evaluate.gates import MIN_SAMPLES, gate_figures
from qwen3_vlm.evaluate.report_tokens import is_token_run, points
from qwen3_vlm.evaluate.run_files import Line, RunFiles, is_number, mapping_of

_GATE_KEYS = {"shuffled": "min_shuffle_gap", "zero": "min_zero_gap", "noise": "min_noise_gap"}  # of the config


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first thing a reader sees. `kind` is "good", "bad" or "open"."""

    kind: str
    title: str
    details: list[str]


def gates_of(run: RunFiles) -> list[dict[str, Any]]:
    """The gates of the final evidence, or those that the newest ablation line amounts to."""
    given = run.evidence.get("gates")
    if isinstance(given, list):
        return [_gate(gate) for gate in given if isinstance(gate, dict)]
    line, settings = run.last("ablation"), _eval_config(run)
    measured = [name for name in _GATE_KEYS if is_number(line.get(f"gap_{name}"))]
    return [_gate_of_line(name, line, settings.get(_GATE_KEYS[name], 0.0)) for name in measured]


def verdict_of(run: RunFiles, gates: Sequence[Mapping[str, Any]]) -> Verdict:
    """What the gates say, in a sentence."""
    failed = [gate for gate in gates if not gate["passed"]]
    if not gates:
        return Verdict("open", f"No gate has been measured yet: the run is at step {run.step:,}", [])
    if failed:
        title = f"{len(failed)} of {len(gates)} gates fail"
        reasons = [
            f"{gate['name']}: {gate['reason'] or 'below its threshold, or not clear of zero.'}" for gate in failed
        ]
        return Verdict("bad", title, reasons)
    details = _smallest_gap(gates, "its own source or prompt" if is_token_run(run) else "its own picture")
    broken = [name for name, holds in order_of(run).items() if not holds]
    if broken:
        details.append(f"The order that a reading model shows does not hold throughout; not so: {', '.join(broken)}.")
    return Verdict("good", f"{_claim(run, gates)}: all {len(gates)} gates pass", details)


def gate_chart(gates: Sequence[Mapping[str, Any]]) -> Markup:
    """Every gap with its interval."""
    gaps = _measured_gaps(gates)
    bars = [
        Bar(gap["name"].removesuffix(" − correct"), gap["value"], gap["low"], gap["high"], gap["passed"])
        for gap in gaps
    ]
    thresholds = {gap["threshold"] for gap in gaps if is_number(gap["threshold"])}
    title = "Gap: loss − loss(correct)"
    return interval_chart(bars, "nats per token", title, thresholds.pop() if len(thresholds) == 1 else None)


def picture_charts(run: RunFiles) -> list[Markup]:
    """A connector's loss under each condition; none of a token LM, whose tasks have one each."""
    losses = mapping_of(mapping_of(run.evidence.get("ablation")).get("losses"))
    rows = [(name, mapping_of(losses.get(name))) for name in CONDITIONS]
    bars = [Bar(name, row["value"], row["low"], row["high"], True if name == "correct" else None)
            for name, row in rows if all(is_number(row.get(key)) for key in ("value", "low", "high"))]  # fmt: skip
    return [interval_chart(bars, "nats per token", "Loss under each condition")] if bars else []


def gap_history(run: RunFiles) -> Markup:
    """The gaps of every ablation of the run, if there was more than one."""
    lines = run.of_kind("ablation")
    if len(lines) < 2:
        return Markup("")
    series = [Series(name, points(lines, f"gap_{name}"), style, dots=True) for style, name in enumerate(_GATE_KEYS)]
    return line_chart(series, "optimizer step", "nats per token", "Gaps while training")


def order_of(run: RunFiles) -> dict[str, bool]:
    """Whether the conditions of a connector stand in the order that a reading model shows."""
    order = mapping_of(mapping_of(run.evidence.get("ablation")).get("order"))
    return {str(name): holds is True for name, holds in order.items()}


def _claim(run: RunFiles, gates: Sequence[Mapping[str, Any]]) -> str:
    """What gates that all pass say, and no more than that."""
    claims = {
        "equal": "the base is as it was",
        "gap": "sources and prompts are used" if is_token_run(run) else "the pictures are used",
        "rate": "everything generated decodes",
        "limit": "text behaviour stays within its limits",
    }
    kinds = [kind for kind in claims if any(gate["kind"] == kind for gate in gates)]
    sentence = ", ".join(claims[kind] for kind in kinds)
    return sentence[:1].upper() + sentence[1:]


def _smallest_gap(gates: Sequence[Mapping[str, Any]], what: str) -> list[str]:
    """A sentence on the gap that is nearest to nothing."""
    return [
        f"Without {what} the model loses at least {gap['value']:.3f} nats per token "
        f"({gap['name']}; interval {gap['low']:.3f} … {gap['high']:.3f}; {gap['samples']} samples)."
        for gap in sorted(_measured_gaps(gates), key=lambda gap: float(gap["value"]))[:1]
    ]


def _measured_gaps(gates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The gates on a loss, those that were measured."""
    keys = ("value", "low", "high")
    return [gate for gate in gates if gate["kind"] == "gap" and all(is_number(gate[key]) for key in keys)]


def _gate_of_line(name: str, line: Line, threshold: Any) -> dict[str, Any]:
    """A gate as an ablation line of metrics.jsonl amounts to."""
    value, low, samples = (line.get(key) for key in (f"gap_{name}", f"gap_{name}_low", "samples"))
    clear = is_number(value) and is_number(low) and low > 0 and is_number(threshold) and value >= threshold
    return _gate(
        {
            "name": f"{name} - correct",
            "value": value,
            "low": low,
            "high": line.get(f"gap_{name}_high"),
            "threshold": threshold,
            "samples": samples,
            "passed": clear and is_number(samples) and samples >= MIN_SAMPLES,
            "reason": "" if is_number(samples) and samples >= MIN_SAMPLES else f"Fewer than {MIN_SAMPLES} samples.",
        }
    )


def _gate(gate: Mapping[str, Any]) -> dict[str, Any]:
    """A gate with what the page needs of any kind; `found` and `asked` are cells."""
    keys = ("name", "value", "low", "high", "threshold", "samples", "win_rate", "win_rate_low", "win_rate_high")
    values = {key: gate.get(key) for key in keys}
    values["name"] = str(values["name"] or "gate").replace(" - ", " − ")  # a minus, where people read it
    values["kind"] = kind = str(gate.get("kind", "gap"))
    interval = {"low": values["low"], "high": values["high"]}
    values["found"] = {"value": values["value"], **interval}
    values["asked"] = values["threshold"]
    if is_number(values["value"]) and kind == "rate":
        values |= {"found": {"percent": values["value"], **interval}, "asked": {"percent": values["threshold"]}}
    if is_number(values["value"]) and kind == "limit":
        values["asked"] = f"at most {values['threshold']}"
    if is_number(values["value"]) and kind == "equal":
        values |= {"found": gate_figures(gate), "asked": "none"}
    return {**values, "passed": gate.get("passed") is True, "reason": str(gate.get("reason") or "")}


def _eval_config(run: RunFiles) -> dict[str, Any]:
    try:
        return mapping_of(mapping_of(yaml.safe_load(run.config_text)).get("eval"))
    except (yaml.YAMLError, RecursionError):
        return {}

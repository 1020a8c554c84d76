"""report.html: one page that says what a run is worth, and shows it.

The verdict first, then the curves, the gates, the golden pictures with reference and answer side by
side, costs, environment and configuration. It is made from the files of the run folder alone, so it
can be written at any moment of a run. One self-contained file: nothing is loaded from anywhere, and
all text is escaped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from qwen3_vlm.evaluate.ablation import CONDITIONS
from qwen3_vlm.evaluate.caption_scores import score_captions
from qwen3_vlm.evaluate.charts import Bar, Series, interval_chart, line_chart
from qwen3_vlm.evaluate.gates import MIN_SAMPLES, gate_figures
from qwen3_vlm.evaluate.golden import GoldenItem
from qwen3_vlm.evaluate.run_files import Line, RunFiles, is_number, is_picture, read_run
from qwen3_vlm.evaluate.token_page import condition_charts, golden_tasks, is_token_run, points, task_charts
from qwen3_vlm.evaluate.word_marks import mark_words
from qwen3_vlm.storage import atomic_write_text

REPORT_FILE = "report.html"
TEMPLATE = "report_template.html"
EVALUATIONS = ("quick_eval", "eval", "final")  # kinds of lines with an evaluation loss
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}  # as ␛: HTML has no ESC
_HISTORY = 6  # earlier answers shown of a golden prompt, at most
_GATE_KEYS = {"shuffled": "min_shuffle_gap", "zero": "min_zero_gap", "noise": "min_noise_gap"}  # of the config


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first thing a reader sees. `kind` is "good", "bad" or "open"."""

    kind: str
    title: str
    details: list[str]


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html`, atomically, and return its path.

    Raises:
        ConfigError: `run_dir` is no run folder.
        StorageError: the disk can't be written.
    """
    path = Path(run_dir) / REPORT_FILE
    atomic_write_text(path, render_report(read_run(run_dir)))
    return path


def render_report(run: RunFiles) -> str:
    """The page as text."""
    template = resources.files("qwen3_vlm.evaluate").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["cell"] = cell
    gates = gates_of(run)
    page = environment.from_string(template).render(
        run=run,
        verdict=verdict_of(run, gates),
        tiles=_tiles(run, gates),
        is_tokens=is_token_run(run),
        loss_charts=[*_loss_charts(run), *task_charts(run)],
        cost_charts=_cost_charts(run),
        gates=gates,
        gate_chart=_gate_chart(gates),
        condition_charts=[*_condition_charts(run), *condition_charts(run)],
        gap_history=_gap_history(run),
        order=_order(run),
        golden=_golden_view(run),
        golden_tasks=golden_tasks(run),
        tables=[_table(table) for table in run.tables],
        costs=_costs(run),
        data=_data_figures(run),
    )
    return page.translate(_CONTROL_PICTURES)


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
    broken = [name for name, holds in _order(run).items() if not holds]
    if broken:
        details.append(f"The order that a reading model shows does not hold throughout; not so: {', '.join(broken)}.")
    return Verdict("good", f"{_claim(run, gates)}: all {len(gates)} gates pass", details)


def _claim(run: RunFiles, gates: Sequence[Mapping[str, Any]]) -> str:
    """What gates that all pass say, and no more than that."""
    if not is_token_run(run):
        return "The pictures are used"
    claims = {
        "equal": "the base is as it was",
        "gap": "sources and prompts are used",
        "rate": "everything generated decodes",
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


def cell(value: Any) -> Markup:
    """One table cell: text, a number, a truth value, an interval, a share or a picture."""
    if isinstance(value, bool):
        return Markup('<span class="mark {}">{}</span>').format("good" if value else "bad", "✓" if value else "✗")
    if isinstance(value, dict):
        return _rich_cell(value)
    if isinstance(value, int):
        return escape(f"{value:,}")
    if isinstance(value, float):
        return escape(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}")
    return escape("–" if value is None else str(value))


def _rich_cell(value: Mapping[str, Any]) -> Markup:
    if is_picture(value.get("image")):
        return Markup('<img src="{}" alt="">').format(value["image"])
    share = "percent" in value
    numbers = [value.get("percent" if share else "value"), value.get("low"), value.get("high")]
    texts = [_figure_text(number, share) for number in numbers]
    if is_number(numbers[1]) and is_number(numbers[2]):
        return Markup('{} <span class="range">{} … {}</span>').format(texts[0], texts[1].removesuffix(" %"), texts[2])
    return escape(texts[0])


def _figure_text(number: Any, share: bool) -> str:
    if not is_number(number):
        return "–"
    return f"{100 * number:.1f} %" if share else f"{number:.4g}"


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
    if is_number(values["value"]) and kind == "equal":
        values |= {"found": gate_figures(gate), "asked": "none"}
    return {**values, "passed": gate.get("passed") is True, "reason": str(gate.get("reason") or "")}


def _tiles(run: RunFiles, gates: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(label, text) of the figures at the top."""
    tiles = [(str(head["label"]), str(head["text"])) for table in run.tables
             if {"label", "text"} <= set(head := _mapping(table.get("headline")))]  # fmt: skip
    evaluations = [line for line in run.of_kind(*EVALUATIONS) if is_number(line.get("loss"))]
    if evaluations:
        first, last = evaluations[0]["loss"], evaluations[-1]["loss"]
        tiles.append(("evaluation loss", f"{first:.2f} → {last:.2f}" if len(evaluations) > 1 else f"{last:.2f}"))
    gaps = [gate["value"] for gate in gates if gate["kind"] == "gap"]
    if gaps and all(map(is_number, gaps)):
        tiles.append(("smallest gap, nats per token", f"{min(gaps):.2f}"))
    if run.golden:
        items = list(run.golden.values())[-1]
        tiles.append(("golden answers exact", f"{sum(item.exact for item in items)} of {len(items)}"))
    if run.token_golden:
        generated = list(run.token_golden.values())[-1]
        tiles.append(("golden samples decoded", f"{sum(not item.error for item in generated)} of {len(generated)}"))
    seconds = _total_seconds(run)
    if seconds:
        tiles.append(("training time", duration(seconds)))
    trainable = run.last("final").get("trainable_parameters")
    if is_number(trainable):
        tiles.append(("trained parameters", f"{trainable:,}"))
    return tiles


def _loss_charts(run: RunFiles) -> list[Markup]:
    quick, full = run.of_kind("quick_eval"), run.of_kind("eval", "final")
    loss = [
        Series("training", points(run.of_kind("train"), "loss"), 3),
        Series("quick evaluation", points(quick, "loss"), 0, dots=True),
        Series("full evaluation", points(full, "loss"), 1, dots=True),
    ]
    labels = {"loss_le10": "≤ 10 tokens", "loss_11_20": "11–20", "loss_ge21": "≥ 21"}
    longer = max((full, quick), key=lambda lines: sum(len(points(lines, key)) for key in labels))  # one set, not both
    buckets = [
        Series(label, points(longer, key), style, dots=True) for style, (key, label) in enumerate(labels.items())
    ]
    exact = [(float(step), float(sum(item.exact for item in items))) for step, items in run.golden.items()]
    charts = [
        line_chart(loss, "optimizer step", "nats per token", "Loss"),
        line_chart(buckets, "optimizer step", "nats per token", "Evaluation loss by answer length"),
        line_chart([Series("exact", exact, 0, dots=True)], "optimizer step", "answers", "Golden answers exact"),
    ]
    return [chart for chart in charts if chart]


def _cost_charts(run: RunFiles) -> list[Markup]:
    train = run.of_kind("train")
    charts = [
        line_chart([Series(title, points(train, key), 0)], "optimizer step", "", title, straight=key != "grad_norm")
        for key, title in (
            ("tokens_per_second", "Real tokens / s"),
            ("peak_memory_mib", "Peak memory, MiB"),
            ("learning_rate", "Learning rate"),
            ("grad_norm", "Gradient norm, unclipped"),
        )
    ]
    return [chart for chart in charts if chart]


def _gate_chart(gates: Sequence[Mapping[str, Any]]) -> Markup:
    gaps = _measured_gaps(gates)
    bars = [
        Bar(gap["name"].removesuffix(" − correct"), gap["value"], gap["low"], gap["high"], gap["passed"])
        for gap in gaps
    ]
    thresholds = {gap["threshold"] for gap in gaps if is_number(gap["threshold"])}
    title = "Gap: loss − loss(correct)"
    return interval_chart(bars, "nats per token", title, thresholds.pop() if len(thresholds) == 1 else None)


def _order(run: RunFiles) -> dict[str, bool]:
    order = _mapping(_mapping(run.evidence.get("ablation")).get("order"))
    return {str(name): holds is True for name, holds in order.items()}


def _condition_charts(run: RunFiles) -> list[Markup]:
    losses = _mapping(_mapping(run.evidence.get("ablation")).get("losses"))
    rows = [(name, _mapping(losses.get(name))) for name in CONDITIONS]
    bars = [Bar(name, row["value"], row["low"], row["high"], True if name == "correct" else None)
            for name, row in rows if all(is_number(row.get(key)) for key in ("value", "low", "high"))]  # fmt: skip
    return [interval_chart(bars, "nats per token", "Loss under each condition")] if bars else []


def _gap_history(run: RunFiles) -> Markup:
    lines = run.of_kind("ablation")
    if len(lines) < 2:
        return Markup("")
    series = [Series(name, points(lines, f"gap_{name}"), style, dots=True) for style, name in enumerate(_GATE_KEYS)]
    return line_chart(series, "optimizer step", "nats per token", "Gaps while training")


def _golden_view(run: RunFiles) -> dict[str, Any]:
    """The newest dump's scores and cards."""
    if not run.golden:
        return {}
    step, items = list(run.golden.items())[-1]
    answered = [item for item in items if not item.error]
    return {
        "step": step,
        "scores": score_captions([item.prediction for item in answered], [item.reference for item in answered]),
        "cards": [_card(run, item, step) for item in items],
    }


def _card(run: RunFiles, item: GoldenItem, step: int) -> dict[str, Any]:
    earlier = [(number, old) for number, dump in run.golden.items() if number < step
               for old in dump if old.id == item.id]  # fmt: skip
    kept = earlier[:: max(1, -(-len(earlier) // _HISTORY))]
    return {
        "item": item,
        "pictures": run.thumbnails.get(item.id, []),
        "prompt": item.prompt.replace("<image>", "").strip(),
        "answer": mark_words(item.prediction, item.reference),
        "history": [(number, old.prediction, old.exact) for number, old in kept],
    }


def _table(table: Mapping[str, Any]) -> dict[str, Any]:
    rows = table["rows"]
    columns = list(dict.fromkeys(str(name) for row in rows for name in row))
    return {
        "title": str(table["title"]),
        "note": str(table.get("note") or ""),
        "columns": columns,
        "rows": [[row.get(column) for column in columns] for row in rows],
    }


def _costs(run: RunFiles) -> list[tuple[str, str]]:
    train, final = run.of_kind("train"), run.last("final")
    rates = sorted(value for _, value in points(train, "tokens_per_second"))
    peaks = [value for _, value in points([*train, *run.of_kind("final")], "peak_memory_mib")]
    figures = [
        ("optimizer steps", f"{run.step:,}"),
        ("time", duration(seconds) if (seconds := _total_seconds(run)) else None),
        ("throughput, median", f"{rates[len(rates) // 2]:,.0f} real tokens / s" if rates else None),
        ("peak memory", f"{max(peaks):,.0f} MiB" if peaks else None),
    ]
    for key, label, unit in (
        ("trainable_parameters", "trained parameters", ""),
        ("total_parameters", "parameters in all", ""),
        ("add_on_bytes", "size of the add-on on disk", " bytes"),
        ("tokens", "tokens graded in the last evaluation", ""),
    ):
        figures.append((label, f"{final[key]:,.0f}{unit}" if is_number(final.get(key)) else None))
    return [(label, text) for label, text in figures if text is not None]


def _data_figures(run: RunFiles) -> list[tuple[str, str]]:
    """Truncation, zero labels, label lengths and skipped records."""
    line = ([line for line in run.of_kind(*EVALUATIONS) if "samples" in line] or [{}])[-1]
    figures = [
        (label, f"{line[key]:,.0f}")
        for key, label in (
            ("samples", "samples evaluated"),
            ("truncated", "too long: turns left out, or refused"),
            ("zero_label", "without a label"),
            ("label_length_p50", "answer length, median tokens"),
            ("label_length_p90", "answer length, 90th percentile"),
            ("label_length_max", "answer length, longest"),
        )
        if is_number(line.get(key))
    ]
    return figures + [
        (f"skipped while training: {reason}", f"{count:,}") for reason, count in sorted(run.skipped.items())
    ]


def duration(seconds: float) -> str:
    """75 → "1 min 15 s"; 8,000 → "2 h 13 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if whole < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _total_seconds(run: RunFiles) -> float:
    """The run's own total, or the sum of its lines' seconds."""
    total = run.last("final").get("seconds")
    return float(total) if is_number(total) else sum(value for _, value in points(run.of_kind("train"), "seconds"))


def _eval_config(run: RunFiles) -> dict[str, Any]:
    try:
        return _mapping(_mapping(yaml.safe_load(run.config_text)).get("eval"))
    except (yaml.YAMLError, RecursionError):
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}

"""report.html: one page that says what a run is worth, and shows it.

The verdict first, then the curves, the gates, the golden pictures with reference and answer side by
side, costs, environment and configuration. It is made from the files of the run folder alone, so it
can be written at any moment of a run. One self-contained file: nothing is loaded from anywhere, and
all text is escaped.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from qwen3_vlm.evaluate.caption_scores import score_captions
from qwen3_vlm.evaluate.charts import Series, line_chart
from qwen3_vlm.evaluate.golden import GoldenItem
from qwen3_vlm.evaluate.report_gates import gap_history, gate_chart, gates_of, order_of, picture_charts, verdict_of
from qwen3_vlm.evaluate.report_tokens import (
    condition_charts,
    golden_tasks,
    is_token_run,
    points,
    task_charts,
    text_charts,
)
from qwen3_vlm.evaluate.run_files import RunFiles, is_number, is_picture, mapping_of, read_run
from qwen3_vlm.evaluate.word_marks import mark_words
from qwen3_vlm.storage import atomic_write_text

REPORT_FILE = "report.html"
TEMPLATE = "report_template.html"
EVALUATIONS = ("quick_eval", "eval", "final")  # kinds of lines with an evaluation loss
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}  # as ␛: HTML has no ESC
_HISTORY = 6  # earlier answers shown of a golden prompt, at most


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
        loss_charts=[*_loss_charts(run), *task_charts(run), *text_charts(run)],
        cost_charts=_cost_charts(run),
        gates=gates,
        only_gaps=all(gate["kind"] == "gap" for gate in gates),
        gate_chart=gate_chart(gates),
        condition_charts=[*picture_charts(run), *condition_charts(run)],
        gap_history=gap_history(run),
        order=order_of(run),
        golden=_golden_view(run),
        golden_tasks=golden_tasks(run),
        tables=[_table(table) for table in run.tables],
        costs=_costs(run),
        data=_data_figures(run),
    )
    return page.translate(_CONTROL_PICTURES)


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


def _tiles(run: RunFiles, gates: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(label, text) of the figures at the top."""
    tiles = [(str(head["label"]), str(head["text"])) for table in run.tables
             if {"label", "text"} <= set(head := mapping_of(table.get("headline")))]  # fmt: skip
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

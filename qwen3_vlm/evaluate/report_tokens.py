"""The parts of report.html about tokens: losses by task and of texts, norms of the rows, what was drawn and said.

Each takes the files of a run and gives what the template puts on the page.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from qwen3_vlm.evaluate.charts import STYLES, Bar, Series, interval_chart, line_chart
from qwen3_vlm.evaluate.run_files import Line, RunFiles, is_number, mapping_of, media_name
from qwen3_vlm.evaluate.token_golden import REFERENCE_FOLDER, TokenGoldenItem, score_token_golden
from qwen3_vlm.evaluate.word_marks import mark_words
from qwen3_vlm.tokenization.sequences import SEQUENCES, TEXT, sequence_format

SECTIONS = ("token_ablation", "prompt_ablation")  # of evidence.json: task → its report
HISTORY = 6  # earlier pictures or answers of a prompt, at most
_WORDS = {"text": "words", "image": "picture", "audio": "sound"}


def is_token_run(run: RunFiles) -> bool:
    """Whether anything in the run's folder is of a token LM."""
    return bool(run.token_golden or _tasks(run) or any(section in run.evidence for section in SECTIONS))


def task_charts(run: RunFiles) -> list[Markup]:
    """Losses by task, while training and held out; norms of the new rows."""
    charts = []
    for title, kinds, dots in (
        ("Training loss by task", ("train",), False),
        ("Evaluation loss by task", ("quick_eval", "eval", "final"), True),
    ):
        lines = run.of_kind(*kinds)
        series = [
            Series(task, points(lines, f"loss_{task}"), number % STYLES, dots)
            for number, task in enumerate(_tasks(run))
        ]
        charts.append(line_chart(series, "optimizer step", "nats per token", title))
    for prefix, title in (("", "Norms of the new rows"), ("head_", "Norms of the new head rows")):
        series = [
            Series(name, points(run.of_kind("train"), f"{prefix}row_norm_{name}"), style)
            for style, name in enumerate(("mean", "min", "max"))
        ]
        charts.append(line_chart(series, "optimizer step", "", title, straight=True))
    return [chart for chart in charts if chart]


def text_charts(run: RunFiles) -> list[Markup]:
    """Of the texts that are mixed in: their loss, and how far they are from the base."""
    lines = run.of_kind("train")
    charts = [
        line_chart([Series("training", points(lines, key), 0)], "optimizer step", "nats per token", title)
        for key, title in ((f"loss_{TEXT}", "Loss of texts"), ("text_kl", "KL of text from the base"))
    ]
    return [chart for chart in charts if chart]


def condition_charts(run: RunFiles) -> list[Markup]:
    """One chart of the losses under each condition for every task that was ablated."""
    charts = []
    for section in SECTIONS:
        for task, report in mapping_of(run.evidence.get(section)).items():
            losses = mapping_of(mapping_of(report).get("losses"))
            bars = [
                Bar(str(name), row["value"], row["low"], row["high"], True if name == "correct" else None)
                for name, row in losses.items()
                if isinstance(row, dict) and all(is_number(row.get(key)) for key in ("value", "low", "high"))
            ]
            charts.append(interval_chart(bars, "nats per token", f"{task}: loss under each condition"))
    return [chart for chart in charts if chart]


def golden_tasks(run: RunFiles) -> list[dict[str, Any]]:
    """The newest dump, task by task: a title, scores in words, and a card for each prompt."""
    if not run.token_golden:
        return []
    step, items = list(run.token_golden.items())[-1]
    known = [item for item in items if item.task in SEQUENCES]
    scores = score_token_golden(known)
    return [
        {
            "step": step,
            "title": f"{task}: {_direction(task)}",
            "scores": _score_cells(scores[task]),
            "cards": [_card(run, item, step) for item in known if item.task == task],
        }
        for task in scores
    ]


def points(lines: Sequence[Line], key: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that have a number there."""
    return [(float(line["step"]), float(line[key])) for line in lines if is_number(line.get(key))]


def _tasks(run: RunFiles) -> list[str]:
    """The tasks that any line tells a loss of."""
    lines = [line for kind in ("train", "quick_eval", "eval", "final") for line in run.lines.get(kind, [])]
    return [task for task in SEQUENCES if any(is_number(line.get(f"loss_{task}")) for line in lines)]


def _direction(task: str) -> str:
    wanted = sequence_format(task)
    noise = f", {wanted.noise_rate:.0%} of the ids replaced," if wanted.noise_rate else ""
    return f"{_WORDS[wanted.source]}{noise} to {_WORDS[wanted.target]}"


def _score_cells(scores: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(label, cell) of a task's scores."""
    cells: list[tuple[str, Any]] = [("decoded", f"{scores['decoded']} of {scores['n']}")]
    for key, label in (("exact_match", "exact"), ("match", "ids as in the reference")):
        if scores.get(key) is not None:
            interval = {"percent": scores[key], "low": scores[f"{key}_low"], "high": scores[f"{key}_high"]}
            cells.append((label, interval))
    if scores.get("cider_d") is not None:
        cells.append(("CIDEr-D of 10", f"{scores['cider_d']:.2f}"))
    return cells


def _card(run: RunFiles, item: TokenGoldenItem, step: int) -> dict[str, Any]:
    """What is given, the reference and what was made of it, each with a text or a picture or sound."""
    wanted = sequence_format(item.task)
    is_text = wanted.target == "text"
    prediction = mark_words(item.prediction, item.reference) if is_text else item.prediction
    history = [
        (number, old.prediction if is_text else "", run.media.get(media_name(number, old.prediction_file)))
        for number, dump in run.token_golden.items()
        if number < step
        for old in dump
        if old.id == item.id
    ]
    kept = history[:: max(1, -(-len(history) // HISTORY))]
    return {
        "item": item,
        "exact": item.exact if is_text else None,
        "sides": [
            _side("given", wanted.source, item.prompt, run, f"{REFERENCE_FOLDER}/{item.source_file}"),
            _side("reference", wanted.target, item.reference, run, f"{REFERENCE_FOLDER}/{item.reference_file}"),
            _side("generated", wanted.target, prediction, run, media_name(step, item.prediction_file)),
        ],
        "history": [entry for entry in kept if is_text or entry[2]],
    }


def _side(label: str, modality: str, text: str, run: RunFiles, name: str) -> dict[str, Any]:
    return {
        "label": label,
        "kind": modality,
        "text": text if modality == "text" else "",
        "media": run.media.get(name),
        "title": "" if modality == "text" else text,
    }

"""Tables of results of `qwen3-vlm eval`: what the report shows, and the terminal.

A table is what `evaluate.run_files` reads from results/*.json: title, order, note, rows of cells.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3_vlm.evaluate.gates import gate_figures
from qwen3_vlm.evaluate.metrics import LossReport
from qwen3_vlm.storage import atomic_write_json

PREFIX = "eval_"  # of the files, so that a new evaluation replaces an old one and nothing else


@dataclass
class Table:
    """One table. `name` is its file's, `notes` are sentences."""

    name: str
    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_text(self) -> str:
        """For a terminal: a line per row."""
        lines = [f"{self.title}:"]
        for row in self.rows:
            cells = [f"{name} {_text(value)}" for name, value in row.items() if value not in (None, "")]
            lines.append("  " + ", ".join(cells))
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def write_tables(folder: Path, tables: Sequence[Table], origin: str) -> list[Path]:
    """Write results/eval_*.json of a run folder; those of an earlier evaluation go.

    Args:
        origin: a sentence that says what was measured; it begins each note.

    Raises:
        StorageError: the disk can't be written.
    """
    written = []
    for number, table in enumerate(tables):
        path = folder / f"{PREFIX}{table.name}.json"
        note = " ".join([origin, *table.notes])
        atomic_write_json(path, {"title": table.title, "order": 20 + number, "note": note, "rows": table.rows})
        written.append(path)
    for old in set(folder.glob(f"{PREFIX}*.json")) - set(written):
        old.unlink()
    return written


def loss_row(name: str, report: LossReport, confidence: float) -> dict[str, Any]:
    """Loss with its interval, what it is over, and what was left out."""
    row: dict[str, Any] = {"of": name, "samples": report.samples, "tokens": report.tokens}
    row["nats per token"] = report.interval(confidence).to_dict() if report.samples else None
    left_out = sum(report.skipped.values()) + report.zero_label
    return row | ({"left out": left_out} if left_out else {})


def gate_table(gates: Iterable[Mapping[str, Any]]) -> Table:
    """One row per gate."""
    rows = [
        {"gate": gate["name"], "passed": bool(gate["passed"]), "figures": gate_figures(gate), "why": gate["reason"]}
        for gate in gates
    ]
    return Table("gates", "Gates, measured again", rows)


def caption_rows(scores: Mapping[str, Mapping[str, Any]], label: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of `score_languages`, one per language; `label` are the first cells of each."""
    return [
        {
            **label,
            "language": language or "–",
            "captions": part["n"],
            "exact": share(part["exact_match"], part["exact_match_low"], part["exact_match_high"]),
            "CIDEr-D of 10": {"value": part["cider_d"], "low": part["cider_d_low"], "high": part["cider_d_high"]},
        }
        for language, part in scores.items()
    ]


def share(value: float, low: float, high: float) -> dict[str, float]:
    """A cell of per cent."""
    return {"percent": value, "low": low, "high": high}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, dict):
        scale, unit = (100, " %") if "percent" in value else (1, "")
        figures = [value.get(name) for name in ("percent" if unit else "value", "low", "high")]
        texts = [f"{scale * figure:.1f}" if unit else f"{figure:.3g}" for figure in figures if figure is not None]
        return texts[0] + unit + (f" [{texts[1]}, {texts[2]}]" if len(texts) == 3 else "")
    return f"{value:.4g}" if isinstance(value, float) else str(value)

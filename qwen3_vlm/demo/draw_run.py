"""Stage 4 of the guided run: the text base gets an adapter, and learns to draw and to speak; the gates, and the scores.

It calls what a real run calls: `data tokenize` and its audit make the shards, `train(config)` trains rows and adapter
and runs the gates, `qwen3-vlm eval` generates and judges. The demo's own is the verdict: what was promised of its
figures.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from qwen3_vlm.config import RunConfig, load_config
from qwen3_vlm.demo.draw_dataset import DrawSizes, build
from qwen3_vlm.demo.paths import BASES, CONFIGS
from qwen3_vlm.demo.token_run import tokenize_parts
from qwen3_vlm.errors import GateError
from qwen3_vlm.storage import read_json
from qwen3_vlm.train.eval_options import EvalOptions

CONFIG = CONFIGS / "demo_stage4.yaml"
SIZES = DrawSizes()
WRITTEN = {"t2i": "neat", "t2a": "spoken", "a2i": "heard", "i2a": "spoken"}  # task → its part of the data set
READ = {"i2t": "pictures", "a2t": "phrases"}  # those of stage 3
OPTIONS = (
    EvalOptions(  # temperature, top_p and guidance were chosen on scenes of another seed than those that are judged
        samples=200, sounds=60, gates=False, temperature=0.5, top_p=0.9, guidance=1.5, vision_tower=str(BASES / "tower")
    )
)
ROUND_TRIP = "of the codec's round trip"  # a column of the table of sounds
DEMANDED_FIRST = 0.5  # of the drawn pictures: the share whose own reference resembles them most
DEMANDED_RATIO = 1.5  # of the spoken phrases: word errors ÷ those of the codec's round trip, at most


@dataclass(frozen=True)
class Results:
    """What is judged: the tables of `qwen3-vlm eval` by name, and stage 3's held-out losses of what it could read."""

    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    before: Mapping[str, float]

    def row(self, table: str, task: str) -> Mapping[str, Any]:
        """The row of a task; empty where there is none."""
        return next((row for row in self.tables.get(table, ()) if task in (row.get("task"), row.get("of"))), {})

    def short(self) -> list[str]:
        """What falls short of the demo's promises."""
        found = []
        first = self.row("pictures", "t2i").get("own reference first", {}).get("percent", 0.0)
        if first < DEMANDED_FIRST:
            found.append(f"pictures nearest to their own reference {first:.0%} < {DEMANDED_FIRST:.0%}")
        ratio = self.row("sounds", "t2a").get("ratio", {}).get("value")
        if ratio is None or ratio > DEMANDED_RATIO:
            figure = "not measured" if ratio is None else f"{ratio:.2f}"
            found.append(f"word errors ÷ round trip {figure}, not ≤ {DEMANDED_RATIO}")
        for task, before in self.before.items():
            loss = self.row("loss", task).get("nats per token") or {"value": float("inf"), "low": float("inf")}
            if loss["low"] > before:
                found.append(f"{task} is worse than after stage 3: {loss['value']:.3f} > {before:.3f} nats a token")
        return found


def run_draw(out: Path, rows: Path, console: Console) -> Path | None:
    """Build the data, train, generate and judge; the trained add-on, or None where a signal ended it.

    Args:
        out: of the whole demo: stage 3 left its tokens and its token space there.
        rows: of stage 3: training starts from them.

    Raises:
        DataError: the shards do not pass their audit.
        GateError: a gate failed, or what is drawn and said is worse than the demo promises.
    """
    from qwen3_vlm.evaluate.gates import describe_gate
    from qwen3_vlm.train.eval_run import evaluate_run
    from qwen3_vlm.train.train_utils import train

    console.print("[bold]Stage 4[/] Drawings, a voice and names as tokens; the rows go on, an adapter joins them")
    build(out / "draw_data", SIZES)
    tokenize_parts(out / "draw_data", out / "draw_tokens", out / "space", parts_of(WRITTEN.values()))
    result = train(draw_config(out, rows))
    if result.add_on_dir is None:
        return None
    console.print("It draws and speaks what training never put together")
    evaluation = evaluate_run(Path(result.output_dir), options=OPTIONS)
    gates = (result.evidence or {}).get("gates", [])
    for gate in gates:
        console.print(f"gate: {gate['name']}: {describe_gate(gate)}", markup=False)
    results = Results({table.name: table.rows for table in evaluation.tables}, reading_losses(rows))
    console.print(results_table(results))
    console.print(f"Report: {evaluation.report}", soft_wrap=True)
    check(gates, results)
    return Path(result.add_on_dir)


def parts_of(names: Any) -> list[str]:
    """Names of manifests: training and held out."""
    return [part for name in dict.fromkeys(names) for part in (name, f"{name}_unseen")]


def draw_config(out: Path, rows: Path) -> RunConfig:
    """`configs/demo_stage4.yaml` with its folders below `out`."""
    homes = {**dict.fromkeys(READ.values(), "tokens"), **dict.fromkeys(WRITTEN.values(), "draw_tokens")}
    folders = {part: str(out / home / part) for name, home in homes.items() for part in parts_of([name])}
    values: dict[str, Any] = {
        "model.llm": BASES / "text",
        "rows.add_on": rows,
        "text.files": [str(out / "draw_data" / "texts.jsonl")],
        "tokens.folders": list(folders.values()),
        "output_dir": out / "draw_run",
    }
    for task, name in {**READ, **WRITTEN}.items():
        values[f"tokens.tasks.{task}.folders"] = [folders[part] for part in parts_of([name])]
    return load_config(CONFIG, [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()])


def reading_losses(rows: Path) -> dict[str, float]:
    """Stage 3's held-out losses, from its run: the records are the same."""
    figures = read_json(rows.parent / "result.json", error=GateError)["eval"]
    return {task: float(figures[f"loss_{task}"]) for task in READ}


def results_table(results: Results) -> Grid:
    """One line per task, for a terminal."""
    grid = Grid("", "held out", "to compare with", title="Stage 4")
    for task, before in results.before.items():
        loss = results.row("loss", task).get("nats per token") or {}
        grid.add_row(f"{task}: nats per token", _interval(loss, 1, 3), f"{before:.3f} after stage 3")
        exact = results.row("texts", task).get("exact", {})
        grid.add_row(f"{task}: exact, %", _interval(exact, 100, 1), "")
    for task in ("t2i", "a2i"):
        row = results.row("pictures", task)
        first, chance = row.get("own reference first", {}), row.get("first by chance", {}).get("percent", 0.0)
        among = f"{100 * chance:.1f} by chance, among {row.get('of', 0)}"
        grid.add_row(f"{task}: own reference first, %", _interval(first, 100, 1), among)
    for task in ("t2a", "i2a"):
        row = results.row("sounds", task)
        trip = _interval(row.get(ROUND_TRIP, {}), 100, 1)
        grid.add_row(f"{task}: word errors, %", _interval(row.get("word errors", {}), 100, 1), f"{trip} {ROUND_TRIP}")
        grid.add_row(f"{task}: ratio of the two", _interval(row.get("ratio", {}), 1, 2), "")
    return grid


def check(gates: Sequence[Mapping[str, Any]], results: Results) -> None:
    """Raise what falls short.

    Raises:
        GateError: names it.
    """
    short = [f"gate {gate['name']}" for gate in gates if not gate["passed"]] + ([] if gates else ["no gate was run"])
    short += results.short()
    if short:
        raise GateError(f"Stage 4 of the demo falls short of what it promises: {'; '.join(short)}.")


def _interval(cell: Mapping[str, float], scale: float, digits: int) -> str:
    value = cell.get("percent", cell.get("value"))
    if value is None:
        return "not measured"
    low, high = (f"{scale * cell[end]:.{digits}f}" for end in ("low", "high"))
    return f"{scale * value:.{digits}f} ({low}–{high})"

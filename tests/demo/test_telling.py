"""What a stage of the guided run tells: gates, a table, and a report that is there."""

import io
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qwen3_vlm.config import RunConfig, dump_yaml
from qwen3_vlm.demo.telling import percent, tell
from qwen3_vlm.evaluate.gates import equality_gate
from qwen3_vlm.evaluate.intervals import Interval
from qwen3_vlm.train.train_utils import TrainResult


def test_gates_then_the_table_then_the_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_yaml(RunConfig()))
    (tmp_path / "metrics.jsonl").write_text("")
    gates = [equality_gate("parameter integrity", "tensors", 0, 24), equality_gate("text identity", "texts", 3, 32)]
    table, console = Table("held-out answers"), Console(file=io.StringIO(), width=100)
    table.add_row(percent(Interval(0.815, 0.78, 0.8456)))
    assert tell(TrainResult(tmp_path, 9, evidence={"gates": gates}), table, console) == gates
    told = console.file.getvalue()  # type: ignore[attr-defined]
    order = ["gate: parameter integrity: ", "gate: text identity: ", "81.5 (78.0–84.6)", f"Report: {tmp_path}"]
    assert sorted(order, key=told.index) == order
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert tell(TrainResult(tmp_path, 9), table, console) == []

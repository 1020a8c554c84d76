"""How the later stages of the guided run tell what came of them: the report, the gates, a table."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from qwen3_vlm.evaluate.intervals import Interval

if TYPE_CHECKING:
    from qwen3_vlm.train.train_utils import TrainResult


def tell(result: "TrainResult", table: Table, console: Console) -> list[dict[str, Any]]:
    """Write the report anew; print each gate, the table and where the report is. The gates."""
    from qwen3_vlm.evaluate.gates import describe_gate
    from qwen3_vlm.evaluate.report import write_report

    report = write_report(result.output_dir)
    gates: list[dict[str, Any]] = (result.evidence or {}).get("gates", [])
    for gate in gates:
        console.print(f"gate: {gate['name']}: {describe_gate(gate)}", markup=False)
    console.print(table)
    console.print(f"Report: {report}", soft_wrap=True)
    return gates


def percent(it: Interval) -> str:
    """A share and its interval, such as "81.5 (78.0–84.6)"."""
    return f"{100 * it.value:.1f} ({100 * it.low:.1f}–{100 * it.high:.1f})"

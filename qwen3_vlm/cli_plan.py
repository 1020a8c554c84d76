"""`qwen3-vlm plan …`: what a run would need and cost, from its config alone.

Like `cli`, the command parses its arguments, calls one function and prints; what it needs is imported inside it.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qwen3_vlm.train.planner import Plan, Way

WIDTH = 25  # of a column


def plan(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/stage1_align.yaml.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as optim.batch_size=8.")
    ] = None,
    gpus: Annotated[str, typer.Option(help="Number and kind, such as 8xH100 or 1x4090.")] = "1xH100",
    samples: Annotated[int | None, typer.Option(min=1, help="Records of the data set.")] = None,
    tokens_per_sample: Annotated[float | None, typer.Option(min=1, help="On average, image tokens included.")] = None,
    graded_per_sample: Annotated[float | None, typer.Option(min=0, help="Tokens with a loss, on average.")] = None,
    new_rows: Annotated[
        int | None, typer.Option(min=1, help="New vocabulary rows, where no tokens are there yet.")
    ] = None,
    utilisation: Annotated[float | None, typer.Option(min=0.01, max=1, help="Executed FLOPs ÷ peak.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of one GPU for an hour, in any currency.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Say what a run would need and cost: parameters, memory, FLOPs, hours; which ways to run it fit."""
    from qwen3_vlm.config import load_config
    from qwen3_vlm.train.planner import Assumptions
    from qwen3_vlm.train.planner import plan as run
    from qwen3_vlm.train.planner_hardware import parse_cluster

    given = Assumptions(samples, tokens_per_sample, graded_per_sample, new_rows, utilisation, price)
    found = run(load_config(config, overrides or []), parse_cluster(gpus), given)
    print(json.dumps(found.to_dict(), indent=2) if as_json else format_plan(found))


def format_plan(plan: "Plan") -> str:
    """The plan as text."""
    tower = f" + {plan.vision_tower}" if plan.vision_tower else ""
    parts = [f"{plan.stage}: {plan.llm}{tower} on {plan.cluster}", _parameters(plan), _work(plan), _ways(plan)]
    return "\n\n".join([*parts, _verdict(plan), "\n".join(plan.remarks)])


def _parameters(plan: "Plan") -> str:
    lines = [f"{'parameters':<18}{'trainable':>16}{'frozen':>18}"]
    total = tuple(sum(column) for column in zip(*plan.parameters.values(), strict=True))
    for name, (trainable, frozen) in [*plan.parameters.items(), ("total", total)]:
        lines.append(f"{name:<18}{trainable:>16,}{frozen:>18,}")
    return "\n".join(lines)


def _work(plan: "Plan") -> str:
    data, batch = plan.data, plan.batch
    content = f"{batch.samples:.1f} samples" + (f", {batch.pictures:.1f} pictures" if batch.pictures else "")
    longest = f"; memory is for {plan.longest.length}" if plan.longest.length > batch.length else ""
    epochs = f" × {plan.epochs} epochs" if plan.epochs > 1 else ""
    return "\n".join(
        [
            f"data   {data.samples:,} samples{epochs}, {data.tokens:.0f} tokens each, {data.graded:.0f} graded",
            f"       ({data.source})",
            f"batch  {batch.rows} rows × {batch.length} positions per GPU: {content}{longest}",
            f"steps  {plan.steps:,} of {plan.samples_per_step:,.0f} samples",
        ]
    )


def _ways(plan: "Plan") -> str:
    ways = plan.ways
    rows = [("GB per GPU", [way.name for way in ways])]
    for part in type(ways[0].memory).__slots__:
        rows += [(f"  {part.replace('_', ' ')}", [f"{getattr(way.memory, part) / 1e9:.2f}" for way in ways])]
    rows.append(("  in all", [f"{way.memory_bytes / 1e9:.2f}" for way in ways]))
    room = plan.cluster.device.memory_bytes / 1e9
    rows.append((f"fits in {room:.0f} GB", ["yes" if way.fits else "no" for way in ways]))
    rows.append(("largest batch_size", [f"{way.largest_batch_size}" for way in ways]))
    rows.append(("TFLOP per step", [f"{way.executed_flops / 1e12:,.1f}" for way in ways]))
    rows.append(("  of them useful", [f"{way.useful_flops / way.executed_flops:.0%}" for way in ways]))
    rows.append(("seconds per step", [f"{way.step_seconds:.3g}" for way in ways]))
    rows.append(("  communication", [f"{way.communication_share:.0%}" for way in ways]))
    rows.append(("tokens per second", [f"{way.tokens_per_second:,.0f}" for way in ways]))
    rows.append(("time", [_duration(way.hours) for way in ways]))
    rows.append(("GPU hours", [f"{way.device_hours:,.1f}" for way in ways]))
    if ways[0].cost is not None:
        rows.append(("cost", [f"{way.cost:,.2f}" for way in ways]))
    return "\n".join(f"{name:<20}" + "".join(f"{value:>{WIDTH}}" for value in values) for name, values in rows)


def _verdict(plan: "Plan") -> str:
    best = plan.best
    if best is not None:
        cost = "" if best.cost is None else f", {best.cost:,.2f} at the given price"
        return (
            f"Quickest that fits: {best.name}, {_duration(best.hours)}{cost}, "
            f"at an assumed {plan.utilisation:.0%} of {plan.cluster.device.peak_flops / 1e12:,.0f} TFLOP/s."
        )
    room: Way = max(plan.ways, key=lambda way: way.largest_batch_size)
    if room.largest_batch_size:
        return f"Nothing fits as it is; {room.name} with optim.batch_size={room.largest_batch_size} would."
    return "Nothing fits, not even one row at a time: more devices, larger ones, or a smaller base are needed."


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"

"""The grid of learning rates × vision_ln, one run folder each, ranked by what matters.

score = eval loss − gap_weight · (Δshuffle + Δzero): a low loss counts, and so does a connector that
really uses the picture. A sweep that was stopped goes on where it was; finished runs are not repeated.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from qwen3_vlm.config import RunConfig, to_dict
from qwen3_vlm.errors import ConfigError, DivergenceError, StorageError
from qwen3_vlm.storage import atomic_write_json, read_json
from qwen3_vlm.train.train_utils import train


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One point of the grid. Figures are None where the run diverged or the gates could not be measured."""

    name: str
    learning_rate: float
    vision_ln: bool
    loss: float | None
    gap_shuffled: float | None  # nats per token
    gap_zero: float | None
    score: float | None
    gates_passed: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class SweepResult:
    """The runs, best first; `finished` is False if a signal stopped the sweep."""

    runs: tuple[SweepRun, ...]
    finished: bool
    folder: Path

    def __str__(self) -> str:
        head = f"{'rank':<5}{'run':<26}{'score':>9}{'loss':>9}{'Δshuffle':>10}{'Δzero':>9}  gates"
        lines = [head]
        for rank, run in enumerate(self.runs, start=1):
            figures = f"{_number(run.score):>9}{_number(run.loss):>9}{_number(run.gap_shuffled):>10}"
            verdict = run.note or ("passed" if run.gates_passed else "failed")
            lines.append(f"{rank:<5}{run.name:<26}{figures}{_number(run.gap_zero):>9}  {verdict}")
        if not self.finished:
            lines.append("Stopped by a signal; the same command goes on.")
        return "\n".join(lines)


def sweep(config: RunConfig) -> SweepResult:
    """Train every point of `config.sweep` below `config.output_dir`, rank them and write sweep.json.

    Raises:
        Qwen3VLMError: as `train` does, but a run that diverges is noted and the sweep goes on.
    """
    if config.stage != "stage1_align":
        raise ConfigError(f"The sweep is over settings of stage1_align; {config.stage} has none of them.")
    folder = Path(config.output_dir)
    runs: list[SweepRun] = []
    finished = True
    for rate, vision_ln in itertools.product(config.sweep.learning_rates, config.sweep.vision_ln):
        run_config = _point(config, rate, vision_ln)
        evidence, note = _finished_evidence(run_config), ""
        if evidence is None:
            try:
                evidence = train(run_config, cache_dir=folder / "cache").evidence
                finished = evidence is not None
            except DivergenceError as problem:
                note = f"diverged: {problem}"
        if not finished:
            break
        runs.append(_judge(run_config, evidence or {}, note))
    ranked = tuple(sorted(runs, key=lambda run: (run.score is None, run.score or 0.0, run.name)))
    result = SweepResult(ranked, finished, folder)
    if PartialState().is_main_process:
        rows = [dataclasses.asdict(run) for run in ranked]
        about = {"format": 1, "gap_weight": config.sweep.gap_weight, "finished": finished}
        atomic_write_json(folder / "sweep.json", {**about, "runs": rows})
    return result


def _point(config: RunConfig, rate: float, vision_ln: bool) -> RunConfig:
    """The config of one run; its rate may lie below the base config's final rate."""
    name = f"lr-{rate:g}_vision-ln-{'on' if vision_ln else 'off'}"
    optim = dataclasses.replace(
        config.optim, learning_rate=rate, min_learning_rate=min(config.optim.min_learning_rate, rate)
    )
    model = dataclasses.replace(config.model, vision_ln=vision_ln)
    return dataclasses.replace(config, output_dir=str(Path(config.output_dir) / name), model=model, optim=optim)


def _finished_evidence(config: RunConfig) -> dict[str, Any] | None:
    """The evidence of a run that ended with this very config."""
    path = Path(config.output_dir) / "result.json"
    if not path.exists():
        return None
    result = read_json(path, error=StorageError)
    same = result.get("config") == to_dict(config)
    return result.get("evidence") if same else None


def _judge(config: RunConfig, evidence: dict[str, Any], note: str) -> SweepRun:
    ablation = evidence.get("ablation") or {}
    losses = {name: interval["value"] for name, interval in (ablation.get("losses") or {}).items()}
    gaps = {name: losses[name] - losses["correct"] if losses else None for name in ("shuffled", "zero")}
    loss = (evidence.get("eval") or {}).get("loss")
    score = None
    if loss is not None and gaps["shuffled"] is not None and gaps["zero"] is not None:
        score = loss - config.sweep.gap_weight * (gaps["shuffled"] + gaps["zero"])
    return SweepRun(
        name=Path(config.output_dir).name,
        learning_rate=config.optim.learning_rate,
        vision_ln=config.model.vision_ln,
        loss=loss,
        gap_shuffled=gaps["shuffled"],
        gap_zero=gaps["zero"],
        score=score,
        gates_passed=bool(ablation.get("passed")),
        note=note or ("" if score is not None else "not measured"),
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"

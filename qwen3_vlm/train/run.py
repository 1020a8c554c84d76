"""A run: its parts, how each of them is built, and what it leaves on disk.

output_dir/
  config.yaml  environment.json  split.json  metrics.jsonl  skipped.jsonl  tensorboard/  cache/
  checkpoints/step-000200/   golden/   connector/ or rows/   report.html   result.json
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object

from qwen3_vlm.config import RunConfig, dump_yaml, to_dict
from qwen3_vlm.errors import StorageError
from qwen3_vlm.evaluate.environment import describe_environment
from qwen3_vlm.evaluate.report import write_report
from qwen3_vlm.folder_lock import FolderLock
from qwen3_vlm.models.precision import bf16_is_fast
from qwen3_vlm.models.quantization import parameter_count
from qwen3_vlm.storage import atomic_directory, atomic_write_json, atomic_write_text, remove_leftovers, storage_error
from qwen3_vlm.train.checkpoint import (
    Checkpoints,
    SavedState,
    optimizer_tensors,
    restore_rng,
    rng_state,
    run_identity,
)
from qwen3_vlm.train.evaluations import evidence
from qwen3_vlm.train.recipe import Plan, Recipe, RunData, RunEvaluations
from qwen3_vlm.train.run_log import RunLog
from qwen3_vlm.train.stages import Stage
from qwen3_vlm.train.text_anchor import TextAnchor

LONGEST_WAIT = timedelta(hours=3)  # of the other ranks while one decodes or builds a cache


@dataclass
class Run:
    """A run that goes on. `wrapped` is what Accelerate made of `model` (DDP, FSDP), or `model` itself."""

    config: RunConfig
    folder: Path
    accelerator: Accelerator
    recipe: Recipe
    stage: Stage
    model: Any
    wrapped: Any
    optimizer: Any
    data: RunData
    plan: Plan
    checkpoints: Checkpoints
    evaluations: RunEvaluations
    log: RunLog
    anchor: TextAnchor | None = None  # what holds text at the base
    step: int = 0
    counters: dict[str, float] = field(default_factory=dict)  # of the whole run, and `window_…` since the last log line
    last_eval: dict[str, Any] = field(default_factory=dict)
    evaluated: bool = True  # whether the evaluations that are due at `step` have been done
    audited: bool = False  # whether gradients were seen to reach what the stage trains
    clock: float = field(default_factory=time.monotonic)


def make_accelerator(config: RunConfig) -> tuple[Accelerator, str | None]:
    """Accelerate's handle on the ranks, and a remark if bf16 autocast was asked for where it does not pay."""
    on_cpu = not torch.accelerator.is_available()  # Accelerate must be told, or ranks on a CPU do not find each other
    device = PartialState(cpu=on_cpu, timeout=LONGEST_WAIT).device
    wanted = config.optim.mixed_precision
    precision = "bf16" if wanted == "bf16" and bf16_is_fast(device) else "no"
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # an earlier run in this process used another precision
    handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    remark = f"No bf16 autocast: this {device.type} has no fast bf16 arithmetic." if precision != wanted else None
    return Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=handlers), remark


def open_folder(config: RunConfig, accelerator: Accelerator, lock: FolderLock) -> Path:
    """The run folder, locked by the main process; an old run steps aside if not resumed.

    Raises:
        StorageError: it can't be written, or another run is writing to it.
    """
    folder = Path(config.output_dir)
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(folder)
            if not config.resume and (folder / "checkpoints").exists():
                _move_aside(folder)
                folder.mkdir()
                lock.acquire(folder)
        except OSError as problem:
            raise storage_error(problem, folder) or StorageError(f"{folder} can't be made: {problem}.") from problem
        remove_leftovers(folder)
    accelerator.wait_for_everyone()
    return folder


def _move_aside(folder: Path) -> None:
    number = 1
    while (old := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(old)


def describe_run(run: Run) -> None:
    """config.yaml and environment.json."""
    if run.accelerator.is_main_process:
        atomic_write_text(run.folder / "config.yaml", dump_yaml(run.config))
        atomic_write_json(run.folder / "environment.json", describe_environment())


def make_optimizer(config: RunConfig, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW over what the stage trains."""
    optim = config.optim
    return torch.optim.AdamW(
        groups,
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )


def adopt_state(run: Run, saved: SavedState) -> None:
    """Take position, counters and random states from a checkpoint."""
    values = saved.values
    run.step = saved.step
    run.counters = dict(values["counters"])
    run.last_eval = dict(values["last_eval"])
    run.evaluated, run.audited = bool(values["evaluated"]), bool(values["audited"])
    ranks = values["rng"]
    if run.accelerator.process_index < len(ranks):
        restore_rng(ranks[run.accelerator.process_index])


def save_checkpoint(run: Run) -> None:
    """Everything that the next step depends on, written by the main process; collective.

    Raises:
        StorageError: the disk is full or can't be written; earlier checkpoints are untouched.
    """
    rng = gather_object([rng_state()]) if run.accelerator.num_processes > 1 else [rng_state()]
    tensors, moments = run.recipe.tensors(run.model), optimizer_tensors(run.model, run.optimizer)
    values = {
        "identity": run_identity(to_dict(run.config), run.accelerator.num_processes, run.data.fingerprint),
        "logs": run.log.sizes(),
        "counters": run.counters,
        "last_eval": run.last_eval,
        "evaluated": run.evaluated,
        "audited": run.audited,
        "rng": rng,
    }
    figures = evidence(run.step, loss=run.last_eval)

    def fill(folder: Path) -> None:
        run.recipe.write(folder, run.model, tensors, figures, details(run))

    if run.accelerator.is_main_process:
        run.checkpoints.save(run.step, values, moments, fill)
    run.accelerator.wait_for_everyone()
    run.clock = time.monotonic()


def write_results(run: Run, loss: dict[str, Any], gates: dict[str, Any], golden: dict[str, Any]) -> dict[str, Any]:
    """The add-on, the final line of metrics.jsonl, result.json and report.html; returns the evidence. Collective."""
    figures = evidence(run.step, loss=loss, gates=gates, golden=golden)
    tensors = run.recipe.tensors(run.model)
    if run.accelerator.is_main_process:
        folder = run.folder / run.recipe.add_on
        with atomic_directory(folder) as temporary:
            run.recipe.write(temporary, run.model, tensors, figures, details(run))
        sizes = [sum(map(parameter_count, group)) for group in (tensors.values(), run.model.parameters())]
        final = {
            "loss": loss.get("loss"),
            "trainable_parameters": sizes[0],
            "total_parameters": sizes[1],
            "seconds": run.counters.get("seconds"),
            "peak_memory_mib": peak_memory_mib(run.accelerator.device),
            "add_on_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        }
        run.log.write("final", run.step, final)
        atomic_write_json(
            run.folder / "result.json",
            {"step": run.step, "eval": loss, "evidence": figures, "config": to_dict(run.config)},
        )
        run.log.say(f"The add-on is in {folder}; the report is {write_report(run.folder)}.")
    run.accelerator.wait_for_everyone()
    return figures


def details(run: Run) -> dict[str, Any]:
    """What the add-on's description says of where it comes from."""
    return {
        "stage": run.config.stage,
        "step": run.step,
        "seed": run.config.seed,
        "dtype": run.config.model.dtype,
        **({"quantization": run.config.model.quantization} if run.config.model.quantization else {}),
        "data": {"fingerprint": run.data.fingerprint, **run.data.counts()},
        "versions": describe_environment()["packages"],
    }


def peak_memory_mib(device: torch.device) -> float:
    """Highest memory use of this process so far: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def judged_bad(skipped: int, seen: int, planned: int, allowed: float, settle: int = 1_000) -> bool:
    """Whether too many of the records are bad: of those seen, or of the first `settle` (all, if fewer) meanwhile."""
    return skipped > allowed * max(seen, min(planned, settle))


__all__: Sequence[str] = (
    "Run",
    "adopt_state",
    "describe_run",
    "details",
    "judged_bad",
    "make_accelerator",
    "make_optimizer",
    "open_folder",
    "peak_memory_mib",
    "save_checkpoint",
    "write_results",
)

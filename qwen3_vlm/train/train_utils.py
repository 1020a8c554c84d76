"""train(config): teach an add-on, on one process or many, and leave the evidence.

    build bases + fresh add-on → freeze, print and check what trains → open the data → resume?
      → each optimizer step: count labels over all ranks, forward/backward per micro-batch, clip, update
      → evaluate, dump golden answers, save → gates → add-on directory, report

The loss of a step is divided by the number of supervised tokens in the *whole* step (those of a weight above 0), all
micro-batches and ranks together, so splitting it differently changes nothing. What is trained, and on what, is the
recipe's business. Everything that a
step depends on is in the config, the data and the checkpoint, so a killed run goes on bit for bit.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3_vlm.config import OptimConfig, RunConfig, to_dict
from qwen3_vlm.data.collate import Batch
from qwen3_vlm.errors import DataError, DivergenceError
from qwen3_vlm.folder_lock import FolderLock
from qwen3_vlm.train.checkpoint import Checkpoints, require_same_run, restore_optimizer, run_identity
from qwen3_vlm.train.data_source import empty_micro_batch
from qwen3_vlm.train.recipe import make_recipe
from qwen3_vlm.train.run import (
    Run,
    adopt_state,
    describe_run,
    judged_bad,
    make_accelerator,
    make_optimizer,
    open_folder,
    peak_memory_mib,
    save_checkpoint,
    write_results,
)
from qwen3_vlm.train.run_log import RunLog
from qwen3_vlm.train.signals import StopSignals
from qwen3_vlm.train.stages import apply_stage, audit_gradients, format_table, stage_of
from qwen3_vlm.train.step_plan import RankStep
from qwen3_vlm.train.task_sums import TaskSums, task_means


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to. `add_on_dir` and `evidence` are None if a signal stopped it before its end."""

    output_dir: Path
    step: int
    eval: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] | None = None
    add_on_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Counts over all micro-batches and ranks of a step; `stop` when any rank was asked to stop."""

    labels: int
    tokens: int
    samples: int
    media: int  # pictures and sounds
    texts: int  # tokens of text-only samples that are held at the base
    skipped: int
    stop: bool


def train(config: RunConfig, *, cache_dir: Path | None = None) -> TrainResult:
    """Train what `config.stage` declares and write the run folder `config.output_dir`.

    `cache_dir` keeps record lengths between runs over the same data; None means `cache/` in the run folder.

    SIGTERM or SIGINT lets the current step end, saves and returns; the same call goes on from there.

    Raises:
        ConfigError, DataError, ModelError, CheckpointError, StorageError, TrainabilityError: each a
            sentence that says what to do.
    """
    with StopSignals() as signals, FolderLock() as lock:
        run = start_run(config, lock, cache_dir)
        try:
            finished = _train_steps(run, signals) and _finish(run, signals)
            if finished:
                return finished
            run.log.say(f"Stopped by a signal and saved at step {run.step:,}; the same command goes on from there.")
            return TrainResult(run.folder, run.step, eval=run.last_eval)
        finally:
            run.log.close()


def start_run(config: RunConfig, lock: FolderLock, cache_dir: Path | None = None) -> Run:
    """Everything that a run needs, from its newest checkpoint on if there is one; `lock` then holds its folder."""
    accelerator, remark = make_accelerator(config)
    folder = open_folder(config, accelerator, lock)
    log = RunLog(folder, active=accelerator.is_main_process, tensorboard=config.tensorboard)
    recipe, stage = make_recipe(config, accelerator, folder), stage_of(config)

    recipe.check()
    torch.manual_seed(config.seed)  # of dropout, too
    model = recipe.build()
    recipe.describe(model)  # as its files have it: what trains is widened next
    table = apply_stage(model, stage)
    log.say("\n".join([f"{config.stage}: {stage.purpose}", format_table(table), *([remark] if remark else [])]))
    if recipe.start_from:
        recipe.load(Path(recipe.start_from), model)
    with accelerator.main_process_first():
        data = recipe.open_data(model, cache_dir or folder / "cache")
    ranks, rank = accelerator.num_processes, accelerator.process_index
    plan = recipe.plan(data, ranks=ranks, rank=rank)

    checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
    saved = checkpoints.newest(log.say)
    if saved:
        require_same_run(saved, run_identity(to_dict(config), ranks, data.fingerprint))
        recipe.load(saved.folder, model)
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(config, recipe.parameter_groups(model)))
    bare = accelerator.unwrap_model(wrapped, keep_torch_compile=False)
    evaluations = recipe.evaluations(bare, data)
    recipe.check_model(bare)
    run = Run(
        config, folder, accelerator, recipe, stage, bare, wrapped, optimizer, data, plan, checkpoints, evaluations, log
    )
    run.anchor = recipe.text_anchor(bare)
    if saved:
        restore_optimizer(bare, optimizer, saved)
        adopt_state(run, saved)
        log.say(f"Going on from {saved.folder}, step {run.step:,} of {plan.total:,}.")
    log.start(run.step, saved.values["logs"] if saved else {})
    if not saved:
        log.skip(0, data.unusable())
        if "tasks" in data.counts():
            log.write("data", 0, data.counts())
    describe_run(run)
    return run


def _train_steps(run: Run, signals: StopSignals) -> bool:
    """All steps that are left; False if a signal ended them early."""
    _evaluate_if_due(run)
    run.log.progress.start(run.step, run.plan.total)
    for steps in run.plan.epochs_from(run.step):
        batches = run.data.train_batches([batch for step in steps for batch in step.micro_batches])
        for step in steps:
            totals = _train_step(run, step, [next(batches) for _ in step.micro_batches], signals.name is not None)
            bad = _too_many_bad(run)
            if not (totals.stop or bad):
                _evaluate_if_due(run)
            if totals.stop or bad or _checkpoint_due(run):
                save_checkpoint(run)
            if bad:
                raise DataError(bad)
            if totals.stop:
                return False
    return True


def _train_step(run: Run, step: RankStep, batches: Sequence[Batch], stop: bool) -> StepTotals:
    """One optimizer step and its bookkeeping."""
    totals = _agree(run, batches, stop)
    rate = learning_rate(run.step, run.plan.total, run.config.optim)
    loss, norm, tasks = 0.0, 0.0, TaskSums()
    if totals.labels or (run.anchor and totals.texts):
        inputs = [batch.inputs for batch in batches if batch.inputs]
        if run.accelerator.num_processes > 1:
            inputs += [empty_micro_batch()] * (step.passes - len(inputs))
        loss, tasks = _accumulate(run, inputs, totals.labels, totals.texts)
        norm = _update(run, rate, has_media=totals.media > 0)
    run.step += 1
    if run.step == run.plan.total:
        run.recipe.settle(run.model)
    run.evaluated = False
    run.log.skip(run.step, [record for batch in batches for record in batch.skipped])
    _account(run, totals, loss, tasks, norm, rate)
    return totals


def _agree(run: Run, batches: Sequence[Batch], stop: bool) -> StepTotals:
    """Sum what the ranks know of this step; one small collective."""
    counts = [
        sum(batch.num_label_tokens for batch in batches),
        sum(batch.num_tokens for batch in batches),
        sum(len(batch.sample_ids) for batch in batches),
        sum(batch.num_media for batch in batches),
        sum(batch.num_text_predictions for batch in batches),
        sum(len(batch.skipped) for batch in batches),
        int(stop),
    ]
    summed: Any = run.accelerator.reduce(torch.tensor(counts, device=run.accelerator.device), reduction="sum")
    labels, tokens, samples, media, texts, skipped, stops = summed.tolist()
    return StepTotals(labels, tokens, samples, media, texts, skipped, stops > 0)


def _accumulate(run: Run, inputs: Sequence[dict[str, Tensor]], labels: int, texts: int = 0) -> tuple[float, TaskSums]:
    """Forward and backward of each micro-batch; the loss per supervised token of the step over all ranks, and by task.

    DDP and FSDP average gradients over ranks, hence labels ÷ ranks.
    """
    accelerator = run.accelerator
    share, share_of_texts = max(labels, 1) / accelerator.num_processes, texts / accelerator.num_processes
    total, tasks = torch.zeros((), device=accelerator.device), TaskSums(accelerator.device)
    for number, tensors in enumerate(inputs, start=1):
        on_device = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in tensors.items()}
        last, more = number == len(inputs), run.recipe.loss_options()
        text_mask = on_device.pop("text_mask", None)
        if run.anchor and texts and (text_mask is not None or accelerator.num_processes > 1):
            more |= run.anchor.options(on_device, text_mask, share_of_texts)
        with contextlib.nullcontext() if last else accelerator.no_sync(run.wrapped):
            outputs = run.wrapped(**on_device, **more, num_items_in_batch=share)
            accelerator.backward(outputs.loss)
        total += outputs.loss.detach().float()
        tasks.add(outputs)
    if run.anchor and texts:
        tasks.add_text(run.anchor.take(accelerator.device), texts / accelerator.num_processes)
    mean: Any = accelerator.reduce(total, reduction="mean")
    return float(mean), tasks.over_ranks(accelerator)


def _update(run: Run, rate: float, *, has_media: bool) -> float:
    """Audit (once), clip and step; returns the gradient norm before clipping."""
    if not run.audited and has_media:
        audit_gradients(run.model, run.stage)
        run.audited = True
    parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    norm = float(_whole_norm(run.accelerator.clip_grad_norm_(parameters, run.config.optim.max_grad_norm)))
    if not math.isfinite(norm):
        raise DivergenceError(
            f"The gradient norm is {norm} at step {run.step + 1:,}, so training was stopped before the update. "
            "Lower optim.learning_rate or optim.max_grad_norm; the last checkpoint is unharmed."
        )
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return norm


def _whole_norm(norm: Any) -> Any:
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def learning_rate(step: int, total: int, optim: OptimConfig) -> float:
    """Rate of the step that follows `step` finished ones: linear warm-up, then a cosine to `min_learning_rate`."""
    warmup = math.ceil(optim.warmup_ratio * total)
    if step < warmup:
        return optim.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    span = optim.learning_rate - optim.min_learning_rate
    return optim.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


def _account(run: Run, totals: StepTotals, loss: float, tasks: TaskSums, norm: float, rate: float) -> None:
    """Counters, the progress line, and a line of metrics.jsonl every `log_every` steps."""
    counters, now = run.counters, time.monotonic()
    added = {
        "samples": totals.samples,
        "skipped": totals.skipped,
        "seconds": now - run.clock,
        "window_loss": loss * totals.labels,
        "window_supervised": totals.labels,
        "window_tokens": totals.tokens,
        "window_seconds": now - run.clock,
        **tasks.counters("window_"),
    }
    for name, value in added.items():
        counters[name] = counters.get(name, 0) + value
    run.clock = now
    speed = counters["window_tokens"] / max(counters["window_seconds"], 1e-9)
    run.log.progress.step(run.step, loss=loss, tokens_per_second=speed)
    if run.step % run.config.log_every == 0 or run.step == run.plan.total:
        line = {
            "loss": counters["window_loss"] / max(counters["window_supervised"], 1),
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": counters["window_tokens"],
            "supervised_tokens": counters["window_supervised"],
            "tokens_per_second": speed,
            "seconds": counters["seconds"],
            "peak_memory_mib": peak_memory_mib(run.accelerator.device),
            "skipped": counters["skipped"],
            **task_means(counters, "window_"),
            **run.recipe.figures(run.model),
        }
        run.log.write("train", run.step, line)
        counters.update(dict.fromkeys([name for name in counters if name.startswith("window_")], 0))


def _evaluate_if_due(run: Run) -> None:
    """Quick and full evaluation, and the golden dump of a checkpoint, where `run.step` calls for them."""
    settings = run.config.eval
    if run.evaluated:
        return
    if run.step % settings.quick_every == 0:
        _evaluate(run, "quick_eval", run.evaluations.quick)
    if settings.full_every and run.step % settings.full_every == 0 and run.step < run.plan.total:
        _evaluate(run, "eval", run.evaluations.full)
    if _checkpoint_due(run):
        run.evaluations.golden(run.step)
    run.evaluated = True
    run.accelerator.wait_for_everyone()
    run.clock = time.monotonic()


def _evaluate(run: Run, kind: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    figures = measure()
    if figures:
        run.last_eval = figures
        run.log.write(kind, run.step, figures)
        name = kind.replace("_", " ")
        run.log.say(
            f"step {run.step:,}  {name}: loss {figures['loss'] or math.nan:.4f}, {figures['samples']:,} samples"
        )
    return figures


def _checkpoint_due(run: Run) -> bool:
    return run.step % run.config.save_every == 0 or run.step == run.plan.total


def _too_many_bad(run: Run) -> str:
    """The sentence that ends the run if more of the records were bad than the config allows, else nothing."""
    section = run.recipe.data_section
    allowed = getattr(run.config, section).max_bad_fraction
    skipped, seen = int(run.counters["skipped"]), int(run.counters["samples"] + run.counters["skipped"])
    if not judged_bad(skipped, seen, run.data.num_train, allowed):
        return ""
    return (
        f"{skipped:,} of the {seen:,} records seen so far could not be used; {section}.max_bad_fraction allows "
        f"{allowed:g}. They are listed in {run.log.skipped.path}. The run was saved at step {run.step:,}."
    )


def _finish(run: Run, signals: StopSignals) -> TrainResult | None:
    """Full evaluation, gates, golden set, add-on directory, report; None if a signal came in between."""
    loss = _evaluate(run, "eval", run.evaluations.full)
    if _agree(run, [], signals.name is not None).stop:
        return None
    gates = run.evaluations.gates()
    if gates:
        run.log.write("ablation", run.step, gates["summary"])
    if _agree(run, [], signals.name is not None).stop:
        return None
    evidence = write_results(run, loss, gates, run.evaluations.golden(run.step))
    return TrainResult(run.folder, run.step, eval=loss, evidence=evidence, add_on_dir=run.folder / run.recipe.add_on)

"""What is measured during a run and at its end, and what of it becomes evidence.

The functions of `evaluate` know nothing of ranks; here they are called so that several ranks do not
wait for each other in vain. Under DDP the loss is shared out and merged, and the main process alone
decodes and ablates. Under FSDP every rank holds but a shard, so all of them do everything.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from qwen3_vlm.config import RunConfig
from qwen3_vlm.errors import DataError
from qwen3_vlm.evaluate.ablation import run_ablation
from qwen3_vlm.evaluate.caption_scores import score_captions
from qwen3_vlm.evaluate.environment import describe_environment
from qwen3_vlm.evaluate.gates import unmeasured_gate
from qwen3_vlm.evaluate.golden import choose_golden, dump_golden
from qwen3_vlm.evaluate.metrics import LossReport, evaluate_loss
from qwen3_vlm.evaluate.text_drift import DriftReport
from qwen3_vlm.models.processing import Qwen3VLMProcessor
from qwen3_vlm.models.vlm import Qwen3VLMForConditionalGeneration
from qwen3_vlm.train.data_source import DataSource

_FSDP_METHODS = ("token_losses", "encode_patches", "get_image_features")  # called besides forward


class Evaluations:
    """The evaluations of one run.

    Args:
        model: without DDP's wrapper.
        folder: of the run; golden dumps go to `golden/` in it.
        drift: measures how far an adapter moved the text behaviour, where there is one.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        model: Qwen3VLMForConditionalGeneration,
        processor: Qwen3VLMProcessor,
        data: DataSource,
        folder: Path,
        drift: Callable[[], DriftReport] | None = None,
    ) -> None:
        self._config, self._accelerator = config, accelerator
        self._model, self._processor, self._data = model, processor, data
        self._folder, self._drift = folder, drift
        self._sharded = accelerator.distributed_type == DistributedType.FSDP
        self._golden_dumped: dict[int, dict[str, Any]] = {}
        if self._sharded:
            from torch.distributed.fsdp import register_fsdp_forward_method

            for name in _FSDP_METHODS:
                register_fsdp_forward_method(model, name)

    def quick(self) -> dict[str, Any]:
        """Loss on a fixed stratified sample; empty where nothing is held out."""
        held_out = self._data.eval
        return self._loss(held_out.pick(held_out.indices, self._config.eval.quick_samples, self._config.seed))

    def full(self) -> dict[str, Any]:
        """Loss on everything held out, with the records that could not be used counted; empty where nothing is."""
        return self._loss(self._data.eval.indices, LossReport.of_refused(self._data.unusable_eval()))

    def gates(self) -> dict[str, Any]:
        """{"gates": …, "ablation": …} of evidence.json, and "summary" for metrics.jsonl."""
        held_out, settings = self._data.eval, self._config.eval
        spare = settings.ablation_samples // 10 + 1  # for pictures that turn out unreadable
        indices = held_out.pick(held_out.with_pictures(), settings.ablation_samples + spare, self._config.seed)
        if not self._working:
            return {}
        if not indices:
            what = "No held-out sample has a picture" if len(held_out) else "No sample is held out"
            reason = f"{what}, so whether the model uses its pictures can't be measured."
            return self._with_drift(_unmeasured(reason))
        try:
            with self._accelerator.autocast():
                batches = self._data.eval_batches(indices, settings.batch_size)
                report = run_ablation(self._model, batches, settings, seed=self._config.seed)
        except DataError as problem:
            return self._with_drift(_unmeasured(str(problem)))
        found = {"gates": report.gates(), "ablation": report.to_dict(), "summary": report.summary()}
        return self._with_drift(found)

    def _with_drift(self, found: dict[str, Any]) -> dict[str, Any]:
        if self._drift is None:
            return found
        with self._accelerator.autocast():
            drift = self._drift()
        found["gates"] += drift.gates()
        found["summary"] |= {f"text_drift_{name}": value for name, value in drift.summary().items()}
        return {**found, "text_drift": drift.to_dict()}

    def golden(self, step: int) -> dict[str, Any]:
        """Decode the golden set, write the dump of this step, and return its scores."""
        if step not in self._golden_dumped:
            self._golden_dumped = {step: self._golden(step) if self._working else {}}
        return self._golden_dumped[step]

    @property
    def _working(self) -> bool:
        return self._accelerator.is_main_process or self._sharded

    def _loss(self, indices: Sequence[int], refused: LossReport | None = None) -> dict[str, Any]:
        if not indices:
            return {}
        ranks, rank = self._accelerator.num_processes, self._accelerator.process_index
        mine = list(indices) if self._sharded else list(indices)[rank::ranks]
        with self._accelerator.autocast():
            batches = self._data.eval_batches(mine, self._config.eval.batch_size)
            report = evaluate_loss(self._model, batches)
        if not self._sharded and ranks > 1:
            report = LossReport.merge(gather_object([report]))
        return LossReport.merge([report, refused]).to_dict() if refused else report.to_dict()

    def _golden(self, step: int) -> dict[str, Any]:
        held_out, settings = self._data.eval, self._config.eval
        candidates = held_out.with_pictures()
        if not candidates:
            return {}
        with self._golden_folder() as folder, self._accelerator.autocast():
            chosen = choose_golden(
                [held_out.table.ids[index] for index in candidates],
                [int(held_out.table.answer_tokens[index]) for index in candidates],
                count=settings.golden_samples,
                seed=self._config.seed,
                path=folder / "ids.json",
            )
            items = dump_golden(
                self._model,
                self._processor,
                [held_out.records[candidates[position]] for position in chosen],
                folder / f"step-{step:06d}.jsonl",
                step=step,
                max_new_tokens=settings.golden_max_new_tokens,
                batch_size=settings.batch_size,
                max_image_pixels=self._config.data.max_image_pixels,
            )
        readable = [item for item in items if not item.error]
        if not readable:
            return {"samples": 0, "unreadable": len(items)}
        scores = score_captions([item.prediction for item in readable], [item.reference for item in readable])
        return {**scores, "file": f"golden/step-{step:06d}.jsonl", "unreadable": len(items) - len(readable)}

    @contextlib.contextmanager
    def _golden_folder(self) -> Iterator[Path]:
        """Ranks that decode only because the others do write to a folder that vanishes."""
        if self._accelerator.is_main_process:
            yield self._folder / "golden"
        else:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder)


def _unmeasured(reason: str) -> dict[str, Any]:
    """What `gates` gives where there is nothing to measure."""
    return {"gates": [unmeasured_gate("ablation", reason)], "ablation": {"error": reason}, "summary": {"error": reason}}


def evidence(
    step: int,
    *,
    loss: dict[str, Any] | None = None,
    gates: dict[str, Any] | None = None,
    golden: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of evidence.json; `gates` from `RunEvaluations.gates`."""
    measured = {name: value for name, value in (gates or {}).items() if name != "summary"}
    return {
        "format": 1,
        "step": step,
        "gates": [],
        **measured,
        "eval": loss or None,
        "golden": golden or None,
        "environment": describe_environment(),
    }

"""What is measured of a run over tokens: the loss of each task, the gates, and what it says, draws and speaks.

Under DDP losses are shared out and merged; the main process alone ablates and generates. Under FSDP every rank
holds but a shard, so all of them do everything.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from qwen3_vlm.errors import DataError
from qwen3_vlm.evaluate.gates import unmeasured_gate
from qwen3_vlm.evaluate.metrics import LossReport, evaluate_loss
from qwen3_vlm.evaluate.parameter_integrity import base_digests, compare_digests
from qwen3_vlm.evaluate.prompt_ablation import run_prompt_ablation
from qwen3_vlm.evaluate.text_identity import compare_text, measure_text
from qwen3_vlm.evaluate.token_ablation import run_token_ablation
from qwen3_vlm.tokenization.sequences import SEQUENCES
from qwen3_vlm.train.token_source import TokenSource

if TYPE_CHECKING:
    from qwen3_vlm.train.rows_recipe import RowsRecipe


class TokenEvaluations:
    """The evaluations of one run.

    Args:
        recipe: knows what the base was before training.
        model: a TokenLM, without DDP's wrapper.
    """

    def __init__(self, recipe: "RowsRecipe", model: Any, data: TokenSource) -> None:
        self._recipe, self._model, self._data = recipe, model, data
        self._config, self._accelerator = recipe.config, recipe.accelerator
        if recipe.sharded:
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(model, "token_losses")
            recipe.text_before = measure_text(model, recipe.tokenizer)  # no rank holds the whole base

    def quick(self) -> dict[str, Any]:
        """Loss of each task on its share of `quick_samples`."""
        return self._losses(-(-self._config.eval.quick_samples // len(self._data.tasks)))

    def full(self) -> dict[str, Any]:
        """Loss of each task on all its held-out records."""
        return self._losses(self._config.tokens.eval_max)

    def gates(self) -> dict[str, Any]:
        """Integrity, text identity, the ablation of each task's source."""
        if not self._working:
            return {}
        recipe = self._recipe
        assert recipe.text_before is not None  # every working rank has measured it
        reports: dict[str, dict[str, Any]] = {
            "parameter_integrity": {"": compare_digests(recipe.digests, base_digests(self._model))},
            "text_identity": {"": compare_text(recipe.text_before, measure_text(self._model, recipe.tokenizer))},
            "token_ablation": {},
            "prompt_ablation": {},
        }
        unmeasured = []
        for task in self._data.tasks:
            kind, run = _ablation_of(task)
            try:
                with self._accelerator.autocast():
                    reports[kind][task] = run(
                        self._model,
                        self._data.token_space,
                        task,
                        self._data.eval_records(task),
                        self._config.eval,
                        seed=self._config.seed,
                        max_len=self._config.tokens.max_seq_len,
                    )
            except DataError as problem:
                unmeasured.append(unmeasured_gate(f"{task}: ablation", str(problem)))
        return _sections(reports, unmeasured)

    def golden(self, step: int) -> dict[str, Any]:
        """Not yet."""
        return {}

    @property
    def _working(self) -> bool:
        return self._accelerator.is_main_process or self._recipe.sharded

    def _losses(self, count: int) -> dict[str, Any]:
        """The loss over all tasks, and of each, on at most `count` held-out records of each."""
        reports = {
            task: self._loss(task, held_out[:count].tolist())
            for task, held_out in self._data.held_out.items()
            if len(held_out)
        }
        if not reports:
            return {}
        figures = LossReport.merge(list(reports.values())).to_dict()
        for task, report in reports.items():
            figures |= {f"loss_{task}": report.to_dict()["loss"], f"samples_{task}": report.samples}
        return figures

    def _loss(self, task: str, indices: Sequence[int]) -> LossReport:
        ranks, rank = self._accelerator.num_processes, self._accelerator.process_index
        mine = indices if self._recipe.sharded else indices[rank::ranks]
        with self._accelerator.autocast():
            batches = self._data.eval_batches(task, mine, self._config.eval.batch_size)
            report = evaluate_loss(self._model, batches)
        if not self._recipe.sharded and ranks > 1:
            report = LossReport.merge(gather_object([report]))
        return report


def _ablation_of(task: str) -> tuple[str, Any]:
    """What is asked of a task: whether it reads its picture or sound, or whether it follows its prompt."""
    if SEQUENCES[task].target == "text":
        return "token_ablation", run_token_ablation
    return "prompt_ablation", run_prompt_ablation


def _sections(reports: dict[str, dict[str, Any]], gates: list[dict[str, Any]]) -> dict[str, Any]:
    """The sections of evidence.json, and the flat summary."""
    found: dict[str, Any] = {"gates": gates}
    summary: dict[str, Any] = {}
    for section, parts in reports.items():
        for task, report in parts.items():
            gates += report.gates()
            summary |= {f"{task or section}_{name}": value for name, value in report.summary().items()}
        found[section] = parts[""].to_dict() if "" in parts else {task: part.to_dict() for task, part in parts.items()}
    return {**found, "summary": summary}

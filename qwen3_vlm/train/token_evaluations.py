"""What is measured of a run over tokens: the loss of each task, the gates, and what it says, draws and speaks.

Under DDP losses are shared out and merged; the main process alone ablates and generates. Under FSDP every rank
holds but a shard, so all of them do everything.
"""

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from torch import Tensor

from qwen3_vlm.errors import DataError
from qwen3_vlm.evaluate.decode_success import DecodeReport, Generate, Prompt, measure_decoding
from qwen3_vlm.evaluate.gates import unmeasured_gate
from qwen3_vlm.evaluate.metrics import LossReport, evaluate_loss
from qwen3_vlm.evaluate.prompt_ablation import run_prompt_ablation
from qwen3_vlm.evaluate.text_identity import measure_text
from qwen3_vlm.evaluate.token_ablation import run_token_ablation
from qwen3_vlm.evaluate.token_golden import choose_records, dump_token_golden, score_token_golden
from qwen3_vlm.evaluate.token_losses import TokenRecord
from qwen3_vlm.generate.generation import fitting_grammar, run
from qwen3_vlm.generate.grammar import Grammar
from qwen3_vlm.generate.sampling import Choice, Sampling
from qwen3_vlm.tokenization.sequences import SEQUENCES, sequence_format
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from qwen3_vlm.train.token_source import TokenSource

if TYPE_CHECKING:
    from qwen3_vlm.train.rows_recipe import RowsRecipe

GENERATED_TOGETHER = 32  # samples of one call
GOLDEN = Sampling(image=Choice(top_p=0.9), audio=Choice(top_p=0.9))  # the likeliest picture of all is an empty one
SAMPLED = Sampling(image=Choice(), audio=Choice())


class TokenEvaluations:
    """The evaluations of one run.

    Args:
        recipe: knows what the base was before training.
        model: a TokenLM, without DDP's wrapper.
    """

    def __init__(self, recipe: "RowsRecipe", model: Any, data: TokenSource) -> None:
        self._recipe, self._model, self._data = recipe, model, data
        self._config, self._accelerator = recipe.config, recipe.accelerator
        self._uti = recipe.open_tokenizers() if self._working else None
        self._golden_scores: dict[int, dict[str, Any]] = {}
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
        """Integrity, text identity, the ablation of each task's source or prompt, and whether what it makes decodes."""
        if not self._working:
            return {}
        recipe = self._recipe
        section, text = recipe.text_report(self._model)
        reports: dict[str, dict[str, Any]] = {
            "parameter_integrity": {"": recipe.integrity(self._model)},
            section: {"": text},
            "token_ablation": {},
            "prompt_ablation": {},
            "decode_success": {},
        }
        unmeasured = []
        for task in self._data.tasks:
            for section, measure in self._measures(task):
                try:
                    with self._accelerator.autocast():
                        reports[section][task] = measure(task)
                except DataError as problem:
                    unmeasured.append(unmeasured_gate(f"{task}: {section.replace('_', ' ')}", str(problem)))
        return _sections(reports, unmeasured)

    def _measures(self, task: str) -> list[tuple[str, Callable[[str], Any]]]:
        """What is asked of a task: does it read its picture or sound; or does it follow its prompt, and decode."""
        if SEQUENCES[task].target == "text":
            return [("token_ablation", partial(self._ablation, run_token_ablation))]
        return [("prompt_ablation", partial(self._ablation, run_prompt_ablation)), ("decode_success", self._decoding)]

    def _ablation(self, run: Callable[..., Any], task: str) -> Any:
        return run(
            self._model,
            self._data.token_space,
            task,
            self._data.eval_records(task),
            self._config.eval,
            seed=self._config.seed,
            max_len=self._config.tokens.max_seq_len,
        )

    def golden(self, step: int) -> dict[str, Any]:
        """Answer the golden prompts of every task, texts greedily and the rest with fixed seeds; the scores."""
        if not self._working or self._uti is None:
            return {}
        if step not in self._golden_scores:
            with self._golden_folder() as folder, self._accelerator.autocast():
                records = {task: self._golden_records(task, folder) for task in self._data.tasks}
                items = dump_token_golden(
                    self._uti, self.generator(GOLDEN), records, folder, step=step, batch_size=GENERATED_TOGETHER
                )
            self._golden_scores = {step: score_token_golden(items, self._config.eval.confidence)}
        return self._golden_scores[step]

    def _golden_records(self, task: str, folder: Path) -> list[TokenRecord]:
        """The same records at every checkpoint, of all lengths."""
        held_out, settings = list(self._data.eval_records(task)), self._config.eval
        if not held_out:
            return []
        lengths = [len(ids[sequence_format(task).target]) for _, ids in held_out]
        names = [name for name, _ in held_out]
        chosen = choose_records(task, names, lengths, folder, count=settings.golden_samples, seed=self._config.seed)
        return [held_out[position] for position in chosen]

    @contextlib.contextmanager
    def _golden_folder(self) -> Iterator[Path]:
        """Ranks that generate only because the others do write to a folder that vanishes."""
        if self._accelerator.is_main_process:
            yield self._recipe.folder / "golden"
        else:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder)

    def _decoding(self, task: str) -> DecodeReport:
        """Sampled at temperature 1: whatever the model makes of it, everything has to decode.

        Raises:
            DataError: the tokenizers of the data can't be opened here, or nothing is held out.
        """
        if self._uti is None:
            raise DataError(f"The tokenizers of the data can't be opened: {self._recipe.uti_problem}")
        settings = self._config.eval
        return measure_decoding(
            self._uti,
            task,
            self._data.eval_records(task),
            self.generator(SAMPLED),
            samples=settings.decode_samples,
            batch_size=GENERATED_TOGETHER,
            confidence=settings.confidence,
            settings={"temperature": 1.0, "seed": self._config.seed},
        )

    def generator(self, sampling: Sampling) -> Generate:
        """Prompts → ids under the grammar; each call goes on with the seeds of the one before."""
        seeds = itertools.count(self._config.seed)

        def generate(prompts: Sequence[Prompt]) -> Tensor:
            """Prompts → (B, T) ids after them, padded on the right, on the CPU."""
            fitting = fitting_grammar(self._model, prompts)
            grammar = Grammar(
                self._data.token_space,
                max_text=min(fitting.text_lengths[1], self._config.eval.golden_max_new_tokens),
                max_frames=max(1, min(fitting.frames[1], self._data.longest_sound)),
            )
            return run(self._model, prompts, grammar, sampling, [next(seeds) for _ in prompts]).cpu()

        return generate

    def source_dropout(self, task: str) -> float:
        """The share of a task's samples that training left without their source."""
        return self._data.task_config(task).source_dropout

    @property
    def tokenizers(self) -> UnifiedTokenizer | None:
        """What decodes; None on an idle rank, and where it can't be opened."""
        return self._uti

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

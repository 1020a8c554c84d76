"""Stage 3: new vocabulary rows behind a frozen language model, on task sequences of text, pictures and sounds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qwen3_vlm.config import RunConfig
from qwen3_vlm.errors import ConfigError, DataError, Qwen3VLMError
from qwen3_vlm.evaluate.parameter_integrity import IntegrityReport, base_digests, compare_digests
from qwen3_vlm.evaluate.text_identity import TextBehaviour, compare_text, measure_text
from qwen3_vlm.fingerprint import fingerprint_tokenizer, resolve_folder
from qwen3_vlm.models.bases import enable_checkpointing, load_strictly
from qwen3_vlm.models.logit_rules import logit_rules
from qwen3_vlm.models.quantization import quantize
from qwen3_vlm.models.row_base import load_tokenizer, require_tokenizer
from qwen3_vlm.models.row_files import describe_base, load_rows, write_rows
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from qwen3_vlm.tokenization.uti_config import load_uti_config
from qwen3_vlm.train.checkpoint import whole
from qwen3_vlm.train.lora_stage import refuse_adapter, refuse_sharded_quantization, refuse_trunk
from qwen3_vlm.train.recipe import Recipe
from qwen3_vlm.train.step_plan import MixtureSteps
from qwen3_vlm.train.token_evaluations import TokenEvaluations
from qwen3_vlm.train.token_source import TokenSource, check_token_folders, open_tokens, uti_folder


class RowsRecipe(Recipe):
    """See the module. What the base was before training is measured here, while it is nothing but the base."""

    add_on = "rows"
    data_section = "tokens"

    def __init__(self, config: RunConfig, accelerator: Accelerator, folder: Path) -> None:
        super().__init__(config, accelerator, folder)
        self.start_from = config.rows.add_on
        self.token_space = check_token_folders(config.tokens)
        self.base: dict[str, Any] = {}
        self.tokenizer: Any = None
        self.text_before: TextBehaviour | None = None
        self.digests: dict[str, str] = {}
        self.uti_problem = ""

    @property
    def sharded(self) -> bool:
        return bool(self.accelerator.distributed_type == DistributedType.FSDP)

    def check(self) -> None:
        """Raises:
        ModelError: the tokenizer of the base can't be had, or is another than that of the data.
        ConfigError: the data has no uti.yaml, which goes into every checkpoint; or 4 bits are to be sharded.
        """
        settings = self.config.model
        refuse_sharded_quantization(settings, self.accelerator)
        self.tokenizer = load_tokenizer(resolve_folder(settings.llm, what="llm"), settings.trust_remote_code)
        require_tokenizer(settings.llm, fingerprint_tokenizer(self.tokenizer), self.token_space)
        load_uti_config(uti_folder(self.config.tokens))

    def build(self) -> TokenLM:
        """The base, looked at before anything is done to it, and fresh rows behind it."""
        settings, llm = self.config.model, self.load_base()
        if settings.quantization:
            quantize(llm.base_model, self.accelerator.device)
        if self.sharded or self.accelerator.is_main_process:
            self.digests = base_digests(llm)
        if not self.sharded and self.accelerator.is_main_process:
            llm.to(self.accelerator.device)
            self.text_before = measure_text(llm, self.tokenizer)
        model = TokenLM.grow(llm, self.token_space, init=self.config.rows.init, seed=self.config.seed)
        if settings.gradient_checkpointing:
            enable_checkpointing(model)
        return model

    def load_base(self) -> Any:
        """The plain causal LM, from its own files."""
        settings = self.config.model
        return load_strictly(
            AutoModelForCausalLM,
            settings.llm,
            getattr(torch, settings.dtype),
            settings.attn_implementation,
            settings.trust_remote_code,
        )

    def describe(self, model: Any) -> None:
        """The base's fingerprints."""
        settings = self.config.model
        self.base = describe_base(
            settings.llm,
            self.tokenizer,
            model=None if settings.quantization else model,
            trust_remote_code=settings.trust_remote_code,
        )

    def open_data(self, model: Any, cache_dir: Path) -> TokenSource:
        """The shards of every folder, by task.

        Raises:
            DataError: see `open_tokens`; or a sequence is longer than the base can read.
        """
        main = self.accelerator.is_main_process
        data = open_tokens(self.config, self.token_space, tokenizer=self.tokenizer, verify=main)
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and data.longest_sequence > positions:
            raise DataError(
                f"The longest sequence has {data.longest_sequence:,} ids; {self.config.model.llm} reads {positions:,}. "
                "Set tokens.max_seq_len to that or less: what is longer is left out and counted."
            )
        return data

    def plan(self, data: TokenSource, *, ranks: int, rank: int) -> MixtureSteps:
        """The mixture of tasks, step by step."""
        return data.plan(self.config.optim, ranks=ranks, rank=rank)

    def check_model(self, model: Any) -> None:
        """Raises: ConfigError: the loss has terms that this family's scores do not take."""
        rules = logit_rules(model.config)
        wanted = [name for name, value in self.loss_options().items() if value]
        if rules and wanted:
            raise ConfigError(
                f"This base changes the scores of its head ({', '.join(rules)}), for which "
                f"{' and '.join(f'rows.{name}' for name in wanted)} can't be used; leave out what is set."
            )

    def loss_options(self) -> dict[str, float]:
        """Smoothing and (log Z)²."""
        return {"label_smoothing": self.config.rows.label_smoothing, "z_loss": self.config.rows.z_loss}

    def evaluations(self, model: Any, data: TokenSource) -> TokenEvaluations:
        """Loss by task, the gates and the golden set."""
        return TokenEvaluations(self, model, data)

    def open_tokenizers(self) -> UnifiedTokenizer | None:
        """What turns generated ids into pictures and sounds; None, and why, where it can't be had on this machine."""
        try:
            return UnifiedTokenizer.open(uti_folder(self.config.tokens))
        except Qwen3VLMError as problem:
            self.uti_problem = str(problem)
            return None

    def parameters(self, model: Any) -> Mapping[str, nn.Parameter]:
        """The new rows: "embeddings" and, for an untied base, "lm_head"."""
        found: dict[str, nn.Parameter] = model.row_parameters()
        return found

    def parameter_groups(self, model: Any) -> list[dict[str, Any]]:
        """One group for each set of rows; the head of an untied base may have a rate of its own."""
        return self.row_groups(model)

    def row_groups(self, model: TokenLM) -> list[dict[str, Any]]:
        """The optimizer's groups of the rows alone."""
        optim, rows = self.config.optim, self.config.rows
        scales = {"embeddings": 1.0, "lm_head": (rows.head_learning_rate or optim.learning_rate) / optim.learning_rate}
        return [{"params": [found], "scale": scales[name]} for name, found in model.row_parameters().items()]

    def integrity(self, model: Any) -> IntegrityReport:
        """Whether every tensor that must stay the base's is."""
        return compare_digests(self.digests, base_digests(model))

    def text_report(self, model: Any) -> tuple[str, Any]:
        """Name and report of what is asked of text behaviour: here, that it is the same to the bit."""
        assert self.text_before is not None  # every working rank has measured it
        return "text_identity", compare_text(self.text_before, measure_text(model, self.tokenizer))

    def figures(self, model: Any) -> dict[str, float]:
        """Norms of the new rows: their mean and extremes tell rows that run away from those that are never said."""
        found: dict[str, float] = {}
        for name, parameter in model.row_parameters().items():
            rows = whole(parameter)
            prefix = "head_" if name == "lm_head" else ""
            norms = rows.float().norm(dim=-1)
            found |= {
                f"{prefix}row_norm_mean": float(norms.mean()),
                f"{prefix}row_norm_min": float(norms.min()),
                f"{prefix}row_norm_max": float(norms.max()),
            }
        return found

    def load(self, directory: Path, model: Any) -> None:
        """Strictly; see `load_rows`.

        Raises:
            AddOnError: it has an adapter, and this stage trains none; or a trunk of its own.
        """
        refuse_adapter(directory, model, self.config.stage, instead="stage4_mmpt")
        refuse_trunk(directory, self.config.stage)
        load_rows(directory, model, self.base)

    def write(
        self,
        folder: Path,
        model: Any,
        tensors: Mapping[str, Tensor],
        evidence: Mapping[str, Any],
        details: Mapping[str, Any],
    ) -> None:
        """trainable_rows.pt, trainable_rows.json, the token space, uti.yaml, evidence.json."""
        uti = uti_folder(self.config.tokens)
        write_rows(folder, model, self.base, uti=uti, tensors=tensors, evidence=evidence, details=details)

"""Stage 1: a connector between a frozen tower and a frozen language model, on pictures with captions."""

import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qwen3_vlm.config import ModelConfig, RunConfig
from qwen3_vlm.data.features import FeatureCache, feature_fingerprint
from qwen3_vlm.data.records import ImageRef
from qwen3_vlm.errors import ConfigError
from qwen3_vlm.models.bases import add_tower, enable_checkpointing, load_strictly
from qwen3_vlm.models.processing import Qwen3VLMProcessor
from qwen3_vlm.models.quantization import quantize
from qwen3_vlm.models.vlm import Qwen3VLMForConditionalGeneration
from qwen3_vlm.train.add_ons import load_connector, write_connector
from qwen3_vlm.train.data_source import DataSource, check_data_paths, open_data
from qwen3_vlm.train.evaluations import Evaluations
from qwen3_vlm.train.identity import describe_bases
from qwen3_vlm.train.lora_stage import refuse_adapter, refuse_sharded_quantization
from qwen3_vlm.train.packing_check import check_packing
from qwen3_vlm.train.recipe import Recipe
from qwen3_vlm.train.step_plan import StepPlan, plan_steps


class ConnectorRecipe(Recipe):
    """See the module."""

    add_on = "connector"
    data_section = "data"

    def __init__(self, config: RunConfig, accelerator: Accelerator, folder: Path) -> None:
        super().__init__(config, accelerator, folder)
        self.start_from = config.model.connector
        self.processor: Qwen3VLMProcessor
        self.bases: dict[str, Any] = {}

    def check(self) -> None:
        """Raises: ConfigError, DataError."""
        if self.config.data.feature_cache and self.accelerator.distributed_type == DistributedType.FSDP:
            raise ConfigError(
                "data.feature_cache needs whole weights on each process: leave it out with FSDP, or use DDP."
            )
        refuse_sharded_quantization(self.config.model, self.accelerator)
        check_data_paths(self.config.data, self.config.text)

    def build(self) -> Qwen3VLMForConditionalGeneration:
        """Both bases and a fresh connector."""
        model, self.processor = build_model(self.config.model, self.config.seed, self.accelerator.device)
        return model

    def describe(self, model: Any) -> None:
        """Fingerprints of both bases, the tokenizer and the chat template."""
        settings = self.config.model
        self.bases = describe_bases(
            settings.llm,
            settings.vision_tower,
            self.processor,
            model=None if settings.quantization else model,
            trust_remote_code=settings.trust_remote_code,
        )

    def open_data(self, model: Any, cache_dir: Path) -> DataSource:
        """The records, measured and split; their pictures' features where they are kept."""
        features = partial(feature_cache, self.config, self.accelerator, model, self.processor, self.bases)
        return open_data(
            self.config,
            self.processor,
            self.folder,
            open_features=features if self.config.data.feature_cache else None,
            cache_dir=cache_dir,
            progress=self.accelerator.is_main_process and sys.stderr.isatty(),
        )

    def plan(self, data: DataSource, *, ranks: int, rank: int) -> StepPlan:
        """Epochs over the records."""
        more = partial(data.texts.epoch, samples=len(data.train)) if data.texts else None
        return plan_steps(self.config, data.train.tokens(), data.train.indices, more=more, ranks=ranks, rank=rank)

    def check_model(self, model: Any) -> None:
        """Packed samples must not read one another."""
        if self.config.data.packing:
            check_packing(model)

    def evaluations(self, model: Any, data: DataSource) -> Evaluations:
        """Loss, ablation and golden captions."""
        return Evaluations(self.config, self.accelerator, model, self.processor, data, self.folder)

    def parameters(self, model: Any) -> Mapping[str, nn.Parameter]:
        """Resampler, projector and, where it is on, vision_ln."""
        found: dict[str, nn.Parameter] = model.connector_parameters()
        return found

    def load(self, directory: Path, model: Any) -> None:
        """Strictly; see `load_connector`.

        Raises:
            AddOnError: it has an adapter, and this stage trains none.
        """
        refuse_adapter(directory, model, self.config.stage, instead="stage2_sft")
        load_connector(directory, model, self.bases)

    def write(
        self,
        folder: Path,
        model: Any,
        tensors: Mapping[str, Tensor],
        evidence: Mapping[str, Any],
        details: Mapping[str, Any],
    ) -> None:
        """connector.safetensors, connector.json, evidence.json."""
        write_connector(folder, model, self.bases, tensors=tensors, evidence=evidence, details=details)


def build_model(
    config: ModelConfig, seed: int, device: torch.device | str = "cpu"
) -> tuple[Qwen3VLMForConditionalGeneration, Qwen3VLMProcessor]:
    """Both bases and a fresh connector; the same on every rank.

    Args:
        device: where a decoder in 4 bits is made; all else is on the CPU.
    """
    torch.manual_seed(seed)
    dtype, options = getattr(torch, config.dtype), (config.attn_implementation, config.trust_remote_code)
    text_model = load_strictly(AutoModelForCausalLM, config.llm, dtype, *options)
    if config.quantization:
        quantize(text_model.base_model, device)
    model, processor = add_tower(
        text_model,
        config.llm,
        config.vision_tower,
        dtype=dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        num_latents=config.num_latents,
        latent_dim=config.latent_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        ff_mult=config.ff_mult,
        projector_hidden_size=config.projector_hidden_size,
        vision_ln=config.vision_ln,
        initializer_range=config.initializer_range,
    )
    if config.gradient_checkpointing:
        enable_checkpointing(model.model.language_model)
    return model, processor


def feature_cache(
    config: RunConfig,
    accelerator: Accelerator,
    model: Qwen3VLMForConditionalGeneration,
    processor: Qwen3VLMProcessor,
    bases: Mapping[str, Any],
    refs: Iterable[ImageRef],
) -> FeatureCache:
    """The tower's outputs for these pictures on disk; the main process, which comes first, makes what is missing."""
    tower: Any = model.model.vision_tower
    tower.to(accelerator.device)
    identity, settings = bases["vision_tower"]["fingerprint"]["sha256"], str(bases["image_processor"])
    precision = str(accelerator.mixed_precision)  # of the autocast below: other rounding, other features
    folder = str(config.data.feature_cache)
    fingerprint = feature_fingerprint(identity, settings, str(tower.dtype), precision)

    def encode(**pixels: Tensor) -> Tensor:
        with torch.no_grad(), accelerator.autocast():
            patches = model.encode_patches(**{name: value.to(accelerator.device) for name, value in pixels.items()})
        return patches.to(tower.dtype)

    if accelerator.is_main_process:
        report = FeatureCache(folder, fingerprint).build(
            refs,
            processor.pixel_values,
            encode,
            max_pixels=config.data.max_image_pixels,
            num_workers=config.data.num_workers,
        )
        print(f"feature cache: {report.encoded:,} pictures encoded, {report.already:,} already there", flush=True)
    return FeatureCache(folder, fingerprint)

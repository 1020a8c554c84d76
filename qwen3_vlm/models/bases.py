"""Put a pretrained language model and a pretrained vision tower together with a fresh connector.

Loading is strict: a base that would be half-empty is refused, with the tensors named.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from qwen3_vlm.errors import ModelError
from qwen3_vlm.models.configuration import Qwen3VLMConfig
from qwen3_vlm.models.precision import compute_in_fp32, must_widen
from qwen3_vlm.models.processing import Qwen3VLMProcessor
from qwen3_vlm.models.vlm import Qwen3VLMForConditionalGeneration

TOWER_TYPES = ("siglip_vision_model", "siglip2_vision_model")


def load_bases(
    llm: str | Path,
    vision_tower: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    **connector: Any,
) -> tuple[Qwen3VLMForConditionalGeneration, Qwen3VLMProcessor]:
    """Two pretrained bases → a model with a fresh fp32 connector, and its processor.

    Args:
        llm: hub id or folder of any decoder-only causal LM.
        vision_tower: hub id or folder of a SigLIP or SigLIP2 model, or of its vision tower alone.
        dtype: of the bases.
        connector: fields of Qwen3VLMConfig (`num_latents`, `latent_dim`, `vision_ln` …).

    Raises:
        ModelError: a base can't be found, is of the wrong kind, or lacks tensors.
    """
    text_model = load_strictly(AutoModelForCausalLM, llm, dtype, attn_implementation, trust_remote_code)
    options: Any = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    return add_tower(text_model, llm, vision_tower, dtype=dtype, **options, **connector)


def add_tower(
    text_model: Any,
    llm: str | Path,
    vision_tower: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    **connector: Any,
) -> tuple[Qwen3VLMForConditionalGeneration, Qwen3VLMProcessor]:
    """The rest of `load_bases` around a language model that was loaded from `llm`; it is not copied."""
    tower = load_tower(vision_tower, dtype=dtype, attn_implementation=attn_implementation)
    try:
        processor = Qwen3VLMProcessor.from_bases(
            llm, vision_tower, connector.get("num_latents", Qwen3VLMConfig.num_latents), trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"No tokenizer or image processor in {llm} or {vision_tower}: {_first_line(error)}") from error
    model = join(text_model, tower, image_token_id=processor.image_token_id, **connector)
    set_generation_defaults(model, processor)
    return model, processor


def load_tower(vision_tower: str | Path, *, dtype: torch.dtype, attn_implementation: str = "sdpa") -> nn.Module:
    """The vision tower of a SigLIP / SigLIP2 folder or hub id, without its pooling head (patches are what is read)."""
    config = _config(vision_tower)
    config = getattr(config, "vision_config", None) or config
    if config.model_type not in TOWER_TYPES:
        raise ModelError(
            f"{vision_tower} holds a {config.model_type!r} model; the vision tower must be SigLIP or SigLIP2."
        )
    config.vision_use_head = False
    return load_strictly(AutoModel, vision_tower, dtype, attn_implementation, trust_remote_code=False, config=config)


def join(text_model: Any, tower: Any, *, image_token_id: int, **connector: Any) -> Qwen3VLMForConditionalGeneration:
    """Build the model around two loaded bases without copying them; the connector is fresh, in fp32."""
    head = text_model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{type(text_model).__name__} has no plain linear head; a decoder-only causal LM is needed.")
    config = Qwen3VLMConfig(
        text_config=text_model.config,
        vision_config=tower.config,
        image_token_id=image_token_id,
        lm_head_bias=head.bias is not None,
        **connector,
    )
    with torch.device("meta"):
        model = Qwen3VLMForConditionalGeneration(config)
    for module in (model.model.resampler, model.model.projector, model.model.vision_ln):
        if module is not None:
            module.to_empty(device="cpu")
            module.float()
            module.apply(model._init_weights)
    model.model.vision_tower = tower
    model.model.language_model = text_model.base_model
    model.lm_head = head
    if must_widen(head.weight):
        for base in (tower, text_model):
            compute_in_fp32(base)
        model.model.widened = True
    model.generation_config = GenerationConfig.from_model_config(text_model.config)
    return model


def set_generation_defaults(model: Qwen3VLMForConditionalGeneration, processor: Qwen3VLMProcessor) -> None:
    """Stop where the chat template says an answer ends."""
    model.generation_config.eos_token_id = processor.stop_token_ids()
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id


def _config(name: str | Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(str(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name} is neither a model folder nor a hub id that can be read: {_first_line(error)}"
        ) from error


def load_strictly(
    auto_class: Any,
    name: str | Path,
    dtype: torch.dtype,
    attn_implementation: str,
    trust_remote_code: bool,
    **kwargs: Any,
) -> Any:
    """What an auto class makes of a folder or hub id, all of it.

    Raises:
        ModelError: it can't be loaded, or lacks tensors that its config promises.
    """
    try:
        with _quiet_report():
            model, info = auto_class.from_pretrained(
                str(name),
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **kwargs,
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(f"The model {name} can't be loaded: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ModelError(
            f"The model {name} lacks {len(missing)} tensors that its config promises, such as {missing[0]}; "
            "it would run with random weights. Is the download complete?"
        )
    return model


@contextmanager
def _quiet_report() -> Iterator[None]:
    """Keep the list of unread tensors (a text tower, a pooling head) from the screen; missing ones are checked here."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def enable_checkpointing(model: Any) -> None:
    """Compute a layer's activations again in backward instead of keeping them; by the name that the library has now."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()

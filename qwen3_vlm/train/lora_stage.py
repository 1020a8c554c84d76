"""What the stages in which the language model learns have in common: a fresh adapter, its optimizer group, the drift
of text.

And what stages refuse to go on from: an add-on with an adapter, or with a trunk of its own, that they do not train.
"""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from qwen3_vlm.config import ModelConfig, RunConfig
from qwen3_vlm.errors import AddOnError, ConfigError
from qwen3_vlm.evaluate.text_drift import DriftReport, measure_drift
from qwen3_vlm.models.base_divergence import BaseDivergence
from qwen3_vlm.models.lora import ADAPTER, add_lora, has_lora, lora_parameters
from qwen3_vlm.models.trunk import TRUNK
from qwen3_vlm.train.text_anchor import TextAnchor


def fresh_lora(config: RunConfig, trunk: Any) -> None:
    """Put the adapter that the config describes on a language model's decoder, in place."""
    lora = config.lora
    add_lora(trunk, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, dora=lora.dora, seed=config.seed)


def lora_group(config: RunConfig, trunk: Any) -> dict[str, Any]:
    """The adapter for the optimizer; it may have a learning rate of its own."""
    rate = config.lora.learning_rate or config.optim.learning_rate
    return {"params": list(lora_parameters(trunk).values()), "scale": rate / config.optim.learning_rate}


def anchor_text(config: RunConfig, trunk: Any, head: Any, text_config: Any, base: Any = None) -> TextAnchor | None:
    """What holds text at the base; None where the config gives it no weight.

    Args:
        base: see `BaseDivergence`.
    """
    weight = config.lora.kl_weight
    return TextAnchor(BaseDivergence(trunk, head, text_config, base), weight) if weight else None


def text_drift(config: RunConfig, model: Any, tokenizer: Any, base: Any = None) -> DriftReport:
    """How far training moved the text suite, against the config's limits; `base` as in `measure_drift`."""
    lora = config.lora
    return measure_drift(model, tokenizer, max_kl=lora.max_text_kl, max_ratio=lora.max_perplexity_ratio, base=base)


def refuse_sharded_quantization(config: ModelConfig, accelerator: Accelerator) -> None:
    """Raises: ConfigError: a decoder in 4 bits is to be cut into shards."""
    if config.quantization and accelerator.distributed_type == DistributedType.FSDP:
        raise ConfigError("model.quantization needs whole weights on each process: use DDP, or leave it out with FSDP.")


def refuse_adapter(directory: Path, model: Any, stage: str, *, instead: str) -> None:
    """Where the model has no adapter, its add-on may have none either: it would be neither trained nor kept.

    Args:
        instead: the stage that trains both.

    Raises:
        AddOnError: it has one.
    """
    if (directory / ADAPTER).is_file() and not has_lora(model):
        raise AddOnError(f"{directory} has an adapter, and {stage} trains none: go on from it with {instead}.")


def refuse_trunk(directory: Path, stage: str) -> None:
    """Where the base's own decoder is asked for, rows that come with another one are refused.

    Raises:
        AddOnError: they do.
    """
    if (directory / TRUNK).is_file():
        raise AddOnError(
            f"{directory} has a decoder of its own ({TRUNK}), and {stage} works on the base's: go on from it with "
            "stage4_mmpt and trunk.training: full."
        )

"""What the stages with an adapter have in common: a fresh one, its optimizer group, the drift of text."""

from typing import Any

from qwen3_vlm.config import RunConfig
from qwen3_vlm.evaluate.text_drift import DriftReport, measure_drift
from qwen3_vlm.models.lora import add_lora, lora_parameters


def fresh_lora(config: RunConfig, trunk: Any) -> None:
    """Put the adapter that the config describes on a language model's decoder, in place."""
    lora = config.lora
    add_lora(trunk, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, dora=lora.dora, seed=config.seed)


def lora_group(config: RunConfig, trunk: Any) -> dict[str, Any]:
    """The adapter for the optimizer; it may have a learning rate of its own."""
    rate = config.lora.learning_rate or config.optim.learning_rate
    return {"params": list(lora_parameters(trunk).values()), "scale": rate / config.optim.learning_rate}


def text_drift(config: RunConfig, model: Any, tokenizer: Any) -> DriftReport:
    """How far the adapter moved the text suite, against the config's limits."""
    lora = config.lora
    return measure_drift(model, tokenizer, max_kl=lora.max_text_kl, max_ratio=lora.max_perplexity_ratio)

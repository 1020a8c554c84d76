"""Stage 4: multimodal pretraining over tokens. The rows go on learning, and the language model gets an adapter.

With an adapter text behaviour does move, so it is no longer asked to be the same to the bit: how far it moved is
measured, and has a limit.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from qwen3_vlm.models.lora import lora_parameters, marked
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.train.lora_stage import anchor_text, fresh_lora, lora_group, text_drift
from qwen3_vlm.train.rows_recipe import RowsRecipe
from qwen3_vlm.train.text_anchor import TextAnchor


class PretrainingRecipe(RowsRecipe):
    """See the module."""

    def build(self) -> TokenLM:
        """The base, rows, and a fresh adapter on every linear layer of its decoder."""
        model = super().build()
        fresh_lora(self.config, model.language_model)
        return model

    def parameters(self, model: Any) -> Mapping[str, nn.Parameter]:
        """The rows, and the adapter under names of its own."""
        return {**super().parameters(model), **marked(lora_parameters(model.language_model))}

    def parameter_groups(self, model: Any) -> list[dict[str, Any]]:
        """The rows' groups, and the adapter's."""
        return [*self.row_groups(model), lora_group(self.config, model.language_model)]

    def text_anchor(self, model: Any) -> TextAnchor | None:
        """On texts alone; scores of the base's own ids are compared."""
        return anchor_text(self.config, model.language_model, model.lm_head, model.config)

    def text_report(self, model: Any) -> tuple[str, Any]:
        """The drift of text."""
        return "text_drift", text_drift(self.config, model, self.tokenizer)

"""Stage 2: conversations about pictures. The connector goes on learning, and the language model gets an adapter.

The adapter goes into the language model alone; the tower is another module and can't be reached. Beside stage 1's
measurements, text that has no picture is read with and without the adapter: how far instruction tuning moved it.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from qwen3_vlm.models.lora import lora_parameters, marked
from qwen3_vlm.train.connector_recipe import ConnectorRecipe
from qwen3_vlm.train.evaluations import Evaluations
from qwen3_vlm.train.lora_stage import anchor_text, fresh_lora, lora_group, text_drift
from qwen3_vlm.train.text_anchor import TextAnchor


class InstructionRecipe(ConnectorRecipe):
    """See the module."""

    def build(self) -> Any:
        """Both bases, a connector, and a fresh adapter on every linear layer of the language model."""
        model = super().build()
        fresh_lora(self.config, model.model.language_model)
        return model

    def parameters(self, model: Any) -> Mapping[str, nn.Parameter]:
        """The connector, and the adapter under names of its own."""
        return {**super().parameters(model), **marked(lora_parameters(model.model.language_model))}

    def parameter_groups(self, model: Any) -> list[dict[str, Any]]:
        """The adapter may have a learning rate of its own."""
        return [
            {"params": list(super().parameters(model).values()), "scale": 1.0},
            lora_group(self.config, model.model.language_model),
        ]

    def text_anchor(self, model: Any) -> TextAnchor | None:
        """On conversations without pictures."""
        return anchor_text(self.config, model.model.language_model, model.lm_head, model.config.text_config)

    def evaluations(self, model: Any, data: Any) -> Evaluations:
        """Stage 1's, and the drift of text."""
        drift = partial(text_drift, self.config, model, self.processor.tokenizer)
        return Evaluations(self.config, self.accelerator, model, self.processor, data, self.folder, drift=drift)

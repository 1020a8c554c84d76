"""Stage 2: conversations about pictures. The connector goes on learning, and the language model gets an adapter.

The adapter goes into the language model alone; the tower is another module and can't be reached. Beside stage 1's
measurements, text that has no picture is read with and without the adapter: how far instruction tuning moved it.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from qwen3_vlm.evaluate.text_drift import measure_drift
from qwen3_vlm.models.lora import add_lora, lora_parameters
from qwen3_vlm.train.add_ons import LORA
from qwen3_vlm.train.connector_recipe import ConnectorRecipe
from qwen3_vlm.train.evaluations import Evaluations


class InstructionRecipe(ConnectorRecipe):
    """See the module."""

    def build(self) -> Any:
        """Both bases, a connector, and a fresh adapter on every linear layer of the language model."""
        model, lora = super().build(), self.config.lora
        add_lora(
            model.model.language_model,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            dora=lora.dora,
            seed=self.config.seed,
        )
        return model

    def parameters(self, model: Any) -> Mapping[str, nn.Parameter]:
        """The connector, and the adapter under names of its own."""
        adapter = lora_parameters(model.model.language_model)
        return {**super().parameters(model), **{f"{LORA}{name}": value for name, value in adapter.items()}}

    def parameter_groups(self, model: Any) -> list[dict[str, Any]]:
        """The adapter may have a learning rate of its own."""
        optim, rate = self.config.optim, self.config.lora.learning_rate
        found = self.parameters(model)
        adapter = [value for name, value in found.items() if name.startswith(LORA)]
        connector = [value for name, value in found.items() if not name.startswith(LORA)]
        scale = (rate or optim.learning_rate) / optim.learning_rate
        return [{"params": connector, "scale": 1.0}, {"params": adapter, "scale": scale}]

    def evaluations(self, model: Any, data: Any) -> Evaluations:
        """Stage 1's, and the drift of text."""
        drift = partial(
            measure_drift,
            model,
            self.processor.tokenizer,
            max_kl=self.config.lora.max_text_kl,
            max_ratio=self.config.lora.max_perplexity_ratio,
        )
        return Evaluations(self.config, self.accelerator, model, self.processor, data, self.folder, drift=drift)

"""Stage 4 with `trunk.training: full`: the rows go on learning, and so does every weight of the base's decoder.

The base's vocabulary rows stay as they are, in the embedding and in a head of its own. How far text moved is measured
against the base as its files have it, which is loaded once more for that; the KL in the loss needs the base at every
step, so a frozen copy of the decoder is kept in memory where `lora.kl_weight` asks for it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen3_vlm.models.lora import marked
from qwen3_vlm.models.row_files import load_rows
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.models.trunk import TRUNK_MARK, frozen_copy, trunk_parameters
from qwen3_vlm.train.lora_stage import anchor_text, refuse_adapter, text_drift
from qwen3_vlm.train.rows_recipe import RowsRecipe
from qwen3_vlm.train.text_anchor import TextAnchor

FULL, INSTEAD = "trunk.training: full", "trunk.training: lora"


class TrunkRecipe(RowsRecipe):
    """See the module. What must stay the same to the bit is what `digests` still has: all but the decoder."""

    base_trunk: Any = None

    def build(self) -> TokenLM:
        """The base and rows, and a copy of its decoder where the loss compares with it."""
        model = super().build()
        model.owns_trunk = True
        trains = trunk_parameters(model.language_model)
        self.digests = {name: digest for name, digest in self.digests.items() if name not in trains}
        if self.config.lora.kl_weight:
            self.base_trunk = frozen_copy(model.language_model)
        return model

    def parameters(self, model: Any) -> Mapping[str, nn.Parameter]:
        """The rows, and the decoder under names of its own."""
        return {**super().parameters(model), **marked(trunk_parameters(model.language_model), TRUNK_MARK)}

    def parameter_groups(self, model: Any) -> list[dict[str, Any]]:
        """The rows' groups, and the decoder's, which may have a learning rate of its own."""
        usual = self.config.optim.learning_rate
        rate = self.config.trunk.learning_rate or usual
        return [
            *self.row_groups(model),
            {"params": list(trunk_parameters(model.language_model).values()), "scale": rate / usual},
        ]

    @torch.no_grad()
    def settle(self, model: Any) -> None:
        """Round the decoder to the base's dtype, in the fp32 that it is held in: it is measured as it is shipped."""
        for parameter in trunk_parameters(model.language_model).values():
            parameter.copy_(parameter.to(model.dtype))

    def text_anchor(self, model: Any) -> TextAnchor | None:
        """On texts alone, against the decoder as it was; scores of the base's own ids are compared."""
        base = None if self.base_trunk is None else self.base_trunk.to(self.accelerator.device)
        return anchor_text(self.config, model.language_model, model.lm_head, model.config, base)

    def text_report(self, model: Any) -> tuple[str, Any]:
        """The drift of text, from the base as its files have it."""
        base = TokenLM.grow(self.load_base(), self.token_space, init="normal").to(self.accelerator.device).eval()
        return "text_drift", text_drift(self.config, model, self.tokenizer, base)

    def load(self, directory: Path, model: Any) -> None:
        """Strictly; see `load_rows`. Rows without a trunk leave the base's as it is.

        Raises:
            AddOnError: it has an adapter, which belongs to the base's own decoder.
        """
        refuse_adapter(directory, model, f"stage4_mmpt with {FULL}", instead=INSTEAD)
        load_rows(directory, model, self.base)

"""The loss that holds text at its base: a weight × the mean KL(base ‖ adapted) per token of a step's text-only samples.

The mean is over the whole optimizer step, all micro-batches and ranks, as that of the graded tokens is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qwen3_vlm.models.base_divergence import BaseDivergence


class TextAnchor:
    """The KL of one model in the loss of its micro-batches.

    Args:
        weight: above 0.
    """

    def __init__(self, divergence: BaseDivergence, weight: float) -> None:
        self._divergence, self._weight = divergence, weight
        self._nats: Tensor | None = None

    def options(self, inputs: Mapping[str, Tensor], text_mask: Tensor | None, count: float) -> dict[str, Any]:
        """What the forward pass of a micro-batch is told.

        Args:
            text_mask: (B, T), 1 at the tokens of its text-only samples; None where there are none.
            count: what the summed KL is divided by: predictions of the step ÷ ranks.
        """

        def added_loss(hidden: Tensor) -> Tensor:
            """(B, T, D) of the last layer → ()."""
            divergence = self._divergence(hidden, inputs["input_ids"], inputs.get("position_ids"), text_mask).sum()
            self._nats = divergence.detach().double() + (0.0 if self._nats is None else self._nats)
            return self._weight * divergence / count

        return {"added_loss": added_loss}

    def take(self, device: torch.device | str) -> Tensor:
        """The summed KL in nats of all micro-batches since it was last taken, () in float64."""
        nats, self._nats = self._nats, None
        return torch.zeros((), dtype=torch.float64, device=device) if nats is None else nats

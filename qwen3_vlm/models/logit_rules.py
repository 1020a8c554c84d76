"""What some families do to the scores of their head before these become probabilities.

Gemma 2 squeezes them softly below a cap, Cohere multiplies them by a scale, Granite divides by one. The head modules
themselves know nothing of it, so whoever calls a head directly has to follow it with these rules.
"""

from typing import Any

import torch
from torch import Tensor

RULES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def logit_rules(config: Any) -> dict[str, float]:
    """The rules that a text config names, in the order in which they apply; empty for most families."""
    found = {name: getattr(config, name, None) for name in RULES}
    return {name: value for name, value in found.items() if value is not None}


def apply_logit_rules(logits: Tensor, config: Any) -> Tensor:
    """(…, V) scores of the head → (…, V) scores of the model."""
    for name, value in logit_rules(config).items():
        if name == "final_logit_softcapping":
            logits = torch.tanh(logits / value) * value
        else:
            logits = logits * value if name == "logit_scale" else logits / value
    return logits

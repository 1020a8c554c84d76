"""How far did training move the text behaviour of the base? Measured where the decoder learns, since it does move.

A fixed suite of texts is read with the adapter and without it, by the same model; or, where the decoder itself was
trained, by the model and by its base:

- KL(base ‖ trained) of the next-token distributions, in nats per token;
- perplexity after training ÷ perplexity of the base.

Both have a limit in the config, and are gates. One text is in memory at a time.

Shapes: T tokens, V ids of the tokenizer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_vlm.evaluate.batches import device_of
from qwen3_vlm.evaluate.conditions import json_interval
from qwen3_vlm.evaluate.gates import limit_gate
from qwen3_vlm.evaluate.intervals import Interval, bootstrap_ratio
from qwen3_vlm.evaluate.text_suite import SUITE_SHA256, TEXTS
from qwen3_vlm.models.lora import without_lora
from qwen3_vlm.models.modes import evaluation_mode

MAX_TOKENS = 128  # of a text; the rest is not read


@dataclass(frozen=True)
class DriftReport:
    """Text by text, and what is asked of them together."""

    kl_sums: NDArray[np.float64]  # (n,) nats
    losses_before: NDArray[np.float64]  # (n,) nats, of the base
    losses_after: NDArray[np.float64]  # (n,)
    token_counts: NDArray[np.int64]  # (n,) predictions
    max_kl: float
    max_ratio: float
    seed: int = 0

    @property
    def kl(self) -> Interval:
        """Nats per token, bootstrap over texts."""
        return bootstrap_ratio(self.kl_sums, self.token_counts, seed=self.seed)

    @property
    def ratio(self) -> Interval:
        """Perplexity ÷ that of the base; the interval is that of the mean difference, exponentiated."""
        found = bootstrap_ratio(self.losses_after - self.losses_before, self.token_counts, seed=self.seed)
        return Interval(math.exp(found.value), math.exp(found.low), math.exp(found.high))

    @property
    def passed(self) -> bool:
        """Both stay below their limits."""
        return all(gate["passed"] for gate in self.gates())

    def gates(self) -> list[dict[str, Any]]:
        """The `gates` of evidence.json."""
        texts = len(self.token_counts)
        return [
            limit_gate("text drift: KL", self.kl, self.max_kl, texts),
            limit_gate("text drift: perplexity ratio", self.ratio, self.max_ratio, texts),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The `text_drift` of evidence.json."""
        tokens = max(int(self.token_counts.sum()), 1)
        return {
            "passed": self.passed,
            "texts": len(self.token_counts),
            "suite_sha256": SUITE_SHA256,
            "kl": json_interval(self.kl),
            "perplexity_ratio": json_interval(self.ratio),
            "perplexity_before": math.exp(float(self.losses_before.sum()) / tokens),
            "perplexity_after": math.exp(float(self.losses_after.sum()) / tokens),
        }

    def summary(self) -> dict[str, Any]:
        """Flat, for a line of metrics.jsonl."""
        return {"passed": self.passed, "kl": self.kl.value, "perplexity_ratio": self.ratio.value}


def measure_drift(
    model: Any,
    tokenizer: Any,
    *,
    max_kl: float,
    max_ratio: float,
    texts: Sequence[str] = TEXTS,
    seed: int = 0,
    base: Any = None,
) -> DriftReport:
    """Read every text with and without what was trained.

    Args:
        model: takes `input_ids`, gives `logits`. A TokenLM is read in text mode.
        tokenizer: the base's Hugging Face tokenizer.
        base: a model of the same class in eval mode, whose decoder is the base's; None: `model` without its adapters.
    """
    num_ids = max(tokenizer.get_vocab().values()) + 1
    space = getattr(model, "token_space", None)
    options: dict[str, Any] = {} if space is None else {"score_range": (0, space.text.vocab_size)}
    found = []
    with evaluation_mode(model):
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False)[:MAX_TOKENS]
            if len(ids) > 1:
                given = torch.tensor([ids], device=device_of(model))
                with without_lora(model):
                    before = _log_probs(model if base is None else base, given, num_ids, options)
                found.append(_compare(before, _log_probs(model, given, num_ids, options), given[0, 1:].cpu()))
    kl, first, second, counts = (np.array(column) for column in zip(*found, strict=True))
    return DriftReport(kl, first, second, counts.astype(np.int64), max_kl, max_ratio, seed)


def _log_probs(model: Any, ids: Tensor, num_ids: int, options: dict[str, Any]) -> Tensor:
    """(T − 1, V) of the predictions that the text itself grades; on the CPU."""
    scores = model(input_ids=ids, use_cache=False, **options).logits[0, :-1, :num_ids]
    return scores.float().log_softmax(dim=-1).cpu()


def _compare(before: Tensor, after: Tensor, target: Tensor) -> tuple[float, float, float, int]:
    kl = (before.exp() * (before - after)).sum(dim=-1).double().sum()
    losses = [-float(part.gather(-1, target[:, None]).double().sum()) for part in (before, after)]
    return float(kl), losses[0], losses[1], len(target)

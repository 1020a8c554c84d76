"""How far training moves the text behaviour of the base, as a loss that holds it back.

    KL(base ‖ adapted) of the next-token distributions, at every token of the text-only samples of a batch

The base is the same model with its adapters off, so there is no second copy; where its own weights train, it is a
frozen copy of them (`trunk.frozen_copy`). It reads the text-only samples alone, moved together. Both distributions are
there for some positions at a time, and never for all of them.

Shapes: B rows, T tokens, R rows with text-only samples, W the most text tokens of a row, S compared predictions,
D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen3_vlm.models.logit_rules import apply_logit_rules
from qwen3_vlm.models.lora import without_lora
from qwen3_vlm.models.losses import position_chunks
from qwen3_vlm.models.precision import frozen_product, must_widen


class BaseDivergence:
    """The KL of one model.

    Args:
        trunk: a decoder with adapters and without its head, such as `Qwen3Model`.
        head: has a frozen `weight` (V, D); what a head has behind it, such as new vocabulary rows, is left out.
        text_config: of the decoder; says what its family does to the head's scores.
        base: the decoder as it was, which takes embeddings alone; None: `trunk` without its adapters.
    """

    def __init__(self, trunk: Any, head: Any, text_config: Any, base: Any = None) -> None:
        self._trunk, self._head, self._config = trunk, head, text_config
        self._base = trunk if base is None else base

    def __call__(
        self, hidden: Tensor, input_ids: Tensor, position_ids: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        """KL(base ‖ adapted) in nats, (S,) in fp32, in row-then-position order.

        Of a batch without text-only samples the base reads two tokens: ranks that share out the weights of a layer
        have to pass through it equally often.

        Args:
            hidden: (B, T, D) of the model with its adapters on, with a graph.
            input_ids: (B, T).
            position_ids: (B, T), which begin at 0 with every sample; None where a row is one sample.
            text_mask: (B, T), true at the tokens of samples without pictures and sounds; None where there are none.
        """
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        places = places if position_ids is None else position_ids
        text = torch.zeros_like(input_ids, dtype=torch.bool) if text_mask is None else text_mask.bool()
        compared = predictions_of(text, places)
        rows = text.any(dim=1)
        rows[0] |= ~rows.any()
        order = _texts_first(text[rows])
        ids, places, kept, graded = (part[rows].gather(1, order) for part in (input_ids, places, text, compared))
        before = self._read(ids.masked_fill(~kept, 0), places)[graded]
        divergence: Tensor = _Divergence.apply(hidden[compared], before, self._scores, len(self._weight))
        return divergence

    @property
    def _weight(self) -> Tensor:
        """(V, D), without padding rows that are never said."""
        weight: Tensor = self._head.weight
        return weight[: getattr(self._head, "num_used", None)]

    @torch.no_grad()
    def _read(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(R, W) → (R, W, D) of the base. What follows a row's texts is read too, and seen by none of them."""
        with without_lora(self._trunk):
            embeddings = self._trunk.get_input_embeddings()(input_ids)
            embeddings = embeddings.float() if must_widen(self._head.weight) else embeddings
            outputs = self._base(inputs_embeds=embeddings, position_ids=position_ids, use_cache=False)
        found: Tensor = outputs.last_hidden_state
        return found

    def _scores(self, hidden: Tensor) -> Tensor:
        """(s, D) → (s, V); of the head, no gradient."""
        bias = getattr(self._head, "bias", None)
        scores = frozen_product(hidden, self._weight)
        return apply_logit_rules(scores if bias is None else scores + bias, self._config)


def predictions_of(text_mask: Tensor, position_ids: Tensor) -> Tensor:
    """(B, T): where a token of a text-only sample is followed by the next one of the same sample."""
    found = torch.zeros_like(text_mask, dtype=torch.bool)
    follows = position_ids[:, 1:] == position_ids[:, :-1] + 1
    found[:, :-1] = text_mask[:, :-1] & text_mask[:, 1:] & follows
    return found


def _texts_first(text: Tensor) -> Tensor:
    """(R, T) → (R, W) places of each row's text tokens in their order, then of as many others as are missing."""
    width = max(int(text.sum(dim=1).max()), 2)
    return text.int().argsort(dim=1, descending=True, stable=True)[:, :width]


class _Divergence(torch.autograd.Function):
    """KL and its gradient in one pass, some positions at a time."""

    @staticmethod
    def forward(ctx: Any, after: Tensor, before: Tensor, scores: Callable[[Tensor], Tensor], vocab_size: int) -> Tensor:
        """(S, D), (S, D) → (S,)."""
        found = torch.zeros(len(after), dtype=torch.promote_types(after.dtype, torch.float32), device=after.device)
        gradient = torch.empty_like(after)
        with torch.autocast(after.device.type, enabled=False):
            for rows in position_chunks(len(after), vocab_size):
                base = _log_softmax(scores(before[rows]))
                with torch.enable_grad():
                    states = after[rows].detach().requires_grad_()
                    divergence = (base.exp() * (base - _log_softmax(scores(states)))).sum(dim=-1)
                    gradient[rows] = torch.autograd.grad(divergence.sum(), states)[0]
                found[rows] = divergence.detach()
        ctx.save_for_backward(gradient)
        return found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """(S,) → (S, D): the KL at a position depends on the hidden state there alone."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].unsqueeze(-1).to(gradient.dtype), None, None, None


def _log_softmax(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(dim=-1)


__all__ = ["BaseDivergence", "predictions_of"]

"""Cross entropy of a linear head, at supervised positions only and chunk by chunk.

Over a vocabulary of 151,936 the logits of one 512-token sequence fill 311 MB in fp32, and most of
them belong to image and prompt positions that nobody grades. Here only positions with a label
reach the head, a chunk at a time, and where the head is frozen the gradient of the hidden states
is formed in the same pass, so no logits outlive their chunk.

Shapes: B batch, T tokens, S supervised tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .precision import matmul, matmul_transposed, must_widen

IGNORE_INDEX = -100
CHUNK_BYTES = 128 * 2**20  # of fp32 logits that live at one time


def supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the next token is graded, in row-then-position order.

    Args:
        labels: (B, T), the token ids themselves (not shifted), -100 where nothing is graded. The first
            label of a row has nothing before it that could predict it and is not counted.

    Returns:
        row (S,), position (S,) of the *predicting* hidden state, and target id (S,).
    """
    targets = labels[:, 1:]
    row, position = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    return row, position, targets[row, position]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """−log softmax(hidden @ weightᵀ)[target] per row, in fp32, without keeping the logits.

    Args:
        hidden: (S, D).
        weight: (V, D); frozen weights take the one-pass path, trainable ones are recomputed in backward.
        target: (S,) ids.

    Returns:
        (S,) losses in nats, fp32, differentiable with respect to `hidden` (and `weight` if it is trainable).
    """
    if weight.requires_grad and torch.is_grad_enabled():
        compute = torch.float32 if must_widen(weight) else weight.dtype
        head = lambda chunk: F.linear(chunk.to(compute), weight.to(compute))  # noqa: E731
        return chunked_cross_entropy(hidden, head, target, weight.shape[0])
    return _FrozenHeadCrossEntropy.apply(hidden, weight, target)


def chunked_cross_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], target: Tensor, vocab_size: int) -> Tensor:
    """Like `linear_cross_entropy` for any head (bias, soft cap, adapters): logits are recomputed in backward."""

    def losses(chunk: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(head(chunk).float(), ids, reduction="none")

    pieces = [
        checkpoint(losses, hidden[rows], target[rows], use_reentrant=False)
        for rows in _chunks(hidden.shape[0], vocab_size)
    ]
    return torch.cat(pieces) if pieces else hidden.sum(dim=-1).float()


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Losses and, where asked for, the gradient of each row's loss, in one pass over the chunks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            logits = matmul_transposed(hidden[rows], weight).float()
            log_normalizer = logits.logsumexp(dim=-1, keepdim=True)
            ids = target[rows].unsqueeze(-1)
            losses[rows] = (log_normalizer - logits.gather(-1, ids)).squeeze(-1)
            if gradient is not None:
                probabilities = logits.sub_(log_normalizer).exp_()
                probabilities.scatter_add_(-1, ids, -torch.ones_like(ids, dtype=probabilities.dtype))
                gradient[rows] = matmul(probabilities, weight)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].unsqueeze(-1).to(gradient.dtype), None, None


def _chunks(rows: int, vocab_size: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * vocab_size))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

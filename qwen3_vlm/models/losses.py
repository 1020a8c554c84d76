"""Cross entropy of a linear head, at supervised positions only and chunk by chunk.

The head is one block (frozen or trainable), or two: a frozen base and trainable new rows, never joined.

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


def sums_by_group(losses: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Losses (S,) of groups (S,) 0 … K − 1 → their sums (K,) in float64 and counts (K,)."""
    sums = torch.zeros(num_groups, dtype=torch.float64, device=losses.device)
    return sums.index_add_(0, group.long(), losses.double()), torch.bincount(group.long(), minlength=num_groups)


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
        """(S, D), (V, D), (S,) → (S,) losses in nats."""
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
        """(S,) → (S, D): each row's stored gradient, weighted."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].unsqueeze(-1).to(gradient.dtype), None, None


def split_cross_entropy(
    hidden: Tensor,
    base: Tensor,
    rows: Tensor,
    target: Tensor,
    *,
    num_used: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """−log softmax over a frozen and a trainable block of one head, per row, without keeping or joining them.

        log Z = logaddexp(logsumexp(hidden @ baseᵀ), logsumexp(hidden @ rowsᵀ))

    Only the gradients of `hidden` and `rows` are formed. That of `hidden` comes out of the same pass as the losses;
    that of `rows` multiplies the new block once more in backward, since it depends on each loss's own weight.

    Args:
        hidden: (S, D).
        base: (V_base, D), frozen, of any dtype.
        rows: (N, D), whose targets are V_base … V_base + N − 1; fp32 master rows are multiplied in the base's dtype.
        target: (S,) ids.
        num_used: base ids that can be predicted at all; the padding rows beyond take no part.
        label_smoothing: ε: each target shares ε of its mass evenly with all ids that can be predicted.
        z_loss: coefficient of (log Z)², which keeps the scores from drifting (PaLM, arXiv:2204.02311, 5).

    Returns:
        (S,) losses in nats, fp32: sum, mean or weight them as you like.

    Raises:
        ValueError: the base is trainable, or a target is a padding row or no id at all, such as −100.
    """
    used = base.shape[0] if num_used is None else num_used
    if base.requires_grad:
        raise ValueError("The base block of the head is trainable; only the new rows may be.")
    end = base.shape[0] + rows.shape[0]
    wrong = (target < 0) | ((target >= used) & (target < base.shape[0])) | (target >= end)
    if bool(wrong.any()):
        found = int(target[wrong][0])
        what = "is a padding row of the base, which no tokenizer gives" if 0 <= found < end else "is no id"
        raise ValueError(
            f"The target {found} {what}: the base's ids end at {used - 1}, new ids are {base.shape[0]} to {end - 1}."
        )
    with torch.autocast(hidden.device.type, enabled=False):  # forward and backward must score alike
        return _SplitCrossEntropy.apply(hidden, base, rows, target, used, label_smoothing, z_loss)


class _SplitCrossEntropy(torch.autograd.Function):
    """Losses and the gradient of `hidden` chunk by chunk; the gradient of `rows` in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, base: Tensor, rows: Tensor, target: Tensor, used: int, smoothing: float, z: float
    ) -> Tensor:
        """(S, D), (V_base, D), (N, D), (S,) → (S,) losses in nats."""
        block, narrow = base[:used], _as_multiplied(rows, base)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        count = used + rows.shape[0]
        log_normalizers = torch.empty(hidden.shape[0], dtype=exact, device=hidden.device)
        losses = torch.empty_like(log_normalizers)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        place = torch.where(target >= base.shape[0], target - base.shape[0] + used, target).unsqueeze(-1)
        for part in _chunks(hidden.shape[0], count):
            old = matmul_transposed(hidden[part], block).to(exact)
            new = F.linear(hidden[part].to(narrow.dtype), narrow).to(exact)
            log_z = torch.logaddexp(old.logsumexp(dim=-1), new.logsumexp(dim=-1))
            of_target = torch.where(place[part] < used, _pick(old, place[part]), _pick(new, place[part] - used))
            losses[part] = log_z - (1 - smoothing) * of_target.squeeze(-1) + z * log_z.square()
            if smoothing:
                losses[part] -= smoothing / count * (old.sum(dim=-1) + new.sum(dim=-1))
            log_normalizers[part] = log_z
            if gradient is not None:
                for scores, first, weight in ((old, 0, block), (new, used, narrow)):
                    slope = _slope(scores, log_z, place[part] - first, smoothing, count, z)
                    piece = matmul(slope, weight)
                    gradient[part] = piece if first == 0 else gradient[part] + piece
        ctx.save_for_backward(hidden, rows, place, log_normalizers, *([] if gradient is None else [gradient]))
        ctx.base, ctx.used, ctx.smoothing, ctx.z = base, used, smoothing, z
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """(S,) → gradients of `hidden` (S, D) and `rows` (N, D)."""
        hidden, rows, place, log_normalizers, *gradient = ctx.saved_tensors
        weights = grad_outputs[0].unsqueeze(-1)
        of_hidden = gradient[0] * weights.to(gradient[0].dtype) if gradient else None
        of_rows = None
        if ctx.needs_input_grad[2]:
            narrow = _as_multiplied(rows, ctx.base)
            count = ctx.used + rows.shape[0]
            of_rows = torch.zeros(rows.shape, dtype=log_normalizers.dtype, device=rows.device)
            for part in _chunks(hidden.shape[0], rows.shape[0]):
                states = hidden[part].to(narrow.dtype)
                scores = F.linear(states, narrow).to(log_normalizers.dtype)
                slope = _slope(scores, log_normalizers[part], place[part] - ctx.used, ctx.smoothing, count, ctx.z)
                of_rows += (slope * weights[part]).to(narrow.dtype).mT @ states
            of_rows = of_rows.to(rows.dtype)
        return of_hidden, None, of_rows, None, None, None, None


def _as_multiplied(rows: Tensor, base: Tensor) -> Tensor:
    """Master rows in the dtype that the base is multiplied in."""
    return rows.to(torch.float32 if must_widen(base) else base.dtype)


def _pick(scores: Tensor, place: Tensor) -> Tensor:
    """Scores at `place` (S, 1); any score where that lies outside this block."""
    return scores.gather(-1, place.clamp(0, scores.shape[-1] - 1))


def _slope(scores: Tensor, log_z: Tensor, place: Tensor, smoothing: float, count: int, z: float) -> Tensor:
    """The derivative of each loss by the scores of one block, in place of the scores."""
    slope = scores.sub_(log_z.unsqueeze(-1)).exp_().mul_((1 + 2 * z * log_z).unsqueeze(-1))
    inside = (place >= 0) & (place < slope.shape[-1])
    share = torch.where(inside, smoothing - 1.0, 0.0).to(slope.dtype)
    slope.scatter_add_(-1, place.clamp(0, slope.shape[-1] - 1), share)
    return slope.sub_(smoothing / count) if smoothing else slope


def _chunks(rows: int, vocab_size: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * vocab_size))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

"""Cross entropy of a linear head, at supervised positions only and block by block.

The head is one matrix (frozen or trainable), or two: a frozen base and trainable new rows, never joined.

Over a vocabulary of 151,936 the logits of one 512-token sequence fill 311 MB in fp32, and most of
them belong to image and prompt positions that nobody grades. Here only positions with a label
reach the head. Frozen weights are walked through once, a block of rows at a time: each block is multiplied, takes
part in the running log-sum-exp, and adds to the gradient of the hidden states while it is still in the cache. When
a block raises the largest score, what was summed before is scaled down (as in FlashAttention, arXiv:2205.14135).

Shapes: B batch, T tokens, S supervised tokens, D width, V vocabulary, N new rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .precision import must_widen, widened

IGNORE_INDEX = -100
CHUNK_BYTES = 128 * 2**20  # of fp32 logits that live at one time
CACHE_BYTES = (
    8 * 2**20
)  # of a frozen head's fp32 weights that a CPU multiplies at one time: read twice, so best kept near


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
    return _split_cross_entropy(hidden, weight, weight[:0], target, weight.shape[0], 0.0, 0.0, None)


def chunked_cross_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], target: Tensor, vocab_size: int) -> Tensor:
    """Like `linear_cross_entropy` for any head (bias, soft cap, adapters): logits are recomputed in backward."""

    def losses(chunk: Tensor, ids: Tensor) -> Tensor:
        scores = head(chunk)
        return F.cross_entropy(scores.to(_exact(scores)), ids, reduction="none")

    pieces = [
        checkpoint(losses, hidden[rows], target[rows], use_reentrant=False)
        for rows in position_chunks(hidden.shape[0], vocab_size)
    ]
    return torch.cat(pieces) if pieces else hidden.sum(dim=-1).float()


def split_cross_entropy(
    hidden: Tensor,
    base: Tensor,
    rows: Tensor,
    target: Tensor,
    *,
    num_used: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    late: "LateGradient | None" = None,
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
        late: where the gradient of `rows` is left for a lookup of the same rows, instead of being returned at once.

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
        return _split_cross_entropy(hidden, base, rows, target, used, label_smoothing, z_loss, late)


class LateGradient:
    """The gradient that a loss has for rows which the same model also looks up, formed when the lookup's own is due.

    That is at the end of the backward pass, when the activations of the layers in between are gone. `ticket` is a
    number without meaning that the lookup puts out and the loss takes in: it makes autograd run the lookup's backward
    after the loss's, whichever way leads there.
    """

    def __init__(self) -> None:
        self.ticket: Tensor | None = None
        self._form: Callable[[], Tensor] | None = None

    def leave(self, form: Callable[[], Tensor]) -> None:
        """Called by the loss, in backward."""
        self._form = form

    def take(self) -> Tensor | None:
        """(N, D), which is the caller's alone; None where no loss has left anything."""
        form, self._form = self._form, None
        return None if form is None else form()


def _split_cross_entropy(
    hidden: Tensor,
    base: Tensor,
    rows: Tensor,
    target: Tensor,
    used: int,
    smoothing: float,
    z: float,
    late: LateGradient | None,
) -> Tensor:
    if late is None or late.ticket is None:
        return _SplitCrossEntropy.apply(hidden, base, rows, target, used, smoothing, z, None, None)
    return _SplitCrossEntropy.apply(hidden, base, rows.detach(), target, used, smoothing, z, late, late.ticket)


class _SplitCrossEntropy(torch.autograd.Function):
    """Losses and the gradient of `hidden` in one pass; the gradient of `rows` in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        base: Tensor,
        rows: Tensor,
        target: Tensor,
        used: int,
        smoothing: float,
        z: float,
        late: LateGradient | None,
        ticket: Tensor | None,
    ) -> Tensor:
        """(S, D), (V_base, D), (N, D), (S,) → (S,) losses in nats."""
        losses = torch.empty(hidden.shape[0], dtype=_exact(hidden), device=hidden.device)
        log_normalizers = torch.empty_like(losses)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        share = smoothing / (used + rows.shape[0])
        total = _sum_of_weights(base[:used], rows, losses.dtype) if smoothing else None  # (D,)
        for part in _parts(hidden, base):
            states, ids = hidden[part].to(_multiplied_dtype(base)), target[part]
            seen = _softmax_statistics(states, base[:used], rows, ids, base.shape[0], gradient is not None)
            log_z = seen.peak + seen.mass.log()  # (s, 1)
            loss = log_z - (1 - smoothing) * seen.of_target + z * log_z.square()
            if total is not None:
                loss -= share * (states.to(total.dtype) @ total).unsqueeze(-1)
            if gradient is not None:
                slope = seen.mean.mul_((1 + 2 * z * log_z) / seen.mass)
                slope -= (1 - smoothing) * _weights_of(ids, base, rows).to(slope.dtype)
                gradient[part] = slope if total is None else slope.sub_(share * total)
            losses[part], log_normalizers[part] = loss.squeeze(-1), log_z.squeeze(-1)
        ctx.save_for_backward(hidden, rows, target, log_normalizers, *([] if gradient is None else [gradient]))
        ctx.base, ctx.late, ctx.smoothing, ctx.share, ctx.z = base, late, smoothing, share, z
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """(S,) → gradients of `hidden` (S, D) and `rows` (N, D)."""
        hidden, rows, target, log_normalizers, *gradient = ctx.saved_tensors
        weights = grad_outputs[0].unsqueeze(-1)  # (S, 1)
        of_hidden = gradient[0] * weights.to(gradient[0].dtype) if gradient else None
        details = (ctx.base, ctx.smoothing, ctx.share, ctx.z)
        form = partial(_gradient_of_rows, hidden, rows, target, log_normalizers.unsqueeze(-1), weights, *details)
        if ctx.late is not None:
            ctx.late.leave(form)
            return of_hidden, *[None] * 7, weights.new_zeros(())
        return of_hidden, None, form() if ctx.needs_input_grad[2] else None, *[None] * 6


@torch.no_grad()
def _gradient_of_rows(
    hidden: Tensor,
    rows: Tensor,
    target: Tensor,
    log_z: Tensor,
    weights: Tensor,
    base: Tensor,
    smoothing: float,
    share: float,
    z: float,
) -> Tensor:
    """(N, D) in the dtype of `rows`, a block at a time; `log_z` (S, 1) and each loss's own `weights` (S, 1)."""
    gradient = torch.empty_like(rows)
    for first, block in _blocks(rows, _multiplied_dtype(base)):
        total = torch.zeros(block.shape, dtype=log_z.dtype, device=rows.device)
        for part in _parts(hidden, base):
            states, weight = hidden[part].to(block.dtype), weights[part]
            slope = F.linear(states, block).to(total.dtype).sub_(log_z[part]).exp_()
            slope = slope.mul_(weight * (1 + 2 * z * log_z[part])).sub_(share * weight)
            place, inside = _place(target[part], base.shape[0] + first, len(block))
            slope.scatter_add_(-1, place, torch.where(inside, (smoothing - 1) * weight, 0.0))
            _add_product(total, slope.mT, states)
        gradient[first : first + len(block)] = total
    return gradient


@dataclass
class _SoftmaxStatistics:
    """Of the scores of each position: the largest, Σ exp(score − largest), the target's, Σ exp(…) · weight."""

    peak: Tensor  # (s, 1)
    mass: Tensor  # (s, 1)
    of_target: Tensor  # (s, 1)
    mean: Tensor  # (s, D); empty where no gradient is wanted


def _softmax_statistics(
    states: Tensor, base: Tensor, rows: Tensor, target: Tensor, first_new: int, with_mean: bool
) -> _SoftmaxStatistics:
    """One pass over all weights, a block at a time; `states` (s, D) are in the dtype that is multiplied in."""
    zero = states.new_zeros(len(states), 1, dtype=_exact(states))
    seen = _SoftmaxStatistics(zero - torch.inf, zero.clone(), zero.clone(), zero.repeat(1, states.shape[1] * with_mean))
    for start, matrix in ((0, base), (first_new, rows)):
        for first, block in _blocks(matrix, states.dtype):
            scores = F.linear(states, block).to(zero.dtype)
            place, inside = _place(target, start + first, len(block))
            seen.of_target = torch.where(inside, scores.gather(-1, place), seen.of_target)
            peak = torch.maximum(seen.peak, scores.amax(dim=-1, keepdim=True))
            shrink = (seen.peak - peak).exp_()
            scores.sub_(peak).exp_()
            seen.peak, seen.mass = peak, seen.mass * shrink + scores.sum(dim=-1, keepdim=True)
            if with_mean:
                _add_product(seen.mean.mul_(shrink), scores, block)
    return seen


def _place(target: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """(s, 1) columns of the targets among ids `first` … `first + count − 1`, and which of them lie there at all."""
    place = target.unsqueeze(-1) - first
    return place.clamp(0, count - 1), (place >= 0) & (place < count)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """`to` += `left` @ `right`, in the dtype of `right`; without a product of its own where nothing is rounded."""
    if to.dtype == right.dtype:
        to.addmm_(left, right)
    else:
        to.add_(left.to(right.dtype) @ right)


def _blocks(matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, some rows in `dtype`), each good until the next one is asked for."""
    size = _block_rows(matrix)
    for first in range(0, len(matrix), size):
        block = matrix[first : first + size]
        yield first, widened(block) if must_widen(block) else block.to(dtype)


def _parts(hidden: Tensor, base: Tensor) -> list[slice]:
    """Positions that are scored against one block at one time."""
    return position_chunks(hidden.shape[0], _block_rows(base))


def _block_rows(matrix: Tensor) -> int:
    limit = CACHE_BYTES if matrix.device.type == "cpu" else CHUNK_BYTES
    return max(1, limit // (4 * matrix.shape[1]))


def _weights_of(ids: Tensor, base: Tensor, rows: Tensor) -> Tensor:
    """(s,) ids → (s, D) rows of the head, as they are multiplied."""
    old = base[ids.clamp(max=base.shape[0] - 1)].to(_multiplied_dtype(base))
    if not len(rows):
        return old
    new = rows[(ids - base.shape[0]).clamp(min=0)].to(old.dtype)
    return torch.where((ids >= base.shape[0]).unsqueeze(-1), new, old)


def _sum_of_weights(base: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(D,): the sum of all scores of a position is its product with this."""
    parts = [block.sum(dim=0, dtype=dtype) for matrix in (base, rows) for _, block in _blocks(matrix, base.dtype)]
    return torch.stack(parts).sum(dim=0)


def _multiplied_dtype(base: Tensor) -> torch.dtype:
    """What hidden states, base and master rows are multiplied in."""
    return torch.float32 if must_widen(base) else base.dtype


def _exact(tensor: Tensor) -> torch.dtype:
    """What is summed in: fp32, or fp64 for fp64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def position_chunks(rows: int, vocab_size: int) -> list[slice]:
    """Spans of positions whose fp32 scores take `CHUNK_BYTES` at most."""
    size = max(1, CHUNK_BYTES // (4 * vocab_size))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

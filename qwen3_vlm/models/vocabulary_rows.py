"""New vocabulary rows behind a frozen base: two blocks that are never joined.

    id < V_base   looked up in, and scored against, the base's own matrix, which is frozen
    id ≥ V_base   looked up in, and scored against, the new rows: the only trainable parameters

A joined matrix would need a gradient of all its rows only to throw most of them away, and weight decay would move
rows that nobody meant to train. Here no gradient of the base block is ever formed, no copy of it is made, and its
bits can't change whatever the optimizer does.

Shapes: B batch, T tokens, D width, V vocabulary, N new rows.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3_vlm.errors import ConfigError, ModelError

from .losses import LateGradient
from .precision import WidenedLinear, must_widen

__all__ = ["RowInit", "SplitEmbedding", "SplitHead", "add_rows", "fresh_rows"]

RowInit = Literal["mean", "normal", "zero_head"]
SPREAD_BLOCK = 16_384  # base rows whose statistics are taken at one time


class SplitEmbedding(nn.Module):
    """Ids → vectors, from the base's table or from the new rows.

    Args:
        base: the base's own embedding module; what it does to its vectors (a scale, a padding row) stays its own.
        rows: (N, D) of ids V_base … V_base + N − 1.

    Attributes:
        share_rows: the head is graded against the same rows in the same pass, see `late_gradient`.
    """

    def __init__(self, base: nn.Embedding, rows: nn.Parameter) -> None:
        super().__init__()
        self.base = base
        self.rows = rows
        self.share_rows = False
        self._late: LateGradient | None = None

    @property
    def weight(self) -> Tensor:
        """The base's table: what libraries read the width and the dtype from."""
        return self.base.weight

    @property
    def num_embeddings(self) -> int:
        return self.base.num_embeddings + self.rows.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.base.embedding_dim

    def forward(self, input_ids: Tensor) -> Tensor:
        """(…,) → (…, D) in the base's dtype, or in fp32 where a 16-bit base is multiplied in fp32."""
        first = self.base.num_embeddings
        from_base: Tensor = self.base(input_ids.clamp(max=first - 1))
        from_base = from_base.float() if must_widen(self.weight) else from_base
        from_rows = self._look_up((input_ids - first).clamp(min=0)).to(from_base.dtype)
        scale = getattr(self.base, "embed_scale", None)  # Gemma scales inside its embedding
        if scale is not None:
            from_rows = from_rows * scale
        return torch.where((input_ids >= first).unsqueeze(-1), from_rows, from_base)

    def _look_up(self, index: Tensor) -> Tensor:
        if not self.share_rows or torch.compiler.is_compiling():
            return F.embedding(index, self.rows)
        self._late = LateGradient()
        vectors, self._late.ticket = _LookUp.apply(self.rows, index, self._late)
        return vectors

    def late_gradient(self) -> LateGradient | None:
        """For the loss of a tied head, which leaves its gradient of the rows there; None where nothing was looked up.

        So one gradient of all rows exists, and only once the layers in between have gone backward. As two uses of one
        parameter, head and lookup would each have one, and the head's would be held through all layers.
        """
        late, self._late = self._late, None
        return late


class _LookUp(torch.autograd.Function):
    """Rows by id, and the ticket of their late gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, late: LateGradient) -> tuple[Tensor, Tensor]:
        """(N, D), (…,) → (…, D), ()."""
        ctx.save_for_backward(index)
        ctx.late, ctx.rows_like = late, {"size": rows.shape, "dtype": rows.dtype, "device": rows.device}
        ctx.set_materialize_grads(False)
        return F.embedding(index, rows), rows.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        of_vectors, of_rows = grad_outputs[0], ctx.late.take()
        of_rows = torch.zeros(**ctx.rows_like) if of_rows is None else of_rows
        if of_vectors is not None:
            of_rows.index_add_(0, index.flatten(), of_vectors.flatten(0, -2))
        return of_rows, None, None


class SplitHead(nn.Module):
    """Vectors → scores of every id, for generation; training uses `losses.split_cross_entropy` and no joined scores.

    Args:
        base: the base's own head.
        rows: (N, D); the embedding's own parameter where the base ties its two.
        num_used: base ids that its tokenizer has; the padding rows beyond are never predicted.
    """

    def __init__(self, base: nn.Module, rows: nn.Parameter, num_used: int) -> None:
        super().__init__()
        self.base = base
        self.rows = rows
        self.num_used = num_used

    @property
    def weight(self) -> Any:
        """The base's matrix (V_base, D)."""
        return self.base.weight

    def forward(
        self,
        hidden_states: Tensor,
        first: int = 0,
        last: int | None = None,
        rules: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """(…, D) → (…, V_base + N); −∞ at the base's padding rows and outside the ids `first` to `last` (excluded).

        A block that has none of those ids is not multiplied, and of the new rows only those that are needed. `rules`
        is what the base's family does to its scores.
        """
        base = self.weight.shape[0]
        end = base + self.rows.shape[0]
        last = end if last is None else last
        used = min(last, self.num_used)
        pieces = []
        if first < used:
            scores = self.base(hidden_states if isinstance(self.base, WidenedLinear) else hidden_states.to(self.dtype))
            scores = scores if rules is None else rules(scores)
            scores[..., :first] = -torch.inf
            scores[..., used:] = -torch.inf
            pieces = [scores]
        else:
            pieces = [self._nothing(hidden_states, base)]
        low, high = max(first, base), max(last, base)
        pieces.append(self._nothing(hidden_states, low - base))
        if low < high:
            scores = self.score_rows(hidden_states, low - base, high - base)
            pieces.append((scores if rules is None else rules(scores)).to(pieces[0].dtype))
        pieces.append(self._nothing(hidden_states, end - max(low, high)))
        return torch.cat(pieces, dim=-1)

    def score_rows(self, hidden_states: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """(…, D) → (…, n): scores of new rows `first` to `last` (excluded) alone."""
        rows = self.rows[first:last]
        return F.linear(hidden_states.to(self.dtype), rows.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """What scores are computed in."""
        return torch.float32 if must_widen(self.weight) else self.weight.dtype

    def _nothing(self, hidden_states: Tensor, count: int) -> Tensor:
        return hidden_states.new_full((*hidden_states.shape[:-1], count), -torch.inf, dtype=self.dtype)


def add_rows(model: Any, embeddings: Tensor, head: Tensor | None, num_used: int) -> None:
    """Freeze a causal LM and put new rows behind its vocabulary, in place. Call it before any wrapping.

    Args:
        model: any Hugging Face causal LM.
        embeddings: (N, D) rows; kept in their dtype (fp32 master rows beside a bf16 base).
        head: (N, D) rows of the head; None for a model whose head is tied to its embedding.
        num_used: ids that the base's tokenizer has.

    Raises:
        ModelError: the shapes do not fit, the head has a bias, or tied and untied are confused.
    """
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = is_tied(model)
    if tied != (head is None):
        raise ModelError(
            "The base ties its head to its embedding, so there is one set of new rows."
            if tied
            else "The base has a head of its own, so new rows are needed for the embedding and for the head."
        )
    for name, rows in (("embedding", embeddings), ("head", head)):
        if rows is not None and (rows.ndim != 2 or rows.shape != (len(embeddings), table.embedding_dim)):
            raise ModelError(
                f"The new {name} rows have the shape {tuple(rows.shape)}; ({len(embeddings)}, {table.embedding_dim}) "
                "is needed."
            )
    if getattr(output, "bias", None) is not None:
        raise ModelError("The base's head has a bias; new rows behind such a head are not supported.")
    if not 0 < num_used <= table.num_embeddings:
        raise ModelError(f"The tokenizer has {num_used:,} ids, the base {table.num_embeddings:,} rows.")
    model.requires_grad_(False)
    rows = nn.Parameter(embeddings.to(table.weight.device))
    model.set_input_embeddings(SplitEmbedding(table, rows))
    model.set_output_embeddings(
        SplitHead(output, rows if head is None else nn.Parameter(head.to(table.weight.device)), num_used)
    )


def is_tied(model: Any) -> bool:
    """Whether head and embedding are one matrix: by the tensors, since configs have been wrong about it."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def fresh_rows(
    model: Any, count: int, *, num_used: int, init: RowInit = "mean", seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """New embedding rows and, for an untied base, head rows: fp32 (count, D) on the base's device.

    "mean" is the mean of the base's used rows plus noise at their own spread, per dimension. The mean alone, as
    resizing does it, gives rows that are equal to the last bits, which training then has to pull apart.
    "normal" is noise at the base's spread around zero. "zero_head" is "mean" with a head that begins at zero, so
    that a fresh model gives every new id the score 0.

    Raises:
        ConfigError: "zero_head" for a tied base, or an unknown `init`.
    """
    tied = is_tied(model)
    if init not in ("mean", "normal", "zero_head"):
        raise ConfigError(f"init is {init!r}; it must be mean, normal or zero_head.")
    if init == "zero_head" and tied:
        raise ConfigError(
            "init is zero_head, but this base ties its head to its embedding: zero rows would embed to 0."
        )
    generator = torch.Generator().manual_seed(seed)
    embeddings = _like_rows(model.get_input_embeddings().weight[:num_used], count, init, generator)
    if tied:
        return embeddings, None
    if init == "zero_head":
        return embeddings, torch.zeros_like(embeddings)
    return embeddings, _like_rows(model.get_output_embeddings().weight[:num_used], count, init, generator)


@torch.no_grad()
def _like_rows(base: Tensor, count: int, init: RowInit, generator: torch.Generator) -> Tensor:
    mean, spread = _statistics(base)
    noise = torch.randn(count, base.shape[1], generator=generator).to(base.device) * spread
    return noise if init == "normal" else mean + noise


def _statistics(base: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of all rows, in float64, a block at a time."""
    total = torch.zeros(base.shape[1], dtype=torch.float64, device=base.device)
    squares = torch.zeros_like(total)
    for block in base.split(SPREAD_BLOCK):
        total += block.double().sum(dim=0)
        squares += block.double().square().sum(dim=0)
    mean = total / len(base)
    variance = (squares / len(base) - mean.square()).clamp(min=0)
    return mean.float(), variance.sqrt().float()

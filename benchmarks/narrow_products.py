"""bf16 matmuls for models that know nothing of a processor without bf16 arithmetic.

Torch's own bf16 matmul runs some hundred times slower there, so that no peer could be measured. Here `F.linear` widens
bf16 weights a block at a time and gives bf16 back: the time of an fp32 product, the memory of a bf16 one. That is the
most that can be done for a peer without changing what it computes.

Shapes: V output width, D input width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_vlm.models.precision import must_widen

BLOCK_ROWS = 2048


class _NarrowProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        """(…, D) @ (V, D)ᵀ → (…, V)."""
        ctx.save_for_backward(hidden, weight)
        wide = hidden.float()
        product = hidden.new_empty(*hidden.shape[:-1], weight.shape[0])
        for rows in _blocks(weight):
            product[..., rows] = wide @ weight[rows].float().mT
        return product

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        of_product, wide = grad_outputs[0].flatten(0, -2), hidden.flatten(0, -2).float()
        of_hidden = torch.zeros_like(wide) if ctx.needs_input_grad[0] else None
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for rows in _blocks(weight):
            slope = of_product[:, rows].float()
            if of_hidden is not None:
                of_hidden.addmm_(slope, weight[rows].float())
            if of_weight is not None:
                of_weight[rows] = slope.mT @ wide
        return None if of_hidden is None else of_hidden.view(hidden.shape).to(hidden.dtype), of_weight


def _blocks(weight: Tensor) -> list[slice]:
    return [slice(start, start + BLOCK_ROWS) for start in range(0, weight.shape[0], BLOCK_ROWS)]


@contextmanager
def narrow_products() -> Iterator[None]:
    """`F.linear`, as nn.Linear and PEFT call it, fast for bf16 weights on any CPU; untouched where it is anyway."""
    plain = F.linear

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not must_widen(weight) or bias is not None:
            return plain(input, weight, bias)
        product: Tensor = _NarrowProduct.apply(input, weight)
        return product

    with mock.patch.object(F, "linear", linear):
        yield

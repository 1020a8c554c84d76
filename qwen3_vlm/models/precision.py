"""Large frozen weights on a CPU without bf16 instructions: stored in bf16, multiplied in fp32.

Where the processor has no bf16 arithmetic, a bf16 matmul runs some hundred times slower than an
fp32 one, and fp32 copies of an 8 B model do not fit a small machine. So the weights stay in bf16
and each is widened, a block of rows at a time, just before it is used and again in the backward
pass. On a GPU, or a CPU with AVX512-BF16 or AMX, nothing here is used.

Shapes: S rows, D input width, V output width.
"""

import threading
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK_BYTES = 256 * 2**20  # of widened weights that live at one time
_scratch = threading.local()  # where a thread widens its blocks: fresh memory each time costs a page fault per page


@cache
def _cpu_has_bf16() -> bool:
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except AttributeError:  # another torch: ask oneDNN, which also knows ARM
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def bf16_is_fast(device: torch.device | str) -> bool:
    """Whether bf16 matmuls pay on this device."""
    return torch.device(device).type != "cpu" or _cpu_has_bf16()


def must_widen(weight: Tensor) -> bool:
    """Whether this weight should be multiplied in fp32 although it is stored in 16 bits."""
    return weight.dtype in (torch.bfloat16, torch.float16) and not bf16_is_fast(weight.device)


def matmul_transposed(hidden: Tensor, weight: Tensor) -> Tensor:
    """(…, D) @ (V, D)ᵀ → (…, V), in fp32 by blocks of V where `must_widen(weight)`. Not differentiable."""
    if not must_widen(weight):
        return F.linear(hidden.to(weight.dtype), weight)
    blocks = _row_blocks(weight)
    if len(blocks) == 1:
        return F.linear(hidden.float(), widened(weight))
    product = hidden.new_empty(*hidden.shape[:-1], weight.shape[0], dtype=torch.float32)
    for block in blocks:
        product[..., block] = F.linear(hidden.float(), widened(weight[block]))
    return product


def matmul(gradient: Tensor, weight: Tensor) -> Tensor:
    """(…, V) @ (V, D) → (…, D), in fp32 by blocks of V where `must_widen(weight)`. Not differentiable."""
    if not must_widen(weight):
        return gradient.to(weight.dtype) @ weight
    blocks = _row_blocks(weight)
    product = gradient[..., blocks[0]].float() @ widened(weight[blocks[0]])
    for block in blocks[1:]:
        product += gradient[..., block].float() @ widened(weight[block])
    return product


def frozen_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """(…, D) @ (V, D)ᵀ → (…, V) as the model's own layers multiply it; gradients reach `hidden` alone."""
    product: Tensor = _FrozenProduct.apply(hidden, weight)
    return product


class WidenedLinear(nn.Linear):
    """An nn.Linear whose frozen 16-bit weight is multiplied in fp32; gradients reach its input alone."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return F.linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float())
        product = frozen_product(input, self.weight)
        return product if self.bias is None else product + self.bias


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        # Not save_for_backward: a layer recomputed by checkpointing stops once all *saved* tensors are back, and a
        # frozen parameter needs no recomputing. So the last product of each layer is not made again.
        ctx.weight = weight
        return matmul_transposed(hidden, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return matmul(grad_outputs[0], ctx.weight), None


def compute_in_fp32(module: nn.Module) -> None:
    """Make every nn.Linear below `module` a WidenedLinear; small tensors (norms, convolutions) become fp32.

    Embedding tables stay in 16 bits: they are looked up, not multiplied.
    """
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = WidenedLinear
        elif not isinstance(child, (nn.Embedding, WidenedLinear)):
            for parameter in child.parameters(recurse=False):
                parameter.data = parameter.data.float()


def widened(block: Tensor) -> Tensor:
    """An fp32 copy in this thread's scratch memory, good until the next call."""
    scratch: Tensor | None = getattr(_scratch, "memory", None)
    if scratch is None or scratch.numel() < block.numel():
        scratch = _scratch.memory = torch.empty(block.numel())
    return scratch[: block.numel()].view_as(block).copy_(block)


def _row_blocks(weight: Tensor) -> list[slice]:
    rows = max(1, BLOCK_BYTES // (4 * weight.shape[1]))
    return [slice(start, min(start + rows, weight.shape[0])) for start in range(0, weight.shape[0], rows)]

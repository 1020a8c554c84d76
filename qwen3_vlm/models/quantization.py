"""A frozen decoder in 4 bits (QLoRA: Dettmers et al., arXiv:2305.14314), by bitsandbytes' own layers.

The linear layers of the decoder's blocks are kept as NF4 with doubly quantized scales, some 4.13 bits a weight, and
multiplied in the base's own precision. Embedding, head, norms, a tower, a connector and new vocabulary rows stay as
they are. Adapters go on such layers as on any other; what is saved belongs to the base as its files have it.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from qwen3_vlm.errors import ModelError
from qwen3_vlm.models.precision import must_widen


def quantize(trunk: Any, device: torch.device | str) -> list[str]:
    """Put the linear layers of a decoder into 4 bits on a device, in place, one after the other; their names.

    Args:
        trunk: a decoder without its head, in its own precision; frozen by it.

    Raises:
        ModelError: bitsandbytes can't be had, or the decoder has no linear layer.
    """
    library = _bitsandbytes()
    layers = {name: module for name, module in trunk.named_modules() if type(module) is nn.Linear}
    if not layers:
        raise ModelError("The language model has no linear layers to quantize.")
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(trunk.get_submodule(parent), own, _quantized(library, layer, torch.device(device)))
    trunk.is_loaded_in_4bit = True  # what PEFT asks for
    return list(layers)


def parameter_count(parameter: Tensor) -> int:
    """Weights of a parameter, also of one that has two of them in each byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _quantized(library: Any, layer: nn.Linear, device: torch.device) -> nn.Module:
    computed = torch.float32 if must_widen(layer.weight) else layer.weight.dtype
    options = {"compute_dtype": computed, "compress_statistics": True, "quant_type": "nf4"}
    made: nn.Module = library.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta", **options
    )
    weight = library.nn.Params4bit(
        layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
    )
    made.register_parameter("weight", weight)
    if layer.bias is not None:
        made.register_parameter("bias", nn.Parameter(layer.bias.data.to(computed), requires_grad=False))
    return made.to(device)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except (ImportError, RuntimeError, OSError) as problem:
        raise ModelError(
            "model.quantization is nf4, which needs bitsandbytes: pip install 'qwen3-vlm[quantization]' "
            f"({str(problem).splitlines()[0]})."
        ) from problem
    return bitsandbytes

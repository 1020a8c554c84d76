"""Whole numbers as an int, a numpy array or a torch tensor: the same arithmetic for all, and no import of torch."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from qwen3_vlm.errors import TokenError

__all__ = ["as_integers", "require_between", "stack_last", "swap_last"]


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # who has a tensor has imported torch
    return torch is not None and isinstance(value, torch.Tensor)


def as_integers(values: Any) -> Any:
    """int, int64 array or int64 tensor; anything that is no integer is refused, not rounded."""
    if isinstance(values, (int, np.integer)) and not isinstance(values, (bool, np.bool_)):
        return int(values)
    if _is_tensor(values):
        if values.is_floating_point() or values.is_complex() or str(values.dtype) == "torch.bool":
            raise TokenError(f"Ids are whole numbers; a tensor of {values.dtype} was given.", "not_integer")
        return values.long()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise TokenError(f"Ids must be one rectangular list of whole numbers ({error}).", "not_integer") from error
    if array.size == 0 and array.dtype == np.float64:  # an empty list
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TokenError(f"Ids are whole numbers; {type(values).__name__} of {array.dtype} was given.", "not_integer")
    if array.dtype == np.uint64 and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise TokenError(f"The id {int(array.max())} is larger than any token space.", "out_of_range")
    return array.astype(np.int64)


def require_between(values: Any, low: int, high: int, what: str, belongs: Callable[[int], str] | None = None) -> None:
    """Refuse the first value outside low … high, naming it, its place and where it would belong.

    Raises:
        TokenError: there is one.
    """
    if isinstance(values, int):
        bad, place = (not low <= values <= high), ""
        value = values
    else:
        outside = (values < low) | (values > high)
        bad = bool(outside.any())
        if bad:
            flat = outside.reshape(-1)
            index = int(flat.int().argmax()) if _is_tensor(flat) else int(flat.argmax())
            value, place = int(values.reshape(-1)[index]), f" at position {index}"
    if not bad:
        return
    where = belongs(value) if belongs else ""
    raise TokenError(f"{what[0].upper()}{what[1:]} lie in {low:,}–{high:,}; {value:,} was given{place}{where}.",
                     "out_of_range")  # fmt: skip


def stack_last(parts: list[Any]) -> Any:
    """K arrays (…, F) to one (…, F, K)."""
    if _is_tensor(parts[0]):
        return sys.modules["torch"].stack(parts, dim=-1)
    return np.stack(parts, axis=-1)


def swap_last(values: Any) -> Any:
    """(…, F, K) to (…, K, F), contiguous."""
    if _is_tensor(values):
        return values.transpose(-1, -2).contiguous()
    return np.ascontiguousarray(np.swapaxes(values, -1, -2))

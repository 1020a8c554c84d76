"""A decoder whose own weights were trained, in a file beside the rows: what the base's file has under these names.

    trunk.safetensors   every parameter of the decoder but its embedding table, by its name in the causal LM

The embedding and the head stay the base's, and so does the base on disk. Values are kept exactly: in the base's dtype
where that holds every one of them, as it does at the end of a training, else in the fp32 that they are trained in.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from qwen3_vlm.errors import AddOnError, TamperedFileError
from qwen3_vlm.models.add_on_files import check_bytes, name_findings
from qwen3_vlm.storage import atomic_file

__all__ = ["TRUNK", "TRUNK_MARK", "check_trunk", "frozen_copy", "read_trunk", "trunk_parameters", "write_trunk"]

TRUNK = "trunk.safetensors"
TRUNK_MARK = "trunk/"  # before the names of its tensors, where they stand beside those of the rows
SHOWN = 20  # findings


def trunk_parameters(trunk: Any) -> dict[str, nn.Parameter]:
    """Name inside the trunk → parameter, without the embedding table and what stands behind it."""
    table = {id(parameter) for parameter in trunk.get_input_embeddings().parameters()}
    return {name: parameter for name, parameter in trunk.named_parameters() if id(parameter) not in table}


def frozen_copy(trunk: Any) -> Any:
    """The decoder as it is now, in eval mode; it takes embeddings alone, and shares no tensor with `trunk`."""
    table = trunk.get_input_embeddings()
    copied: Any = copy.deepcopy(trunk, {id(table): nn.Identity()})
    return copied.requires_grad_(False).eval()


def write_trunk(folder: Path, tensors: Mapping[str, Tensor], prefix: str, dtype: torch.dtype) -> None:
    """trunk.safetensors; atomicity of the folder is the caller's.

    Args:
        tensors: by the names of `trunk_parameters`, whole.
        prefix: the trunk's name inside the causal LM (`base_model_prefix`), such as "model".
        dtype: of the base.

    Raises:
        StorageError: the disk is full or can't be written.
    """
    kept = dtype if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in tensors.values()) else None
    whole = {
        f"{prefix}.{name}": tensor.detach().to("cpu", kept or torch.float32).contiguous()
        for name, tensor in tensors.items()
    }
    with atomic_file(folder / TRUNK) as temporary:
        safetensors.torch.save_file(whole, temporary, metadata={"format": "pt"})


def read_trunk(folder: Path, trunk: Any, prefix: str, written: Mapping[str, Any]) -> None:
    """Put a saved trunk into a decoder, in place, in the dtype that it has there.

    Args:
        written: size and checksum of the file, from trainable_rows.json.

    Raises:
        AddOnError: it is missing, or not this decoder's weights; a line per finding.
        TamperedFileError: its bytes are not those that were written.
    """
    path = folder / TRUNK
    check_bytes(path, written)
    parameters = {f"{prefix}.{name}": parameter for name, parameter in trunk_parameters(trunk).items()}
    with _opened(path) as stored:
        names = list(stored.keys())
        lines = name_findings(names, parameters)
        lines += [
            f"{name} has shape {shape}; the model has {tuple(parameters[name].shape)}"
            for name in names
            if name in parameters and (shape := _shape(stored, name)) != tuple(parameters[name].shape)
        ]
        if lines:
            raise AddOnError(f"{path} does not fit the model:\n  " + "\n  ".join(lines[:SHOWN]))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(_values(path, stored, name))


def check_trunk(folder: Path, written: Mapping[str, Any]) -> tuple[int, int, str]:
    """Check the file without a decoder: (tensors, parameters, dtype).

    Raises:
        AddOnError, TamperedFileError: see `read_trunk`.
    """
    path = folder / TRUNK
    check_bytes(path, written)
    count, kinds = 0, set()
    with _opened(path) as stored:
        names = list(stored.keys())
        for name in names:
            tensor = _values(path, stored, name)
            count += tensor.numel()
            kinds.add(str(tensor.dtype).removeprefix("torch."))
    return len(names), count, "/".join(sorted(kinds))


def _opened(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError, ValueError) as problem:
        raise TamperedFileError(f"{path} is no readable safetensors file ({problem}).") from problem


def _shape(stored: Any, name: str) -> tuple[int, ...]:
    return tuple(stored.get_slice(name).get_shape())


def _values(path: Path, stored: Any, name: str) -> Tensor:
    tensor: Tensor = stored.get_tensor(name)
    if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
        raise AddOnError(f"{path} can't be used: {name} holds values that are not finite.")
    return tensor

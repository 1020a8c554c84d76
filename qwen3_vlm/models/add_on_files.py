"""What connector directories and trainable-rows folders have in common: files that may come from anywhere.

Files are compared with the checksums that were recorded, bases with their fingerprints, tensors with the parameters
that they are for; each difference is a line.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3_vlm.errors import AddOnError, BaseMismatchError, ModelError, StorageError, TamperedFileError
from qwen3_vlm.fingerprint import Role, differences, fingerprint_file, fingerprint_folder, resolve_folder

__all__ = [
    "EVIDENCE",
    "MAX_INFO_BYTES",
    "base_folder",
    "check_bytes",
    "describe_files",
    "folder_differences",
    "is_text",
    "name_findings",
    "named_dtype",
    "refuse_differences",
    "require_new_folder",
    "tensor_findings",
]

EVIDENCE = "evidence.json"
MAX_INFO_BYTES = 10_000_000
_LABELS = {"llm": "LLM", "vision_tower": "vision tower"}


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Checksum and size of each of these files, for `check_bytes`."""
    return {
        name: {"sha256": fingerprint_file(folder / name), "bytes": (folder / name).stat().st_size} for name in names
    }


def check_bytes(path: Path, written: Mapping[str, Any]) -> None:
    """Compare a file's size and checksum with those that were recorded.

    Raises:
        AddOnError: it is missing.
        TamperedFileError: its bytes are not those that were written.
    """
    try:
        size = path.stat().st_size
        digest = fingerprint_file(path) if size == written.get("bytes") else None
    except OSError as problem:
        raise AddOnError(f"{path} can't be read: {problem.strerror or problem}.") from problem
    if digest is None:
        raise TamperedFileError(
            f"{path} has {size:,} bytes, but {written.get('bytes')} were written; it was cut short or changed. "
            "Fetch it again."
        )
    if digest != written.get("sha256"):
        raise TamperedFileError(f"{path} was changed after it was written (its checksum differs). Fetch it again.")


def is_text(value: Any) -> bool:
    """A string without the halves of characters that JSON can write and UTF-8 can't."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def name_findings(names: Iterable[str], expected: Iterable[str]) -> list[str]:
    """A line per tensor that is missing, and per tensor that should not be there."""
    names, expected = list(names), list(expected)
    missing = [f"{name} is missing" for name in expected if name not in names]
    return missing + [f"{name} is unexpected" for name in names if name not in expected]


def tensor_findings(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], what: str) -> list[str]:
    """A line per way in which the tensors of `what` ("connectors") are not finite fp32 values for these parameters."""
    lines = name_findings(tensors, parameters)
    for name, parameter in parameters.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tensor.shape != parameter.shape:
            lines.append(f"{name} has shape {tuple(tensor.shape)}; the model has {tuple(parameter.shape)}")
        elif tensor.dtype != torch.float32:
            lines.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; {what} are float32")
        elif not bool(torch.isfinite(tensor).all()):
            lines.append(f"{name} holds values that are not finite")
    return lines


def folder_differences(
    expected: Mapping[str, Any], source: str | Path, role: Role, *, trust_remote_code: bool = False
) -> list[str]:
    """One line per way in which a base's own files differ from its recorded fingerprint; nothing large is loaded.

    A base that has no safetensors files is passed: it can be compared once it is loaded.
    """
    try:
        found = fingerprint_folder(source, role, trust_remote_code=trust_remote_code)
    except ModelError:
        if not any(Path(source).glob("*.bin")):
            raise
        return []
    return differences(expected, found, _LABELS[role])


def refuse_differences(directory: str | Path, lines: list[str]) -> None:
    """Do nothing if there are no lines.

    Raises:
        BaseMismatchError: there are.
    """
    if lines:
        raise BaseMismatchError(f"The add-on {directory} was made for another base:\n  " + "\n  ".join(lines))


def base_folder(source: str | Path, section: str, folder: Path, *, download: bool = True) -> Path:
    """Where a base of the add-on in `folder` lies; without `download`, on this machine.

    Raises:
        ModelError: it can't be had; the sentence says how to name another place.
    """
    try:
        return resolve_folder(source, what=section.replace("_", " "), download=download)
    except ModelError as problem:
        option = "--llm" if section == "llm" else "--vision-tower"
        raise ModelError(f"{problem} {folder} was trained on it; say where it is with {option}.") from problem


def require_new_folder(path: str | Path) -> Path:
    """The folder that an export shall become, which is not there yet or empty.

    Raises:
        StorageError: there is something in it, or it is a file.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StorageError(f"{target} already exists and is not empty; choose another name for the export.")
    return target


def named_dtype(name: str | torch.dtype) -> torch.dtype:
    """A dtype of weights by its name, such as "bfloat16".

    Raises:
        ModelError: there is no such dtype, or it is none of weights.
    """
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"{name!r} is no dtype of model weights; use bfloat16 or float32.")
    return dtype

"""trainable_rows.pt: written with torch.save, looked at before torch.load(weights_only=True) may read it.

    {"embeddings": (N, D), "lm_head": (N, D) or None, "row_start", "row_end", "base_llm", "dtype"}

A .pt file is a zip archive with a pickle in it. `weights_only` keeps code from running, but a file may still ask for
memory without end, or for more bytes than it has. So the archive's directory and the pickle's instructions are read
first: only what torch.save writes for such a dict passes, and every tensor must have exactly its bytes in the file.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3_vlm.errors import AddOnError, Qwen3VLMError, TamperedFileError
from qwen3_vlm.storage import atomic_file

__all__ = ["DTYPE", "ROW_NAMES", "StoredRows", "read_layout", "read_row_tensors", "write_row_tensors"]

DTYPE = "float32"
ROW_NAMES = ("embeddings", "lm_head")
MAX_PICKLE_BYTES = 100_000
MAX_MEMBERS = 32
_KEYS = {"embeddings", "lm_head", "row_start", "row_end", "base_llm", "dtype"}
_GLOBALS = {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"}
_OPCODES = {
    *("PROTO", "MARK", "BINPUT", "BINGET", "STOP"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("NONE", "NEWFALSE", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("GLOBAL", "BINPERSID", "REDUCE"),
}


@dataclass(frozen=True, slots=True)
class StoredRows:
    """What a file says it holds; `shapes` has an entry per tensor."""

    shapes: dict[str, tuple[int, ...]]
    row_start: int
    row_end: int
    base_llm: str
    dtype: str


def write_row_tensors(path: Path, tensors: Mapping[str, Tensor], row_start: int, row_end: int, base_llm: str) -> None:
    """Write the rows in fp32; the same rows give the same bytes.

    Raises:
        StorageError: the disk is full or can't be written.
    """
    rows = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    content = {
        **{name: rows.get(name) for name in ROW_NAMES},
        "row_start": row_start,
        "row_end": row_end,
        "base_llm": base_llm,
        "dtype": DTYPE,
    }
    with atomic_file(path) as temporary, open(temporary, "wb") as stream:
        torch.save(content, stream)  # to a stream: given a path, it writes that name into the file


def read_layout(path: Path) -> StoredRows:
    """What the file would give, without reading a tensor.

    Raises:
        AddOnError: it holds anything else than such rows: code, other objects, tensors without their bytes.
        TamperedFileError: it is no readable archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = _member_sizes(archive)
            (name,) = (name for name in sizes if name.endswith("data.pkl"))
            if sizes[name] > MAX_PICKLE_BYTES:
                raise _NotRowsError(f"its pickle has {sizes[name]:,} bytes")
            data = archive.read(name)
        _check_instructions(path, data)
        return _layout(_Describer(io.BytesIO(data)).load(), name.removesuffix("data.pkl"), sizes)
    except Qwen3VLMError:
        raise
    except _NotRowsError as problem:
        raise AddOnError(f"{path} holds no trainable rows: {problem}. It was not written by this package.") from problem
    except Exception as problem:  # a damaged file can fail in any way
        reason = " ".join(str(problem).split())[:200]
        raise TamperedFileError(f"{path} is no readable file of rows ({reason}); fetch it again.") from problem


def read_row_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors, by name, on the CPU.

    Raises:
        AddOnError, TamperedFileError: see `read_layout`.
    """
    shapes = read_layout(path).shapes
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {name: content[name] for name in ROW_NAMES if content[name] is not None}
    except Exception as problem:  # likewise
        reason = " ".join(str(problem).split())[:200]
        raise TamperedFileError(f"{path} is no readable file of rows ({reason}); fetch it again.") from problem
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        raise TamperedFileError(f"{path} does not give the tensors that it describes; fetch it again.")
    return tensors


class _NotRowsError(Exception):
    """A readable pickle that is not the dict it should be."""


class _Described:
    """Stands for a tensor: the arguments that would rebuild it."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


class _Describer(pickle.Unpickler):
    """Runs a pickle whose instructions `_check_instructions` has passed; it can make dicts and descriptions alone."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module} {name}" not in _GLOBALS:
            raise _NotRowsError(f"it names {module}.{name}")
        return {"_rebuild_tensor_v2": _Described, "OrderedDict": dict, "FloatStorage": "float32"}[name]

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _member_sizes(archive: zipfile.ZipFile) -> dict[str, int]:
    """Name → bytes of each member; none is compressed, none stands there twice."""
    members = archive.infolist()
    if len(members) > MAX_MEMBERS or len({member.filename for member in members}) != len(members):
        raise _NotRowsError("its archive has other members than torch.save writes")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise _NotRowsError("its archive is compressed")
    return {member.filename: member.file_size for member in members}


def _check_instructions(path: Path, data: bytes) -> None:
    """Read a pickle's instructions without running one."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL" and argument not in _GLOBALS:
            name = str(argument).replace(" ", ".")[:100]
            raise AddOnError(
                f"{path} is refused: its pickle names {name}, which is neither a tensor nor a number. It may hold code "
                "that runs in any program that opens it."
            )
        if opcode.name not in _OPCODES:
            raise _NotRowsError(f"its pickle uses {opcode.name}, which torch.save does not for such rows")


def _layout(content: Any, root: str, sizes: Mapping[str, int]) -> StoredRows:
    if type(content) is not dict or set(content) != _KEYS:
        raise _NotRowsError(f"it is no dict of {', '.join(sorted(_KEYS))}")
    for key, kind in (("row_start", int), ("row_end", int), ("base_llm", str), ("dtype", str)):
        if type(content[key]) is not kind:
            raise _NotRowsError(f"its {key} is no {kind.__name__}")
    shapes = {name: _shape(name, content[name], root, sizes) for name in ROW_NAMES if content[name] is not None}
    return StoredRows(shapes, content["row_start"], content["row_end"], content["base_llm"], content["dtype"])


def _shape(name: str, tensor: Any, root: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a described tensor that has a member of the archive to itself."""
    if not isinstance(tensor, _Described):
        raise _NotRowsError(f"its {name} is no tensor")
    storage, offset, shape, stride, *_ = tensor.arguments
    kind, dtype, key, _, numel = storage
    numbers = [offset, numel, *shape, *stride]
    if kind != "storage" or dtype != "float32" or any(type(number) is not int for number in numbers):
        raise _NotRowsError(f"its {name} is no plain float32 tensor")
    dense = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
    if offset or min(shape, default=0) < 1 or tuple(stride) != dense or math.prod(shape) != numel:
        raise _NotRowsError(f"its {name} is a view of other bytes than its own")
    if sizes.get(f"{root}data/{key}") != numel * 4:
        raise _NotRowsError(f"its {name} has {sizes.get(f'{root}data/{key}')} bytes, and {numel * 4} are needed")
    return tuple(shape)

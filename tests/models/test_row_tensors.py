"""trainable_rows.pt from somebody who means harm: nothing runs, nothing large is made."""

import io
import os
import pickle
import resource
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_vlm.errors import AddOnError, Qwen3VLMError, TamperedFileError
from qwen3_vlm.models.row_tensors import StoredRows, read_layout, read_row_tensors, write_row_tensors

ROWS = {"embeddings": torch.arange(12.0).reshape(4, 3), "lm_head": torch.ones(4, 3)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_row_tensors(tmp_path / "rows.pt", ROWS, 10, 14, "owner/base")
    return tmp_path / "rows.pt"


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def replace(path: Path, change: Callable[[dict[str, bytes]], object], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the archive again with other members."""
    content = members(path)
    change(content)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def with_pickle(path: Path, data: bytes) -> None:
    replace(path, lambda content: content.update({"archive/data.pkl": data}))


def refused(path: Path, words: str | None = None) -> None:
    for read in (read_layout, read_row_tensors):
        with pytest.raises(AddOnError, match=words):
            read(path)


def test_round_trip(path: Path) -> None:
    assert read_layout(path) == StoredRows({"embeddings": (4, 3), "lm_head": (4, 3)}, 10, 14, "owner/base", "float32")
    tensors = read_row_tensors(path)
    assert all(torch.equal(tensors[name], ROWS[name]) for name in ROWS)
    assert all(tensor.untyped_storage().nbytes() == 48 for tensor in tensors.values())


def test_any_reader_of_torch_files_reads_it(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    assert content["row_end"] - content["row_start"] == len(content["embeddings"])


def test_one_matrix_that_serves_as_both(tmp_path: Path) -> None:
    """torch writes shared bytes once; it is read as two tensors of the same values."""
    rows = {"embeddings": ROWS["embeddings"], "lm_head": ROWS["embeddings"]}
    write_row_tensors(tmp_path / "rows.pt", rows, 10, 14, "x")
    assert torch.equal(*read_row_tensors(tmp_path / "rows.pt").values())


def test_a_compressed_or_rewritten_archive(path: Path) -> None:
    replace(path, lambda content: None)
    assert read_layout(path).row_start == 10
    replace(path, lambda content: None, zipfile.ZIP_DEFLATED)
    refused(path, "its archive is compressed")


class Runs:
    """Pickles to a call."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


@pytest.mark.parametrize(
    ("call", "arguments", "words"),
    [
        (os.system, ("touch ran",), r"names posix\.system"),
        (eval, ("open('ran', 'w')",), r"names __builtin__\.eval"),
        (exec, ("open('ran', 'w')",), r"names __builtin__\.exec"),
        (subprocess.run, (["touch", "ran"],), r"names commands\.run"),
        (bytearray, (10**13,), r"names __builtin__\.bytearray"),
        (torch.load, ("other.pt",), r"names torch\.serialization\.load"),
        (torch.zeros, (10**12,), r"names torch\._C\._VariableFunctions\.zeros|names"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_code_is_never_run(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., Any],
    arguments: tuple[Any, ...],
    words: str,
    protocol: int,
) -> None:
    monkeypatch.chdir(path.parent)
    with_pickle(path, pickle.dumps({"embeddings": Runs(call, *arguments)}, protocol))
    refused(path, words if protocol == 2 else None)
    assert not (path.parent / "ran").exists()


def test_a_bare_pickle_and_the_old_format(path: Path) -> None:
    path.write_bytes(pickle.dumps(Runs(os.system, "exit 1")))
    refused(path, "no readable file of rows")
    torch.save({"embeddings": torch.ones(4, 3)}, path, _use_new_zipfile_serialization=False)
    refused(path, "no readable file of rows")


def emit(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


TENSOR, STORAGE = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(numel: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    storage = b"(" + text("storage") + STORAGE + text(key) + text("cpu") + number(numel) + b"tQ"
    sizes = [b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (shape, stride)]
    hooks = b"ccollections\nOrderedDict\n)R"
    return TENSOR + b"(" + storage + number(offset) + sizes[0] + sizes[1] + b"\x89" + hooks + b"tR"


def rows_dict(embeddings: bytes) -> bytes:
    fields = {"lm_head": b"N", "row_start": number(10), "row_end": number(14), "base_llm": text("x")}
    parts = [text("embeddings"), embeddings, *(text(key) + value for key, value in fields.items())]
    return emit(b"}(", *parts, text("dtype"), text("float32"), b"u")


def test_the_hand_written_pickle_is_read(path: Path) -> None:
    with_pickle(path, rows_dict(tensor(12, 0, (4, 3), (3, 1))))
    assert read_layout(path).shapes == {"embeddings": (4, 3)}
    assert torch.equal(read_row_tensors(path)["embeddings"], ROWS["embeddings"])


@pytest.mark.parametrize(
    ("embeddings", "words"),
    [
        (tensor(10**13, 0, (10**13,), (1,)), "bytes, and 40000000000000 are needed"),
        (tensor(10**13, 0, (4, 3), (3, 1)), "a view of other bytes"),
        (tensor(12, 0, (10**7, 10**6), (0, 0)), "a view of other bytes"),
        (tensor(12, 10**9, (4, 3), (3, 1)), "a view of other bytes"),
        (tensor(12, -4, (4, 3), (3, 1)), "a view of other bytes"),
        (tensor(12, 0, (4, 3), (10**12, 1)), "a view of other bytes"),
        (tensor(12, 0, (-4, -3), (-3, 1)), "a view of other bytes"),
        (tensor(0, 0, (0, 3), (3, 1)), "a view of other bytes"),
        (tensor(1, 0, (), ()), "a view of other bytes"),
        (tensor(2**63, 0, (2**62, 2), (2, 1)), "are needed"),
        (tensor(12, 0, (4, 3), (3, 1), key="7"), "has None bytes, and 48 are needed"),
        (tensor(12, 0, (4, 3), (3, 1), key="../data.pkl"), "has None bytes"),
        (tensor(6, 0, (2, 3), (3, 1)), "has 48 bytes, and 24 are needed"),
        (number(5), "its embeddings is no tensor"),
        (TENSOR + b")R", "no readable file of rows"),
        (TENSOR + b"(" + number(1) * 7 + b"tR", "no readable file of rows"),
    ],
)
def test_tensors_that_are_not_in_the_file(path: Path, embeddings: bytes, words: str) -> None:
    with_pickle(path, rows_dict(embeddings))
    refused(path, words)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        emit(b"}"),
        emit(b"N"),
        emit(b"u"),
        emit(b"h\x07"),
        emit(b"0"),
        emit(b"r" + struct.pack("<I", 2**31 - 1) + b"N"),  # a memo of 2³¹ entries
        emit(b"\x96" + struct.pack("<Q", 2**40)),  # BYTEARRAY8 of a terabyte
        emit(b"\x8e" + struct.pack("<Q", 2**40)),  # BINBYTES8
        emit(b"X" + struct.pack("<I", 2**31 - 1)),
        emit(b"\x82\x01"),  # the extension registry
        emit(b"cos\nsystem\n", text("touch ran"), b"\x85R"),
        emit(b"ios\nsystem\n"),
        emit(text("os"), text("system"), b"\x93"),
        emit(b"ctorch._utils\n_rebuild_tensor_v2\nb"),
        emit(b"(" * 50_000),
        emit(b")\x85" + b"\x85" * 50_000),
        b"\x80\x02" + b"N" * 200_000,
        b"\x80\xff.",
    ],
)
def test_pickles_that_are_something_else(path: Path, data: bytes) -> None:
    with_pickle(path, data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_archives_that_are_something_else(path: Path) -> None:
    good = path.read_bytes()
    empty, many, twice = io.BytesIO(), io.BytesIO(), io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    with zipfile.ZipFile(many, "w") as archive:
        for index in range(100):
            archive.writestr(f"archive/data/{index}", b"")
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("archive/data.pkl", members(path)["archive/data.pkl"])
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("archive/data.pkl", members(path)["archive/data.pkl"])
    for data in (b"", b"PK", empty.getvalue(), many.getvalue(), twice.getvalue(), good[:-30], good[: len(good) // 2]):
        path.write_bytes(data)
        refused(path)
    path.unlink()
    with pytest.raises(TamperedFileError):
        read_layout(path)


def test_no_single_changed_byte_gives_anything_but_rows_or_a_sentence(path: Path) -> None:
    """Every byte of the file, one at a time: a value may change, but neither shape nor kind."""
    good = path.read_bytes()
    read = 0
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        try:
            layout, tensors = read_layout(path), read_row_tensors(path)
        except Qwen3VLMError:
            continue
        read += 1
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == layout.shapes
        assert all(type(tensor) is torch.Tensor and tensor.dtype == torch.float32 for tensor in tensors.values())
    assert read < len(good)

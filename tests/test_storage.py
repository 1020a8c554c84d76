"""Files are complete or not there, whatever goes wrong while writing."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3_vlm import storage
from qwen3_vlm.errors import AddOnError, StorageError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    storage.atomic_write_text(path, "first")
    storage.atomic_write_text(path, "zweite Größe")
    assert path.read_bytes() == "zweite Größe".encode()
    assert names(path.parent) == ["a.txt"]


def test_respects_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        storage.atomic_write_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_json_refuses_what_json_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        storage.atomic_write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names(tmp_path) == []


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)))
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, value: dict[str, object]) -> None:
    path = tmp_path_factory.getbasetemp() / "round.json"
    storage.atomic_write_json(path, value)
    assert storage.read_json(path) == value


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only"), (errno.EIO, "write error")],
)
def test_failing_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    path = tmp_path / "a.txt"
    storage.atomic_write_text(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=words) as caught:
        storage.atomic_write_text(path, "new")
    assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match=words), storage.atomic_directory(tmp_path / "folder") as folder:
        (folder / "part").write_text("x")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="not a folder"):
        storage.atomic_write_text(tmp_path / "file" / "a.txt", "x")


SMALL_DISK = """
import resource, signal, sys
from qwen3_vlm import storage
from qwen3_vlm.errors import StorageError

def fill_folder(path):
    with storage.atomic_directory(path) as folder:
        (folder / "x").write_bytes(bytes(9000))

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (lambda: storage.atomic_write_bytes(sys.argv[1] + "/a", bytes(8192)), lambda: fill_folder(sys.argv[1] + "/b")):
    try:
        write()
    except StorageError as error:
        print(error)
"""  # noqa: E501


def test_a_real_limit_of_the_kernel(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.count("too large for this file system") == 2
    assert names(tmp_path) == []


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user can't mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(full_disk: Path) -> None:
    """Python's writer and safetensors' own, which reports the reason as text only."""
    storage.atomic_write_text(full_disk / "old.txt", "old")
    with pytest.raises(StorageError, match=r"old\.txt could not be written because the disk is full"):
        storage.atomic_write_bytes(full_disk / "old.txt", bytes(200_000))
    with (
        pytest.raises(StorageError, match=r"new\.safetensors could not be written because the disk is full"),
        storage.atomic_file(full_disk / "new.safetensors") as temporary,
    ):
        safetensors.torch.save_file({"a": torch.zeros(50_000)}, temporary)
    with (
        pytest.raises(StorageError, match=r"/new/big\.bin could not be written because the disk is full"),
        storage.atomic_directory(full_disk / "new") as folder,
    ):
        storage.atomic_write_bytes(folder / "big.bin", bytes(200_000))
    assert names(full_disk) == ["old.txt"]
    assert (full_disk / "old.txt").read_text() == "old"


def test_private_writers_get_the_usual_mode(tmp_path: Path) -> None:
    with storage.atomic_file(tmp_path / "a.safetensors") as temporary:
        safetensors.torch.save_file({"a": torch.zeros(3)}, temporary)
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def interrupted() -> None:
        with storage.atomic_directory(tmp_path / "a") as folder:
            (folder / "one").write_text("1")
            assert not (tmp_path / "a").exists()
            raise KeyError("two")

    with pytest.raises(KeyError):
        interrupted()
    assert names(tmp_path) == []
    with storage.atomic_directory(tmp_path / "a") as folder:
        (folder / "one").write_text("1")
    with storage.atomic_directory(tmp_path / "a") as folder:
        (folder / "two").write_text("2")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["two"]


KILLED = """
import sys, time
from qwen3_vlm import storage
with storage.atomic_directory(sys.argv[1] + "/a") as folder, storage.atomic_file(sys.argv[1] + "/b") as temporary:
    (folder / "x").write_text("half")
    temporary.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_leftovers_of_a_killed_process(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [name.startswith(".") for name in names(tmp_path)] == [True, True]
    storage.remove_leftovers(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{", "not valid JSON"), (b"[1]", "list; an object"), (b"\xff", "not valid JSON"), (b" " * 200, "larger than")],
)
def test_read_json_says_what_is_wrong(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(AddOnError, match=words):
        storage.read_json(path, error=AddOnError, max_bytes=100)
    with pytest.raises(StorageError, match="can't be read"):
        storage.read_json(tmp_path / "missing.json")


def test_deep_json_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000)
    with pytest.raises(StorageError, match="not valid JSON"):
        storage.read_json(path)


def test_json_is_readable_by_others(tmp_path: Path) -> None:
    storage.atomic_write_json(tmp_path / "a.json", {"ü": 1, "time": time.time()})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert "ü" in text
    assert json.loads(text)["ü"] == 1

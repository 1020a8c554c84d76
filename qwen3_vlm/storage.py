"""Files that are either complete or not there.

Everything is written under a temporary name in the same folder, flushed to the disk and then
renamed, so that neither a kill, a power cut nor a full disk leaves half a file under a final name.
A disk that can't be written becomes one `StorageError`, and the temporary file is removed.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen3_vlm.errors import Qwen3VLMError, StorageError

TEMPORARY_SUFFIX = ".partial"
MAX_JSON_BYTES = 50_000_000
_WRITE_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be too large for this file system",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk reported a write error",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EISDIR: "a folder is in its place",
}
_ADVICE = {errno.ENOSPC: "Free some space", errno.EDQUOT: "Free some space"}


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, all of it or none.

    Raises:
        StorageError: the disk is full or can't be written; `path` is as it was before.
    """
    with atomic_file(path) as temporary, open(temporary, "wb") as stream:
        stream.write(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, all of it or none; see `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | Path, value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as JSON with a final newline; NaN and infinity are refused (they are not JSON)."""
    atomic_write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on a clean exit it becomes `path`, else it is removed.

    For writers that want a path of their own, such as `safetensors.torch.save_file`. Parent folders
    are made.

    Raises:
        StorageError: the disk is full or can't be written; `path` is as it was before.
    """
    final = Path(path)
    temporary = _temporary_name(final)
    with _sentences(final):
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as stream:
                mode = os.fstat(stream.fileno()).st_mode
            yield temporary
            os.chmod(temporary, mode)  # the umask's, though some writers put a private file of their own in its place
            _flush(temporary)
            os.replace(temporary, final)
            _flush(final.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a new temporary folder to fill; on a clean exit it becomes `path`, else it is removed.

    A folder that is already at `path` is replaced: it stays until the new one is complete on disk.

    Raises:
        StorageError: the disk is full or can't be written; `path` is as it was before.
    """
    final = Path(path)
    temporary = _temporary_name(final)
    with _sentences(final):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for folder, _, files in os.walk(temporary, topdown=False):
                for name in files:
                    _flush(Path(folder) / name)
                _flush(Path(folder))
            _replace_directory(temporary, final)
        except StorageError as problem:  # of a file inside, which is known under the final name only
            raise StorageError(str(problem).replace(str(temporary), str(final))) from problem
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: str | Path) -> None:
    """Remove temporary files and folders that a killed process left directly inside `folder`."""
    for path in Path(folder).glob(f".*{TEMPORARY_SUFFIX}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def read_bytes(path: str | Path, max_bytes: int, *, error: type[Qwen3VLMError], name: str | None = None) -> bytes:
    """The content of a file of at most `max_bytes`; no more than that is ever read.

    Args:
        name: what messages call the file; None: its path.

    Raises:
        error: it can't be read, or is larger.
    """
    name = str(path) if name is None else name
    try:
        with open(path, "rb") as stream:
            data = stream.read(max_bytes + 1)
    except OSError as problem:
        raise error(f"{name} can't be read: {problem.strerror or problem}.") from problem
    if len(data) > max_bytes:
        raise error(f"{name} is larger than {max_bytes:,} bytes, the most that such a file can have.")
    return data


def read_json(
    path: str | Path, *, error: type[Qwen3VLMError] = StorageError, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Read a JSON object of at most `max_bytes`.

    Raises:
        error: the file is missing, too large, not JSON, or not an object; the sentence names it.
    """
    data = read_bytes(path, max_bytes, error=error)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not valid JSON ({' '.join(str(problem).split())}).") from problem
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}; an object is expected.")
    return value


def storage_error(problem: Exception, path: str | Path) -> StorageError | None:
    """The `StorageError` that says why writing `path` failed, or None if `problem` is of another kind.

    Libraries in native code report a full disk as errors of their own, with the reason in the text.
    """
    number = problem.errno if isinstance(problem, OSError) else None
    text = str(problem)
    if number is None and ("os error 28" in text or "No space left on device" in text):
        number = errno.ENOSPC
    if number is None and "os error 122" in text:
        number = errno.EDQUOT
    if number not in _WRITE_ERRORS:
        return None
    advice = _ADVICE.get(number, "Choose another place or repair this one")
    return StorageError(f"{path} could not be written because {_WRITE_ERRORS[number]}. {advice}, then run it again.")


@contextlib.contextmanager
def _sentences(path: Path) -> Iterator[None]:
    try:
        yield
    except Qwen3VLMError:
        raise
    except Exception as problem:
        error = storage_error(problem, path)
        if error is None:
            raise
        raise error from problem


def _temporary_name(final: Path) -> Path:
    return final.parent / f".{final.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"


def _flush(path: Path) -> None:
    """fsync a file or folder, so that the rename never reaches the disk before the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_directory(temporary: Path, final: Path) -> None:
    """Move `temporary` to `final`. An old folder steps aside first: a rename can't replace a full one."""
    aside = None
    if final.is_dir() and any(final.iterdir()):
        aside = _temporary_name(final)
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        if aside is not None:
            os.rename(aside, final)
        raise
    _flush(final.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)

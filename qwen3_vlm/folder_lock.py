"""One run at a time in a folder."""

import contextlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from qwen3_vlm.errors import StorageError

LOCK = ".lock"


class FolderLock:
    """Holds `.lock` in a folder from `acquire` to the end of the `with`.

    The lock is the kernel's and belongs to the process, so it is gone the moment the process is, however that
    ends. It is of the POSIX kind (`lockf`), which data workers do not inherit. Where there is none (Windows,
    some network file systems), they go without.
    """

    def __init__(self) -> None:
        self._file: BinaryIO | None = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hold(None)

    def acquire(self, folder: Path) -> None:
        """Lock `folder`, and let go of the one held before.

        Raises:
            StorageError: another process holds it.
            OSError: the file can't be written.
        """
        try:
            import fcntl
        except ImportError:
            return
        file = open(folder / LOCK, "ab")  # noqa: SIM115 - stays open for as long as the lock is held
        try:
            with contextlib.suppress(OSError):  # but for "held": a file system without locks
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError) as problem:
                    raise StorageError(
                        f"Another run is writing to {folder}. Wait until it ends, or choose another folder."
                    ) from problem
        except StorageError:
            file.close()
            raise
        self._hold(file)

    def _hold(self, file: BinaryIO | None) -> None:
        if self._file is not None:
            self._file.close()
        self._file = file

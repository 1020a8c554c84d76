"""What a run writes while it runs: metrics.jsonl, TensorBoard, skipped.jsonl, and a line on the terminal.

The JSON-lines files are append-only; a checkpoint notes their lengths, so that a resumed run cuts
off what the killed one wrote after it and then writes the same lines again.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen3_vlm.storage import storage_error
from qwen3_vlm.train.progress import Progress


class JsonLines:
    """An append-only file of JSON objects, one a line.

    Raises:
        StorageError: the disk is full or can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, values: Mapping[str, Any]) -> None:
        """Add one line and hand it to the operating system; NaN and infinity become null."""
        line = json.dumps(_finite(values), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError as problem:
            raise storage_error(problem, self.path) or problem from problem

    def size(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, size: int) -> None:
        """Cut off what was written after the file had `size` bytes."""
        if self.size() > size:
            with open(self.path, "r+b") as stream:
                stream.truncate(size)


class RunLog:
    """All logs of one run; on any but the main process it writes nothing."""

    def __init__(self, folder: Path, *, active: bool, tensorboard: bool) -> None:
        self.active = active
        self.metrics = JsonLines(folder / "metrics.jsonl")
        self.skipped = JsonLines(folder / "skipped.jsonl")
        self.progress = Progress(active=active)
        self._tensorboard = tensorboard and active
        self._folder = folder
        self._writer: Any = None

    def start(self, step: int, sizes: Mapping[str, int]) -> None:
        """Cut the files back to a checkpoint's `sizes()` (none: to nothing) and open TensorBoard after `step`."""
        if not self.active:
            return
        self.metrics.truncate(int(sizes.get("metrics", 0)))
        self.skipped.truncate(int(sizes.get("skipped", 0)))
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1)

    def sizes(self) -> dict[str, int]:
        """Bytes in each JSON-lines file, for a checkpoint."""
        return {"metrics": self.metrics.size(), "skipped": self.skipped.size()}

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, its numbers to TensorBoard too."""
        if not self.active:
            return
        self.metrics.append({"step": step, "kind": kind, **values})
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)

    def skip(self, step: int, records: Iterable[Any]) -> None:
        """One line of skipped.jsonl per record (`data.encode.SkippedRecord`)."""
        if self.active:
            for record in records:
                self.skipped.append({"step": step, **record.to_dict()})

    def say(self, text: str) -> None:
        """A line or more for the user."""
        if self.active:
            self.progress.say(text)

    def close(self) -> None:
        """Close TensorBoard and the progress bar."""
        self.progress.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def warn(text: str) -> None:
    """A line on standard error, where no run log is open yet."""
    print(text, file=sys.stderr)

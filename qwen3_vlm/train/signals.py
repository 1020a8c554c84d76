"""SIGTERM and SIGINT become a wish to stop after the current step; a second one stops at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """While entered, `name` is the signal that asked to stop, or None.

    Outside the main thread no handler can be set; then nothing is caught.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a process forked meanwhile
        if self.name is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.name = signal.Signals(number).name

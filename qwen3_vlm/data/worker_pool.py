"""Processes that work off tasks one at a time, survive a crash of one of them, and die with their parent.

Each is spawned, opens what it needs once, and computes with one thread: results depend neither on how many
there are nor on the machine's cores. A task whose worker dies is given out once more.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, TypeVar

from qwen3_vlm.errors import DataError, Qwen3VLMError

Task = TypeVar("Task")
Tell = Callable[[int], None]
Work = Callable[[Any, Tell], Any]  # one task, and whom to tell of progress → its result
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
MAX_CRASHES = 2  # of one task
JOIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Event(Generic[Task]):
    """News of a task: `count` more records dealt with (negative after a crash), or its result."""

    task: Task
    count: int = 0
    done: bool = False
    result: Any = None


class WorkerPool(Generic[Task]):
    """`count` processes that each call `start` once and then the function it returned with task after task.

    Args:
        start: picklable, such as a `functools.partial` of a module's function.

    Use as a context manager: on leaving, whatever still runs is ended.
    """

    def __init__(self, count: int, start: Callable[[], Work]) -> None:
        self._count = count
        self._start = start
        self._workers: list[_Worker[Task]] = []
        self._idle: list[_Worker[Task]] = []

    def __enter__(self) -> "WorkerPool[Task]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers + self._idle:
            worker.end(0.0 if worker in self._workers or error else JOIN_SECONDS)
        self._workers, self._idle = [], []

    def run(self, tasks: Iterable[Task]) -> Iterator[Event[Task]]:
        """Work off the tasks, taken from the iterable as workers become free, and say what happens.

        Raises:
            DataError: workers died twice over the same task.
            Qwen3VLMError: what a worker raised.
        """
        waiting = iter(tasks)
        for task in waiting:
            self._workers.append(_Worker(self._start, task))
            if len(self._workers) == self._count:
                break
        while self._workers:
            ready = wait([worker.connection for worker in self._workers])
            for worker in [worker for worker in self._workers if worker.connection in ready]:
                try:
                    event = worker.receive()
                except (EOFError, OSError):
                    yield Event(worker.task, -worker.told)
                    self._replace(worker)
                    continue
                yield event
                if event.done:
                    self._hand_on(worker, waiting)

    def _hand_on(self, worker: "_Worker[Task]", waiting: Iterator[Task]) -> None:
        for task in waiting:
            worker.give(task)
            return
        self._workers.remove(worker)
        self._idle.append(worker)
        worker.let_go()

    def _replace(self, worker: "_Worker[Task]") -> None:
        end = worker.end(JOIN_SECONDS)
        if worker.crashes + 1 >= MAX_CRASHES:
            name = getattr(worker.task, "name", worker.task)
            raise DataError(
                f"A worker process ended {MAX_CRASHES} times over {name} ({end}). If the memory was full, try fewer "
                "workers or smaller batches; else look at the records of that unit."
            )
        self._workers[self._workers.index(worker)] = _Worker(self._start, worker.task, worker.crashes + 1)


class _Worker(Generic[Task]):
    """The parent's side of one process, which begins with its first task at once."""

    def __init__(self, start: Callable[[], Work], task: Task, crashes: int = 0) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        lifeline, self._lifeline = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(start, theirs, lifeline), daemon=True)
        with _environment(ONE_THREAD), signals_to_parent():
            self._process.start()
        theirs.close()
        lifeline.close()
        self.give(task)
        self.crashes = crashes

    def give(self, task: Task) -> None:
        self.task, self.crashes, self.told = task, 0, 0
        with contextlib.suppress(OSError):  # it is dead already; `receive` will say so
            self.connection.send(task)

    def receive(self) -> Event[Task]:
        """The next news.

        Raises:
            EOFError, OSError: the process died.
            Qwen3VLMError: the work failed.
        """
        kind, value = self.connection.recv()
        if kind == "failed":
            raise value
        if kind == "done":
            return Event(self.task, done=True, result=value)
        self.told += value
        return Event(self.task, value)

    def let_go(self) -> None:
        """There is no more work: it ends by itself."""
        self.connection.close()

    def end(self, patience_seconds: float = 0.0) -> str:
        """End the process, by force if it still runs after some patience, and say how it ended."""
        self._process.join(timeout=patience_seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        code = self._process.exitcode
        self.connection.close()
        self._lifeline.close()
        return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"


def _serve(start: Callable[[], Work], connection: Connection, lifeline: Connection) -> None:
    """What a worker process does."""
    threading.Thread(target=_die_with_parent, args=(lifeline,), daemon=True).start()
    task = None
    try:
        work = start()
        while True:
            task = connection.recv()
            result = work(task, lambda count: connection.send(("told", count)))
            connection.send(("done", result))
    except EOFError:
        return
    except Exception as error:
        connection.send(("failed", _portable(error, task)))


def _die_with_parent(lifeline: Connection) -> None:
    """Nothing is ever sent: the pipe ends when the parent does, even by kill -9."""
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os._exit(1)


def _portable(error: Exception, task: Any) -> Exception:
    """The error as it can be sent: our own as they are, others as their text with task and place."""
    if isinstance(error, Qwen3VLMError):
        return error
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if task is None else f" over {getattr(task, 'name', task)}"
    return RuntimeError(f"{type(error).__name__}: {error} (in a worker{where}, {place.filename}:{place.lineno})")


@contextlib.contextmanager
def signals_to_parent() -> Iterator[None]:
    """Ctrl-C and schedulers signal the whole process group, but it is the parent that decides: a child that is
    started meanwhile never sees either signal, from its first moment on."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that a child process is born with: some libraries read them when they are imported."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

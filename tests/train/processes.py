"""Commands in processes of their own, which can be killed.

They are forked from a server that has imported torch and transformers, once for all of them: that import is most of
what a short run costs.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.train.tiny_run import metrics

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
FORKS: Any = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["qwen3_vlm.cli", "qwen3_vlm.train.train_utils", "qwen3_vlm.train.mmpt_recipe", "peft", "tests.train.processes"]
)


class Child:
    """`python -m MODULE ARGUMENTS…` in a session of its own; what it prints goes to one file."""

    def __init__(self, module: str, *arguments: object, **environment: object) -> None:
        handle, self._printed = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        values = ENVIRONMENT | {name: str(value) for name, value in environment.items()}
        os.environ.update(ENVIRONMENT)  # the server is started with it
        self._process = FORKS.Process(target=_run, args=(module, [*map(str, arguments)], values, self._printed))
        self._process.start()
        self.pid = int(self._process.pid)

    @property
    def returncode(self) -> int | None:
        """Of a process that has ended; minus the signal's number where one killed it."""
        return self._process.exitcode

    def end(self, timeout: float = 240) -> str:
        """Wait for its end; what it printed.

        Raises:
            AssertionError: it still runs after so many seconds.
        """
        self._process.join(timeout)
        text = Path(self._printed).read_text(encoding="utf-8", errors="replace")
        if self.returncode is None:
            self._process.kill()
            raise AssertionError(f"It still runs after {timeout} s:\n{text}")
        os.unlink(self._printed)
        return text


def _run(module: str, arguments: list[str], environment: dict[str, str], printed: str) -> None:
    os.setsid()
    with open(printed, "ab", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start(config: Path, *overrides: str) -> Child:
    """A training run."""
    return Child("qwen3_vlm", "train", config, *overrides)


def wait_for_steps(process: Child, run: Path, count: int) -> None:
    """Until the run has logged `count` more steps than it had, which is somewhere within a step."""
    path = run / "metrics.jsonl"
    before = len(metrics(run)) if path.exists() else 0
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.returncode is None:
        if path.exists() and len(path.read_bytes().splitlines()) >= before + count:
            return
        time.sleep(0.005)


def run_on_two_ranks(module: str, *arguments: object) -> str:
    """`python -m MODULE ARGUMENTS…` as two gloo processes, with the variables that torch's launcher sets, to their end.

    Raises:
        AssertionError: one of them fails.
    """
    world = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [Child(module, *arguments, RANK=rank, LOCAL_RANK=rank, **world) for rank in range(2)]
    printed = [rank.end() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-3000:] for text in printed)
    return "".join(printed)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

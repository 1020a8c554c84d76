"""Training runs in processes of their own."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.train.tiny_run import metrics

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def command(config: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "qwen3_vlm", "train", str(config), *overrides]


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(config, *overrides), cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **pipes)


def wait_for_steps(process: subprocess.Popen[str], run: Path, count: int) -> None:
    """Until the run has logged `count` more steps than it had, which is somewhere within a step."""
    path = run / "metrics.jsonl"
    before = len(metrics(run)) if path.exists() else 0
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and len(path.read_bytes().splitlines()) >= before + count:
            return
        time.sleep(0.005)


def run_on_two_ranks(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """`python …` under torch's launcher with two gloo processes, to its end.

    Raises:
        AssertionError: it fails.
    """
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    pipes: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 240, "check": False}
    done = subprocess.run([sys.executable, *launcher, *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, **pipes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

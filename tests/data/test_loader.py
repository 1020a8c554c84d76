"""What a data worker does with the signals that a scheduler sends to the whole process group."""

import os
import signal

import pytest
import torch

from qwen3_vlm.data.loader import ordered_loader


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_first_moments_of_a_worker_does_not_end_it(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch sets its own handler for SIGTERM when a worker starts, then its threads: the signal comes in between."""
    parent, set_threads = os.getpid(), torch.set_num_threads

    def signalled(count: int) -> None:
        if os.getpid() != parent:
            os.kill(os.getpid(), number)
        set_threads(count)

    monkeypatch.setattr(torch, "set_num_threads", signalled)
    assert list(ordered_loader(range(5), 2)) == list(range(5))
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, [])

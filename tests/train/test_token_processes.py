"""Stage 3 in processes of its own: killed anywhere, on two ranks, and sharded."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.processes import run_on_two_ranks, start, wait_for_steps
from tests.train.tiny_run import metrics, write_config
from tests.train.tiny_token_run import final_bytes, save_dataset, token_config


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("tokens"))


@pytest.mark.slow
def test_killed_anywhere_ends_the_same(dataset: Path, tmp_path: Path) -> None:
    """kill -9 at random moments, then SIGTERM, then to the end: the same bits as uninterrupted."""
    settings: dict[str, Any] = {"optim__max_steps": 32, "save_every": 5, "log_every": 1, "eval__quick_every": 7}
    from qwen3_vlm.train.train_utils import train

    train(token_config(tmp_path / "whole", dataset, **settings))
    run = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", token_config(run, dataset, **settings))
    chance = random.Random()
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        process = start(config, f"tokens.num_workers={int(number == signal.SIGTERM)}")
        wait_for_steps(process, run, chance.randint(4, 9))
        time.sleep(chance.random() * 0.05)
        os.killpg(process.pid, number)
        output = process.end()
        assert process.returncode == (0 if number == signal.SIGTERM else -9), output
    assert not (run / "rows").exists()
    train(token_config(run, dataset, **settings))
    assert final_bytes(run) == final_bytes(tmp_path / "whole")
    assert metrics(run) == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_are_one_process(dataset: Path, tmp_path: Path) -> None:
    """2 gloo processes × accumulation 2 = 1 process × accumulation 4; some ranks have no micro-batch of a task."""
    from qwen3_vlm.train.train_utils import train

    settings: dict[str, Any] = {"optim__eps": 1e-3, "save_every": 5}
    train(token_config(tmp_path / "one", dataset, **settings, optim__accumulation=4))
    two = token_config(tmp_path / "two", dataset, **settings, optim__accumulation=2)
    printed = run_on_two_ranks("qwen3_vlm", "train", write_config(tmp_path / "two.yaml", two))
    first, second = (
        torch.load(tmp_path / name / "rows" / "trainable_rows.pt", weights_only=True) for name in ("one", "two")
    )
    assert float((first["embeddings"] - second["embeddings"]).abs().max()) < 1e-5
    ours, theirs = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [(line["kind"], line["step"]) for line in ours] == [(line["kind"], line["step"]) for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("loss", "loss_i2t", "loss_a2t", "loss_t2i"):
            assert (key in mine) == (key in other)
            if key in mine:
                assert mine[key] == pytest.approx(other[key], abs=1e-5)
        counts = ("tokens", "samples", "tokens_i2t", "tokens_a2t", "tokens_t2i")
        assert [mine.get(key) for key in counts] == [other.get(key) for key in counts]
    assert printed.count("The add-on is in") == 1

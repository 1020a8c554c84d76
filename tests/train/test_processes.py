"""Runs in processes of their own: killed, stopped, and on two ranks."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from tests.train.processes import run_on_two_ranks, start, wait_for_steps
from tests.train.tiny_run import final_bytes, metrics, tiny_config, write_config, write_records

STEPS = 32


@pytest.fixture(scope="module")
def arguments(
    tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    return tiny_llm_dir, tiny_tower_dir, write_records(tmp_path_factory.mktemp("records"))


@pytest.mark.slow
def test_killed_and_stopped_anywhere_ends_the_same(arguments: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """kill -9 at random moments, then SIGTERM (exit status 0), then to the end: the same bits as uninterrupted.

    SIGTERM goes to the whole process group, data workers included, as a scheduler sends it.
    """
    settings: dict[str, Any] = {"optim__max_steps": STEPS, "save_every": 5, "log_every": 1, "eval__quick_every": 7}
    settings |= {"eval__golden_samples": 1, "eval__golden_max_new_tokens": 1}
    from qwen3_vlm.train.train_utils import train

    train(tiny_config(tmp_path / "whole", *arguments, **settings))
    run = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", tiny_config(run, *arguments, **settings))
    chance = random.Random()
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        process = start(config, f"data.num_workers={int(number == signal.SIGTERM)}")
        wait_for_steps(process, run, chance.randint(4, 9))
        time.sleep(chance.random() * 0.05)
        os.killpg(process.pid, number)
        output = process.end()
        assert process.returncode == (0 if number == signal.SIGTERM else -9), output
    assert "Stopped by a signal and saved at step" in output
    assert not (run / "connector").exists()
    train(tiny_config(run, *arguments, **settings))
    assert final_bytes(run) == final_bytes(tmp_path / "whole")
    assert metrics(run) == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_are_one_process(arguments: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """2 gloo processes × accumulation 1 = 1 process × accumulation 2, with a last step too short for both."""
    settings: dict[str, Any] = {"optim__max_steps": None, "optim__eps": 1e-3, "save_every": 5, "data__packing": False}
    settings |= {"data__eval_fraction": 0.225}  # 9 of 40: the epoch's 31 micro-batches make 15 whole steps and a half
    from qwen3_vlm.train.train_utils import train

    train(tiny_config(tmp_path / "one", *arguments, **settings))
    two = tiny_config(tmp_path / "two", *arguments, **settings, optim__accumulation=1)
    config = write_config(tmp_path / "two.yaml", two)
    printed = run_on_two_ranks("qwen3_vlm", "train", config)
    first, second = (
        safetensors.torch.load_file(tmp_path / name / "connector" / "connector.safetensors") for name in ("one", "two")
    )
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5
    ours, theirs = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [(line["kind"], line["step"]) for line in ours] == [(line["kind"], line["step"]) for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        if "loss" in mine:
            assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert [mine.get(key) for key in ("tokens", "samples")] == [other.get(key) for key in ("tokens", "samples")]
    assert printed.count("The add-on is in") == 1


@pytest.mark.slow
def test_shards_are_audited_saved_and_resumed(tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path: Path) -> None:
    """FSDP2 over two gloo ranks, against the same model whole."""
    printed = run_on_two_ranks("tests.train.sharded_step", tiny_llm_dir, tiny_tower_dir, tmp_path)
    assert printed.count("sharded and whole agree") == 2

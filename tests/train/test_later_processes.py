"""Stages 2 and 4 in other processes, with adapters, texts and the KL to the base: killed, on two ranks, sharded."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from qwen3_vlm.config import LoraConfig
from qwen3_vlm.models.lora import ADAPTER
from qwen3_vlm.models.trunk import TRUNK
from qwen3_vlm.train.train_utils import train
from tests.train.processes import run_on_two_ranks, start, wait_for_steps
from tests.train.tiny_run import metrics, write_config
from tests.train.tiny_talks import Setting, write_texts
from tests.train.tiny_token_run import save_dataset, token_config

Configure = Callable[..., Any]  # output folder, overrides → RunConfig
STAGES = ["stage2_sft", "stage4_mmpt"]
FULL = "stage4_mmpt, the whole decoder"


@pytest.fixture(scope="module")
def configure(
    tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Configure]:
    """By stage."""
    folder = tmp_path_factory.mktemp("later")
    setting, dataset = Setting(tiny_llm_dir, tiny_tower_dir, folder), save_dataset(folder / "tokens")
    texts = folder / "plain.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"a small dog below {count} green trees"}) for count in range(7)))
    shared: dict[str, Any] = {"lora__rank": 4, "lora__kl_weight": 0.5, "text__share": 0.3, "eval__quick_every": 5}
    shared |= {"eval__golden_samples": 1, "eval__golden_max_new_tokens": 1, "eval__decode_samples": 1}
    talks = {"text__files": [str(write_texts(folder / "texts"))]}
    tokens = {"stage": "stage4_mmpt", "text__files": [str(texts)], "tokens__tasks": {"i2t": {}, "t2i": {}}}
    usual = LoraConfig()
    full = {"trunk__training": "full", "lora__rank": usual.rank, "lora__dropout": usual.dropout}
    return {
        "stage2_sft": lambda out, **more: setting.config(out, **{**shared, **talks, **more}),
        "stage4_mmpt": lambda out, **more: token_config(out, dataset, **{**shared, **tokens, **more}),
        FULL: lambda out, **more: token_config(out, dataset, **{**shared, **tokens, **more, **full}),
    }


def add_on(run: Path) -> dict[str, torch.Tensor]:
    """Everything that was trained."""
    folder = next(run / name for name in ("connector", "rows") if (run / name).is_dir())
    found = safetensors.torch.load_file(next(folder / name for name in (ADAPTER, TRUNK) if (folder / name).is_file()))
    if folder.name == "rows":
        rows = torch.load(folder / "trainable_rows.pt", weights_only=True)
        return found | {name: value for name, value in rows.items() if isinstance(value, torch.Tensor)}
    return found | safetensors.torch.load_file(folder / "connector.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*STAGES, FULL])
def test_killed_anywhere_ends_the_same(stage: str, configure: dict[str, Configure], tmp_path: Path) -> None:
    """kill -9 within a step, then to the end: the same bits as uninterrupted, with the adapter's dropout on."""
    settings: dict[str, Any] = {"optim__max_steps": 8, "save_every": 3, "log_every": 1, "lora__dropout": 0.1}
    train(configure[stage](tmp_path / "whole", **settings))
    run = tmp_path / "run"
    process = start(write_config(tmp_path / "run.yaml", configure[stage](run, **settings)))
    wait_for_steps(process, run, random.Random().randint(7, 9))
    os.killpg(process.pid, signal.SIGKILL)
    printed = process.end()
    assert process.returncode == -9, printed
    assert any((run / "checkpoints").iterdir())
    train(configure[stage](run, **settings))
    ours, theirs = add_on(run), add_on(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    newest = [max((tmp_path / name / "checkpoints").iterdir()) for name in ("run", "whole")]
    first, second = ((folder / "optimizer.safetensors").read_bytes() for folder in newest)
    assert first == second
    assert metrics(run) == metrics(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*STAGES, FULL])
def test_two_ranks_are_one_process(stage: str, configure: dict[str, Configure], tmp_path: Path) -> None:
    """2 gloo processes × accumulation 2 = 1 process × accumulation 4; some micro-batches have no text."""
    settings: dict[str, Any] = {"optim__eps": 1e-3, "save_every": 9, "log_every": 1, "optim__max_steps": 5}
    settings["lora__dropout"] = 0.0
    train(configure[stage](tmp_path / "one", **settings, optim__accumulation=4))
    two = configure[stage](tmp_path / "two", **settings, optim__accumulation=2)
    printed = run_on_two_ranks("qwen3_vlm", "train", write_config(tmp_path / "two.yaml", two))
    assert printed.count("The add-on is in") == 1
    ours, theirs = add_on(tmp_path / "one"), add_on(tmp_path / "two")
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
    lines = [[line for line in metrics(tmp_path / name) if line["kind"] == "train"] for name in ("one", "two")]
    for mine, other in zip(*lines, strict=True):
        assert mine.keys() == other.keys()
        for key in ("loss", "text_kl", "loss_text", "loss_i2t"):
            assert mine.get(key) == pytest.approx(other.get(key), abs=1e-5)
        assert [mine[key] for key in ("tokens", "supervised_tokens")] == [
            other[key] for key in ("tokens", "supervised_tokens")
        ]
    assert any(line.get("text_kl", 0) > 0 for line in lines[0])


@pytest.mark.slow
def test_shards_are_the_whole(tiny_llm_dir: Path, tiny_tower_dir: Path) -> None:
    """FSDP2 over two gloo ranks, against the same models whole."""
    printed = run_on_two_ranks("tests.train.sharded_later", tiny_llm_dir, tiny_tower_dir)
    agreed = [printed.count(f"{case}: sharded and whole agree") for case in (*STAGES, "the whole decoder")]
    assert agreed == [2, 2, 2]

"""Benchmarks run end to end at a tiny size, and their counts agree with hand counts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(script: str, out: Path, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / script), "--out", str(out), *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=290)
    assert finished.returncode == 0, finished.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.slow
def test_stage1_step_compares_the_same_losses(tmp_path: Path) -> None:
    sizes = ["--layers", 1, "--width", 128, "--vocab-size", 512, "--patches", 9, "--samples", 6, "--batch-size", 4]
    result = run("stage1_step.py", tmp_path / "result.json", *sizes)
    ours, usual = result["ours"], result["usual"]
    assert ours["real_tokens"] == usual["real_tokens"]
    assert result["loss_difference"] < 0.02
    assert ours["positions_per_real_token"] < usual["positions_per_real_token"]
    assert result["speed_ratio"] > 0
    assert 0 < ours["utilisation"] < 2


@pytest.mark.slow
def test_full_size_steps_and_counts(tmp_path: Path) -> None:
    sizes = ["--layers", 1, "--tower-layers", 1, "--width", 128, "--vocab-size", 512, "--image-size", 42]
    result = run("full_size.py", tmp_path / "result.json", *sizes, "--tokens", 200)
    assert result["trainable_parameters"] == 6_927_872 + (512 * 512 + 512) + (512 * 128 + 128)
    assert result["pictures"] >= 1
    assert result["loss"] < result["warm_up_loss"]
    assert result["peak_gb"] >= result["loaded_gb"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # said by PEFT of its own way
@pytest.mark.parametrize("case", ["bf16-i2t", "fp32-t2i", "fp32-i2t-untied"])
def test_stage3_rows_compares_the_same_gradients(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All ways in this process, which spares four starts of everything; their memory means nothing so."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import stage3_rows

    def run_child(side: str, *arguments: object) -> dict[str, Any]:
        sizes = ["--layers", 1, "--width", 64, "--base-rows", 500, "--side", side]
        monkeypatch.setattr("sys.argv", ["stage3_rows.py", *map(str, sizes), *map(str, arguments)])
        return {**stage3_rows.run_side(stage3_rows.parse()), "peak_mib_over_model": 1.0}

    monkeypatch.setattr(stage3_rows, "run_child", run_child)
    dtype, task, *untied = case.split("-")
    result = stage3_rows.compare_case(dtype, task, not untied, tmp_path)
    assert result["gradient_difference"] < 1e-5
    assert result["ours"]["loss"] == pytest.approx(result["hook"]["loss"], rel=1e-2 if dtype == "bf16" else 1e-5)
    assert result["peft"]["loss"] == pytest.approx(result["hook"]["loss"], rel=1e-5)
    assert result["ours"]["graded_tokens"] == 2 * (26 if task == "i2t" else 226)  # with the end token
    assert result["to_hook"]["cpu_time"] > 0


def test_useful_flops_against_a_hand_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measuring import connector_flops, linear_weights, llm_flops, tower_flops
    from transformers import Qwen3Config, Qwen3Model, SiglipVisionConfig, SiglipVisionModel

    from qwen3_vlm.models.configuration import Qwen3VLMConfig

    text = Qwen3Config(
        vocab_size=11, hidden_size=8, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    body = Qwen3Model(text)
    per_layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 24  # q, k and v, o, gate and up and down
    assert linear_weights(body) == 2 * per_layer
    attention = 2 * (2 * 2 * 8) * (3**2 + 5**2) / 2 * 3  # layers × two matmuls × half of L² × (1 forward + 2 backward)
    assert llm_flops(body, [3, 5], 2, 11) == 4 * 2 * per_layer * 8 + attention + 4 * 2 * 8 * 11

    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2,
        vision_use_head=False,
    )  # fmt: skip
    tower = 2 * 4 * (4 * 8 * 8 + 2 * 8 * 16 + 3 * 2 * 2 * 8) + 2 * 2 * 4 * 4 * 8
    assert tower_flops(SiglipVisionModel(vision), 3, 4) == 3 * tower

    config = Qwen3VLMConfig(
        text_config=text, vision_config=vision, num_latents=2, latent_dim=4, depth=1, num_heads=1, head_dim=4,
        ff_mult=2, projector_hidden_size=6,
    )  # fmt: skip
    layer = 2 * (2 * 4 * 4) + 2 * (5 * 4 * 4) + 2 * (2 * 5 * 4) + 2 * (2 * 4 * 8)  # q and o, k and v, attention, mlp
    projector = 2 * 4 * 6 + 2 * 6 * 8
    assert connector_flops(config, 3, 5) == 3 * (6 * (layer + projector) + 4 * (5 * 8 * 4))


@pytest.mark.parametrize("mix", ["pretrain", "pretrain+instruct"])
def test_the_length_mix_is_that_of_its_source(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from length_mix import make_samples

    samples = make_samples(mix, 400, image_tokens=64, image_token_id=999, text_ids=900, max_seq_len=512)
    lengths = [len(loaded.sample.input_ids) for loaded in samples]
    captions = [loaded for loaded in samples if loaded.sample.id.startswith("caption")]
    assert len(captions) == pytest.approx(400 * (1 if mix == "pretrain" else 558_128 / 715_680), abs=1)
    assert max(lengths) <= 512
    assert all(loaded.sample.input_ids.count(999) == 64 for loaded in samples)
    assert all(loaded.sample.answer_length == sum(x != -100 for x in loaded.sample.labels) for loaded in samples)
    mean = sum(len(loaded.sample.input_ids) for loaded in captions) / len(captions)
    assert 64 + 10 + 10 + 12 < mean < 64 + 10 + 10 + 18

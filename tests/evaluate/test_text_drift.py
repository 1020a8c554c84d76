"""How far an adapter moved text: against two models side by side and torch's own divergence."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from qwen3_vlm.evaluate.text_drift import measure_drift
from qwen3_vlm.evaluate.text_suite import TEXTS
from qwen3_vlm.models.lora import add_lora, lora_parameters
from tests.tiny import tiny_tokenizer

pytest.importorskip("peft")
LIMITS: Any = {"max_kl": 0.1, "max_ratio": 1.05}


def adapted(folder: Path, strength: float) -> Any:
    """The tiny base with an adapter that has moved by so much."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    add_lora(model.model, rank=2, alpha=4, seed=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in lora_parameters(model.model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * strength)
    return model


def test_figures_are_those_of_two_models_side_by_side(tiny_llm_dir: Path) -> None:
    model, tokenizer = adapted(tiny_llm_dir, 0.1), tiny_tokenizer()
    base = AutoModelForCausalLM.from_pretrained(tiny_llm_dir, dtype=torch.float32)
    report = measure_drift(model, tokenizer, texts=TEXTS[:5], **LIMITS)
    used = len(tokenizer)
    kl, losses, count = 0.0, [0.0, 0.0], 0
    for text in TEXTS[:5]:
        ids = torch.tensor([tokenizer.encode(text)[:128]])
        with torch.no_grad():
            plain, moved = (m(input_ids=ids).logits[0, :-1, :used].double() for m in (base, model))
        kl += float(F.kl_div(moved.log_softmax(-1), plain.log_softmax(-1), reduction="sum", log_target=True))
        for place, logits in enumerate((plain, moved)):
            losses[place] += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    assert report.kl.value == pytest.approx(kl / count, rel=1e-4)
    assert report.ratio.value == pytest.approx(math.exp((losses[1] - losses[0]) / count), rel=1e-5)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()


def test_a_fresh_adapter_moves_nothing_and_a_wild_one_too_much(tiny_llm_dir: Path) -> None:
    still, wild = (measure_drift(adapted(tiny_llm_dir, by), tiny_tokenizer(), **LIMITS) for by in (0.0, 3.0))
    assert (still.kl.value, still.ratio.value, still.passed) == (0.0, 1.0, True)
    assert not wild.passed
    assert [gate["passed"] for gate in wild.gates()] == [False, False]
    assert wild.gates()[0]["reason"].endswith("at most 0.1 is allowed.")

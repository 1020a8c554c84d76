"""Weights stored in bf16 and multiplied in fp32, against fp32 copies of the same weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForImageTextToText

from qwen3_vlm.models import precision
from qwen3_vlm.models.bases import load_bases
from qwen3_vlm.models.losses import linear_cross_entropy
from tests.tiny import TINY_CONNECTOR


@pytest.fixture(autouse=True)
def _a_cpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: False)
    monkeypatch.setattr(precision, "BLOCK_BYTES", 4 * 32 * 5)  # blocks of five rows


def test_linear_and_its_input_gradient_equal_fp32() -> None:
    torch.manual_seed(0)
    narrow = nn.Linear(32, 23).bfloat16().requires_grad_(False)
    wide = copy.deepcopy(narrow).float()
    precision.compute_in_fp32(narrow)
    x = torch.randn(4, 7, 32, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = narrow(x), wide(y)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert narrow.weight.dtype == torch.bfloat16


def test_loss_over_a_bf16_head_equals_fp32() -> None:
    torch.manual_seed(0)
    weight, target = torch.randn(57, 32).bfloat16(), torch.randint(57, (9,))
    x = torch.randn(9, 32, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    loss = linear_cross_entropy(x, weight, target)
    expected = F.cross_entropy(y @ weight.float().T, target, reduction="none")
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    expected.sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_a_whole_model_in_bf16_storage_equals_its_fp32_copy(tiny_llm_dir: Path, tiny_tower_dir: Path) -> None:
    models: list[Any] = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        models.append(load_bases(tiny_llm_dir, tiny_tower_dir, dtype=dtype, **TINY_CONNECTOR))
    (narrow, processor), (wide, _) = models
    for name, parameter in wide.named_parameters():  # the same rounded weights on both sides
        parameter.data = dict(narrow.named_parameters())[name].data.float()
    question = {"role": "user", "content": "<image_patch>\ndescribe"}
    ids = torch.tensor([processor.encode_conversation([question, {"role": "assistant", "content": "a dog"}])[0]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    narrow.eval(), wide.eval()
    torch.testing.assert_close(narrow(**inputs).logits, wide(**inputs).logits, atol=1e-5, rtol=1e-5)
    losses = [model.train()(**inputs, labels=ids).loss for model in (narrow, wide)]
    torch.testing.assert_close(*losses)
    assert narrow.lm_head.weight.dtype == torch.bfloat16
    narrow.eval().generate(**inputs, max_new_tokens=3)


def test_a_model_loaded_by_transformers_in_bf16_runs_as_it_is(tiny_vlm: tuple[Any, Any], tmp_path: Path) -> None:
    """Its matmuls are slow on such a CPU, but right."""
    tiny_vlm[0].save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    ids = torch.tensor([tiny_vlm[1].encode_prompt([{"role": "user", "content": "<image_patch>\ndescribe"}])])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    assert model(**inputs).logits.dtype == torch.bfloat16
    assert model(**inputs, labels=ids).loss.isfinite()
    model.generate(**inputs, max_new_tokens=2)


def test_bf16_storage_stays_bf16_on_disk(tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path: Path) -> None:
    model, _ = load_bases(tiny_llm_dir, tiny_tower_dir, dtype=torch.bfloat16, **TINY_CONNECTOR)
    model.save_pretrained(tmp_path)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).lm_head.weight.dtype == torch.bfloat16


def test_gpus_are_left_alone() -> None:
    assert precision.bf16_is_fast("cuda")
    assert not precision.bf16_is_fast("cpu")

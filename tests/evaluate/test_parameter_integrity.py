"""Hashes of the base's tensors: the same names and values however the model is wrapped, and any change is found."""

import hashlib
import json
from typing import Any

import pytest
import torch

from qwen3_vlm.evaluate.parameter_integrity import base_digests, compare_digests, tensor_digest
from qwen3_vlm.models.token_lm import TokenLM
from tests.models.grown import FAMILIES, SPACE, grow, make_base, pad, sequences


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_grown_base_is_the_base(family: str, tied: bool) -> None:
    base = make_base(family, tied=tied)
    before = base_digests(base)
    names = {name.removeprefix(f"{base.base_model_prefix}.") for name in base.state_dict()}
    assert set(before) == names
    assert base_digests(grow(base)) == before


def test_a_digest_is_of_shape_and_values() -> None:
    values = torch.randn(3, 5)
    expected = hashlib.sha256(b"(3, 5) float32\n" + values.numpy().tobytes()).hexdigest()
    assert tensor_digest(values) == expected
    assert tensor_digest(values.T.contiguous().T) == expected
    assert tensor_digest(values.reshape(5, 3)) != expected
    half = values.bfloat16()
    assert tensor_digest(half) == tensor_digest(half.float()) != expected
    assert tensor_digest(torch.arange(4)) != tensor_digest(torch.arange(4).float())


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(7, 11)
    whole = tensor_digest(values)
    monkeypatch.setattr("qwen3_vlm.evaluate.parameter_integrity.BLOCK_ELEMENTS", 10)
    assert tensor_digest(values) == whole


@pytest.mark.parametrize("tied", [True, False])
def test_training_with_weight_decay_leaves_the_base(tied: bool) -> None:
    base = make_base(tied=tied)
    before = base_digests(base)
    model = TokenLM.grow(base, SPACE).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    first = model.embedding.rows.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        model(**pad(sequences())).loss.backward()
        optimizer.step()
    assert not torch.equal(first, model.embedding.rows)
    report = compare_digests(before, base_digests(model))
    assert report.passed
    (gate,) = report.gates()
    assert (gate["name"], gate["kind"], gate["value"], gate["samples"], gate["passed"]) == (
        "parameter integrity", "equal", 0, len(before), True
    )  # fmt: skip


@pytest.mark.parametrize("name", ["norm.weight", "embed_tokens.weight", "layers.1.self_attn.q_proj.weight"])
def test_one_bit_is_found(name: str) -> None:
    base = make_base()
    before = base_digests(base)
    model = grow(base)
    parameter = model.get_parameter(f"language_model.{name.replace('tokens.', 'tokens.base.')}")
    with torch.no_grad():
        parameter.view(torch.int32).view(-1)[-1] ^= 1  # the last bit of its last value
    report = compare_digests(before, base_digests(model))
    tied = ("lm_head.weight",) if name == "embed_tokens.weight" else ()
    assert set(report.changed) == {name, *tied}
    assert report.gates()[0]["reason"] == f"{1 + len(tied)} of {len(before)} tensors differ; none may."
    assert not report.passed


def test_a_missing_tensor_fails_and_nothing_compared_too() -> None:
    before = base_digests(make_base())
    fewer = {name: digest for name, digest in before.items() if name != "norm.weight"}
    assert compare_digests(before, fewer).missing == ("norm.weight",)
    assert not compare_digests(before, fewer).passed
    nothing = compare_digests({}, before)
    assert not nothing.passed
    assert nothing.gates()[0]["reason"] == "No tensors were compared."


def test_adapters_and_wrappers_do_not_count() -> None:
    peft = pytest.importorskip("peft")
    base = make_base()
    before = base_digests(base)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    adapted = peft.inject_adapter_in_model(config, grow(base))
    assert base_digests(adapted) == before
    assert base_digests(torch.nn.DataParallel(grow(base))) == before
    compiled: Any = torch.compile(grow(base), backend="eager")
    assert base_digests(compiled) == before


def test_report_is_json() -> None:
    before = base_digests(make_base())
    report = compare_digests(before, before)
    tree = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert tree == report.to_dict()
    assert tree["digests"] == before
    assert len(tree["sha256"]) == 64
    assert report.summary() == {"passed": True, "tensors": len(before), "changed": 0}

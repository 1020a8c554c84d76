"""LoRA: where it goes and where it can't, off to the bit, and PEFT's own reading of its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qwen3_vlm.errors import AddOnError, ModelError
from qwen3_vlm.models.lora import (
    add_lora,
    has_lora,
    lora_names,
    lora_parameters,
    merge_lora,
    read_adapter,
    use_lora,
    without_lora,
    write_adapter,
)

IDS = torch.arange(12).reshape(1, 12)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def shake(model: Any, name: str = "default", seed: int = 5) -> None:
    """Give a fresh adapter something to say."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model.base_model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("dora", [False, True])
def test_peft_alone_loads_it(tiny_llm_dir: Path, tmp_path: Path, dora: bool) -> None:
    plain, model = load(tiny_llm_dir), load(tiny_llm_dir)
    targets = add_lora(model.base_model, rank=4, alpha=8, dora=dora)
    assert {name.rsplit(".", 1)[-1] for name in targets} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)
    shake(model)
    write_adapter(tmp_path, model.base_model, "model", str(tiny_llm_dir))
    theirs = PeftModel.from_pretrained(load(tiny_llm_dir), str(tmp_path)).eval()
    assert not torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-2)
    assert torch.equal(theirs(IDS).logits, model(IDS).logits)
    ours = load(tiny_llm_dir)
    read_adapter(tmp_path, ours.base_model, "model")
    assert torch.equal(ours(IDS).logits, model(IDS).logits)
    with without_lora(model):
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert torch.equal(ours(IDS).logits, model(IDS).logits)
    merge_lora(ours.base_model)
    for merged in (ours, theirs.merge_and_unload()):
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_several_adapters_by_name(tiny_llm_dir: Path, tmp_path: Path) -> None:
    """Each acts as it does alone, whatever acted before; their files are those of adapters that stand alone."""
    plain, model = load(tiny_llm_dir), load(tiny_llm_dir)
    kinds: dict[str, dict[str, Any]] = {"a": {"rank": 2, "alpha": 8.0}, "b-2": {"rank": 3, "alpha": 3.0, "dora": True}}
    expected = {}
    for number, (name, settings) in enumerate(kinds.items()):
        alone = load(tiny_llm_dir)
        add_lora(alone.base_model, **settings)
        shake(alone, seed=number)
        write_adapter(tmp_path / name, alone.base_model, "model", "x")
        expected[name] = alone(IDS).logits
        read_adapter(tmp_path / name, model.base_model, "model", name=name)
    own = {id(parameter) for parameter in model.base_model.parameters()}
    assert lora_names(model.base_model) == ["a", "b-2"]
    for name in ("a", "b-2", None, "b-2", None, "a"):
        use_lora(model.base_model, name)
        assert torch.equal(model(IDS).logits, plain(IDS).logits if name is None else expected[name])
        assert not any(parameter.requires_grad for parameter in model.base_model.parameters())
    with without_lora(model):
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert torch.equal(model(IDS).logits, expected["a"])
    use_lora(model.base_model, None)
    with without_lora(model):
        pass
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert {id(parameter) for parameter in model.base_model.parameters()} == own
    for name in kinds:
        write_adapter(tmp_path / "again", model.base_model, "model", "x", name=name)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / name / file).read_bytes()


def test_names_that_are_refused(tiny_llm_dir: Path) -> None:
    model = load(tiny_llm_dir)
    for name in ("", "a.b", "x y", "é"):
        with pytest.raises(ModelError, match="is no name of an adapter"):
            add_lora(model.base_model, rank=1, alpha=1, name=name)
    with pytest.raises(ModelError, match="no adapter 'x'; there are none"):
        use_lora(model.base_model, "x")
    add_lora(model.base_model, rank=1, alpha=1, name="lora_A")  # a word of PEFT's own
    with pytest.raises(ModelError, match="already has an adapter 'lora_A'"):
        add_lora(model.base_model, rank=1, alpha=1, name="lora_A")
    assert len(lora_parameters(model.base_model, "lora_A")) == 2 * 14
    assert not lora_parameters(model.base_model)


def test_only_adapters_are_trainable_and_fp32(tiny_llm_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llm_dir, dtype=torch.bfloat16)
    add_lora(model.base_model, rank=2, alpha=4)
    trainable = {name for name, parameter in model.base_model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == len(lora_parameters(model.base_model)) > 0
    assert {parameter.dtype for parameter in lora_parameters(model.base_model).values()} == {torch.float32}


def test_the_same_seed_gives_the_same_adapter_and_leaves_the_generator(tiny_llm_dir: Path) -> None:
    first, second = load(tiny_llm_dir), load(tiny_llm_dir)
    before = torch.get_rng_state()
    for model in (first, second):
        add_lora(model.base_model, rank=2, alpha=4, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    for name, parameter in lora_parameters(first.base_model).items():
        assert torch.equal(parameter, lora_parameters(second.base_model)[name])


def test_refused(tiny_llm_dir: Path, tmp_path: Path) -> None:
    model = load(tiny_llm_dir)
    with pytest.raises(AddOnError, match=r"adapter_config\.json"):
        read_adapter(tmp_path, model.base_model, "model")
    add_lora(model.base_model, rank=2, alpha=4)
    assert has_lora(model)
    with pytest.raises(ModelError, match="already"):
        add_lora(model.base_model, rank=2, alpha=4)
    write_adapter(tmp_path, model.base_model, "model", "x")
    other = load(tiny_llm_dir)
    add_lora(other.base_model, rank=3, alpha=4)
    with pytest.raises(AddOnError, match="has the shape"):
        read_adapter(tmp_path, other.base_model, "model")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(AddOnError, match="can't be read"):
        read_adapter(tmp_path, model.base_model, "model")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for rank in (0, -1, 10**12):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": rank}))
        with pytest.raises(AddOnError, match=f"its rank is {rank}"):
            read_adapter(tmp_path, load(tiny_llm_dir).base_model, "model")


def test_what_peft_would_compute_otherwise_is_refused(tiny_llm_dir: Path, tmp_path: Path) -> None:
    model = load(tiny_llm_dir)
    add_lora(model.base_model, rank=4, alpha=4)
    write_adapter(tmp_path, model.base_model, "model", "x")
    read_adapter(tmp_path, model.base_model, "model")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    others = {"use_rslora": True, "alpha_pattern": {"q_proj": 8}, "fan_in_fan_out": True, "peft_type": "ADALORA"}
    others |= {"bias": "all", "init_lora_weights": "pissa_niter_4"}
    for name, value in others.items():
        path.write_text(json.dumps(config | {name: value}))
        with pytest.raises(AddOnError, match=name):
            read_adapter(tmp_path, model.base_model, "model")
    for name, value in {"bias": "lora_only", "init_lora_weights": "olora"}.items():
        path.write_text(json.dumps(config | {name: value}))
        with pytest.raises(AddOnError, match=f"{name} is '{value}'"):
            read_adapter(tmp_path, model.base_model, "model")
    for start in (False, "gaussian", "eva"):
        path.write_text(json.dumps(config | {"init_lora_weights": start}))
        read_adapter(tmp_path, model.base_model, "model")


@pytest.mark.parametrize("trainable", [True, False])
def test_taking_it_off_for_a_moment_neither_freezes_nor_thaws_it(tiny_llm_dir: Path, trainable: bool) -> None:
    model = load(tiny_llm_dir)
    add_lora(model.base_model, rank=2, alpha=4)
    model.requires_grad_(False)
    for parameter in lora_parameters(model.base_model).values():
        parameter.requires_grad_(trainable)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with without_lora(model):
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before

"""A decoder in 4 bits: which layers, how near, and stages 2 and 4 over it, whose add-ons belong to the plain base."""

import builtins
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qwen3_vlm.config import ModelConfig, parse_config
from qwen3_vlm.errors import ConfigError, ModelError
from qwen3_vlm.evaluate.parameter_integrity import base_digests, compare_digests
from qwen3_vlm.fingerprint import fingerprint_folder
from qwen3_vlm.folder_lock import FolderLock
from qwen3_vlm.models.lora import add_lora, has_lora, without_lora
from qwen3_vlm.models.quantization import quantize
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.train import train_utils
from qwen3_vlm.train.add_ons import load_vlm
from qwen3_vlm.train.connector_recipe import build_model
from qwen3_vlm.train.export_rows import export_rows
from qwen3_vlm.train.lora_stage import refuse_sharded_quantization
from qwen3_vlm.train.planner_step import NF4
from qwen3_vlm.train.run import save_checkpoint
from qwen3_vlm.train.stages import trainability_table
from qwen3_vlm.train.verify import verify_add_on
from tests.tiny import TINY_CONNECTOR
from tests.train.tiny_run import tiny_config
from tests.train.tiny_talks import write_conversations
from tests.train.tiny_token_run import save_dataset, token_config

# The sixteen values of NormalFloat4 (arXiv:2305.14314, appendix E).
LEVELS = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip
SHORT: dict[str, Any] = {"model__quantization": "nf4", "lora__rank": 4, "lora__kl_weight": 1.0}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def nearest(weight: Tensor) -> Tensor:
    """The weights in NF4 by the paper's rule, blocks of 64 scaled by their largest; the scales themselves exact."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(LEVELS)
    chosen = levels[((blocks / scale).unsqueeze(-1) - levels).abs().argmin(dim=-1)]
    return (chosen * scale).reshape(weight.shape)


def test_each_layer_computes_with_nf4_and_nothing_else_changes(tiny_llm_dir: Path) -> None:
    plain, made = load(tiny_llm_dir), load(tiny_llm_dir)
    names = quantize(made.base_model, "cpu")
    assert names == [name for name, module in plain.base_model.named_modules() if isinstance(module, nn.Linear)]
    assert len(names) == 14
    for name in names:
        layer, original = made.base_model.get_submodule(name), plain.base_model.get_submodule(name)
        product = layer(torch.eye(original.in_features)).T  # its weights
        expected = nearest(original.weight.detach())
        # Scales are kept in 8 bits, so a block may be off by a part of its largest weight.
        assert float((product - expected).abs().max()) < 0.02 * float(original.weight.detach().abs().max())
        assert not torch.allclose(product, original.weight, atol=1e-3)
        assert layer.weight.dtype == torch.uint8
    others = {name: value for name, value in plain.named_parameters() if not name.endswith("proj.weight")}
    found = dict(made.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in others.items())
    add_lora(made.base_model, rank=4, alpha=8)
    adapted = {type(made.base_model.get_submodule(name)).__module__ for name in names}
    assert adapted == {"peft.tuners.lora.bnb"}


def test_bytes_are_those_that_the_planner_counts() -> None:
    trunk = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    quantize(trunk, "cpu")
    weight: Any = trunk[0].weight
    scales = weight.quant_state
    parts = (weight, scales.absmax, scales.state2.absmax)
    assert sum(part.numel() * part.element_size() for part in parts) == 1024 * 1024 * NF4


def test_no_tower_no_connector_no_head(tiny_llm_dir: Path, tiny_tower_dir: Path) -> None:
    settings = ModelConfig(
        llm=str(tiny_llm_dir), vision_tower=str(tiny_tower_dir), dtype="float32", quantization="nf4", **TINY_CONNECTOR
    )
    model, _ = build_model(settings, seed=0)
    packed = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8]
    assert len(packed) == 14
    assert all(name.startswith("model.language_model.layers.") for name in packed)
    table = {row.component: row.trainable + row.frozen for row in trainability_table(model)}
    assert table["language_model"] == 30_912  # weights, not bytes


def one_step(config: Any) -> tuple[Path, set[str]]:
    """A checkpoint after one audited step, and which parts have other tensors than before; adapters and rows apart."""
    with FolderLock() as lock:
        run = train_utils.start_run(config, lock)
        run.log.progress.start(0, run.plan.total)
        before = base_digests(run.model)
        (first, *_) = next(run.plan.epochs_from(0))
        train_utils._train_step(run, first, list(run.data.train_batches(first.micro_batches)), stop=False)
        save_checkpoint(run)
        run.log.close()
        assert run.audited
        changed = compare_digests(before, base_digests(run.model)).changed
        return Path(config.output_dir) / "checkpoints" / "step-000001", {name.split(".")[0] for name in changed}


def test_stage_2_over_4_bits(tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path: Path) -> None:
    """What was trained belongs to the plain base: it loads over it, and its adapter off is that base to the bit."""
    talks = write_conversations(tmp_path / "talks", 12)
    changes: dict[str, Any] = {"stage": "stage2_sft", "optim__accumulation": 8, **SHORT}
    folder, changed = one_step(tiny_config(tmp_path / "run", tiny_llm_dir, tiny_tower_dir, talks, **changes))
    assert changed == {"resampler", "projector"}
    info = json.loads((folder / "connector.json").read_text())
    assert info["llm"]["fingerprint"] == fingerprint_folder(tiny_llm_dir, "llm")
    assert info["quantization"] == "nf4"
    model, _ = load_vlm(folder)
    assert has_lora(model)
    ids = torch.arange(1, 13).reshape(1, 12)
    with without_lora(model):
        assert torch.equal(model(input_ids=ids).logits, load(tiny_llm_dir)(ids).logits)


def test_stage_4_over_4_bits(tmp_path: Path) -> None:
    dataset = save_dataset(tmp_path / "data", 30)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"{number} small dogs below a tree"}) for number in range(4)))
    changes: dict[str, Any] = {"stage": "stage4_mmpt", "text__files": [str(texts)], "text__share": 0.3, **SHORT}
    folder, changed = one_step(token_config(tmp_path / "run", dataset, **changes))
    assert changed == set()
    model, ids = TokenLM.from_add_on(folder), torch.arange(1, 13).reshape(1, 12)
    assert has_lora(model)
    used = model.token_space.text.tokenizer_size
    with without_lora(model):
        plain = load(dataset.parent / "tokenizers" / "llm")(ids).logits[..., :used]
        assert torch.equal(model(ids, score_range=(0, 384)).logits[..., :used], plain)


def test_trained_over_4_bits_it_is_verified_and_exported_over_the_plain_base(tmp_path: Path) -> None:
    """A whole run; what is exported is the base as its files have it, with the adapter in it."""
    dataset = save_dataset(tmp_path / "data", 30)
    changes: dict[str, Any] = {"stage": "stage4_mmpt", "optim__max_steps": 1, **SHORT, "lora__kl_weight": 0.0}
    changes |= {"lora__learning_rate": 1e-1, "tokens__tasks": {"i2t": {}}}
    rows = train_utils.train(token_config(tmp_path / "run", dataset, **changes)).add_on_dir
    assert rows is not None
    checks = {check.name: check.passed for check in verify_add_on(rows).checks}
    assert [checks[name] for name in ("files", "rows", "adapter", "llm", "gate parameter integrity")] == [True] * 5
    export_rows(rows, tmp_path / "whole")
    model, ids = TokenLM.from_add_on(rows), torch.arange(1, 13).reshape(1, 12)
    used = model.token_space.text.tokenizer_size
    found = model(ids, score_range=(0, used)).logits[..., :used]
    torch.testing.assert_close(load(tmp_path / "whole")(ids).logits[..., :used], found, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(load(dataset.parent / "tokenizers" / "llm")(ids).logits[..., :used], found, atol=1e-3)


def test_without_the_library_a_sentence(tiny_llm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name == "bitsandbytes":
            raise ImportError("No module named 'bitsandbytes'")
        return real(name, *rest)

    model = load(tiny_llm_dir)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ModelError, match=r"needs bitsandbytes: pip install 'qwen3-vlm\[quantization\]'"):
        quantize(model.base_model, "cpu")


def test_where_it_has_no_place() -> None:
    for stage in ("stage1_align", "stage3_rows"):
        with pytest.raises(ConfigError, match=f"quantization is for stages with an adapter; {stage} has none"):
            parse_config({"stage": stage, "model": {"quantization": "nf4"}})
    sharded: Any = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(ConfigError, match="use DDP"):
        refuse_sharded_quantization(ModelConfig(quantization="nf4"), sharded)

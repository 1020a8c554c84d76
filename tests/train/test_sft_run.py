"""Stage 2: connector and adapter on conversations with several turns and pictures."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qwen3_vlm.errors import TamperedFileError
from qwen3_vlm.models.lora import without_lora
from qwen3_vlm.train import train_utils
from qwen3_vlm.train.add_ons import export_vlm, load_vlm
from qwen3_vlm.train.train_utils import train
from tests.train.tiny_run import final_bytes, metrics
from tests.train.tiny_talks import Setting


@pytest.fixture(scope="module")
def setting(tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_llm_dir, tiny_tower_dir, tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def whole_run(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(setting.config(folder))
    return folder


def test_one_directory_holds_connector_and_adapter(setting: Setting, whole_run: Path) -> None:
    folder = whole_run / "connector"
    info = json.loads((folder / "connector.json").read_text())
    assert {"connector.safetensors", "adapter_model.safetensors", "adapter_config.json"} <= info["files"].keys()
    before = safetensors.torch.load_file(setting.connector / "connector.safetensors")
    after = safetensors.torch.load_file(folder / "connector.safetensors")
    assert all(
        not torch.equal(after[name], before[name]) for name in before if "k_proj" not in name or "weight" in name
    )
    evidence = json.loads((folder / "evidence.json").read_text())
    names = [gate["name"] for gate in evidence["gates"]]
    assert {"shuffled - correct", "text drift: KL", "text drift: perplexity ratio"} <= set(names)
    assert evidence["text_drift"]["kl"]["value"] > 0


def test_peft_alone_loads_the_adapter(setting: Setting, whole_run: Path) -> None:
    model, processor = load_vlm(whole_run / "connector")
    ids = torch.tensor([processor.tokenizer.encode("what is in the picture? a red heart")])
    base = AutoModelForCausalLM.from_pretrained(setting.llm, dtype=torch.float32).eval()
    with without_lora(model):
        assert torch.equal(model(input_ids=ids).logits, base(ids).logits)
    theirs = PeftModel.from_pretrained(base, str(whole_run / "connector")).eval()
    assert torch.equal(model(input_ids=ids).logits, theirs(ids).logits)


def test_resume_is_exact(setting: Setting, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the adapter's dropout on."""
    update, seen = train_utils._update, []

    def killed_at(run: Any, *args: Any, **kwargs: Any) -> float:
        seen.append(run.step)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return update(run, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train_utils, "_update", killed_at)
        with pytest.raises(KeyboardInterrupt):
            train(setting.config(tmp_path / "run"))
    train(setting.config(tmp_path / "run"))
    assert final_bytes(tmp_path / "run") == final_bytes(whole_run)
    adapters = [
        (folder / "connector" / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "run", whole_run)
    ]
    assert adapters[0] == adapters[1]
    assert metrics(tmp_path / "run") == metrics(whole_run)


def test_a_changed_adapter_is_refused(whole_run: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "connector"
    shutil.copytree(whole_run / "connector", folder)
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(TamperedFileError, match="adapter_model"):
        load_vlm(folder)


def test_export_merges_the_adapter(whole_run: Path, tmp_path: Path) -> None:
    from qwen3_vlm.models.vlm import Qwen3VLMForConditionalGeneration

    export_vlm(whole_run / "connector", tmp_path / "out")
    model, processor = load_vlm(whole_run / "connector")
    merged = Qwen3VLMForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.tensor([processor.tokenizer.encode("a red heart on a white background")])
    torch.testing.assert_close(merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_verify_reads_the_adapter_too(whole_run: Path, tmp_path: Path) -> None:
    import shutil

    from qwen3_vlm.train.verify import verify_connector

    report = verify_connector(whole_run / "connector")
    assert next(check for check in report.checks if check.name == "adapter").passed
    shutil.copytree(whole_run / "connector", tmp_path / "cut")
    (tmp_path / "cut" / "adapter_config.json").write_text("{}")
    with pytest.raises(TamperedFileError, match="adapter_config"):
        verify_connector(tmp_path / "cut")

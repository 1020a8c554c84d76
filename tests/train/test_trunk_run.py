"""Stage 4 with the whole decoder: what moves, what is shipped, what is refused, and that a killed run goes on."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from qwen3_vlm.config import parse_config
from qwen3_vlm.errors import AddOnError, ConfigError
from qwen3_vlm.evaluate.text_drift import measure_drift
from qwen3_vlm.evaluate.token_ablation import run_token_ablation
from qwen3_vlm.fingerprint import fingerprint_file
from qwen3_vlm.models.row_base import load_tokenizer
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.models.trunk import TRUNK, trunk_parameters
from qwen3_vlm.train import token_evaluations
from qwen3_vlm.train.export_rows import export_rows
from qwen3_vlm.train.train_utils import train
from qwen3_vlm.train.verify import verify_rows
from tests.train.tiny_run import metrics
from tests.train.tiny_token_run import final_bytes, save_dataset, token_config

FULL: dict[str, Any] = {
    "stage": "stage4_mmpt",
    "trunk__training": "full",
    "trunk__learning_rate": 1e-3,
    "tokens__tasks": {"i2t": {}, "t2i": {}},
    "eval__golden_samples": 1,
    "eval__golden_max_new_tokens": 1,
    "eval__decode_samples": 1,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data"), 30)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings by which half of the samples are texts."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"a small dog below {number} green trees"}) for number in range(5)))
    return {"text__files": [str(path)], "text__share": 0.5}


@pytest.fixture(scope="module")
def run(dataset: Path, texts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With everything on; a rate at which text drifts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(token_config(folder, dataset, **FULL, **texts, lora__kl_weight=0.5))
    return folder


def base_of(dataset: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(dataset.parent / "tokenizers" / "llm", dtype=torch.float32)


def test_the_decoder_moves_and_nothing_else_of_the_base(run: Path, dataset: Path) -> None:
    model, base = TokenLM.from_add_on(run / "rows"), base_of(dataset)
    before = dict(base.model.named_parameters())
    moved = trunk_parameters(model.language_model)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in moved.items())
    assert torch.equal(model.embedding.weight, base.get_input_embeddings().weight)
    evidence = json.loads((run / "rows" / "evidence.json").read_text())
    assert [*evidence["parameter_integrity"]["digests"]] == ["embed_tokens.weight", "lm_head.weight"]
    assert next(gate for gate in evidence["gates"] if gate["name"] == "parameter integrity")["passed"]
    assert "text_identity" not in evidence
    assert sorted(path.name for path in (run / "rows").glob("*.safetensors")) == [TRUNK]


def test_drift_is_measured_against_the_base_on_disk(run: Path, dataset: Path) -> None:
    """The figures of the evidence, from a plain base of its own, text by text."""
    model, base = TokenLM.from_add_on(run / "rows"), base_of(dataset)
    evidence = json.loads((run / "rows" / "evidence.json").read_text())["text_drift"]
    tokenizer = load_tokenizer(dataset.parent / "tokenizers" / "llm", False)
    grown = TokenLM.grow(base, model.token_space, seed=9).eval()
    found = measure_drift(model, tokenizer, max_kl=0.5, max_ratio=1.5, base=grown)
    assert evidence["kl"]["value"] == pytest.approx(found.kl.value, rel=1e-5)
    assert evidence["kl"]["value"] > 1e-3
    assert evidence["perplexity_before"] != pytest.approx(evidence["perplexity_after"], rel=1e-4)
    assert measure_drift(model, tokenizer, max_kl=1, max_ratio=2).kl.value == 0  # there is no adapter to switch off


def test_the_kl_holds_text_at_the_base(dataset: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    settings = {**FULL, **texts, "trunk__learning_rate": 1e-2, "optim__max_steps": 6, "log_every": 1}
    settings |= {"tokens__tasks": {"i2t": {}}, "eval__quick_every": 20, "save_every": 20}
    drift = {}
    for weight in (0.0, 20.0):
        train(token_config(tmp_path / str(weight), dataset, **settings, lora__kl_weight=weight))
        evidence = json.loads((tmp_path / str(weight) / "rows" / "evidence.json").read_text())
        drift[weight] = evidence["text_drift"]["kl"]["value"]
        lines = [line for line in metrics(tmp_path / str(weight)) if line["kind"] == "train"]
        assert all(("text_kl" in line) == bool(weight) for line in lines)
    assert lines[0]["text_kl"] < 1e-6 < lines[-1]["text_kl"]  # nothing has moved before the first step
    assert drift[20.0] < 0.6 * drift[0.0]


def test_an_interrupted_run_ends_the_same(
    run: Path, dataset: Path, texts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by a signal in its fifth step and in its gates, the KL's base being that of the first start."""
    config = token_config(tmp_path / "run", dataset, **FULL, **texts, lora__kl_weight=0.5)
    quick = token_evaluations.TokenEvaluations.quick

    def stop_then(self: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return quick(self)

    with monkeypatch.context() as patch:
        patch.setattr(token_evaluations.TokenEvaluations, "quick", stop_then)
        assert train(config).add_on_dir is None
        assert train(config).add_on_dir is None
    (first, *_) = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert first.name < "step-000008"
    with monkeypatch.context() as patch:

        def stop_in_gates(*args: Any, **options: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return run_token_ablation(*args, **options)

        patch.setattr(token_evaluations, "run_token_ablation", stop_in_gates)
        assert train(config).add_on_dir is None
    train(config)
    assert final_bytes(tmp_path / "run") == final_bytes(run)
    assert (tmp_path / "run" / "rows" / TRUNK).read_bytes() == (run / "rows" / TRUNK).read_bytes()
    assert metrics(tmp_path / "run") == metrics(run)


def test_masters_are_kept_between_and_rounded_at_the_end(dataset: Path, tmp_path: Path) -> None:
    """Over a bf16 base: a checkpoint midway has fp32, the last one and what is shipped are bf16 and the same."""
    train(token_config(tmp_path / "run", dataset, **FULL, model__dtype="bfloat16", optim__max_steps=4, save_every=2))
    middle, last = sorted((tmp_path / "run" / "checkpoints").iterdir())
    kinds = {
        folder.name: {tensor.dtype for tensor in safetensors.torch.load_file(folder / TRUNK).values()}
        for folder in (middle, last)
    }
    assert kinds == {"step-000002": {torch.float32}, "step-000004": {torch.bfloat16}}
    assert (last / TRUNK).read_bytes() == (tmp_path / "run" / "rows" / TRUNK).read_bytes()
    verify_rows(tmp_path / "run" / "rows")


def test_it_goes_on_from_rows_and_from_a_trunk(run: Path, dataset: Path, tmp_path: Path) -> None:
    settings = {**FULL, "optim__max_steps": 1, "optim__learning_rate": 1e-6, "trunk__learning_rate": 1e-6}
    train(token_config(tmp_path / "on", dataset, **settings, rows__add_on=str(run / "rows")))
    before, after = (safetensors.torch.load_file(folder / "rows" / TRUNK) for folder in (run, tmp_path / "on"))
    assert 0 < max(float((after[name] - before[name]).abs().max()) for name in before) < 1e-5
    rows = {"stage": "stage3_rows", "optim__max_steps": 1, "tokens__tasks": {"i2t": {}}}
    train(token_config(tmp_path / "rows", dataset, **rows))
    train(token_config(tmp_path / "from rows", dataset, **settings, rows__add_on=str(tmp_path / "rows" / "rows")))


def test_where_it_does_not_belong_it_is_refused(run: Path, dataset: Path, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{"stage": "stage3_rows"}, {"stage": "stage4_mmpt", "lora__rank": 4}]
    for settings in changes:
        config = token_config(tmp_path / settings["stage"], dataset, **settings, rows__add_on=str(run / "rows"))
        with pytest.raises(AddOnError, match=r"has a decoder of its own .*stage4_mmpt and trunk\.training: full"):
            train(config)
    adapted = {"stage": "stage4_mmpt", "lora__rank": 4, "optim__max_steps": 1, "tokens__tasks": {"i2t": {}}}
    train(token_config(tmp_path / "adapted", dataset, **adapted))
    config = token_config(tmp_path / "full", dataset, **FULL, rows__add_on=str(tmp_path / "adapted" / "rows"))
    with pytest.raises(AddOnError, match=r"has an adapter, .*trains none: go on from it with trunk\.training: lora"):
        train(config)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"stage": "stage1_align"}, "stage1_align does not read the section trunk"),
        ({"stage": "stage2_sft"}, "stage2_sft does not read the section trunk"),
        ({"stage": "stage3_rows"}, "stage3_rows does not read the section trunk"),
        ({"lora": {"rank": 4, "dora": True}}, r"no adapter for lora\.rank, lora\.dora; leave out"),
        ({"model": {"quantization": "nf4"}}, "weights in 4 bits can't be trained"),
        ({"trunk": {"learning_rate": 1e-4}}, r"trunk\.learning_rate is for trunk\.training: full"),
        ({"trunk": {"training": "half"}}, "must be one of lora, full"),
        ({"trunk": {"training": "full", "learning_rate": 0.0}}, "must be above 0"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_config({"stage": "stage4_mmpt", "trunk": {"training": "full"}, **changes})


def test_settings_about_text_stay(texts: dict[str, Any]) -> None:
    lora = {"kl_weight": 1.0, "max_text_kl": 0.1, "max_perplexity_ratio": 1.1}
    tree = {"stage": "stage4_mmpt", "trunk": {"training": "full"}, "lora": lora, "text": {"files": ["t.jsonl"]}}
    assert parse_config(tree).lora.kl_weight == 1


def test_verify_and_export(run: Path, dataset: Path, tmp_path: Path) -> None:
    """The exported folder says what the add-on says, through transformers alone; the base on disk is as it was."""
    before = fingerprint_file(dataset.parent / "tokenizers" / "llm" / "model.safetensors")
    checks = {check.name: check for check in verify_rows(run / "rows").checks}
    count = sum(parameter.numel() for parameter in trunk_parameters(base_of(dataset).model).values())
    assert f"{count:,} parameters in float32, all finite" in checks["trunk"].detail
    export_rows(run / "rows", tmp_path / "whole")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    model = TokenLM.from_add_on(run / "rows")
    ids = torch.arange(40).reshape(2, 20)
    used, text = model.token_space.text.tokenizer_size, (0, model.token_space.text.vocab_size)
    with torch.no_grad():
        theirs, ours = exported(ids).logits[..., :used], model(ids, score_range=text).logits[..., :used]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base_of(dataset)(ids).logits[..., :used], ours, atol=1e-3)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "its decoder trained further and its own vocabulary rows unchanged" in card
    assert "Answers in words are not the base's" in card
    assert fingerprint_file(dataset.parent / "tokenizers" / "llm" / "model.safetensors") == before
    assert {"gate parameter integrity", "gate text drift: KL"} <= checks.keys()

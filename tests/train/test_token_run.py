"""Stage 3 from tokenized shards to trained rows: the run's folder, exact resume, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qwen3_vlm.errors import CheckpointError, ConfigError, DataError
from qwen3_vlm.models.lora import without_lora
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.train import train_utils
from qwen3_vlm.train.train_utils import train
from tests.train.tiny_run import metrics
from tests.train.tiny_token_run import final_bytes, save_dataset, token_config


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def whole_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(token_config(folder, dataset))
    return folder


def test_run_folder(whole_run: Path, dataset: Path) -> None:
    rows = {path.name for path in (whole_run / "rows").iterdir()}
    assert {"trainable_rows.pt", "trainable_rows.json", "evidence.json", "uti.yaml", "token_space.json"} <= rows
    evidence = json.loads((whole_run / "rows" / "evidence.json").read_text())
    by_name = {gate["name"]: gate for gate in evidence["gates"]}
    for exact in ("parameter integrity", "text identity: logits", "text identity: greedy continuations"):
        assert by_name[exact]["passed"], by_name[exact]
    assert {"i2t: shuffled - correct", "a2t: noise - correct", "t2i: prompt empty - correct"} <= by_name.keys()
    assert evidence["token_ablation"].keys() == {"i2t", "a2t"}
    assert evidence["prompt_ablation"].keys() == {"t2i"}
    assert evidence["decode_success"]["t2i"]["rate"]["value"] == 1.0
    assert by_name["t2i: decodes"]["samples"] == 2
    assert not by_name["t2i: decodes"]["passed"], "two samples are no evidence"
    assert evidence["golden"].keys() == {"i2t", "a2t", "t2i"}
    items = [
        json.loads(line) for line in (whole_run / "golden" / "step-000008" / "items.jsonl").read_text().splitlines()
    ]
    assert [item["task"] for item in items] == ["i2t", "i2t", "a2t", "a2t", "t2i", "t2i"]
    assert not any(item["error"] for item in items)


def test_only_the_rows_moved_and_they_load(whole_run: Path, dataset: Path) -> None:
    """The base inside the loaded model is the base on disk; the rows are not those that the run began with."""
    llm = dataset.parent / "tokenizers" / "llm"
    model = TokenLM.from_add_on(whole_run / "rows")
    base = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    for name, tensor in base.model.state_dict().items():
        found = model.language_model.state_dict()[name.replace("embed_tokens.", "embed_tokens.base.")]
        assert torch.equal(found, tensor), name
    fresh = TokenLM.grow(base, model.token_space)
    assert not torch.equal(fresh.embedding.rows, model.embedding.rows)


def test_metrics_tell_each_task_the_ramp_and_the_norms(whole_run: Path) -> None:
    lines = [line for line in metrics(whole_run) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert "loss_t2i" not in lines[0], "t2i begins after a quarter of the steps"
    assert lines[-1]["tokens_t2i"] > lines[1]["tokens_t2i"]
    for line in lines:
        parts = [
            (line[f"loss_{task}"], line[f"tokens_{task}"]) for task in ("i2t", "a2t", "t2i") if f"loss_{task}" in line
        ]
        assert sum(count for _, count in parts) == line["supervised_tokens"]
        weighted = sum(loss * count for loss, count in parts) / line["supervised_tokens"]
        assert line["loss"] == pytest.approx(weighted, abs=1e-5)
        assert 0 < line["row_norm_min"] < line["row_norm_mean"] < line["row_norm_max"]
    (counts,) = [line for line in metrics(whole_run) if line["kind"] == "data"]
    assert counts["dropped"]["i2t"]["no_image"] > 0
    assert counts["tasks"].keys() == {"i2t", "a2t", "t2i"}


@pytest.mark.parametrize("moment", [1, 4, 7])
def test_resume_is_exact(
    dataset: Path, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Stopped in the middle of a step, before its update, and started again: the same bits."""
    update, seen = train_utils._update, []

    def killed_at(run: Any, *args: Any, **kwargs: Any) -> float:
        seen.append(run.step)
        if len(seen) == moment + 1:
            raise KeyboardInterrupt
        return update(run, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train_utils, "_update", killed_at)
        with pytest.raises(KeyboardInterrupt):
            train(token_config(tmp_path / "run", dataset))
    train(token_config(tmp_path / "run", dataset))
    assert final_bytes(tmp_path / "run") == final_bytes(whole_run)
    assert metrics(tmp_path / "run") == metrics(whole_run)


def test_a_batch_may_be_split_in_any_way(dataset: Path, whole_run: Path, tmp_path: Path) -> None:
    """6 × 1 and 1 × 6 take the steps of 2 × 3."""
    expected = torch.load(whole_run / "rows" / "trainable_rows.pt", weights_only=True)["embeddings"]
    for batch_size, accumulation in ((6, 1), (1, 6)):
        folder = tmp_path / f"{batch_size}"
        train(token_config(folder, dataset, optim__batch_size=batch_size, optim__accumulation=accumulation))
        found = torch.load(folder / "rows" / "trainable_rows.pt", weights_only=True)["embeddings"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_going_on_from_trained_rows(dataset: Path, whole_run: Path, tmp_path: Path) -> None:
    config = token_config(tmp_path / "next", dataset, rows__add_on=str(whole_run / "rows"), optim__max_steps=1)
    train(config)
    line = metrics(tmp_path / "next")[-1]
    assert line["step"] == 1
    first = next(line for line in metrics(tmp_path / "next") if line["kind"] == "train")
    fresh = next(line for line in metrics(whole_run) if line["kind"] == "train")
    assert first["loss"] < fresh["loss"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"tokens__folders": []}, DataError, "names no training data"),
        ({"tokens__folders": ["nowhere"]}, DataError, "no complete tokenized data set"),
        ({"tokens__tasks": {"t2v": {}}}, Exception, "There is no task 't2v'"),
        ({"tokens__train_split": "validation"}, DataError, "has records in a split 'validation'"),
        ({"tokens__max_seq_len": 8}, DataError, "No record .* can be used for the task i2t"),
        ({"data__packing": False}, ConfigError, "does not read the section data"),
        ({"tokens__tasks": {"i2t": {"ramp_from": 0.5, "ramp_until": 0.6}}}, ConfigError, "without a ramp"),
    ],
)
def test_refused(dataset: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        train(token_config(tmp_path / "run", dataset, **changes))


def test_changed_tasks_are_another_run(dataset: Path, whole_run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokens\.tasks"):
        train(token_config(whole_run, dataset, tokens__tasks={"i2t": {}}))


def test_tied_and_untied_heads_have_their_own_rates(dataset: Path, tmp_path: Path) -> None:
    """An untied base: the head's rows move at their own rate, the embeddings' at theirs (AdamW's first step)."""
    from tests.tiny import save_tiny_llm

    llm = save_tiny_llm(tmp_path / "untied", tied=False)
    moved = {}
    for rate in (1e-2, 1e-3):
        folder = tmp_path / f"{rate}"
        train(
            token_config(
                folder, dataset, model__llm=str(llm), rows__head_learning_rate=rate, optim__max_steps=1, save_every=1
            )
        )
        rows = torch.load(folder / "rows" / "trainable_rows.pt", weights_only=True)
        base = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
        fresh = TokenLM.grow(base, TokenLM.from_add_on(folder / "rows").token_space).row_parameters()
        moved[rate] = {name: (rows[name] - fresh[name]).abs().max().item() for name in ("embeddings", "lm_head")}
    assert moved[1e-2]["embeddings"] == pytest.approx(moved[1e-3]["embeddings"], rel=1e-4)
    assert moved[1e-2]["lm_head"] == pytest.approx(10 * moved[1e-3]["lm_head"], rel=1e-2)


def test_stage_4_trains_rows_and_an_adapter(dataset: Path, whole_run: Path, tmp_path: Path) -> None:
    """From a stage-3 directory; the result loads with its adapter, without it text is the base's to the bit."""
    settings: dict[str, Any] = {"stage": "stage4_mmpt", "rows__add_on": str(whole_run / "rows"), "lora__rank": 4}
    settings["tokens__tasks"] = {"i2t": {}, "t2i": {"source_dropout": 0.5}, "a2i": {}}
    train(token_config(tmp_path / "run", dataset, **settings))
    folder = tmp_path / "run" / "rows"
    model = TokenLM.from_add_on(folder)
    ids = torch.arange(40).reshape(2, 20)
    base = AutoModelForCausalLM.from_pretrained(dataset.parent / "tokenizers" / "llm", dtype=torch.float32)
    used, whole = model.token_space.text.tokenizer_size, (0, model.token_space.text.vocab_size)
    moved = model(ids, score_range=whole).logits[..., :used]
    assert not torch.equal(moved, base(ids).logits[..., :used])
    with without_lora(model):
        assert torch.equal(model(ids, score_range=whole).logits[..., :used], base(ids).logits[..., :used])
    evidence = json.loads((folder / "evidence.json").read_text())
    assert evidence["text_drift"]["kl"]["value"] > 0
    assert "text_identity" not in evidence
    assert next(gate for gate in evidence["gates"] if gate["name"] == "parameter integrity")["passed"]
    theirs = PeftModel.from_pretrained(base, str(folder)).eval()
    assert torch.equal(theirs(ids).logits[..., :used], moved)

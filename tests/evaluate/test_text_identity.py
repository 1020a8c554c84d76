"""Text behaviour against the plain base: bit-equal with new rows alone, and any drift is found."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GenerationConfig

from qwen3_vlm.errors import DataError, ModelError
from qwen3_vlm.evaluate.text_identity import TextBehaviour, compare_text, measure_text
from qwen3_vlm.evaluate.text_suite import SUITE_SHA256, TEXTS
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.models.vocabulary_rows import SplitHead
from tests.models.grown import pad, sequences
from tests.tiny import save_tiny_llm, tiny_row_space, tiny_tokenizer

FEW = TEXTS[:6]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llm(tmp_path_factory.mktemp("llm"), tied=request.param)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def test_the_suite_is_varied_and_fixed() -> None:
    assert len(TEXTS) == len(set(TEXTS)) == 32
    assert SUITE_SHA256 == "bbcd6fe639f136c29c44ae7feeebbd00816a5ff9f07402f14e4c3a29cecac18c"
    scripts = {ord(char) // 256 for text in TEXTS for char in text}
    assert len(scripts) > 8


def test_figures_are_those_of_the_plain_library(folder: Path) -> None:
    """Perplexity by cross entropy, continuations by the library's own greedy `generate`."""
    llm, tokenizer = load(folder), tiny_tokenizer()
    used = len(tokenizer)
    found = measure_text(llm, tokenizer, FEW, max_tokens=40, new_tokens=5)
    loss, count = 0.0, 0
    for number, text in enumerate(FEW):
        ids = torch.tensor([tokenizer.encode(text)[:40]])
        with torch.no_grad():
            logits = llm(input_ids=ids).logits[0, :, :used].double()
        loss += float(F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
        suppressed = list(range(used, llm.config.vocab_size))
        config = GenerationConfig(max_new_tokens=5, do_sample=False, suppress_tokens=suppressed, pad_token_id=0)
        answer = llm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert found.continuations[number] == tuple(answer[0, ids.shape[1] :].tolist())
    assert found.perplexity == pytest.approx(math.exp(loss / count), rel=1e-9)
    assert sum(found.token_counts) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_leave_text_as_it_was_to_the_bit(folder: Path, dtype: torch.dtype) -> None:
    llm, tokenizer = load(folder, dtype), tiny_tokenizer()
    before = measure_text(llm, tokenizer)
    model = TokenLM.grow(llm, tiny_row_space(folder)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**pad(sequences())).loss.backward()
        optimizer.step()
    report = compare_text(before, measure_text(model, tokenizer))
    assert model.training, "the mode is put back"
    assert report.passed, report.to_dict()
    assert [gate["name"] for gate in report.gates()] == [
        "text identity: logits", "text identity: greedy continuations", "text identity: perplexity"
    ]  # fmt: skip
    assert report.perplexity_before == report.perplexity_after
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()


def test_a_drift_is_found(folder: Path) -> None:
    llm, tokenizer = load(folder), tiny_tokenizer()
    before = measure_text(llm, tokenizer, FEW)
    with torch.no_grad():
        llm.model.layers[0].mlp.up_proj.weight[0, 0] *= 1.001
    report = compare_text(before, measure_text(llm, tokenizer, FEW))
    assert not report.passed
    assert len(report.logits) == len(FEW)
    assert report.gates()[0]["reason"] == f"{len(FEW)} of {len(FEW)} texts differ; none may."
    assert report.perplexity_before != report.perplexity_after


def test_a_head_that_lets_new_ids_in_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text mode is what is measured: where it moved a text score, that would show."""
    llm, tokenizer = load(folder), tiny_tokenizer()
    before = measure_text(llm, tokenizer, FEW)
    model = TokenLM.grow(llm, tiny_row_space(folder))
    right = SplitHead.forward
    monkeypatch.setattr(SplitHead, "forward", lambda self, *args, **more: right(self, *args, **more) + 1e-3)
    assert len(compare_text(before, measure_text(model, tokenizer, FEW)).logits) == len(FEW)


def test_json_keeps_a_measurement(folder: Path) -> None:
    found = measure_text(load(folder), tiny_tokenizer(), FEW, new_tokens=3)
    kept = TextBehaviour.from_dict(json.loads(json.dumps(found.to_dict())))
    assert kept == found
    assert compare_text(kept, found).passed
    with pytest.raises(DataError, match="no measurement of text behaviour"):
        TextBehaviour.from_dict({"digests": []})


def test_other_texts_are_not_compared(folder: Path) -> None:
    llm, tokenizer = load(folder), tiny_tokenizer()
    one, other = (measure_text(llm, tokenizer, texts, new_tokens=1) for texts in (FEW[:2], FEW[2:4]))
    with pytest.raises(DataError, match="different texts"):
        compare_text(one, other)
    empty = replace(one, digests=(), continuations=(), loss_sums=(), token_counts=())
    assert not compare_text(empty, empty).passed, "nothing compared is nothing shown"


def test_a_tokenizer_of_another_base_is_refused(folder: Path) -> None:
    llm, tokenizer = load(folder), tiny_tokenizer()
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(200)])
    with pytest.raises(ModelError, match="the base 384 rows"):
        measure_text(llm, tokenizer, FEW)


def test_texts_are_cut_to_what_the_model_reads(folder: Path) -> None:
    llm = load(folder)
    found = measure_text(llm, tiny_tokenizer(), ["a red heart " * 400], max_tokens=10_000, new_tokens=12)
    assert found.token_counts == (llm.config.max_position_embeddings - 12 - 1,)

"""The evaluation loss against a plain float64 formula, and its independence of batches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.data.collate import Batch
from qwen3_vlm.data.encode import SkippedRecord
from qwen3_vlm.errors import DataError
from qwen3_vlm.evaluate.metrics import LossReport, evaluate_loss
from qwen3_vlm.models.modes import evaluation_mode
from tests.evaluate.helpers import make_batches, make_records


def plain_losses(model: Any, batch: Batch) -> list[list[float]]:
    """Per row, −log p of every graded token: full logits, float64, one token at a time."""
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.inputs.items() if name != "labels"}).logits.double()
    rows = []
    for row, labels in enumerate(batch.inputs["labels"].tolist()):
        graded = [place for place in range(1, len(labels)) if labels[place] != -100]
        rows.append([-float(logits[row, place - 1].log_softmax(-1)[labels[place]]) for place in graded])
    return rows


def test_loss_is_the_plain_formula_per_token(tiny_vlm: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny_vlm
    batches = make_batches(processor, make_records(tmp_path, 7, text_only=[3]), batch_size=3)
    report = evaluate_loss(model, batches)
    expected = [losses for batch in batches for losses in plain_losses(model, batch)]
    assert report.sample_ids == tuple(f"r{number}" for number in range(7))
    assert report.token_counts.tolist() == [len(losses) for losses in expected]
    np.testing.assert_allclose(report.loss_sums, [sum(losses) for losses in expected], rtol=1e-5)
    tokens = [loss for losses in expected for loss in losses]
    assert report.loss == pytest.approx(sum(tokens) / len(tokens), rel=1e-6)
    mean_of_means = np.mean([np.mean(losses) for losses in expected])
    assert abs(report.loss - mean_of_means) > 3e-4  # the two differ here, so the test tells them apart


def test_loss_does_not_depend_on_the_batch_size(tiny_vlm: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny_vlm
    records = make_records(tmp_path, 6)
    reports = [evaluate_loss(model, make_batches(processor, records, size)) for size in (1, 4, 6)]
    for report in reports[1:]:
        np.testing.assert_allclose(report.loss_sums, reports[0].loss_sums, rtol=1e-5)


def test_max_samples_stops_within_a_batch_and_before_the_next(tiny_vlm: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny_vlm
    batches = make_batches(processor, make_records(tmp_path, 6), batch_size=4)

    def two_batches() -> Any:
        yield batches[0]
        raise AssertionError("a batch too many was read")

    report = evaluate_loss(model, two_batches(), max_samples=3)
    assert report.sample_ids == ("r0", "r1", "r2")
    np.testing.assert_allclose(report.loss_sums, evaluate_loss(model, batches).loss_sums[:3], rtol=1e-5)


def test_what_is_left_out_is_counted(tiny_vlm: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny_vlm
    batch = make_batches(processor, make_records(tmp_path, 4), batch_size=4)[0]
    batch.inputs["labels"][1] = -100
    bad = [SkippedRecord(9, "x", "f:9", reason, "…") for reason in ("no_labels", "truncates_answer", "missing_image")]
    empty = Batch(inputs={}, skipped=bad)
    report = evaluate_loss(model, [batch, empty])
    assert report.sample_ids == ("r0", "r2", "r3")
    figures = report.to_dict()
    assert (figures["zero_label"], figures["truncated"], figures["skipped"]) == (2, 1, 3)
    assert report.skipped == {"no_labels": 1, "truncates_answer": 1, "missing_image": 1}


def test_packed_batches_are_refused(tiny_vlm: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny_vlm
    batches = make_batches(processor, make_records(tmp_path, 3), batch_size=3, packing=True)
    with pytest.raises(DataError, match="packing off"):
        evaluate_loss(model, batches)


def test_every_module_is_back_in_its_own_mode(tiny_vlm: tuple[Any, Any]) -> None:
    model, _ = tiny_vlm
    model.train()
    model.model.language_model.eval()
    modes = [module.training for module in model.modules()]
    assert True in modes
    assert False in modes
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes


def test_buckets_by_hand() -> None:
    report = LossReport(
        sample_ids=("a", "b", "c", "d", "e"),
        loss_sums=np.array([10.0, 4.0, 30.0, 40.0, 21.0]),
        token_counts=np.array([5, 11, 12, 21, 22]),
        answer_lengths=np.array([4, 10, 11, 20, 21]),
    )
    assert report.bucket_losses() == pytest.approx({"le10": 14 / 16, "11_20": 70 / 33, "ge21": 21 / 22})
    figures = report.to_dict()
    assert [figures[f"samples_{name}"] for name in ("le10", "11_20", "ge21")] == [2, 2, 1]
    assert (figures["label_length_p50"], figures["label_length_max"], figures["tokens"]) == (11.0, 21, 71)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_an_empty_report_is_json_too() -> None:
    report = LossReport.merge([])
    assert np.isnan(report.loss)
    assert report.to_dict()["loss"] is None
    json.dumps(report.to_dict(), allow_nan=False)


samples = st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50), st.integers(0, 60)), min_size=1, max_size=30)


@settings(deadline=None, max_examples=40)
@given(samples, st.integers(0, 30))
def test_merging_parts_gives_the_whole(rows: list[tuple[float, int, int]], cut: int) -> None:
    def report(part: list[tuple[float, int, int]]) -> LossReport:
        sums, counts, lengths = (np.array(column) for column in zip(*part, strict=True)) if part else ([], [], [])
        return LossReport(
            tuple(map(str, range(len(part)))),
            np.asarray(sums, dtype=np.float64),
            np.asarray(counts, dtype=np.int64),
            np.asarray(lengths, dtype=np.int64),
            zero_label=1,
            skipped={"missing_image": len(part)},
        )

    merged = LossReport.merge([report(rows[:cut]), report(rows[cut:])])
    assert merged.loss == pytest.approx(sum(row[0] for row in rows) / sum(row[1] for row in rows), rel=1e-12)
    assert merged.samples == len(rows)
    assert merged.zero_label == 2
    assert sum(merged.skipped.values()) == len(rows)
    whole = report(rows).bucket_losses()
    assert merged.bucket_losses() == pytest.approx(whole, nan_ok=True)

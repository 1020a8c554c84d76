"""The ablation gate: against the conditions done by hand, and on models that read or ignore pictures."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from qwen3_vlm.config import EvalConfig
from qwen3_vlm.data.collate import Batch
from qwen3_vlm.errors import DataError
from qwen3_vlm.evaluate.ablation import AblationReport, embedding_statistics, run_ablation
from qwen3_vlm.evaluate.conditions import Gap
from qwen3_vlm.evaluate.intervals import Interval, bootstrap_ratio
from tests.evaluate.helpers import make_batches, make_records

CONFIG = EvalConfig(bootstrap_samples=200)


def test_conditions_equal_those_done_by_hand(tiny_vlm: tuple[Any, Any], tmp_path: Path) -> None:
    """Sample by sample, through `forward`: own features, zeros, and features of a sample that is not the own."""
    model, processor = tiny_vlm
    records = make_records(tmp_path, 8, text_only=[2])
    report = run_ablation(model, make_batches(processor, records, 3), CONFIG, seed=7)
    singles = [batch for batch in make_batches(processor, records, 1) if batch.image_counts == (1,)]
    features = [model.get_image_features(batch.inputs["pixel_values"]).pooler_output[0] for batch in singles]
    assert report.sample_ids == tuple(batch.sample_ids[0] for batch in singles)
    assert (report.samples, report.text_only, report.same_picture) == (7, 1, 0)

    def loss(row: int, embeddings: Tensor) -> float:
        inputs = {k: v for k, v in singles[row].inputs.items() if k != "pixel_values"}
        outputs = {"image": BaseModelOutputWithPooling(pooler_output=[embeddings])}
        with torch.no_grad():
            return float(model(**inputs, mm_encoder_outputs=outputs).loss) * report.token_counts[row]

    for row in range(7):
        assert report.loss_sums["correct"][row] == pytest.approx(loss(row, features[row]), rel=1e-5)
        assert report.loss_sums["zero"][row] == pytest.approx(loss(row, torch.zeros_like(features[row])), rel=1e-5)
        others = [loss(row, features[other]) for other in range(7) if other != row]
        assert min(abs(report.loss_sums["shuffled"][row] - other) for other in others) < 1e-4


def test_correct_is_the_evaluation_loss(tiny_vlm: tuple[Any, Any], tmp_path: Path) -> None:
    from qwen3_vlm.evaluate.metrics import evaluate_loss

    model, processor = tiny_vlm
    batches = make_batches(processor, make_records(tmp_path, 5), 2)
    report = run_ablation(model, batches, CONFIG)
    np.testing.assert_allclose(report.loss_sums["correct"], evaluate_loss(model, batches).loss_sums, rtol=1e-5)


def test_result_does_not_depend_on_the_batch_size(tiny_vlm: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny_vlm
    records = make_records(tmp_path, 6)
    reports = [run_ablation(model, make_batches(processor, records, size), CONFIG, seed=3) for size in (1, 4)]
    for name, sums in reports[0].loss_sums.items():
        np.testing.assert_allclose(reports[1].loss_sums[name], sums, rtol=1e-4)


def test_cached_patches_give_the_same_report(tiny_vlm: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny_vlm
    batches = make_batches(processor, make_records(tmp_path, 5), 2)
    cached = []
    for batch in batches:
        inputs = dict(batch.inputs)
        with torch.no_grad():
            inputs["patch_embeddings"] = model.encode_patches(inputs.pop("pixel_values"))
        cached.append(replace(batch, inputs=inputs))
    plain, from_cache = run_ablation(model, batches, CONFIG), run_ablation(model, cached, CONFIG)
    for name in ("correct", "zero"):  # digests differ, so the partners may
        np.testing.assert_allclose(from_cache.loss_sums[name], plain.loss_sums[name], rtol=1e-5)


def test_embedding_statistics_are_those_of_the_whole_set() -> None:
    embeddings = [torch.randn(4, 6) * 3 + 2 for _ in range(9)]
    mean, std = embedding_statistics(embeddings)
    whole = torch.cat(embeddings).double()
    torch.testing.assert_close(mean.double(), whole.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(std.double(), whole.std(0, correction=0), rtol=1e-5, atol=1e-6)


@dataclass
class _Losses:
    loss: Tensor
    row: Tensor


class StubModel(nn.Module):
    """A picture is one number, and so is its sample's answer; the loss is `sight` × their distance + noise."""

    def __init__(self, sight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(image_token_id=9, num_latents=2)
        self.sight = sight
        self.seen: list[Tensor] = []

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=list(pixel_values.reshape(-1, 1, 1).expand(-1, 2, 3).clone()))

    def token_losses(self, *, labels: Tensor, mm_encoder_outputs: Any, **_: Any) -> _Losses:
        embeddings = torch.stack(mm_encoder_outputs["image"].pooler_output)
        self.seen.append(embeddings)
        row, place = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        distance = (embeddings.mean(dim=(1, 2)) - labels.max(dim=1).values).abs()
        return _Losses(3.0 + self.sight * distance[row] + 0.1 * (place % 3), row)


def stub_batches(count: int, *, same: bool = False) -> Iterator[Batch]:
    rng = np.random.default_rng(0)
    for start in range(0, count, 32):
        rows = min(32, count - start)
        values = torch.full((rows,), 5) if same else torch.arange(start, start + rows)
        labels = torch.full((rows, 12), -100)
        for row, length in enumerate(rng.integers(1, 10, rows)):
            labels[row, 2 : 2 + length] = values[row]
        yield Batch(
            inputs={"input_ids": torch.ones(rows, 12, dtype=torch.long), "labels": labels,
                    "pixel_values": values.float().reshape(-1, 1, 1, 1)},
            sample_ids=tuple(f"s{start + row}" for row in range(rows)),
            answer_lengths=(3,) * rows, image_counts=(1,) * rows, dropped_turns=(0,) * rows,
        )  # fmt: skip


def test_a_reading_model_passes() -> None:
    report = run_ablation(StubModel(sight=0.01), stub_batches(300), CONFIG)
    assert report.samples == 256  # config.ablation_samples
    assert report.passed
    assert report.failures() == []
    assert report.order["correct < shuffled"]
    for name, gap in report.gaps.items():
        difference = report.loss_sums[name] - report.loss_sums["correct"]
        assert gap.interval.value == pytest.approx(difference.sum() / report.token_counts.sum())
        assert gap.interval == bootstrap_ratio(difference, report.token_counts, samples=200, seed=0)
        assert gap.win_rate.value == np.mean(difference > 0)


def test_a_blind_model_fails_with_a_sentence() -> None:
    report = run_ablation(StubModel(sight=0.0), stub_batches(256), CONFIG)
    assert not report.passed
    assert len(report.failures()) == 3
    assert "is needed" in report.failures()[0]
    assert all(gap.interval.value == 0 for gap in report.gaps.values())


def test_too_few_samples_can_not_pass() -> None:
    report = run_ablation(StubModel(sight=0.01), stub_batches(255), CONFIG)
    assert not report.passed
    assert all("255 samples" in sentence for sentence in report.failures())


@pytest.mark.parametrize(
    ("value", "low", "samples", "passed"),
    [(0.2, 0.1, 256, True), (0.2, 0.0, 256, False), (0.04, 0.03, 999, False), (0.2, 0.1, 255, False),
     (float("nan"), float("nan"), 256, False)],
)  # fmt: skip
def test_what_a_gate_demands(value: float, low: float, samples: int, passed: bool) -> None:
    gap = Gap(Interval(value, low, 1.0), Interval(0.9, 0.8, 1.0), threshold=0.05, samples=samples)
    assert gap.passed is passed
    assert bool(gap.reason) is not passed


def test_shuffled_deranges_the_whole_set_and_noise_has_its_spread() -> None:
    model = StubModel(sight=0.0)
    run_ablation(model, stub_batches(256), CONFIG)
    correct, shuffled, zero, noise = (torch.cat(model.seen[start : start + 8]) for start in (0, 8, 16, 24))
    own, given = correct[:, 0, 0], shuffled[:, 0, 0]
    assert sorted(given.tolist()) == sorted(own.tolist())
    assert (own != given).all()
    assert ((own // 32) != (given // 32)).float().mean() > 0.7  # most partners come from another batch
    assert not zero.any()
    assert float(noise.mean()) == pytest.approx(float(own.mean()), abs=10)
    assert float(noise.std()) == pytest.approx(float(own.std(correction=0)), rel=0.1)
    assert noise[0].flatten().unique().numel() == 6  # drawn per latent and dimension


def test_identical_pictures_are_counted_where_they_can_not_be_avoided() -> None:
    report = run_ablation(StubModel(sight=1.0), stub_batches(64, same=True), CONFIG)
    assert report.same_picture == 64
    assert not report.passed


def test_report_is_json_and_names_its_gates() -> None:
    report = run_ablation(StubModel(sight=0.01), stub_batches(256), CONFIG)
    tree = report.to_dict()
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    assert {"name", "value", "low", "high", "threshold", "passed"} <= set(report.gates()[0])
    assert [gate["name"] for gate in report.gates()] == ["shuffled - correct", "zero - correct", "noise - correct"]
    assert all(isinstance(value, (int, float)) for value in report.summary().values())


def test_without_pictures_it_is_one_sentence(tiny_vlm: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny_vlm
    batches = make_batches(processor, make_records(tmp_path, 4, text_only=[0, 1, 2, 3]), 2)
    with pytest.raises(DataError, match="at least two samples with a picture"):
        run_ablation(model, batches, CONFIG)


def test_zero_label_rows_are_left_out_and_counted(tiny_vlm: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny_vlm
    batches = make_batches(processor, make_records(tmp_path, 5), 5)
    batches[0].inputs["labels"][1] = -100
    report: AblationReport = run_ablation(model, batches, CONFIG)
    assert report.zero_label == 1
    assert report.sample_ids == ("r0", "r2", "r3", "r4")

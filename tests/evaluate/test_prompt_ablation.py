"""Whether a token LM follows its prompt: prompts of others, no prompt, and gates that tell."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from qwen3_vlm.config import EvalConfig
from qwen3_vlm.evaluate.prompt_ablation import run_prompt_ablation
from qwen3_vlm.evaluate.token_losses import source_ids
from qwen3_vlm.tokenization.sequences import build_sequence, parse_sequence, prompt_ids, unconditional_prompt
from tests.data.tiny_shards import tiny_record
from tests.evaluate.token_stubs import SPACE, Reader, told_records
from tests.models.grown import grow, make_base

CONFIG = EvalConfig(bootstrap_samples=200)


@pytest.mark.parametrize("task", ["t2i", "t2a", "i2a", "copy_image"])
def test_another_prompt_before_the_same_target(task: str) -> None:
    ours, theirs = (tiny_record(number, SPACE).ids for number in (3, 4))
    own, other = (build_sequence(SPACE, task, ids) for ids in (ours, theirs))
    mixed = own.with_source(source_ids(other))
    prompt = prompt_ids(SPACE, task, theirs)
    assert mixed.input_ids[: len(prompt)].tolist() == prompt.tolist()
    target = own.span("target")
    assert mixed.input_ids[len(prompt) :].tolist() == own.input_ids[target.start :].tolist()
    assert mixed.labels.tolist() == [-100] * len(prompt) + own.labels[target.start :].tolist()
    assert [(span.name, span.start, span.stop) for span in mixed.spans] == [
        (span.name, span.start, span.stop) for span in parse_sequence(SPACE, mixed.input_ids).spans
    ]


def test_the_empty_prompt_is_the_one_that_generation_knows() -> None:
    own = build_sequence(SPACE, "t2i", tiny_record(3, SPACE).ids)
    empty = own.with_source(np.empty(0, np.int32))
    prompt = unconditional_prompt(SPACE, "t2i")
    assert empty.input_ids[: len(prompt)].tolist() == prompt.tolist()
    assert (empty.labels != -100).sum() == own.num_label_tokens


def test_conditions_equal_those_done_by_hand() -> None:
    """Sample by sample through `forward`: own prompt, none, and that of another record."""
    model = grow(make_base())
    records = [
        (record.id, record.ids) for record in (tiny_record(number, SPACE) for number in range(1, 9) if number % 5)
    ]
    report = run_prompt_ablation(model, SPACE, "t2i", records, EvalConfig(bootstrap_samples=50, batch_size=3))
    end = [SPACE.special("<|img_end|>")]

    def loss(prompt: np.ndarray, target: np.ndarray) -> float:
        ids = torch.tensor([[*prompt.tolist(), *target.tolist(), *end]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            return float(model(input_ids=ids, labels=labels).loss) * (len(target) + 1)

    for row, (_, ids) in enumerate(records):
        target = np.asarray(ids["image"])
        others = [
            loss(prompt_ids(SPACE, "t2i", theirs), target)
            for number, (_, theirs) in enumerate(records)
            if number != row
        ]
        assert report.loss_sums["correct"][row] == pytest.approx(loss(prompt_ids(SPACE, "t2i", ids), target), rel=1e-5)
        assert report.loss_sums["empty"][row] == pytest.approx(
            loss(unconditional_prompt(SPACE, "t2i"), target), rel=1e-5
        )
        assert min(abs(report.loss_sums["shuffled"][row] - other) for other in others) < 1e-3
    assert report.token_counts.tolist() == [7] * len(records)


def test_a_model_that_follows_its_prompt_passes() -> None:
    model = Reader(0.2, "t2i")
    report = run_prompt_ablation(model, SPACE, "t2i", told_records(300), CONFIG)
    assert report.samples == 256
    assert report.passed, report.failures()
    assert report.order == {"correct < shuffled": True, "correct < empty": True}
    assert [gate["name"] for gate in report.gates()] == [
        "t2i: prompt shuffled - correct",
        "t2i: prompt empty - correct",
    ]
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()
    assert report.losses["correct"].value == 1.0
    own, given = model.seen[:256], model.seen[256:512]
    words = [[int(ids[1]) for ids in part] for part in (own, given)]
    assert Counter(words[0]) == Counter(words[1]), "every prompt is used once"


def test_a_model_that_does_not_fails_with_a_sentence() -> None:
    report = run_prompt_ablation(Reader(0.0, "t2i"), SPACE, "t2i", told_records(256), CONFIG)
    assert "interval of the gap reaches down to 0.0000" in report.failures()[0]
    assert len(report.failures()) == 2


def test_equal_prompts_are_kept_apart_and_counted_where_they_can_not() -> None:
    records = told_records(40)
    for number, (_, ids) in enumerate(records):
        ids["text"] = np.array([number % 4])
    assert run_prompt_ablation(Reader(1.0, "t2i"), SPACE, "t2i", records, CONFIG).same_prompt == 0
    for _, ids in records[:30]:
        ids["text"] = np.array([7])
    assert run_prompt_ablation(Reader(1.0, "t2i"), SPACE, "t2i", records, CONFIG).same_prompt == 20

"""Whether a token LM reads its source: conditions that stay valid, losses as if graded one by one, gates that tell."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_vlm.config import EvalConfig
from qwen3_vlm.errors import DataError, TokenError
from qwen3_vlm.evaluate.token_ablation import CONDITIONS, replaced_ids, run_token_ablation
from qwen3_vlm.evaluate.token_losses import sequence_losses, source_ids
from qwen3_vlm.tokenization.sequences import build_sequence, parse_sequence
from tests.data.tiny_shards import tiny_record
from tests.evaluate.token_stubs import SPACE, Reader, told_records
from tests.models.grown import grow, make_base

CONFIG = EvalConfig(bootstrap_samples=200)
AUDIO = SPACE.audio_to_global(
    np.stack([np.random.default_rng(k).integers(0, size, 40) for k, size in enumerate((4, 5, 6))])
)
IMAGE = SPACE.image_to_global(np.arange(6).reshape(2, 3))


@pytest.mark.parametrize("task", ["i2t", "a2t", "t2i", "copy_audio", "denoise_image"])
def test_every_condition_is_a_valid_sequence_with_the_same_answer(task: str) -> None:
    record = tiny_record(3, SPACE)
    own = build_sequence(SPACE, task, record.ids, noise_key="k")
    source = parse_sequence(SPACE, own.input_ids).source
    for condition in CONDITIONS[source]:
        ids = replaced_ids(SPACE, source, source_ids(own), condition, "0", record.id)
        parsed = parse_sequence(SPACE, own.with_source(ids).input_ids)
        assert parsed.source_ids.tolist() == ids.tolist()
        assert parsed.target_ids.tolist() == record.ids[parsed.target].tolist()
        assert (condition == "correct") <= (ids.tolist() == source_ids(own).tolist())


def test_shuffled_has_the_same_ids_in_another_order() -> None:
    shuffled = replaced_ids(SPACE, "image", IMAGE, "shuffled", "0", "a")
    assert Counter(shuffled.tolist()) == Counter(IMAGE.tolist())
    assert shuffled.tolist() != IMAGE.tolist()
    frames = [tuple(frame) for frame in AUDIO.reshape(-1, 3).tolist()]
    moved = [
        tuple(frame) for frame in replaced_ids(SPACE, "audio", AUDIO, "shuffled", "0", "a").reshape(-1, 3).tolist()
    ]
    assert Counter(moved) == Counter(frames), "whole frames are moved"
    assert moved != frames


def test_scattered_moves_the_ids_of_each_codebook_on_their_own() -> None:
    scattered = replaced_ids(SPACE, "audio", AUDIO, "scattered", "0", "a").reshape(-1, 3)
    for codebook in range(3):
        assert Counter(scattered[:, codebook].tolist()) == Counter(AUDIO.reshape(-1, 3)[:, codebook].tolist())
    assert Counter(map(tuple, scattered.tolist())) != Counter(map(tuple, AUDIO.reshape(-1, 3).tolist()))


def test_noise_is_uniform_over_the_range_of_each_codebook() -> None:
    silence = SPACE.audio_to_global(np.zeros((3, 6000), dtype=np.int64))
    codes = SPACE.audio_from_global(replaced_ids(SPACE, "audio", silence, "noise", "0", "a"))
    for codebook, size in enumerate((4, 5, 6)):
        counts = np.bincount(codes[codebook], minlength=size)
        assert len(counts) == size
        assert abs(counts / 6000 - 1 / size).max() < 0.03
    words = replaced_ids(SPACE, "text", np.zeros(6000, np.int32), "noise", "0", "a")
    assert 0 <= words.min() < 10
    assert words.max() < SPACE.text.tokenizer_size, "padding rows of the base are no text"


def test_constant_is_one_id_per_codebook_for_the_whole_set() -> None:
    first, second = (replaced_ids(SPACE, "audio", AUDIO, "constant", "0", name) for name in "ab")
    assert first.tolist() == second.tolist()
    assert {len(set(first.reshape(-1, 3)[:, codebook])) for codebook in range(3)} == {1}
    others = {tuple(replaced_ids(SPACE, "audio", AUDIO, "constant", str(seed), "a")[:3]) for seed in range(20)}
    assert len(others) > 5, "which one is drawn from the seed"


def test_a_sample_is_replaced_the_same_wherever_it_stands() -> None:
    for condition in ("shuffled", "noise"):
        same = [replaced_ids(SPACE, "image", IMAGE, condition, "0", "a").tolist() for _ in range(2)]
        assert same[0] == same[1]
        assert same[0] != replaced_ids(SPACE, "image", IMAGE, condition, "1", "a").tolist()
    assert (
        replaced_ids(SPACE, "image", IMAGE, "noise", "0", "a").tolist()
        != replaced_ids(SPACE, "image", IMAGE, "noise", "0", "b").tolist()
    )


def test_losses_are_those_of_forward_one_by_one() -> None:
    """Independent of the batch: each sequence alone, through `forward` and its mean loss."""
    model = grow(make_base()).train()
    made = [build_sequence(SPACE, "i2t", tiny_record(number, SPACE).ids) for number in (1, 4, 2, 3, 8)]
    sums, counts = sequence_losses(model, SPACE, made, batch_size=2)
    assert model.training, "the mode is put back"
    model.eval()
    for number, sequence in enumerate(made):
        inputs = {
            "input_ids": torch.tensor(sequence.input_ids)[None].long(),
            "labels": torch.tensor(sequence.labels)[None].long(),
        }
        with torch.no_grad():
            loss = float(model(**inputs).loss)
        assert counts[number] == sequence.num_label_tokens
        assert sums[number] == pytest.approx(loss * counts[number], rel=1e-5)


def test_correct_does_not_depend_on_the_batch_size_or_the_order() -> None:
    model = grow(make_base())
    records = [(record.id, record.ids) for record in (tiny_record(number, SPACE) for number in range(30))]
    one, other = (
        run_token_ablation(model, SPACE, "i2t", given, EvalConfig(bootstrap_samples=50, batch_size=size), seed=4)
        for given, size in ((records, 1), (records[::-1], 7))
    )
    places = [other.sample_ids.index(name) for name in one.sample_ids]
    for condition, sums in one.loss_sums.items():
        np.testing.assert_allclose(other.loss_sums[condition][places], sums, rtol=1e-4)
    assert one.dropped == {"empty_text": 6}


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_a_model_that_reads_passes(modality: str) -> None:
    task = "i2t" if modality == "image" else "a2t"
    report = run_token_ablation(Reader(0.5, task), SPACE, task, told_records(300, modality), CONFIG)
    assert report.samples == 256
    assert report.passed, report.failures()
    assert [gate["name"] for gate in report.gates()] == [f"{task}: shuffled - correct", f"{task}: noise - correct"]
    assert report.losses["correct"].value == 1.0
    assert all(report.order.values()) or report.order["correct < shuffled"]
    gate = report.gates()[1]
    difference = report.loss_sums["noise"] - report.loss_sums["correct"]
    assert gate["value"] == pytest.approx(difference.sum() / report.token_counts.sum())
    assert (gate["win_rate"], gate["min_win_rate"], gate["threshold"]) == (np.mean(difference > 0), 0.85, 0.15)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()
    assert all(isinstance(value, (int, float)) for value in report.summary().values())


def test_a_blind_model_fails_with_a_sentence() -> None:
    report = run_token_ablation(Reader(0.0, "i2t"), SPACE, "i2t", told_records(256), CONFIG)
    assert not report.passed
    assert report.failures()[0] == "Gate i2t: shuffled: The gap is 0.0000 nats per token; 0.1 is needed."


def test_a_gap_that_few_samples_make_fails_by_its_win_rate() -> None:
    """Half of the set is told wrongly, so its own picture is worth nothing there; the other half makes the gap."""
    records = told_records(256)
    for name, ids in records[::2]:
        assert name
        ids["text"] = (ids["text"] + 1) % 300
    report = run_token_ablation(Reader(5.0, "i2t"), SPACE, "i2t", records, CONFIG)
    assert report.gaps["noise"].interval.low > 0.15
    assert "% of the samples do better with their own; 85 % are needed." in report.gaps["noise"].reason


def test_what_another_order_leaves_as_it_is_is_counted() -> None:
    records = told_records(10)
    for _, ids in records[:4]:
        ids["image"] = SPACE.image_to_global(np.full((2, 3), 7))
    report = run_token_ablation(Reader(1.0, "i2t"), SPACE, "i2t", records, CONFIG)
    assert report.unchanged == 4
    assert report.to_dict()["unchanged"] == 4
    assert "10 samples were graded; a gate needs 256." in report.failures()[0]


def test_what_can_not_be_measured_is_said() -> None:
    records: list[tuple[str, Any]] = [("a", {"text": np.array([1])}), ("b", {"text": np.array([1])})]
    with pytest.raises(DataError, match=r"at least two samples; 0 can be made .* \(missing_image: 2\)"):
        run_token_ablation(Reader(1.0, "i2t"), SPACE, "i2t", records, CONFIG)
    with pytest.raises(TokenError, match="There is no task 'x2y'"):
        run_token_ablation(Reader(1.0, "i2t"), SPACE, "x2y", records, CONFIG)
    long = told_records(4)
    with pytest.raises(DataError, match="too_long: 4"):
        run_token_ablation(Reader(1.0, "i2t"), SPACE, "i2t", long, CONFIG, max_len=8)

"""Batches by hand: positions, labels, masks, pictures in order, bad records listed, any number of workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.masking_utils import find_packed_sequence_indices

from qwen3_vlm.data.captions import Records, open_records
from qwen3_vlm.data.collate import Batch, Collator
from qwen3_vlm.data.encode import IGNORED, SampleEncoder
from qwen3_vlm.data.loader import batch_loader
from qwen3_vlm.data.plan import MicroBatch
from tests.data.helpers import (
    END_TOKEN_ID,
    IMAGE_TOKEN_ID,
    ROLE_TOKEN_IDS,
    WordProcessor,
    conversation,
    png,
    word_id,
    write_json,
)

USER, ASSISTANT, END = ROLE_TOKEN_IDS["user"], ROLE_TOKEN_IDS["assistant"], END_TOKEN_ID
Q, A, B, C = (word_id(word) for word in ("q", "a", "b", "c"))
I = IMAGE_TOKEN_ID  # noqa: E741
_ = IGNORED


@pytest.fixture
def records(tmp_path: Path) -> Records:
    trees = [
        {"id": "zero", "conversations": conversation("q", "a")},
        {"id": "one", "image": "red.png", "conversations": conversation("<image> q", "b")},
        {"id": "two", "image": ["blue.png", "red.png"], "conversations": conversation("<image> <image>", "c")},
        {"id": "three", "image": "gone.png", "conversations": conversation("<image> q", "c")},
        {"id": "four", "conversations": conversation("q", "")},
    ]
    (tmp_path / "red.png").write_bytes(png((200, 0, 0)))
    (tmp_path / "blue.png").write_bytes(png((0, 0, 100)))
    return open_records([str(write_json(tmp_path / "a.json", trees))])


def collate(records: Records, *batches: MicroBatch, packing: bool, num_workers: int = 0) -> list[Batch]:
    processor = WordProcessor(num_image_tokens=2)
    collator = Collator(processor, packing=packing, max_image_pixels=10_000)
    return list(batch_loader(records, SampleEncoder(processor, 50), collator, batches, num_workers))


def test_packed_batch_by_hand(records: Records) -> None:
    (batch,) = collate(records, ((0, 1), (2,)), packing=True)
    assert {name: value.tolist() for name, value in batch.inputs.items() if name != "pixel_values"} == {
        "input_ids": [
            [USER, Q, END, ASSISTANT, A, END, USER, I, I, Q, END, ASSISTANT, B, END],
            [USER, I, I, I, I, END, ASSISTANT, C, END, 0, 0, 0, 0, 0],
        ],
        "position_ids": [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4]],
        "labels": [[_, _, _, _, A, END, _, _, _, _, _, _, B, END], [_, _, _, _, _, _, _, C, END, _, _, _, _, _]],
    }
    colours = batch.inputs["pixel_values"].flatten(1).tolist()
    assert colours == [[200, 0, 0], [0, 0, 100], [200, 0, 0]]  # row 0, then row 1 in the order of its placeholders
    assert batch.sample_ids == ("zero", "one", "two")
    assert batch.sample_indices == (0, 1, 2)
    assert batch.spans == ((0, 0, 6), (0, 6, 14), (1, 0, 9))
    assert batch.image_counts == (0, 1, 2)
    assert batch.answer_lengths == (1, 1, 1)
    assert batch.num_label_tokens == 6
    assert batch.num_tokens == 23
    assert batch.skipped == []


def test_padded_batch_by_hand(records: Records) -> None:
    (batch,) = collate(records, ((0,), (1,)), packing=False)
    assert {name: value.tolist() for name, value in batch.inputs.items() if name != "pixel_values"} == {
        "input_ids": [[USER, Q, END, ASSISTANT, A, END, 0, 0], [USER, I, I, Q, END, ASSISTANT, B, END]],
        "position_ids": [[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]],
        "labels": [[_, _, _, _, A, END, _, _], [_, _, _, _, _, _, B, END]],
        "attention_mask": [[1, 1, 1, 1, 1, 1, 0, 0], [1] * 8],
    }


def test_transformers_sees_the_segments(records: Records) -> None:
    (batch,) = collate(records, ((0, 1), (2,)), packing=True)
    segments = find_packed_sequence_indices(batch.inputs["position_ids"])
    assert segments is not None
    assert segments.tolist() == [[0] * 6 + [1] * 8, [0] * 9 + [1] * 5]


def test_a_sample_never_predicts_the_next_ones_first_token(records: Records) -> None:
    processor = WordProcessor()
    everything = processor.encode_conversation
    processor.encode_conversation = lambda messages: (everything(messages)[0], [1] * 6)  # type: ignore[method-assign]
    collator = Collator(processor, packing=True, max_image_pixels=100)
    (batch,) = batch_loader(records, SampleEncoder(processor, 50), collator, [((0, 0),)])
    assert batch.inputs["labels"][0, [0, 6]].tolist() == [IGNORED, IGNORED]
    assert batch.num_label_tokens == 10


def test_text_only_batches_have_no_pictures(records: Records) -> None:
    for packing in (True, False):
        (batch,) = collate(records, ((0,), (0,)), packing=packing)
        assert "pixel_values" not in batch.inputs


def test_bad_records_are_left_out_and_listed(records: Records) -> None:
    batch, bad = collate(records, ((3, 0), (4,)), ((4, 3),), packing=True)
    assert batch.sample_ids == ("zero",)
    assert batch.inputs["input_ids"].shape == (1, 6)
    assert [(skipped.index, skipped.id, skipped.reason) for skipped in batch.skipped] == [
        (3, "three", "missing_image"),
        (4, "", "no_labels"),
    ]
    assert batch.skipped[0].origin.endswith("a.json[3]")
    assert batch.skipped[0].message.endswith("gone.png does not exist.")
    assert bad.inputs == {}  # still a micro-batch, so that all ranks count alike
    assert bad.sample_ids == ()
    assert bad.num_label_tokens == 0
    assert len(bad.skipped) == 2


def test_pictures_over_the_limit_are_skipped(records: Records) -> None:
    collator = Collator(WordProcessor(), packing=True, max_image_pixels=47)
    (batch,) = batch_loader(records, SampleEncoder(WordProcessor(), 50), collator, [((0, 1),)])
    assert [skipped.reason for skipped in batch.skipped] == ["image_too_large"]


@pytest.mark.parametrize("packing", [True, False])
def test_workers_change_nothing(records: Records, packing: bool) -> None:
    batches: list[MicroBatch] = [((0,), (1,)), ((3,), (2,)), ((4,), (3,)), ((1,), (2,)), ((0,),)]
    plain = collate(records, *batches, packing=packing)
    for workers in (1, 2):
        for one, other in zip(plain, collate(records, *batches, packing=packing, num_workers=workers), strict=True):
            assert one.inputs.keys() == other.inputs.keys()
            assert all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)
            assert one.spans == other.spans
            assert one.skipped == other.skipped


def test_the_rest_of_a_plan_gives_the_rest_of_the_batches(records: Records) -> None:
    batches: list[MicroBatch] = [((0, 1),), ((2,),), ((1, 0),)]
    whole = collate(records, *batches, packing=True)
    rest = collate(records, *batches[1:], packing=True)
    assert [batch.sample_ids for batch in rest] == [batch.sample_ids for batch in whole[1:]]


def test_loading_leaves_torch_random_numbers_alone(records: Records) -> None:
    state = torch.get_rng_state()
    for workers in (0, 1):
        collate(records, ((0,),), ((1,),), packing=True, num_workers=workers)
    assert torch.equal(state, torch.get_rng_state())


def test_batches_move_to_a_device(records: Records) -> None:
    (batch,) = collate(records, ((0, 1),), packing=True)
    moved = batch.to("meta")
    assert {value.device.type for value in moved.inputs.values()} == {"meta"}
    assert moved.sample_ids == batch.sample_ids


def test_packed_loss_is_the_unpacked_loss(tiny_vlm: tuple[Any, Any], tmp_path: Path) -> None:
    """Through the real model and processor: each sample's loss is what it is alone in a padded batch."""
    model, processor = tiny_vlm
    texts = ["a red heart", "two big apples above a green tree", "dog", "a small dog on a white background"]
    trees = [
        {"id": text, "image": f"{number}.png", "conversations": conversation("what is it? <image>", text)}
        for number, text in enumerate(texts)
    ]
    trees[2] = {"id": "dog", "conversations": conversation("say dog", "dog")}
    for number in range(len(texts)):
        (tmp_path / f"{number}.png").write_bytes(png((60 * number, 20, 200 - 60 * number), (16, 16)))
    records = open_records([str(write_json(tmp_path / "a.json", trees))])
    encoder = SampleEncoder(processor, 200)

    def losses(packing: bool, batches: list[MicroBatch]) -> dict[str, float]:
        collator = Collator(processor, packing=packing, max_image_pixels=10_000)
        found: dict[str, float] = {}
        for batch in batch_loader(records, encoder, collator, batches):
            inputs = dict(batch.inputs)
            with torch.no_grad():
                tokens = model.token_losses(**inputs)
            for name, (row, start, stop) in zip(batch.sample_ids, batch.spans, strict=True):
                mine = (tokens.row == row) & (tokens.position >= start) & (tokens.position < stop)
                found[name] = float(tokens.loss[mine].sum())
        return found

    packed = losses(True, [((0, 1, 2), (3,))])
    padded = losses(False, [((0,), (1,), (2,), (3,))])
    assert packed.keys() == padded.keys() == set(texts)
    np.testing.assert_allclose([packed[text] for text in texts], [padded[text] for text in texts], rtol=1e-5)

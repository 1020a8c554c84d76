"""Texts beside token tasks: their ids, what can't be used, their share of every step, their place in a batch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen3_vlm.data.loader import ordered_loader
from qwen3_vlm.data.shards import open_shards
from qwen3_vlm.data.task_mixture import TaskMixture, TaskSample, TaskShare
from qwen3_vlm.data.texts import Texts
from qwen3_vlm.data.token_batches import TASK_NUMBERS, TokenBatches, TokenCollator, TokenRecords, cut_micro_batches
from qwen3_vlm.errors import DataError, RecordError
from tests.data.tiny_shards import tiny_space, write_tiny

SPACE = tiny_space()


def letters(text: str) -> list[int]:
    return [ord(letter) - 96 for letter in text]


def write(path: Path, *records: object) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def test_ids_cut_at_the_end_and_what_can_not_be_used(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "abc"}, {"words": "abc"}, {"text": "a"}, ["abc"], {"text": "abcdefg"})
    texts = Texts([path], letters, 5)
    assert texts.lengths.tolist() == [3, 0, 0, 0, 5]
    assert texts.usable.tolist() == [0, 4]
    assert [texts[index].tolist() for index in (0, 4)] == [[1, 2, 3], [1, 2, 3, 4, 5]]
    assert [(bad.index, bad.reason) for bad in texts.unusable] == [
        (1, "bad_record"),
        (2, "no_labels"),
        (3, "bad_record"),
    ]
    assert texts.unusable[0].message == f'{path}:2 has no "text".'
    with pytest.raises(RecordError, match="fewer than two tokens"):
        texts[2]
    with pytest.raises(DataError, match="no text of two tokens"):
        Texts([write(tmp_path / "b.jsonl", {"text": "a"})], letters, 5)
    (tmp_path / "c.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"files of texts end in \.json"):
        Texts([str(tmp_path / "c.tar")], letters, 5)


def test_the_content_is_the_identity(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{name}.jsonl", {"text": text}) for name, text in (("a", "abc"), ("b", "abd"), ("c", "abc"))
    ]
    prints = [Texts([path], letters, 5).fingerprint for path in paths]
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_is_met_at_every_step_whatever_ramps_do(share: float) -> None:
    tasks = {
        "i2t": TaskShare(np.arange(9)),
        "t2i": TaskShare(np.arange(9), 3.0, 0.2, 0.8),
        "text": TaskShare(np.arange(5), fixed=share),
    }
    mixture = TaskMixture(tasks, samples=8, seed=0, steps=30)
    found = np.cumsum([mixture.counts(step)["text"] for step in range(30)])
    wanted = share * 8 * np.arange(1, 31)
    assert np.abs(found - wanted).max() <= 1
    assert all(sum(mixture.counts(step).values()) == 8 for step in range(30))
    epoch = TaskMixture(tasks, samples=8, seed=0)
    drawn = [sample.task for step in range(epoch.steps) for sample in epoch.step(step)]
    assert 18 <= len(drawn) - drawn.count("text") <= 18 + 8


@pytest.mark.parametrize("workers", [0, 1])
def test_texts_in_a_batch(tmp_path: Path, workers: int) -> None:
    records = TokenRecords([open_shards(write_tiny(tmp_path / "shards", SPACE, 12))])
    texts = Texts([write(tmp_path / "a.jsonl", {"text": "abcd"}, {"text": "ab"})], letters, 9)
    picture = next(index for index in range(12) if (records.lengths[index] > 0).all())
    samples = [TaskSample("i2t", picture, 0), TaskSample("text", 0, 0), TaskSample("text", 1, 1)]
    batches = cut_micro_batches(records, samples, 8, texts)
    assert [sample.task for sample in batches[0]] == ["text", "text", "i2t"]
    for marked in (False, True):
        collator = TokenCollator(SPACE, mark_text=marked)
        (batch,) = ordered_loader(TokenBatches(records, SPACE, collator, batches, texts=texts), workers)
        inputs = batch.inputs
        assert inputs["input_ids"][0, :2].tolist() == [1, 2]
        assert inputs["labels"][0, :2].tolist() == [-100, 2]
        assert inputs["labels"][1, :4].tolist() == [-100, 2, 3, 4]
        assert (inputs["labels"][1, 4:] == -100).all()
        assert inputs["task_ids"][:, 0].tolist() == [TASK_NUMBERS["text"]] * 2 + [TASK_NUMBERS["i2t"]]
        assert batch.num_media == 1
        assert batch.num_text_predictions == (4 if marked else 0)
        assert ("text_mask" in inputs) == marked
    lengths = torch.tensor([2, 4, 0])[:, None]
    assert inputs["text_mask"].equal((torch.arange(inputs["input_ids"].shape[1]) < lengths).long())

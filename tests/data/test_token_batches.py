"""From tokenized records to batches of task sequences, against sequences built one by one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_vlm.data.loader import ordered_loader
from qwen3_vlm.data.shards import open_shards
from qwen3_vlm.data.task_mixture import TaskSample
from qwen3_vlm.data.token_batches import TASK_NUMBERS, TokenBatches, TokenCollator, TokenRecords, cut_micro_batches
from qwen3_vlm.errors import RecordError
from qwen3_vlm.tokenization.sequences import SEQUENCES, DropCounter, build_sequence, unconditional_prompt
from tests.data.tiny_shards import tiny_space, write_tiny

SPACE = tiny_space()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    return [write_tiny(folder / "one", SPACE, 40), write_tiny(folder / "two", SPACE, 25)]


@pytest.fixture
def records(folders: list[Path]) -> TokenRecords:
    return TokenRecords([open_shards(folder) for folder in folders])


def test_one_numbering_over_all_folders(folders: list[Path], records: TokenRecords) -> None:
    parts = [open_shards(folder) for folder in folders]
    expected = [record.id for part in parts for record in part]
    assert [records[index].id for index in range(len(records))] == expected
    assert len({records.origin(index) for index in range(len(records))}) == len(expected)


@pytest.mark.parametrize("task", SEQUENCES)
def test_usable_is_what_can_be_built(records: TokenRecords, task: str) -> None:
    """Lengths from the index agree with building every sequence; what is left out is counted by reason."""
    drops, limit = DropCounter(), 13
    usable = set(records.usable(task, limit, drops).tolist())
    expected: dict[str, int] = {}
    for index in range(len(records)):
        try:
            sequence = build_sequence(SPACE, task, records[index].ids)
            assert records.sample_length(TaskSample(task, index, 0)) == len(sequence)
            reason = "too_long" if len(sequence) > limit else ""
        except Exception:
            reason = "missing"
        assert (index in usable) == (not reason)
        if reason:
            expected[reason] = expected.get(reason, 0) + 1
    counted = drops.to_dict().get(task, {})
    assert counted.get("too_long", 0) == expected.get("too_long", 0)
    assert sum(count for name, count in counted.items() if name != "too_long") == expected.get("missing", 0)


def test_a_task_may_have_its_own_folders(folders: list[Path], records: TokenRecords) -> None:
    """Records of the others are neither used nor counted as left out."""
    alone, drops, expected = TokenRecords([open_shards(folders[1])]), DropCounter(), DropCounter()
    usable = records.usable("t2i", 13, drops, [str(folders[1])])
    np.testing.assert_array_equal(usable, len(open_shards(folders[0])) + alone.usable("t2i", 13, expected))
    assert drops.to_dict() == expected.to_dict() != {}
    both = records.usable("t2i", 13, DropCounter(), folders)
    np.testing.assert_array_equal(both, records.usable("t2i", 13, DropCounter()))


def samples(records: TokenRecords) -> list[TaskSample]:
    drops = DropCounter()
    found = []
    for task in ("i2t", "t2a", "denoise_image"):
        found += [TaskSample(task, int(index), draw) for draw, index in enumerate(records.usable(task, 99, drops)[:9])]
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_sequences_padded(records: TokenRecords, workers: int) -> None:
    batches = cut_micro_batches(records, samples(records), 4)
    assert sorted(sample for batch in batches for sample in batch) == sorted(samples(records))
    dataset = TokenBatches(records, SPACE, TokenCollator(SPACE, {"t2a": 0.5}), batches, noise_seed=5)
    for batch, chosen in zip(ordered_loader(dataset, workers), batches, strict=True):
        inputs = batch.inputs
        for row, sample in enumerate(chosen):
            record = records[sample.record]
            alone = build_sequence(SPACE, sample.task, record.ids, noise_key=f"5/{sample.draw}/{record.id}")
            size = len(alone)
            assert inputs["input_ids"][row, :size].tolist() == alone.input_ids.tolist()
            assert inputs["labels"][row, :size].tolist() == alone.labels.tolist()
            assert inputs["attention_mask"][row].tolist() == [1] * size + [0] * (inputs["labels"].shape[1] - size)
            assert (inputs["labels"][row, size:] == -100).all()
            assert (inputs["input_ids"][row, size:] == SPACE.special("<|pad_mm|>")).all()
            assert (inputs["task_ids"][row] == TASK_NUMBERS[sample.task]).all()
            assert batch.sample_ids[row] == record.id
        assert batch.num_label_tokens == int((inputs["labels"] != -100).sum())
        assert batch.num_tokens == int(inputs["attention_mask"].sum())
        assert inputs["task_weights"][TASK_NUMBERS["t2a"]] == 0.5
        assert torch.all(inputs["task_weights"] > 0)


def test_lengths_within_a_step_grow(records: TokenRecords) -> None:
    lengths = [
        [records.sample_length(sample) for sample in batch] for batch in cut_micro_batches(records, samples(records), 4)
    ]
    flat = np.concatenate(lengths)
    assert (np.diff(flat) >= 0).all()


def test_a_damaged_record_is_listed_and_the_others_stay(records: TokenRecords) -> None:
    chosen = samples(records)[:3]

    class Damaged:
        def __getitem__(self, index: Any) -> Any:
            if index == chosen[1].record:
                raise RecordError("It is torn.", "torn")
            return records[index]

        def __getattr__(self, name: str) -> Any:
            return getattr(records, name)

    damaged: Any = Damaged()
    batch = TokenBatches(damaged, SPACE, TokenCollator(SPACE), [chosen])[0]
    assert len(batch.sample_ids) == 2
    assert [(skipped.reason, skipped.index) for skipped in batch.skipped] == [("torn", chosen[1].record)]
    alone = TokenBatches(damaged, SPACE, TokenCollator(SPACE), [chosen[1:2]])[0]
    assert alone.inputs == {}
    assert alone.num_label_tokens == 0


def test_dropped_sources_leave_the_unconditional_prompt(records: TokenRecords) -> None:
    """Which samples lose theirs follows from seed and draw; about as many as asked for; targets and labels stay."""
    chosen = [TaskSample("t2i", int(records.usable("t2i", 99, DropCounter())[0]), draw) for draw in range(400)]
    options: Any = {"noise_seed": 1, "source_dropout": {"t2i": 0.25}}
    dataset = TokenBatches(records, SPACE, TokenCollator(SPACE), [chosen], **options)
    inputs = dataset[0].inputs
    lengths = inputs["attention_mask"].sum(dim=1)
    dropped = lengths == lengths.min()
    assert 70 <= int(dropped.sum()) <= 130
    row = int(dropped.nonzero()[0])
    whole = build_sequence(SPACE, "t2i", records[chosen[0].record].ids)
    prompt = unconditional_prompt(SPACE, "t2i")
    size = int(lengths[row])
    assert inputs["input_ids"][row, : len(prompt)].tolist() == prompt.tolist()
    assert inputs["labels"][row, len(prompt) : size].tolist() == [label for label in whole.labels if label != -100]
    assert (inputs["labels"][row, : len(prompt)] == -100).all()
    again = TokenBatches(
        records, SPACE, TokenCollator(SPACE), [chosen[200:]], noise_seed=1, source_dropout={"t2i": 0.25}
    )
    assert torch.equal(again[0].inputs["attention_mask"].sum(dim=1), lengths[200:])

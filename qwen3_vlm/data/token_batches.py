"""From tokenized records to batches of task sequences: what a token LM trains on and is graded with.

    Shards → TokenRecords (one numbering over all folders) → build_sequence → rows, padded → Batch

Which tasks a record can serve, and whether it fits, follows from the shards' indices alone; what is left out is
counted by task and reason. Rows are padded on the right; sequences of a step are sorted by length before they are
cut into micro-batches, so little is padding.

Shapes: B rows, T tokens, K tasks.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from qwen3_vlm.data.collate import Batch
from qwen3_vlm.data.encode import SkippedRecord
from qwen3_vlm.data.shards import Shards, TokenizedRecord
from qwen3_vlm.data.task_mixture import TaskSample
from qwen3_vlm.data.texts import Texts
from qwen3_vlm.errors import RecordError, TokenError
from qwen3_vlm.tokenization.sequences import (
    GRADED,
    IGNORED,
    TEXT,
    DropCounter,
    TokenSequence,
    build_sequence,
    sequence_format,
    sequence_lengths,
)
from qwen3_vlm.tokenization.token_space import MODALITIES, TokenSpace

NOTHING = np.empty(0, dtype=np.int32)
TASK_NUMBERS = {task: number for number, task in enumerate(GRADED)}


class TokenRecords(Sequence[TokenizedRecord]):
    """The records of one split of several data sets, under one numbering."""

    def __init__(self, parts: Sequence[Shards]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)
        self.lengths: npt.NDArray[np.int64] = np.concatenate(
            [np.empty((0, len(MODALITIES)), dtype=np.int64), *(part.lengths for part in self.parts)]
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        """Record `index`, read and checked.

        Raises:
            RecordError: it is damaged.
        """
        part, row = self._locate(index)
        return part[row]

    def origin(self, index: int) -> str:
        """Where a record stands, for messages."""
        part, row = self._locate(index)
        return part.origin(row)

    @property
    def identity(self) -> list[dict[str, Any]]:
        """What tells these records from any other, as JSON."""
        return [part.identity for part in self.parts]

    def _locate(self, index: int) -> tuple[Shards, int]:
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[number], int(index) - (int(self.ends[number - 1]) if number else 0)

    def usable(
        self, task: str, max_seq_len: int, drops: DropCounter, folders: Collection[str | Path] = ()
    ) -> npt.NDArray[np.int64]:
        """The records that can be examples of a task; the others are counted in `drops`.

        Args:
            folders: the data sets whose records may; empty: all. Records of others are not counted.
        """
        wanted, offered = sequence_format(task), self._records_of(folders)
        lengths = sequence_lengths(task, self.lengths[offered])
        for modality in dict.fromkeys((wanted.source, wanted.target)):
            missing = int((self.lengths[offered, MODALITIES.index(modality)] == 0).sum())
            if missing:
                drops.add(task, f"no_{modality}", missing)
        too_long = int((lengths > max_seq_len).sum())
        if too_long:
            drops.add(task, "too_long", too_long)
        return offered[(lengths > 0) & (lengths <= max_seq_len)]

    def _records_of(self, folders: Collection[str | Path]) -> npt.NDArray[np.int64]:
        """The numbers of the records of some data sets, or of all."""
        chosen = [not folders or part.folder in map(Path, folders) for part in self.parts]
        return np.flatnonzero(np.repeat(chosen, [len(part) for part in self.parts]))

    def sample_length(self, sample: TaskSample) -> int:
        """Ids of a sample's sequence."""
        return int(sequence_lengths(sample.task, self.lengths[sample.record : sample.record + 1])[0])


def cut_micro_batches(
    records: TokenRecords, samples: Sequence[TaskSample], batch_size: int, texts: Texts | None = None
) -> list[tuple[TaskSample, ...]]:
    """A step's samples in micro-batches of like length."""

    def length(sample: TaskSample) -> int:
        """Ids of its sequence."""
        alone = texts is not None and sample.task == TEXT
        return int(texts.lengths[sample.record]) if texts is not None and alone else records.sample_length(sample)

    ordered = sorted(samples, key=lambda sample: (length(sample), sample))
    return [tuple(ordered[start : start + batch_size]) for start in range(0, len(ordered), batch_size)]


class TokenCollator:
    """Sequences → one batch."""

    def __init__(
        self, token_space: TokenSpace, task_weights: Mapping[str, float] | None = None, *, mark_text: bool = False
    ) -> None:
        """Args:
        task_weights: what the losses of a task are multiplied with; None leaves them out.
        mark_text: put a `text_mask` beside the ids, 1 at those of texts by themselves, where there are any.
        """
        self.pad_id, self.mark_text = token_space.special("<|pad_mm|>"), mark_text
        self.weights = None
        if task_weights is not None:
            self.weights = torch.tensor([float(task_weights.get(task, 1.0)) for task in GRADED])

    def __call__(
        self,
        sequences: Sequence[TokenSequence],
        samples: Sequence[TaskSample],
        ids: Sequence[str],
        skipped: Sequence[SkippedRecord] = (),
    ) -> Batch:
        """One row per sequence; empty where every record was bad."""
        if not sequences:
            return Batch(inputs={}, skipped=list(skipped))
        shape = (len(sequences), max(map(len, sequences)))
        input_ids, labels = torch.full(shape, self.pad_id), torch.full(shape, IGNORED)
        mask, tasks = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            end = len(sequence)
            input_ids[row, :end] = torch.from_numpy(sequence.input_ids).long()
            labels[row, :end] = torch.from_numpy(sequence.labels).long()
            mask[row, :end] = 1
            tasks[row] = TASK_NUMBERS[sequence.task]
        inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "task_ids": tasks}
        if self.weights is not None:
            inputs["task_weights"] = self.weights
        texts = [sequence for sequence in sequences if self.mark_text and sequence.task == TEXT]
        if texts:
            inputs["text_mask"] = mask * (tasks == TASK_NUMBERS[TEXT])
        return Batch(
            inputs=inputs,
            sample_ids=tuple(ids),
            sample_indices=tuple(sample.record for sample in samples),
            spans=tuple((row, 0, len(sequence)) for row, sequence in enumerate(sequences)),
            answer_lengths=tuple(sequence.num_label_tokens for sequence in sequences),
            dropped_turns=(0,) * len(sequences),
            skipped=list(skipped),
            num_label_tokens=int((labels[self._teaches(tasks)] != IGNORED).sum()),
            num_tokens=sum(map(len, sequences)),
            num_media=sum(sequence.task != TEXT for sequence in sequences),  # every task has one, in or out
            num_text_predictions=sum(len(sequence) - 1 for sequence in texts),
        )

    def _teaches(self, tasks: Tensor) -> Tensor:
        """(B, T) → (B,): whose losses have a weight above 0; the others take no part in the mean."""
        rows = tasks[:, 0]
        return torch.ones_like(rows, dtype=torch.bool) if self.weights is None else self.weights[rows] > 0


class TokenBatches(Dataset[Batch]):
    """`dataset[i]` is micro-batch i; the same whatever process asks for it."""

    def __init__(
        self,
        records: TokenRecords,
        token_space: TokenSpace,
        collator: TokenCollator,
        batches: Sequence[Sequence[TaskSample]],
        *,
        max_seq_len: int | None = None,
        noise_seed: int = 0,
        source_dropout: Mapping[str, float] | None = None,
        texts: Texts | None = None,
    ) -> None:
        """Args:
        source_dropout: by task, the share of samples whose source is left out; which ones follows from the seed
            and the sample's draw.
        texts: what samples of the task "text" are.
        """
        self.texts = texts
        self.records, self.token_space, self.collator = records, token_space, collator
        self.batches, self.max_seq_len, self.noise_seed = batches, max_seq_len, noise_seed
        self.source_dropout = dict(source_dropout or {})

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        made, skipped = [], []
        for sample in self.batches[number]:
            if self.texts is not None and sample.task == TEXT:
                sequence = TokenSequence.of_text(self.texts[sample.record])
                made.append((sequence, sample, self.texts.origin(sample.record)))
                continue
            record = None
            try:
                record = self.records[sample.record]
                made.append((self._sequence(sample, record), sample, record.id))
            except (RecordError, TokenError) as error:
                origin = self.records.origin(sample.record)
                name = record.id if record else ""
                skipped.append(SkippedRecord(sample.record, name, origin, error.reason, str(error)))
        sequences, samples, ids = zip(*made, strict=True) if made else ((), (), ())
        return self.collator(sequences, samples, ids, skipped)

    def _sequence(self, sample: TaskSample, record: TokenizedRecord) -> TokenSequence:
        noise = f"{self.noise_seed}/{sample.draw}/{record.id}"
        sequence = build_sequence(self.token_space, sample.task, record.ids, max_len=self.max_seq_len, noise_key=noise)
        return sequence.with_source(NOTHING) if self._drops_source(sample) else sequence

    def _drops_source(self, sample: TaskSample) -> bool:
        rate = self.source_dropout.get(sample.task, 0.0)
        if not rate:
            return False
        key = hashlib.sha256(f"{self.noise_seed}/{sample.task}/{sample.draw}/source".encode()).digest()
        return int.from_bytes(key[:8], "big") < rate * 2**64

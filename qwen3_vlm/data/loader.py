"""Batches in a given order, read and decoded in worker processes.

The order is a list of micro-batches from `plan_epoch`: a resumed run hands in what is left of it, a rank its
share. A record that turns out bad is left out of its batch and listed there with the reason.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from qwen3_vlm.data.captions import Records
from qwen3_vlm.data.collate import Batch, Collator, LoadedSample, MicroBatch
from qwen3_vlm.data.encode import SampleEncoder, SkippedRecord
from qwen3_vlm.data.worker_pool import signals_to_parent
from qwen3_vlm.errors import RecordError


class BatchDataset(Dataset[Batch]):
    """`dataset[i]` is the collated micro-batch i; the same whatever process asks for it."""

    def __init__(
        self, records: Records, encoder: SampleEncoder, collator: Collator, batches: Sequence[MicroBatch]
    ) -> None:
        self.records, self.encoder, self.collator = records, encoder, collator
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        skipped: list[SkippedRecord] = []
        rows = [[self._load(index, skipped) for index in row] for row in self.batches[number]]
        return self.collator([[loaded for loaded in row if loaded] for row in rows], skipped)

    def _load(self, index: int, skipped: list[SkippedRecord]) -> LoadedSample | None:
        record = None
        try:
            record = self.records[index]
            return self.collator.load(index, self.encoder.encode(record))
        except RecordError as error:
            origin = record.origin if record else self.records.origin(index)
            skipped.append(SkippedRecord(index, record.id if record else "", origin, error.reason, str(error)))
            return None


def batch_loader(
    records: Records,
    encoder: SampleEncoder,
    collator: Collator,
    batches: Sequence[MicroBatch],
    num_workers: int = 0,
) -> DataLoader[Batch]:
    """A loader that yields one Batch per micro-batch, in the given order whatever `num_workers` is."""
    return ordered_loader(BatchDataset(records, encoder, collator, batches), num_workers)


def ordered_loader(dataset: Any, num_workers: int) -> DataLoader[Batch]:
    """The batches `dataset[0]`, `dataset[1]`, … in this order, made by worker processes."""
    workers = min(num_workers, len(dataset))
    generator = torch.Generator()  # its own: making an iterator draws from it, and a resumed run must not notice
    return _Loader(dataset, batch_size=None, collate_fn=_unchanged, num_workers=workers, generator=generator)


class _Loader(DataLoader[Batch]):
    """Its workers never see SIGTERM or SIGINT; they end when this process does, which torch watches over."""

    def __iter__(self) -> Any:
        with signals_to_parent():
            return super().__iter__()


def _unchanged(batch: Any) -> Any:
    return batch

"""From the data section of a config to training batches, evaluation batches and golden records."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3_vlm.config import DataConfig, RunConfig, TextConfig
from qwen3_vlm.data.captions import Records, expand_paths, open_records
from qwen3_vlm.data.collate import Batch, Collator
from qwen3_vlm.data.encode import LengthTable, SampleEncoder, SkippedRecord, lengths
from qwen3_vlm.data.features import FeatureCache
from qwen3_vlm.data.loader import batch_loader
from qwen3_vlm.data.plan import MicroBatch
from qwen3_vlm.data.records import ImageRef
from qwen3_vlm.data.shuffle import draw
from qwen3_vlm.data.splits import load_split, pick_stratified, save_split, split_table
from qwen3_vlm.errors import DataError
from qwen3_vlm.fingerprint import fingerprint_dataset
from qwen3_vlm.models.processing import Qwen3VLMProcessor


@dataclass(frozen=True, slots=True)
class Part:
    """One side of the split: records, their lengths, and which of them belong to it."""

    records: Records
    table: LengthTable
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def tokens(self) -> list[int]:
        """Token count of each sample, in the order of `indices`."""
        return [int(self.table.tokens[index]) for index in self.indices]

    def with_pictures(self) -> list[int]:
        """The indices whose samples have pictures."""
        return [index for index in self.indices if self.table.images[index]]

    def pick(self, indices: Sequence[int], count: int, seed: int) -> list[int]:
        """A deterministic stratified subset of `indices`."""
        answer_lengths = [int(number) for number in self.table.answer_tokens]
        return pick_stratified(indices, self.table.ids, answer_lengths, min(count, len(indices)), seed)


@dataclass(frozen=True, slots=True)
class TextMix:
    """Conversations without pictures, so many beside the records of each epoch that they are a share of both."""

    part: Part
    share: float
    first: int  # index of the first of them, behind the training records
    seed: int

    def epoch(self, number: int, samples: int) -> tuple[list[int], list[int]]:
        """Token counts and indices of the text samples that come with `samples` others in an epoch."""
        count = max(1, round(samples * self.share / (1 - self.share)))
        _, places = draw(len(self.part), f"{self.seed}/text", number * count, (number + 1) * count)
        tokens = self.part.tokens()
        return [tokens[place] for place in places], [self.first + self.part.indices[place] for place in places]


@dataclass(frozen=True, slots=True)
class DataSource:
    """The data of a run, opened."""

    config: DataConfig
    encoder: SampleEncoder
    train: Part
    eval: Part
    fingerprint: str
    train_collator: Collator
    eval_collator: Collator
    texts: TextMix | None = None

    @property
    def num_train(self) -> int:
        """Records to train on; text that is mixed in is not counted."""
        return len(self.train)

    def counts(self) -> dict[str, Any]:
        """How many samples are on either side of the split, and to choose text from."""
        found = {"train_samples": len(self.train), "eval_samples": len(self.eval)}
        return found if self.texts is None else found | {"text_samples": len(self.texts.part)}

    def unusable(self) -> list[SkippedRecord]:
        """Records that were found bad while measuring lengths; those of evaluation files come last."""
        tables = [self.train.table, *([self.texts.part.table] if self.texts else [])]
        tables += [] if self.eval.table is self.train.table else [self.eval.table]
        return [skipped for table in tables for _, skipped in sorted(table.reasons.items())]

    def unusable_eval(self) -> dict[str, int]:
        """Reason → records of evaluation files that can't be used; of one file split in two they count as training."""
        return {} if self.eval.table is self.train.table else self.eval.table.counts()

    def train_batches(self, micro_batches: Sequence[MicroBatch]) -> Iterator[Batch]:
        """These micro-batches, in order, read by worker processes."""
        files = self.train.records.files + (self.texts.part.records.files if self.texts else [])
        return self._iterate(Records(files), self.train_collator, micro_batches)

    def eval_batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
        """Padded batches, one sample a row, of these evaluation records."""
        starts = range(0, len(indices), batch_size)
        rows = [tuple((index,) for index in indices[start : start + batch_size]) for start in starts]
        return self._iterate(self.eval.records, self.eval_collator, rows)

    def _iterate(self, records: Records, collator: Collator, rows: Sequence[MicroBatch]) -> Iterator[Batch]:
        return iter(batch_loader(records, self.encoder, collator, rows, self.config.num_workers))


def check_data_paths(config: DataConfig, text: TextConfig) -> None:
    """Say that a record file is missing before large bases are loaded.

    Raises:
        DataError: `train` is empty, or a name in it, in `eval` or in `text.files` matches nothing.
    """
    if not config.train:
        raise DataError("The config names no training data: set data.train to a file, folder or glob.")
    expand_paths(config.train + config.eval + text.files)


def open_data(
    config: RunConfig,
    processor: Qwen3VLMProcessor,
    folder: Path,
    *,
    open_features: Callable[[Iterable[ImageRef]], FeatureCache] | None = None,
    cache_dir: Path | None = None,
    progress: bool = False,
) -> DataSource:
    """Open the records, measure them (cached in `cache_dir`), split them, and keep the split in `folder`.

    `open_features` gets all pictures and returns the cache of their tower outputs.

    Raises:
        DataError: files that can't be used, too many bad records, or nothing left to train on.
    """
    data = config.data
    encoder = SampleEncoder(processor, data.max_seq_len)

    def measure(paths: Sequence[str], purpose: str) -> tuple[Records, LengthTable]:
        records = open_records(paths, data.image_root, cache_dir)
        table = lengths(records, encoder, cache_dir, data.num_workers, progress)
        _check_bad_fraction(table, data, purpose)
        if not len(table.usable):
            raise DataError(f"No usable record is left to {purpose} on in {', '.join(paths)} ({table.counts()}).")
        return records, table

    records, table = measure(data.train, "train")
    if data.eval:
        eval_records, eval_table = measure(data.eval, "evaluate")
        train, held_out = _whole(records, table), _whole(eval_records, eval_table)
        parts = [("train", records.fingerprint), ("eval", eval_records.fingerprint)]
    else:
        train, held_out = _split(records, table, config, folder)
        parts = [("train", records.fingerprint)]
    if not train.indices:
        raise DataError(f"No usable record is left to train on in {', '.join(data.train)} ({table.counts()}).")

    texts = None
    if config.text.files:
        text = _whole(*measure(config.text.files, "hold text with"))
        _refuse_pictures(text, config.text)
        texts = TextMix(text, config.text.share, len(train.records), config.seed)
        parts += [("text", text.records.fingerprint)]
    elif config.lora.kl_weight and len(train.with_pictures()) == len(train):
        raise DataError("lora.kl_weight has no text to hold: each conversation has a picture. Name some in text.files.")

    features = open_features(_pictures(train, held_out)) if open_features else None
    sizes: Any = {"max_image_pixels": data.max_image_pixels, "features": features}
    collators = (
        Collator(processor, packing=data.packing, mark_text=config.lora.kl_weight > 0, **sizes),
        Collator(processor, packing=False, **sizes),
    )
    return DataSource(data, encoder, train, held_out, fingerprint_dataset(parts), *collators, texts)


def empty_micro_batch() -> dict[str, Tensor]:
    """Two tokens and no label: what a rank works on when the data of a step has run out."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    return {"input_ids": ids, "position_ids": torch.arange(2).unsqueeze(0), "labels": torch.full_like(ids, -100)}


def _whole(records: Records, table: LengthTable) -> Part:
    return Part(records, table, tuple(int(index) for index in table.usable))


def _refuse_pictures(part: Part, config: TextConfig) -> None:
    seen = part.with_pictures()
    if seen:
        raise DataError(
            f"{len(seen):,} of the records in {', '.join(config.files)} have pictures, such as "
            f"{part.records.origin(seen[0])}; text.files is for text alone. Name them in data.train instead."
        )


def _pictures(*parts: Part) -> Iterator[ImageRef]:
    for part in parts:
        for index in part.with_pictures():
            yield from part.records[index].images


def _split(records: Records, table: LengthTable, config: RunConfig, folder: Path) -> tuple[Part, Part]:
    """Split the records, or read the split that a run in this folder already made."""
    path = folder / "split.json"
    if path.exists():
        split = load_split(path, table.ids)
    else:
        split = split_table(table, config.data.eval_fraction, config.data.eval_max, config.seed)
        save_split(path, split, table.ids, table.answer_tokens)
    sides = (split.train_indices, split.eval_indices)
    train, held_out = (Part(records, table, tuple(int(index) for index in side)) for side in sides)
    return train, held_out


def _check_bad_fraction(table: LengthTable, config: DataConfig, purpose: str) -> None:
    bad, seen = len(table.reasons), len(table)
    if bad > config.max_bad_fraction * seen:
        reasons = ", ".join(f"{count} {name}" for name, count in table.counts().items())
        raise DataError(
            f"{bad:,} of {seen:,} records to {purpose} on can't be used ({reasons}), "
            f"more than data.max_bad_fraction {config.max_bad_fraction:g}. `qwen3-vlm data doctor` lists them all."
        )

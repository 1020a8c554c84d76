"""From samples to batches: which samples share a sequence, and the tensors that the model reads.

Packed: several samples stand in one row, positions restart at 0 for each, and there is no attention mask:
transformers' `create_causal_mask` lets tokens attend within their own run of positions alone. The
padded tail is a run of its own, without labels. Padded: one sample per row, lengths grouped, attention mask.

Shapes: B rows, T tokens, I images, P patches, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from qwen3_vlm.data.encode import IGNORED, ConversationProcessor, Sample, SkippedRecord
from qwen3_vlm.data.images import load_image
from qwen3_vlm.errors import DataError

if TYPE_CHECKING:
    from qwen3_vlm.data.features import FeatureCache

WINDOW = 8192  # samples that are packed together; shuffled before, so that packing stays random
GROUPED_BATCHES = 50  # batches whose samples are sorted by length together when padding

Row = tuple[int, ...]  # record indices that share one sequence
MicroBatch = tuple[Row, ...]


def plan_epoch(
    lengths: Sequence[int] | npt.NDArray[np.int32],
    *,
    batch_size: int,
    max_seq_len: int,
    packing: bool,
    seed: int,
    epoch: int,
    indices: Sequence[int] | npt.NDArray[np.int64] | None = None,
) -> list[MicroBatch]:
    """Every sample exactly once, in rows of at most `max_seq_len` tokens, `batch_size` rows to a batch.

    A pure function of its arguments: a resumed run and every rank of a distributed one get the same plan. `indices`
    are the record indices that the lengths belong to; None means 0, 1, ….

    Raises:
        DataError: a length is not in 1…max_seq_len.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    names = np.arange(len(sizes)) if indices is None else np.asarray(indices, dtype=np.int64)
    if len(sizes) and not 1 <= sizes.min() <= sizes.max() <= max_seq_len:
        raise DataError(f"Lengths {sizes.min()} to {sizes.max()} can't be planned; they must lie in 1…{max_seq_len}.")
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    order = generator.permutation(len(sizes))
    if packing:
        rows = _packed_rows(sizes, order, max_seq_len)
        rows = [rows[number] for number in generator.permutation(len(rows))]
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    else:
        batches = _grouped_batches(sizes, order, batch_size)
        batches = [batches[number] for number in generator.permutation(len(batches))]
    return [tuple(tuple(int(names[sample]) for sample in row) for row in batch) for batch in batches]


def fill_rate(batches: Sequence[MicroBatch], lengths: Sequence[int] | npt.NDArray[np.int32], max_seq_len: int) -> float:
    """Real tokens ÷ room for tokens, of a plan whose indices count `lengths`."""
    rows = [row for batch in batches for row in batch]
    return sum(int(lengths[sample]) for row in rows for sample in row) / max(1, len(rows) * max_seq_len)


def _packed_rows(sizes: npt.NDArray[np.int64], order: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        longest_first = window[np.argsort(-sizes[window], kind="stable")]
        rows.extend(_best_fit(longest_first.tolist(), sizes[longest_first].tolist(), capacity))
    return rows


def _best_fit(samples: list[int], sizes: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each sample goes to the fullest row that still has room for it.

    Open rows are kept by the room that they have left, with one bit per amount of room in `open_rooms`: the
    smallest sufficient room is its lowest set bit at or above the sample's size.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_rooms = 0
    for sample, size in zip(samples, sizes, strict=True):
        sufficient = open_rooms >> size
        if sufficient:
            room = size + (sufficient & -sufficient).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                open_rooms &= ~(1 << room)
        else:
            room, number = capacity, len(rows)
            rows.append([])
        rows[number].append(sample)
        if room - size:
            by_room[room - size].append(number)
            open_rooms |= 1 << (room - size)
    return rows


def _grouped_batches(
    sizes: npt.NDArray[np.int64], order: npt.NDArray[np.int64], batch_size: int
) -> list[list[list[int]]]:
    """One sample per row; batches of similar lengths, cut from megabatches of shuffled samples."""
    batches: list[list[list[int]]] = []
    for start in range(0, len(order), GROUPED_BATCHES * batch_size):
        megabatch = order[start : start + GROUPED_BATCHES * batch_size]
        longest_first = megabatch[np.argsort(-sizes[megabatch], kind="stable")].tolist()
        firsts = range(0, len(longest_first), batch_size)
        batches.extend([[sample] for sample in longest_first[first : first + batch_size]] for first in firsts)
    return batches


@dataclass(frozen=True, slots=True)
class LoadedSample:
    """A sample with its pictures in memory: decoded, or their tower outputs from the cache."""

    index: int
    sample: Sample
    pictures: list[Image.Image] | None
    features: Tensor | None = None  # (I, P, D)


@dataclass(frozen=True, slots=True)
class Batch:
    """Model inputs and what they came from. Per-sample fields stand in row-then-position order.

    `inputs` is empty where every record of the batch was bad: such a batch still counts as a micro-batch,
    so that all ranks take the same number of steps.
    """

    inputs: dict[str, Tensor]  # what `model(**inputs)` takes
    sample_ids: tuple[str, ...] = ()
    sample_indices: tuple[int, ...] = ()
    spans: tuple[tuple[int, int, int], ...] = ()  # row, first token, end
    answer_lengths: tuple[int, ...] = ()
    image_counts: tuple[int, ...] = ()
    dropped_turns: tuple[int, ...] = ()
    skipped: list[SkippedRecord] = field(default_factory=list)
    num_label_tokens: int = 0
    num_tokens: int = 0  # real ones, without padding

    def to(self, device: torch.device | str) -> "Batch":
        """The same with its tensors on `device`."""
        return replace(self, inputs={name: value.to(device, non_blocking=True) for name, value in self.inputs.items()})


class Collator:
    """Lays samples out in rows.

    Args:
        processor: turns pictures into pixel values and knows the padding token.
        packing: several samples per row, kept apart by their positions; false: one per row and an attention mask.
        max_image_pixels: a larger picture is refused.
        features: tower outputs on disk that replace the pictures.
    """

    def __init__(
        self,
        processor: ConversationProcessor,
        *,
        packing: bool,
        max_image_pixels: int,
        features: "FeatureCache | None" = None,
    ) -> None:
        self.processor = processor
        self.packing = packing
        self.max_image_pixels = max_image_pixels
        self.features = features
        self.pad_token_id = int(getattr(processor.tokenizer, "pad_token_id", None) or 0)

    def load(self, index: int, sample: Sample) -> LoadedSample:
        """Read a sample's pictures.

        Raises:
            ImageError: one of them can't be read.
        """
        if self.features is not None and sample.images:
            features = self.features.read(sample.images, max_pixels=self.max_image_pixels)
            return LoadedSample(index, sample, None, features)
        pictures = [
            load_image(ref.read_bytes(), max_pixels=self.max_image_pixels, name=ref.name) for ref in sample.images
        ]
        return LoadedSample(index, sample, pictures)

    def __call__(self, rows: Sequence[Sequence[LoadedSample]], skipped: Sequence[SkippedRecord] = ()) -> Batch:
        """Rows of loaded samples → one batch; empty rows vanish."""
        filled = [row for row in rows if row]
        if not self.packing:
            filled = [[loaded] for row in filled for loaded in row]
        if not filled:
            return Batch(inputs={}, skipped=list(skipped))
        spans = [span for number, row in enumerate(filled) for span in _spans(number, row)]
        flat = [loaded for row in filled for loaded in row]
        text = self._text_inputs(filled)
        return Batch(
            inputs=text | self._image_inputs(flat),
            sample_ids=tuple(loaded.sample.id for loaded in flat),
            sample_indices=tuple(loaded.index for loaded in flat),
            spans=tuple(spans),
            answer_lengths=tuple(loaded.sample.answer_length for loaded in flat),
            image_counts=tuple(len(loaded.sample.images) for loaded in flat),
            dropped_turns=tuple(loaded.sample.dropped_turns for loaded in flat),
            skipped=list(skipped),
            num_label_tokens=int((text["labels"] != IGNORED).sum()),
            num_tokens=sum(len(loaded.sample.input_ids) for loaded in flat),
        )

    def _text_inputs(self, rows: Sequence[Sequence[LoadedSample]]) -> dict[str, Tensor]:
        width = max(sum(len(loaded.sample.input_ids) for loaded in row) for row in rows)
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        labels = torch.full((len(rows), width), IGNORED)
        position_ids = torch.zeros((len(rows), width), dtype=torch.long)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for number, row in enumerate(rows):
            end = 0
            for (_, start, end), loaded in zip(_spans(number, row), row, strict=True):
                input_ids[number, start:end] = torch.tensor(loaded.sample.input_ids)
                labels[number, start:end] = torch.tensor(loaded.sample.labels)
                labels[number, start] = IGNORED  # the token before it belongs to another sample
                position_ids[number, start:end] = torch.arange(end - start)
            position_ids[number, end:] = torch.arange(width - end)  # the padded tail is a segment of its own
            attention_mask[number, :end] = 1
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return inputs if self.packing else inputs | {"attention_mask": attention_mask}

    def _image_inputs(self, flat: Sequence[LoadedSample]) -> dict[str, Tensor]:
        features = [loaded.features for loaded in flat if loaded.features is not None]
        if features:
            return {"patch_embeddings": torch.cat(features)}
        pictures = [picture for loaded in flat for picture in loaded.pictures or ()]
        return dict(self.processor.pixel_values(pictures)) if pictures else {}


def _spans(number: int, row: Sequence[LoadedSample]) -> list[tuple[int, int, int]]:
    ends = np.cumsum([len(loaded.sample.input_ids) for loaded in row]).tolist()
    return [(number, start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

"""From samples to batches: the tensors that the model reads, with what they came from.

Packed: several samples stand in one row, positions restart at 0 for each, and there is no attention mask:
transformers' `create_causal_mask` lets tokens attend within their own run of positions alone. The
padded tail is a run of its own, without labels. Padded: one sample per row, lengths grouped, attention mask.

Shapes: B rows, T tokens, I images, P patches, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen3_vlm.data.encode import IGNORED, ConversationProcessor, Sample, SkippedRecord
from qwen3_vlm.data.images import load_image
from qwen3_vlm.data.plan import MicroBatch, Row, fill_rate, plan_epoch

if TYPE_CHECKING:
    from qwen3_vlm.data.features import FeatureCache
__all__ = ["Batch", "Collator", "LoadedSample", "MicroBatch", "Row", "fill_rate", "plan_epoch"]


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
    image_counts: tuple[int, ...] = ()  # pictures of each sample that the connector has to encode
    dropped_turns: tuple[int, ...] = ()
    skipped: list[SkippedRecord] = field(default_factory=list)
    num_label_tokens: int = 0  # that the loss is a mean over: graded, with a weight above 0
    num_tokens: int = 0  # real ones, without padding
    num_media: int = 0  # pictures and sounds, as pixels or as ids
    num_text_predictions: int = 0  # tokens of marked text-only samples that have one before them

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
        mark_text: put a `text_mask` beside the ids, 1 at the tokens of samples without pictures, where there are any.
    """

    def __init__(
        self,
        processor: ConversationProcessor,
        *,
        packing: bool,
        max_image_pixels: int,
        features: "FeatureCache | None" = None,
        mark_text: bool = False,
    ) -> None:
        self.processor = processor
        self.packing = packing
        self.max_image_pixels = max_image_pixels
        self.features = features
        self.mark_text = mark_text
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
        alone = [loaded.sample for loaded in flat if self.mark_text and not loaded.sample.images]
        if alone:
            text["text_mask"] = _text_mask(filled, text["input_ids"])
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
            num_media=sum(len(loaded.sample.images) for loaded in flat),
            num_text_predictions=sum(len(sample.input_ids) - 1 for sample in alone),
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


def _text_mask(rows: Sequence[Sequence[LoadedSample]], ids: Tensor) -> Tensor:
    """(B, T), 1 at the tokens of samples without pictures."""
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        for (_, start, end), loaded in zip(_spans(number, row), row, strict=True):
            mask[number, start:end] = int(not loaded.sample.images)
    return mask


def _spans(number: int, row: Sequence[LoadedSample]) -> list[tuple[int, int, int]]:
    ends = np.cumsum([len(loaded.sample.input_ids) for loaded in row]).tolist()
    return [(number, start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

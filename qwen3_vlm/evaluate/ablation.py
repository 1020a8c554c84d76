"""Does the model use its pictures? The gate that every connector has to pass.

The same samples are graded four times; only the image embeddings that are injected differ:

- correct: the sample's own pictures;
- shuffled: pictures of other samples, a derangement of the whole set (not of a batch);
- zero: all zeros;
- noise: drawn per dimension from a normal distribution with the mean and std that the projected
  embeddings have over the set, so that it looks right to the language model and says nothing.

A model that reads its pictures does best with its own: loss(correct) < loss(shuffled) < loss(zero),
loss(noise). The gates are on the gaps to `correct`, per token, with paired bootstrap intervals over
samples; whether `shuffled` also lies below the other two is reported as information.

Shapes: I images, N latents, D the language model's width, n samples.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from qwen3_vlm.config import EvalConfig
from qwen3_vlm.data.collate import Batch
from qwen3_vlm.errors import DataError
from qwen3_vlm.evaluate.batches import (
    IMAGE_INPUTS,
    TEXT_INPUTS,
    device_of,
    num_rows,
    select,
)
from qwen3_vlm.evaluate.conditions import ConditionReport, Threshold, compare_conditions, finite
from qwen3_vlm.evaluate.metrics import row_losses
from qwen3_vlm.evaluate.shuffling import derangement, exchange_groups
from qwen3_vlm.models.losses import IGNORE_INDEX
from qwen3_vlm.models.modes import evaluation_mode

CONDITIONS = ("correct", "shuffled", "zero", "noise")


@dataclass(frozen=True)
class AblationReport(ConditionReport):
    """Per-sample losses under the four conditions, and what follows from them."""

    text_only: int  # samples without a picture: left out
    zero_label: int  # samples in which nothing is graded: left out
    same_picture: int  # pictures that `shuffled` could not keep from their own sample or an identical picture
    embedding_std: float  # of the projected embeddings over the set, mean over dimensions

    @property
    def order(self) -> dict[str, bool]:
        """The order a reading model shows; information beside the gates."""
        return {
            "correct < shuffled": self.is_below("correct", "shuffled"),
            "shuffled < zero": self.is_below("shuffled", "zero"),
            "shuffled < noise": self.is_below("shuffled", "noise"),
        }

    def details(self) -> dict[str, Any]:
        return {
            "text_only": self.text_only,
            "zero_label": self.zero_label,
            "same_picture": self.same_picture,
            "embedding_std": finite(self.embedding_std),
        }


@dataclass
class _Collected:
    """The set: text on the CPU batch by batch, and all projected embeddings (I, N, D)."""

    texts: list[dict[str, Tensor]]
    image_counts: list[list[int]]  # per batch, pictures of each row
    sample_ids: list[str]
    embeddings: list[Tensor]  # I × (N, D), in row order over the whole set
    owners: list[int]  # I, index of the sample each picture belongs to
    digests: list[bytes]  # I, equal for equal pictures
    text_only: int = 0
    zero_label: int = 0


def run_ablation(model: Any, batches: Iterable[Batch], config: EvalConfig, *, seed: int = 0) -> AblationReport:
    """Grade up to `config.ablation_samples` samples with pictures under all four conditions.

    Each picture is encoded once. The embeddings of the set are kept in memory: 256 pictures of
    64 × 4,096 take 134 MB in bf16. The result does not depend on the batch size beyond the rounding
    of the model itself.

    Raises:
        DataError: fewer than two samples have a picture and a graded token.
    """
    with evaluation_mode(model):
        collected = _collect(model, batches, config.ablation_samples)
        if len(collected.sample_ids) < 2:
            raise DataError(
                f"The ablation needs at least two samples with a picture and an answer; "
                f"{len(collected.sample_ids)} were given ({collected.text_only} others have no picture)."
            )
        sources = derangement(exchange_groups(collected.owners, collected.digests), seed)
        mean, std = embedding_statistics(collected.embeddings)
        replacements = {
            "correct": lambda index: collected.embeddings[index],
            "shuffled": lambda index: collected.embeddings[sources[index]],
            "zero": lambda index: torch.zeros_like(collected.embeddings[index]),
            "noise": _noise_source(mean, std, collected.embeddings, seed),
        }
        graded = {name: _grade(model, collected, replacements[name]) for name in CONDITIONS}
    counts = graded["correct"][1]
    return _summarise(collected, {name: sums for name, (sums, _) in graded.items()}, counts, sources, std, config, seed)


def embedding_statistics(embeddings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and population std per dimension, (D,) fp32 each, over all images and latents of I × (N, D)."""
    count = sum(embedding.shape[0] for embedding in embeddings)
    mean = torch.zeros(embeddings[0].shape[1], dtype=torch.float64)
    for embedding in embeddings:
        mean += embedding.double().sum(dim=0) / count
    variance = torch.zeros_like(mean)
    for embedding in embeddings:
        variance += (embedding.double() - mean).square().sum(dim=0) / count
    return mean.float(), variance.sqrt().float()


def _noise_source(mean: Tensor, std: Tensor, embeddings: Sequence[Tensor], seed: int) -> Callable[[int], Tensor]:
    """Noise of picture i, the same in whichever batch and order it is asked for."""

    def noise(index: int) -> Tensor:
        like = embeddings[index]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        return (torch.randn(like.shape, generator=generator) * std + mean).to(like.dtype)

    return noise


def _collect(model: Any, batches: Iterable[Batch], max_samples: int) -> _Collected:
    collected = _Collected([], [], [], [], [], [])
    for batch in batches:
        if num_rows(batch):
            _collect_batch(model, batch, collected, max_samples)
        if len(collected.sample_ids) >= max_samples:
            break
    return collected


def _collect_batch(model: Any, batch: Batch, collected: _Collected, max_samples: int) -> None:
    """Encode the batch's pictures and add the rows that can be graded."""
    graded = (batch.inputs["labels"][:, 1:] != IGNORE_INDEX).any(dim=1).tolist()
    kept: list[int] = []
    for row, (count, has_labels) in enumerate(zip(batch.image_counts, graded, strict=True)):
        if len(collected.sample_ids) + len(kept) >= max_samples:
            break
        if count and has_labels:
            kept.append(row)
        collected.text_only += not count
        collected.zero_label += bool(count) and not has_labels
    if not kept:
        return
    inputs = select(batch.inputs, IMAGE_INPUTS, device_of(model))
    embeddings = [embedding.cpu() for embedding in image_embeddings(model, inputs)]
    digests = [hashlib.sha256(picture.float().cpu().numpy().tobytes()).digest() for picture in _pictures(inputs)]
    starts = np.cumsum([0, *batch.image_counts])
    for row in kept:
        pictures = range(int(starts[row]), int(starts[row + 1]))
        collected.owners += [len(collected.sample_ids)] * len(pictures)
        collected.sample_ids.append(batch.sample_ids[row])
        collected.embeddings += [embeddings[picture] for picture in pictures]
        collected.digests += [digests[picture] for picture in pictures]
    collected.image_counts.append([batch.image_counts[row] for row in kept])
    texts = select(batch.inputs, TEXT_INPUTS, torch.device("cpu"))
    collected.texts.append({name: tensor[kept] for name, tensor in texts.items()})


def image_embeddings(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """I × (N, D): what the connector makes of a batch's pixels or cached patch embeddings."""
    return list(model.get_image_features(**inputs).pooler_output)


def _pictures(inputs: dict[str, Tensor]) -> Tensor:
    """What tells two pictures apart, (I, …): their pixels, or what the tower made of them."""
    return inputs["patch_embeddings"] if "patch_embeddings" in inputs else inputs["pixel_values"]


def _grade(
    model: Any, collected: _Collected, replacement: Callable[[int], Tensor]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Per-sample loss sums and token counts (n,) with each picture's embeddings replaced."""
    device = device_of(model)
    sums, counts, picture = [], [], 0
    for text, image_counts in zip(collected.texts, collected.image_counts, strict=True):
        indices = range(picture, picture + sum(image_counts))
        picture = indices.stop
        pooled: Any = [replacement(index).to(device) for index in indices]
        inputs: dict[str, Any] = {name: tensor.to(device) for name, tensor in text.items()}
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=pooled)}
        batch_sums, batch_counts = row_losses(model, inputs)
        sums.append(batch_sums)
        counts.append(batch_counts)
    return np.concatenate(sums), np.concatenate(counts)


def _summarise(
    collected: _Collected,
    loss_sums: dict[str, NDArray[np.float64]],
    counts: NDArray[np.int64],
    sources: list[int],
    std: Tensor,
    config: EvalConfig,
    seed: int,
) -> AblationReport:
    thresholds = {
        "shuffled": Threshold(config.min_shuffle_gap),
        "zero": Threshold(config.min_zero_gap),
        "noise": Threshold(config.min_noise_gap),
    }
    losses, gaps = compare_conditions(loss_sums, counts, thresholds, config, seed)
    kept_own = [
        collected.owners[source] == collected.owners[index] or collected.digests[source] == collected.digests[index]
        for index, source in enumerate(sources)
    ]
    return AblationReport(
        sample_ids=tuple(collected.sample_ids),
        token_counts=counts,
        loss_sums=loss_sums,
        text_only=collected.text_only,
        zero_label=collected.zero_label,
        same_picture=sum(kept_own),
        losses=losses,
        gaps=gaps,
        embedding_std=float(std.mean()),
        seed=seed,
    )

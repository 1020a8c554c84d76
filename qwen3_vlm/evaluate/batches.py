"""What evaluation needs to know of a batch and of a model; shared by losses, ablation and captions.

A batch is the collator's padded dict, one sample per row. Its tensors named in `MODEL_INPUTS` are the
model's arguments; the rest (`sample_ids`, `skipped`, `answer_lengths`, …) is bookkeeping.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids", "labels")  # (B, T) each
IMAGE_INPUTS = ("pixel_values", "patch_embeddings", "pixel_attention_mask", "spatial_shapes")  # (I, …) each
MODEL_INPUTS = TEXT_INPUTS + IMAGE_INPUTS

Batch = Mapping[str, Any]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs belong."""
    return next(model.parameters()).device


def model_inputs(batch: Batch, device: torch.device, names: tuple[str, ...] = MODEL_INPUTS) -> dict[str, Tensor]:
    """The tensors of a batch that the model takes, on its device."""
    return {name: batch[name].to(device) for name in names if isinstance(batch.get(name), Tensor)}


def num_rows(batch: Batch) -> int:
    """Samples in a batch; 0 where the collator had to skip all of them."""
    input_ids = batch.get("input_ids")
    return input_ids.shape[0] if isinstance(input_ids, Tensor) else 0


def images_per_row(model: Any, input_ids: Tensor) -> list[int]:
    """How many pictures each row of (B, T) ids holds, counted by its placeholders."""
    placeholders = (input_ids == model.config.image_token_id).sum(dim=1)
    return [int(count) // int(model.config.num_latents) for count in placeholders]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off and no graph; afterwards every module is back in the very mode it was in.

    Module by module, because in training the frozen bases stay in evaluation mode while the
    connector does not: `model.train()` would switch them all.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training

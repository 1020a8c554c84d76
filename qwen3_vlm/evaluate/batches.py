"""What evaluation needs to know of a batch and of a model; shared by losses, ablation and captions.

Batches come from the collator with packing off: every row holds one sample.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qwen3_vlm.data.collate import Batch
from qwen3_vlm.errors import DataError

TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids", "labels")  # (B, T) each
IMAGE_INPUTS = ("pixel_values", "patch_embeddings", "pixel_attention_mask", "spatial_shapes")  # (I, …) each


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs belong."""
    return next(model.parameters()).device


def select(inputs: Mapping[str, Tensor], names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """The inputs of these names that the batch has, on the device."""
    return {name: inputs[name].to(device) for name in names if inputs.get(name) is not None}


def num_rows(batch: Batch) -> int:
    """Samples in a batch.

    Raises:
        DataError: the batch is packed, so that a row is not a sample.
    """
    rows = batch.inputs["input_ids"].shape[0] if batch.inputs else 0
    if rows != len(batch.sample_ids):
        raise DataError(
            f"An evaluation batch has {len(batch.sample_ids)} samples in {rows} rows; losses are kept per sample, "
            "so make the batches with packing off."
        )
    return rows

"""Does this language model keep packed samples apart? Asked of the loaded model itself, before training.

Packing relies on attention that follows positions that start again. Linear attention, convolutions over time,
positions counted by other rules, and attention kernels that look at a mask alone do not, and
samples would then read their neighbours without a word. A few random tokens tell.
"""

from typing import Any

import torch
from torch import Tensor

from qwen3_vlm.errors import ModelError
from qwen3_vlm.evaluate.batches import device_of
from qwen3_vlm.models.modes import evaluation_mode

SAMPLE_LENGTHS = ((5, 9, 4), (7, 6, 5))  # rows of packed samples
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}  # nats on one token


def check_packing(model: Any) -> None:
    """Grade random samples packed and alone.

    Raises:
        ModelError: their losses differ, so packing must be turned off for this model.
    """
    with evaluation_mode(model):
        difference = packing_error(model)
    if not difference <= TOLERANCE.get(model.dtype, 0.15):
        config = model.config.text_config
        raise ModelError(
            f"The language model ({config.model_type}, attention {config._attn_implementation!r}) does not keep packed "
            f"samples apart: a token's loss changes by {difference:.3g} nats with its neighbours. "
            "Set data.packing=false."
        )


def packing_error(model: Any, seed: int = 0) -> float:
    """The largest change of a token's loss, in nats, when random text samples are packed."""
    generator = torch.Generator().manual_seed(seed)
    device, vocabulary = device_of(model), model.config.text_config.vocab_size
    rows = [
        [torch.randint(min(vocabulary, 1000), (1, length), generator=generator).to(device) for length in lengths]
        for lengths in SAMPLE_LENGTHS
    ]
    rows = [[ids.masked_fill(ids == model.config.image_token_id, 0) for ids in row] for row in rows]
    alone = torch.cat([_losses(model, [[ids]]) for row in rows for ids in row])
    return float((_losses(model, rows) - alone).abs().max())


def _losses(model: Any, rows: list[list[Tensor]]) -> Tensor:
    """Losses of all tokens but the first of each sample, row by row."""
    input_ids = torch.cat([torch.cat(row, dim=1) for row in rows])
    labels, positions = input_ids.clone(), []
    for number, row in enumerate(rows):
        start = 0
        for ids in row:
            labels[number, start] = -100
            start += ids.shape[1]
        positions.append(torch.cat([torch.arange(ids.shape[1], device=ids.device) for ids in row]))
    losses: Tensor = model.token_losses(input_ids=input_ids, position_ids=torch.stack(positions), labels=labels).loss
    return losses

"""The loss of each token sequence, in batches of like length; what the ablations of a token LM grade with.

Rows are padded on the right and masked, so a sequence's loss does not depend on its batch, beyond the rounding
of the model itself.

Shapes: n sequences, B rows, T tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwen3_vlm.errors import DataError, TokenError
from qwen3_vlm.evaluate.batches import device_of, evaluation_mode
from qwen3_vlm.evaluate.conditions import Counts, Sums
from qwen3_vlm.evaluate.metrics import row_losses
from qwen3_vlm.tokenization.sequences import IGNORED, TokenSequence, build_sequence
from qwen3_vlm.tokenization.token_space import TokenSpace

Ids = npt.NDArray[np.int32]
TokenRecord = tuple[str, Mapping[str, npt.NDArray[Any]]]  # id, and global ids by modality


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence of a record, as it is graded under some condition."""

    id: str
    input_ids: Ids  # (T,)
    labels: Ids  # (T,)


def collect_sequences(
    token_space: TokenSpace,
    task: str,
    records: Iterable[TokenRecord],
    *,
    max_samples: int,
    max_len: int | None = None,
    seed: int = 0,
) -> tuple[list[tuple[str, TokenSequence]], dict[str, int]]:
    """The first `max_samples` records of which `task` can be made, and why others can't: reason → count.

    Args:
        seed: of a denoising task's noise.

    Raises:
        TokenError: there is no such task, or this token space lacks one of its modalities.
        DataError: fewer than two can be made.
    """
    found: list[tuple[str, TokenSequence]] = []
    dropped: dict[str, int] = {}
    for name, ids in records:
        if len(found) == max_samples:
            break
        try:
            key = f"{seed}/evaluation/{name}"
            found.append((name, build_sequence(token_space, task, ids, max_len=max_len, noise_key=key)))
        except TokenError as error:
            if error.reason in ("unknown", "unknown_task"):
                raise
            dropped[error.reason] = dropped.get(error.reason, 0) + 1
    if len(found) < 2:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items()))
        raise DataError(
            f"The ablation of {task} needs at least two samples; {len(found)} can be made of the records given"
            f"{f' ({reasons})' if reasons else ''}."
        )
    return found, dropped


def example_losses(
    model: Any, token_space: TokenSpace, examples: Sequence[Example], *, batch_size: int
) -> tuple[Sums, Counts]:
    """Summed nats and number of graded tokens of each example, (n,) each, in the order given.

    Args:
        model: a TokenLM, or what has its `token_losses`; its mode is put back afterwards.
    """
    sums, counts = np.zeros(len(examples)), np.zeros(len(examples), np.int64)
    order = sorted(range(len(examples)), key=lambda number: len(examples[number].input_ids))
    pad, device = token_space.special("<|pad_mm|>"), device_of(model)
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = pad_right([examples[number] for number in chosen], pad)
            batch = {name: tensor.to(device) for name, tensor in inputs.items()}
            sums[chosen], counts[chosen] = row_losses(model, batch)
    return sums, counts


def pad_right(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, (B, T) each."""
    shape = len(examples), max(len(example.input_ids) for example in examples)
    input_ids = np.full(shape, pad, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = example.input_ids
        attention_mask[row, :length] = 1
        labels[row, :length] = example.labels
    arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}

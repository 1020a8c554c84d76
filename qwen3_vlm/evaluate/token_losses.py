"""The loss of each token sequence, in batches of like length; what the ablations of a token LM grade with.

Rows are padded on the right and masked, so a sequence's loss does not depend on its batch, beyond the rounding
of the model itself.

Shapes: n sequences.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen3_vlm.config import EvalConfig
from qwen3_vlm.data.token_batches import TokenCollator
from qwen3_vlm.errors import DataError, TokenError
from qwen3_vlm.evaluate.batches import TEXT_INPUTS, device_of, select
from qwen3_vlm.evaluate.conditions import Counts, Sums, Threshold, compare_conditions
from qwen3_vlm.evaluate.metrics import row_losses
from qwen3_vlm.models.modes import evaluation_mode
from qwen3_vlm.tokenization.sequences import TokenSequence, build_sequence
from qwen3_vlm.tokenization.token_space import TokenSpace

Ids = npt.NDArray[np.int32]
TokenRecord = tuple[str, Mapping[str, npt.NDArray[Any]]]  # id, and global ids by modality


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


def sequence_losses(
    model: Any, token_space: TokenSpace, sequences: Sequence[TokenSequence], *, batch_size: int
) -> tuple[Sums, Counts]:
    """Summed nats and number of graded tokens of each sequence, (n,) each, in the order given.

    Args:
        model: a TokenLM, or what has its `token_losses`; its mode is put back afterwards.
    """
    sums, counts = np.zeros(len(sequences)), np.zeros(len(sequences), np.int64)
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    collator, device = TokenCollator(token_space), device_of(model)
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collator([sequences[number] for number in chosen], (), ())
            sums[chosen], counts[chosen] = row_losses(model, select(batch.inputs, TEXT_INPUTS, device))
    return sums, counts


def graded_conditions(
    model: Any,
    token_space: TokenSpace,
    names: tuple[str, ...],
    conditions: Mapping[str, Sequence[TokenSequence]],
    thresholds: Mapping[str, Threshold],
    config: EvalConfig,
    seed: int,
) -> dict[str, Any]:
    """Grade the same samples under each condition: what a `ConditionReport` is made of.

    Args:
        names: (n,) ids of the samples.
        conditions: condition → (n,) sequences, "correct" among them.
        thresholds: of the conditions that are gates.
    """
    graded = {
        condition: sequence_losses(model, token_space, sequences, batch_size=config.batch_size)
        for condition, sequences in conditions.items()
    }
    loss_sums = {condition: sums for condition, (sums, _) in graded.items()}
    counts = graded["correct"][1]
    losses, gaps = compare_conditions(loss_sums, counts, thresholds, config, seed)
    common: dict[str, Any] = {"sample_ids": names, "token_counts": counts, "loss_sums": loss_sums, "seed": seed}
    return common | {"losses": losses, "gaps": gaps}


def source_ids(sequence: TokenSequence) -> Ids:
    """The ids of the source segment, boundaries left out."""
    span = sequence.span("source")
    return sequence.input_ids[span.start : span.stop]

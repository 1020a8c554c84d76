"""Does a token LM draw or say what it is asked to? The gate on generated segments.

The same targets are graded after three prompts:

- correct: the record's own;
- shuffled: that of another record, a derangement of the whole set (not of a batch) that keeps equal prompts apart;
- empty: the source's boundaries with nothing between them.

A model that follows its prompts does best after its own: loss(correct) < loss(shuffled), loss(empty).

Shapes: n samples.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen3_vlm.config import EvalConfig
from qwen3_vlm.evaluate.conditions import ConditionReport, Threshold
from qwen3_vlm.evaluate.shuffling import derangement, exchange_groups
from qwen3_vlm.evaluate.token_losses import TokenRecord, collect_sequences, graded_conditions, source_ids
from qwen3_vlm.tokenization.token_space import TokenSpace

THRESHOLDS = {"shuffled": Threshold(0.0), "empty": Threshold(0.0)}  # an interval clear of zero is what is asked for


@dataclass(frozen=True)
class PromptAblationReport(ConditionReport):
    """Per-sample losses of one task's targets after each prompt, and what follows from them."""

    task: str
    same_prompt: int  # samples that `shuffled` could not keep from their own prompt or an equal one
    dropped: dict[str, int]  # reason → records that the task can't be made of

    @property
    def prefix(self) -> str:
        return f"{self.task}: prompt "

    @property
    def order(self) -> dict[str, bool]:
        """What a model that follows its prompt shows."""
        return {f"correct < {other}": self.is_below("correct", other) for other in THRESHOLDS}

    def details(self) -> dict[str, Any]:
        return {"task": self.task, "same_prompt": self.same_prompt, "dropped": self.dropped}


def run_prompt_ablation(
    model: Any,
    token_space: TokenSpace,
    task: str,
    records: Iterable[TokenRecord],
    config: EvalConfig,
    *,
    seed: int = 0,
    max_len: int | None = None,
) -> PromptAblationReport:
    """Grade the targets of up to `config.ablation_samples` records after their own, another's and no prompt.

    Args:
        model: a TokenLM, or what has its `token_losses`.
        records: (id, {modality: global ids}) of held-out records; read no further than is needed.
        max_len: what is longer is left out and counted.

    Raises:
        TokenError: there is no such task, or this token space lacks one of its modalities.
        DataError: fewer than two samples can be made.
    """
    found, dropped = collect_sequences(
        token_space, task, records, max_samples=config.ablation_samples, max_len=max_len, seed=seed
    )
    sources = [source_ids(sequence) for _, sequence in found]
    groups = exchange_groups(range(len(sources)), [source.tobytes() for source in sources])
    partners = derangement(groups, seed)
    given = {
        "correct": sources,
        "shuffled": [sources[partner] for partner in partners],
        "empty": [np.empty(0, np.int32)] * len(sources),
    }
    names = tuple(name for name, _ in found)
    conditions = {
        condition: [own.with_source(ids) for (_, own), ids in zip(found, prompts, strict=True)]
        for condition, prompts in given.items()
    }
    return PromptAblationReport(
        **graded_conditions(model, token_space, names, conditions, THRESHOLDS, config, seed),
        task=task,
        same_prompt=sum(groups[partner] == group for partner, group in zip(partners, groups, strict=True)),
        dropped=dropped,
    )

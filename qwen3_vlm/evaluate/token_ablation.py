"""Does a token LM use the picture or the sound that it is given? The gate on what it understands.

The same samples are graded under conditions that differ in the ids of the source segment alone; boundaries, prompt
and answer stay. Every condition keeps the sequence valid: as many ids, each from the range its place asks for.

- correct: the record's own ids;
- shuffled: the same ids in another order: the ids of a picture over its places, the frames of a sound over its time
  (a frame keeps its ids, so that every codebook stays in its place), the ids of a text;
- noise: uniform over the range, for sound over the range of each codebook; for text over the tokenizer's ids;
- constant: one id for the whole set, for sound one per codebook;
- scattered (sound alone): the ids of each codebook moved over the frames on their own, which also breaks up the frames.

Gates stand on noise and shuffled; the other losses are information. A sample's replacement follows from the seed and
its id alone, whatever the order of the records and the batches.

Shapes: S ids of a segment, K codebooks, F frames, n samples.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen3_vlm.config import EvalConfig
from qwen3_vlm.evaluate.conditions import ConditionReport, Threshold
from qwen3_vlm.evaluate.token_losses import TokenRecord, collect_sequences, graded_conditions, source_ids
from qwen3_vlm.tokenization.sequences import TokenSequence, sequence_format
from qwen3_vlm.tokenization.token_space import Content, TokenSpace

Ids = npt.NDArray[np.int32]
CONDITIONS: dict[Content, tuple[str, ...]] = {
    "text": ("correct", "shuffled", "noise", "constant"),
    "image": ("correct", "shuffled", "noise", "constant"),
    "audio": ("correct", "shuffled", "noise", "constant", "scattered"),
}


@dataclass(frozen=True)
class TokenAblationReport(ConditionReport):
    """Per-sample losses of one task under each condition, and what follows from them."""

    task: str
    unchanged: int  # sources that another order leaves as they are: one frame, or the same id throughout
    dropped: dict[str, int]  # reason → records that the task can't be made of

    @property
    def prefix(self) -> str:
        return f"{self.task}: "

    @property
    def order(self) -> dict[str, bool]:
        """What a model that reads its ids shows."""
        pairs = (("correct", "shuffled"), ("shuffled", "noise"), ("correct", "constant"))
        return {f"{lower} < {higher}": self.is_below(lower, higher) for lower, higher in pairs}

    def details(self) -> dict[str, Any]:
        return {"task": self.task, "unchanged": self.unchanged, "dropped": self.dropped}


def run_token_ablation(
    model: Any,
    token_space: TokenSpace,
    task: str,
    records: Iterable[TokenRecord],
    config: EvalConfig,
    *,
    seed: int = 0,
    max_len: int | None = None,
) -> TokenAblationReport:
    """Grade up to `config.ablation_samples` records as `task` under every condition of its source.

    Args:
        model: a TokenLM, or what has its `token_losses`.
        records: (id, {modality: global ids}) of held-out records; read no further than is needed.
        max_len: what is longer is left out and counted.

    Raises:
        TokenError: there is no such task, or this token space lacks one of its modalities.
        DataError: fewer than two samples can be made.
    """
    source = sequence_format(task).source
    found, dropped = collect_sequences(
        token_space, task, records, max_samples=config.ablation_samples, max_len=max_len, seed=seed
    )
    names = tuple(name for name, _ in found)
    conditions = {
        condition: [_replaced(token_space, own, condition, name, seed) for name, own in found]
        for condition in CONDITIONS[source]
    }
    pairs = zip(conditions["shuffled"], found, strict=True)
    unchanged = sum(np.array_equal(sequence.input_ids, own.input_ids) for sequence, (_, own) in pairs)
    return TokenAblationReport(
        **graded_conditions(model, token_space, names, conditions, thresholds(config), config, seed),
        task=task,
        unchanged=unchanged,
        dropped=dropped,
    )


def thresholds(config: EvalConfig) -> dict[str, Threshold]:
    """What the gates ask for."""
    return {
        "shuffled": Threshold(config.min_token_shuffle_gap, config.min_shuffle_win_rate),
        "noise": Threshold(config.min_token_noise_gap, config.min_noise_win_rate),
    }


def replaced_ids(
    token_space: TokenSpace, modality: Content, ids: Ids, condition: str, set_key: str, sample_key: str
) -> Ids:
    """The ids (S,) of one segment under a condition.

    Args:
        set_key: decides the constant ids, which are those of the whole set.
        sample_key: decides, together with `set_key`, everything else.
    """
    first, size = _ranges(token_space, modality)
    frames = ids.reshape(-1, len(first))  # (F, K); text and pictures have frames of one id
    of_sample = _generator(f"{set_key}\0{condition}\0{sample_key}")
    makers: dict[str, Callable[[], npt.NDArray[Any]]] = {
        "correct": lambda: frames,
        "shuffled": lambda: frames[_new_order(frames, of_sample)],
        "scattered": lambda: of_sample.permuted(frames, axis=0),
        "noise": lambda: of_sample.integers(first, first + size, size=frames.shape),
        "constant": lambda: np.broadcast_to(_generator(set_key).integers(first, first + size), frames.shape),
    }
    return makers[condition]().reshape(-1).astype(np.int32)


def _replaced(token_space: TokenSpace, own: TokenSequence, condition: str, name: str, seed: int) -> TokenSequence:
    """A sequence with the ids of its source replaced."""
    source, set_key = sequence_format(own.task).source, f"{seed}/{own.task}"
    return own.with_source(replaced_ids(token_space, source, source_ids(own), condition, set_key, name))


def _new_order(frames: Ids, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """A random order of the frames; not the one they have, if any other looks different."""
    while True:
        order = generator.permutation(len(frames))
        if not np.array_equal(frames[order], frames) or (frames == frames[0]).all():
            return order


def _ranges(token_space: TokenSpace, modality: Content) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First id and size of the range of each id of a frame, (K,) each."""
    if modality == "text":  # rows beyond the tokenizer's ids were never trained
        return np.array([0]), np.array([token_space.text.tokenizer_size])
    codebooks = range(token_space.audio.num_codebooks) if modality == "audio" and token_space.audio else [None]
    spans = [token_space.range_of(modality, codebook) for codebook in codebooks]
    return np.array([span.first for span in spans]), np.array([span.size for span in spans])


def _generator(key: str) -> np.random.Generator:
    seed = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:16]
    return np.random.Generator(np.random.PCG64(int.from_bytes(seed, "big")))

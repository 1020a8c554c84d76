"""Which of the ids that may come is taken: temperature, top-k and top-p by modality and codebook, guidance, seeds.

The choice is made by the Gumbel trick (Gumbel 1954; Maddison et al., arXiv:1411.0030): noise is added to the
log-probabilities and the largest sum wins, which draws from exactly those probabilities. The noise is a function of
the sample's seed, the place in its answer and the id: no state, so a sample comes out the same alone and in any
batch. What remains is rounding: a model's scores differ in their last bits between batch sizes, and a sum must be
within these bits of the largest one to be affected; a threshold on cumulated probabilities would have a brink at
every id instead.

Shapes: B rows, T tokens, V vocabulary, N ids that may come.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from qwen3_vlm.config import require
from qwen3_vlm.errors import ModelError
from qwen3_vlm.generate.grammar import Grammar, Position, Slot, by_slot, log_probabilities

__all__ = ["Choice", "Sampler", "Sampling", "WordSampler"]


@dataclass(frozen=True, slots=True)
class Choice:
    """How one id is chosen: first the temperature, then top-k, then top-p, as in `generate`."""

    temperature: float = 1.0  # 0: the likeliest id
    top_k: int = 0  # of so many likeliest ids alone; 0: of all
    top_p: float = 1.0  # of the fewest likeliest ids that have this much probability together

    def __post_init__(self) -> None:
        good = self.temperature == 0 or 0.01 <= self.temperature <= 100
        require(good, "temperature", self.temperature, "must be 0 (the likeliest id) or 0.01 to 100")
        require(self.top_k >= 0, "top_k", self.top_k, "must be 0 (all) or above")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0, at most 1")


LIKELIEST = Choice(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the ids of an answer are chosen."""

    text: Choice = LIKELIEST
    image: Choice = Choice()
    audio: Choice | tuple[Choice, ...] = Choice()  # one for all codebooks, or one for each of them
    switch: Choice = LIKELIEST  # which segment follows
    guidance: float = 1.0  # beyond 1: how far from an empty prompt's answer (Ho & Salimans, arXiv:2207.12598)

    def __post_init__(self) -> None:
        require(0 <= self.guidance <= 100, "guidance", self.guidance, "must be 0 to 100; 1 is none")
        require(self.audio != (), "audio", self.audio, "must name at least one choice")

    def of(self, slot: Slot) -> Choice:
        """The choice that is made at this place; a sound's end token is the first codebook's."""
        if slot.kind != "audio":
            return {"text": self.text, "image": self.image, "switch": self.switch}[slot.kind]
        return self.audio if isinstance(self.audio, Choice) else self.audio[slot.codebook]

    def require_codebooks(self, count: int) -> None:
        """Refuse another number of choices than the codec has codebooks.

        Raises:
            ConfigError: names both.
        """
        if not isinstance(self.audio, Choice):
            require(len(self.audio) == count, "audio", f"{len(self.audio)} choices", f"must be one, or {count}")


class Sampler(LogitsProcessor):
    """Scores → 0 at the chosen id, −∞ at all others, so that greedy `generate` (`do_sample=False`) takes it.

    With guidance the batch holds every prompt twice: first all prompts, then in the same order what they are to be
    told from (`sequences.unconditional_prompt`). Both take the same id. Beams have no use for one chosen id: give
    them a `GrammarProcessor`.

    Args:
        seeds: one per sample, in the order of the rows.

    Raises:
        ConfigError: `sampling` has another number of codebooks than the space.
    """

    def __init__(self, grammar: Grammar, sampling: Sampling, seeds: Sequence[int]) -> None:
        audio = grammar.token_space.audio
        if audio is not None:
            sampling.require_codebooks(audio.num_codebooks)
        self.grammar = grammar
        self.sampling = sampling
        self.keys = [_key(seed) for seed in seeds]

    @property
    def guided(self) -> bool:
        """Whether every prompt is there twice."""
        return self.sampling.guidance != 1

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """(B, T) ids, (B, V) scores → (B, V).

        Raises:
            ModelError: other rows than there are seeds for, or scores that are no numbers.
        """
        count = len(self.keys)
        if len(input_ids) != count * (1 + self.guided):
            raise ModelError(f"There are {len(input_ids)} rows and {count} seeds{' for pairs' * self.guided}; "
                             "each sample needs one.")  # fmt: skip
        positions = self.grammar.positions(input_ids[:count])
        chosen = input_ids.new_empty(count)
        for slot, rows in by_slot(positions):
            if slot.only is not None:
                chosen[rows] = slot.only
                continue
            numbers = list(range(count))[rows] if isinstance(rows, slice) else rows
            log_probs = self._log_probs(scores, slot, rows)
            noise = torch.from_numpy(np.stack([gumbel_noise(self.keys[n], positions[n]) for n in numbers]))
            chosen[rows] = slot.ids(scores.device)[_choose(log_probs, self.sampling.of(slot), noise.to(scores.device))]
        chosen = torch.cat([chosen, chosen]) if self.guided else chosen
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def _log_probs(self, scores: Tensor, slot: Slot, rows: Any) -> Tensor:
        """(r, N), of the prompts or, with guidance, of what sets them apart."""
        count = len(self.keys)
        prompted = log_probabilities(scores[:count], slot, rows, self.grammar)
        if not self.guided:
            return prompted
        empty = log_probabilities(scores[count:], slot, rows, self.grammar)
        return (empty + self.sampling.guidance * (prompted - empty)).nan_to_num(nan=-torch.inf).log_softmax(dim=-1)


class WordSampler(LogitsProcessor):
    """The same for words of a plain language model: one choice, and ids of its tokenizer alone.

    Args:
        num_ids: of the tokenizer; rows of the model beyond are never taken.
        seeds: one per row.
    """

    def __init__(self, choice: Choice, num_ids: int, seeds: Sequence[int]) -> None:
        self.choice = choice
        self.slot = Slot("text", ((0, num_ids),))
        self.keys = [_key(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """(B, T) ids, (B, V) scores → (B, V)."""
        log_probs = self.slot.cut(scores).float().log_softmax(dim=-1)
        position = Position(self.slot, 0, input_ids.shape[1])
        noise = torch.from_numpy(np.stack([gumbel_noise(key, position) for key in self.keys]))
        chosen = _choose(log_probs, self.choice, noise.to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def gumbel_noise(key: int, position: Position) -> npt.NDArray[np.float64]:
    """(N,) of a sample at a place; each id's number is its own, whatever else may come there.

    Philox (Salmon et al., SC 2011) counts instead of remembering. Its raw bits alone are drawn, since NumPy promises
    that these stay the same between versions.
    """
    slot, segment, place = position
    bits = [
        np.random.Philox(key=key, counter=[0, first, place, segment]).random_raw(last - first)
        for first, last in slot.ranges
    ]
    uniform = ((np.concatenate(bits) >> np.uint64(12)) + 0.5) * 2.0**-52  # never 0 and never 1
    return -np.log(-np.log(uniform))


def _key(seed: int) -> int:
    """128 bits, so that neighbouring seeds have nothing in common."""
    return int.from_bytes(hashlib.sha256(str(int(seed)).encode()).digest()[:16], "big")


def _choose(log_probs: Tensor, choice: Choice, noise: Tensor) -> Tensor:
    """(r, N) log-probabilities → (r,) which of the N is taken."""
    if choice.temperature == 0:
        return log_probs.argmax(dim=-1)
    scores: Any = (log_probs - log_probs.amax(dim=-1, keepdim=True)) / choice.temperature
    nothing: Any = None  # these two read no ids
    if choice.top_k:
        scores = TopKLogitsWarper(choice.top_k)(nothing, scores)
    if choice.top_p < 1:
        scores = TopPLogitsWarper(choice.top_p)(nothing, scores)
    return (scores + noise).argmax(dim=-1)

"""Did text behaviour move? Bit equality between the base before rows were added and the TokenLM in text mode.

The same texts are read by both. In text mode the TokenLM scores the base's own ids alone, as a grammar in text mode
makes it do; with nothing but new rows trained, every score of a text id is the base's to the last bit. Compared are

- logits: the sha256 of the scores of every position over the tokenizer's ids;
- continuations: the ids of a greedy answer;
- perplexity, over the tokenizer's ids.

One text is in memory at a time. Both have to be measured on the same machine in the same dtype: kernels differ.

Shapes: T tokens, V scores of which the first `num_ids` are the tokenizer's.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen3_vlm.errors import DataError, ModelError
from qwen3_vlm.evaluate.batches import device_of
from qwen3_vlm.evaluate.conditions import finite
from qwen3_vlm.evaluate.gates import equality_gate
from qwen3_vlm.evaluate.text_suite import SUITE_SHA256, TEXTS
from qwen3_vlm.models.modes import evaluation_mode
from qwen3_vlm.models.precision import compute_in_fp32, must_widen

MAX_TOKENS = 128  # of a text; the rest is not read
NEW_TOKENS = 16  # of a greedy continuation


@dataclass(frozen=True)
class TextBehaviour:
    """What a model makes of a suite of texts. Plain values: JSON keeps them exactly."""

    suite_sha256: str
    digests: tuple[str, ...]  # per text: sha256 of its scores (T, num_ids) as fp32
    continuations: tuple[tuple[int, ...], ...]
    loss_sums: tuple[float, ...]  # nats, float64
    token_counts: tuple[int, ...]  # graded tokens: all but the first

    @property
    def perplexity(self) -> float:
        """exp of the loss per token over the whole suite."""
        return math.exp(sum(self.loss_sums) / sum(self.token_counts)) if sum(self.token_counts) else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "TextBehaviour":
        """What `to_dict` gave, after JSON too.

        Raises:
            DataError: it is no such mapping.
        """
        try:
            return cls(
                str(tree["suite_sha256"]),
                tuple(map(str, tree["digests"])),
                tuple(tuple(map(int, ids)) for ids in tree["continuations"]),
                tuple(map(float, tree["loss_sums"])),
                tuple(map(int, tree["token_counts"])),
            )
        except (KeyError, TypeError, ValueError) as problem:
            raise DataError(f"This is no measurement of text behaviour: {problem!r}.") from problem


@dataclass(frozen=True)
class TextIdentityReport:
    """The texts on which two measurements differ."""

    texts: int
    logits: tuple[int, ...]  # numbers of the texts whose scores differ in any bit
    continuations: tuple[int, ...]
    perplexity_before: float
    perplexity_after: float

    @property
    def passed(self) -> bool:
        """Nothing differs."""
        return all(gate["passed"] for gate in self.gates())

    def gates(self) -> list[dict[str, Any]]:
        """The `gates` of evidence.json."""
        moved = int(self.perplexity_before != self.perplexity_after)
        return [
            equality_gate("text identity: logits", "texts", len(self.logits), self.texts),
            equality_gate("text identity: greedy continuations", "texts", len(self.continuations), self.texts),
            equality_gate("text identity: perplexity", "perplexities", moved, 1 if self.texts else 0),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The `text_identity` of evidence.json."""
        return {
            "passed": self.passed,
            "texts": self.texts,
            "suite_sha256": SUITE_SHA256,
            "different_logits": list(self.logits),
            "different_continuations": list(self.continuations),
            "perplexity_before": finite(self.perplexity_before),
            "perplexity_after": finite(self.perplexity_after),
        }

    def summary(self) -> dict[str, Any]:
        """Flat, for a line of metrics.jsonl."""
        return {
            "passed": self.passed,
            "texts": self.texts,
            "different_logits": len(self.logits),
            "different_continuations": len(self.continuations),
            "perplexity_before": finite(self.perplexity_before),
            "perplexity_after": finite(self.perplexity_after),
        }


def measure_text(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str] = TEXTS,
    *,
    max_tokens: int = MAX_TOKENS,
    new_tokens: int = NEW_TOKENS,
) -> TextBehaviour:
    """Read every text, and go on from it greedily.

    Args:
        model: the plain causal LM before `TokenLM.grow`, or a TokenLM, which is measured in text mode. A plain base
            that `grow` would set to compute in fp32 on this machine is set to it here.
        tokenizer: the base's Hugging Face tokenizer.
        max_tokens: of a text and its continuation together no more than the model has positions.

    Raises:
        ModelError: the tokenizer gives ids that the model has no row for.
    """
    num_ids = max(tokenizer.get_vocab().values()) + 1
    reader = _Reader(model, num_ids)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    room = max_tokens if not isinstance(positions, int) else min(max_tokens, positions - new_tokens)
    found = []
    with evaluation_mode(model):
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False)[: max(room, 1)]
            found.append(reader.read(ids, new_tokens))
    digests, continuations, sums, counts = zip(*found, strict=True) if found else ((), (), (), ())
    suite = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return TextBehaviour(suite, digests, continuations, sums, counts)


def compare_text(before: TextBehaviour, after: TextBehaviour) -> TextIdentityReport:
    """Where two measurements differ.

    Raises:
        DataError: they are of different texts.
    """
    if before.suite_sha256 != after.suite_sha256 or before.token_counts != after.token_counts:
        raise DataError("The two measurements of text behaviour are of different texts, so they can't be compared.")
    return TextIdentityReport(
        texts=len(before.digests),
        logits=_different(before.digests, after.digests),
        continuations=_different(before.continuations, after.continuations),
        perplexity_before=before.perplexity,
        perplexity_after=after.perplexity,
    )


class _Reader:
    """Scores of text ids from a plain base or from a TokenLM, by the same calls."""

    def __init__(self, model: Any, num_ids: int) -> None:
        self.model, self.num_ids = model, num_ids
        space = getattr(model, "token_space", None)
        self.embedding = model.get_input_embeddings()
        rows = self.embedding.num_embeddings if space is None else space.text.vocab_size
        if num_ids > rows:
            raise ModelError(f"The tokenizer has {num_ids:,} ids, the base {rows:,} rows.")
        self.options: dict[str, Any] = {} if space is None else {"score_range": (0, rows)}
        self.widened = space is None and must_widen(model.get_output_embeddings().weight)
        if self.widened:
            compute_in_fp32(model)

    def read(self, ids: Sequence[int], new_tokens: int) -> tuple[str, tuple[int, ...], float, int]:
        """Digest of the scores, greedy continuation, summed loss and number of graded tokens."""
        given = torch.tensor([list(ids)], device=device_of(self.model))  # (1, T)
        scores, cache = self._scores(given, None)
        digest = hashlib.sha256(scores.contiguous().numpy().tobytes()).hexdigest()
        losses = scores[:-1].double().log_softmax(dim=-1).gather(-1, given[0, 1:, None].cpu())
        loss, last = -float(losses.sum()), scores[-1:]
        del scores, losses
        answer: list[int] = []
        for _ in range(new_tokens):
            answer.append(int(last[-1].argmax()))
            if len(answer) < new_tokens:
                last, cache = self._scores(given.new_tensor([answer[-1:]]), cache)
        return digest, tuple(answer), loss, len(ids) - 1

    def _scores(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """(T, num_ids) fp32 on the CPU, and the cache."""
        inputs: dict[str, Any] = {"inputs_embeds": self.embedding(ids).float()} if self.widened else {"input_ids": ids}
        output = self.model(**inputs, past_key_values=cache, use_cache=True, **self.options)
        return output.logits[0, :, : self.num_ids].float().cpu(), output.past_key_values


def _different(before: Sequence[Any], after: Sequence[Any]) -> tuple[int, ...]:
    return tuple(number for number, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])

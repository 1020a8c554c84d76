"""Which ids may come next: from the ids so far and the token space alone.

    … <|text_start|>  ids of the tokenizer, then <|text_end|>
    … <|img_start|>   exactly R·C image ids, then <|img_end|>
    … <|aud_start|>   frames, each one id of every codebook in order; between frames <|aud_end|> may come
    … <|gen_img|>     <|img_start|>, and likewise for the others
    … an end token    the switch to another segment where one may follow, else nothing but <|pad_mm|>

The last boundary token of a row tells where it stands. So nothing is remembered between steps, rows of a batch may
stand anywhere, a prompt may already hold the beginning of a picture, and it does not matter what pads it on the left.
A row without any boundary token is plain text and goes on with ids of the tokenizer.

Shapes: B rows, T tokens, V vocabulary, R C rows and columns of an image's grid, K codebooks, N ids that may come.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from qwen3_vlm.config import require
from qwen3_vlm.errors import ModelError, TokenError
from qwen3_vlm.models.token_lm import ScoreRange
from qwen3_vlm.tokenization.sequences import BOUNDARIES
from qwen3_vlm.tokenization.token_space import Content, TokenSpace

__all__ = ["Follower", "Grammar", "GrammarProcessor", "Position", "Slot"]

Kind = Literal["text", "image", "audio", "switch"]
Follower = Literal["text", "image", "audio", "stop"]  # what may come after a segment
PAD = "<|pad_mm|>"


@dataclass(frozen=True, slots=True)
class Slot:
    """What may stand at one place: ids of `ranges`, ascending, the last of each excluded."""

    kind: Kind
    ranges: tuple[ScoreRange, ...]
    codebook: int = 0

    @property
    def only(self) -> int | None:
        """The id, where no other may come: nothing has to be computed there."""
        (first, last), *more = self.ranges
        return first if last - first == 1 and not more else None

    def cut(self, values: Tensor, rows: Any = slice(None)) -> Tensor:
        """(B, V) → (r, N): the columns of the ids that may come, in the rows that are asked for."""
        parts = [values[rows, first:last] for first, last in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def ids(self, device: torch.device) -> Tensor:
        """(N,) the ids that may come."""
        return torch.cat([torch.arange(first, last, device=device) for first, last in self.ranges])


class Position(NamedTuple):
    """Where a row stands."""

    slot: Slot
    segment: int  # how many switches the row has: 1 in the answer to an ordinary prompt
    place: int  # how many ids stand since the last boundary token


class Grammar:
    """See the module.

    Args:
        token_space: what every id means.
        then: what may follow the answer's first segment, its second, and so on, for interleaved answers; "stop" among
            them lets the model end there. `[["image"]]` after a prompt for text is text and then a picture. Segments
            are counted by the switches in the row, so the prompt has one, as `prompt_ids` makes it.
        min_text, max_text: ids of a text.
        min_frames, max_frames: frames of a sound; None: one clip.

    Raises:
        ConfigError: the lengths contradict each other.
        TokenError: `then` names what the space does not have.
    """

    def __init__(
        self,
        token_space: TokenSpace,
        *,
        then: Sequence[Collection[Follower]] = (),
        min_text: int = 1,
        max_text: int = 256,
        min_frames: int = 1,
        max_frames: int | None = None,
    ) -> None:
        if max_frames is None:
            max_frames = token_space.audio.frames_per_clip if token_space.audio else min_frames
        require(0 <= min_text <= max_text > 0, "max_text", max_text, f"must be above 0 and at least {min_text}")
        require(0 < min_frames <= max_frames, "max_frames", max_frames, f"must be at least {min_frames}, and that 1")
        for modality in BOUNDARIES:
            if any(modality in followers for followers in then):
                token_space.range_of(modality, 0 if modality == "audio" else None)
        good = all(followers and {*followers} <= {*BOUNDARIES, "stop"} for followers in then)
        require(good, "then", then, "must be lists of text, image, audio and stop, none of them empty")
        self.token_space = token_space
        self.then = tuple(tuple(followers) for followers in then)
        self.text_lengths = (min_text, max_text)
        self.frames = (min_frames, max_frames)
        self.pad_id = token_space.special(PAD)
        self._switches: dict[str, int] = {
            modality: token_space.special(boundary.gen) for modality, boundary in BOUNDARIES.items()
        }
        self._marks = {  # id → what it is
            token_space.special(name): (role, modality)
            for modality, boundary in BOUNDARIES.items()
            for role, name in boundary._asdict().items()
        }

    # What may come ----------------------------------------------------------------------------------------

    def positions(self, input_ids: Tensor) -> list[Position]:
        """Where each row of (B, T) stands.

        Raises:
            TokenError: a row is no beginning that could be gone on with.
        """
        keys = self._read(input_ids)
        slots = {key: self._slot(*key) for key in set(keys)}
        return [Position(slots[mark, place, segment], segment, place) for mark, place, segment in keys]

    def allowed(self, input_ids: Tensor) -> Tensor:
        """(B, T) → (B, V) bool: which ids may come next.

        Raises:
            TokenError: see `positions`.
        """
        mask = input_ids.new_zeros(len(input_ids), self.token_space.vocab_size_total, dtype=torch.bool)
        for row, (slot, _, _) in enumerate(self.positions(input_ids)):
            for first, last in slot.ranges:
                mask[row, first:last] = True
        return mask

    def next_range(self, input_ids: Tensor) -> ScoreRange | None:
        """The shortest range that has all ids that may come in any row, the last excluded; None: no such row.

        Where just one id may come no score is needed. A sound that may end is the one case with ids in between
        that may not come: its end token stands before the images.
        """
        try:
            slots = {position.slot for position in self.positions(input_ids)}
        except TokenError:  # a piece of a prompt, which nothing is sampled after
            return None
        open_slots = {slot for slot in slots if slot.only is None} or slots
        return min(slot.ranges[0][0] for slot in open_slots), max(slot.ranges[-1][1] for slot in open_slots)

    # How generation ends ----------------------------------------------------------------------------------

    @property
    def stop_ids(self) -> list[int]:
        """What ends a row: the end token of its segment, or <|pad_mm|> where other segments may follow."""
        if self.then:
            return [self.pad_id]
        return [self.token_space.special(boundary.end) for boundary in BOUNDARIES.values()]

    def most_ids(self, first: Content) -> int:
        """The longest answer that begins with a segment of this modality, its start token in the prompt."""
        longest = self._longest(first)
        for followers in self.then:
            longest += max((2 + self._longest(name) for name in followers if name != "stop"), default=0)
        return longest + bool(self.then)

    def generation_config(self, first: Content, **changes: Any) -> GenerationConfig:
        """For `generate`: ends where the grammar ends, and nothing that the base brings along bends the choice."""
        settings: dict[str, Any] = {
            "max_new_tokens": self.most_ids(first),
            "eos_token_id": self.stop_ids,
            "pad_token_id": self.pad_id,
            "do_sample": False,
            "num_beams": 1,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 50,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
        }
        return GenerationConfig(**settings | changes)

    def _longest(self, modality: Content) -> int:
        """Ids of the longest segment and its end token."""
        if modality == "text":
            return self.text_lengths[1] + 1
        if modality == "image":
            return self._image_ids + 1
        return self.frames[1] * self._codebooks + 1

    # One row ----------------------------------------------------------------------------------------------

    def _read(self, input_ids: Tensor) -> list[tuple[int, int, int]]:
        """For each row its last boundary token (−1: none), the ids since, and its switches."""
        if input_ids.ndim != 2 or not input_ids.shape[1]:
            raise TokenError(f"Ids of the shape {tuple(input_ids.shape)} were given; (rows, tokens) is needed.")
        tokens = input_ids.shape[1]
        marks = torch.tensor(list(self._marks), device=input_ids.device)
        switches = torch.tensor(list(self._switches.values()), device=input_ids.device)
        places = torch.arange(1, tokens + 1, device=input_ids.device)
        last = (torch.isin(input_ids, marks) * places).amax(dim=1)  # (B,), from 1; 0: none
        found = input_ids.gather(1, (last - 1).clamp(min=0)[:, None])[:, 0].where(last > 0, -1)
        counts = torch.isin(input_ids, switches).sum(dim=1)
        return [(mark, place, count) for mark, place, count in torch.stack([found, tokens - last, counts], 1).tolist()]

    def _slot(self, mark: int, place: int, segment: int) -> Slot:
        """What may come `place` ids after a boundary token."""
        if mark < 0:
            return Slot("text", (self._text_range,))
        role, modality = self._marks[mark]
        if role == "end":
            return self._after_end(place, segment)
        if role == "gen":
            if place:
                raise TokenError(f"{place} ids stand after {BOUNDARIES[modality].gen}; {BOUNDARIES[modality].start} is "
                                 "due there.", "malformed")  # fmt: skip
            return Slot("switch", (_one(self.token_space.special(BOUNDARIES[modality].start)),))
        end = _one(self.token_space.special(BOUNDARIES[modality].end))
        return {"text": self._in_text, "image": self._in_image, "audio": self._in_audio}[modality](place, end)

    def _in_text(self, place: int, end: ScoreRange) -> Slot:
        least, most = self.text_lengths
        if place >= most:
            return Slot("text", (end,))
        return Slot("text", (self._text_range, end) if place >= least else (self._text_range,))

    def _in_image(self, place: int, end: ScoreRange) -> Slot:
        if place > self._image_ids:
            raise TokenError(f"{place} ids stand after <|img_start|>; a picture has {self._image_ids}.", "malformed")
        return Slot("image", (end,) if place == self._image_ids else (self._range("image"),))

    def _in_audio(self, place: int, end: ScoreRange) -> Slot:
        frame, codebook = divmod(place, self._codebooks)
        least, most = self.frames
        if not codebook and frame >= most:
            return Slot("audio", (end,))
        codes = self._range("audio", codebook)
        return Slot("audio", (end, codes) if not codebook and frame >= least else (codes,), codebook)

    def _after_end(self, place: int, segment: int) -> Slot:
        if not place and not segment:
            raise TokenError("The prompt ends with an end token and has no switch such as <|gen_img|>, so it does "
                             "not say what shall come; see sequences.prompt_ids.", "malformed")  # fmt: skip
        followers = self.then[segment - 1] if not place and segment <= len(self.then) else ("stop",)
        return Slot("switch", tuple(sorted(_one(self._switches.get(name, self.pad_id)) for name in set(followers))))

    # The token space --------------------------------------------------------------------------------------

    @property
    def _text_range(self) -> ScoreRange:
        return 0, self.token_space.text.tokenizer_size

    @property
    def _image_ids(self) -> int:
        self.token_space.range_of("image")
        return self.token_space.image.num_ids if self.token_space.image else 0

    @property
    def _codebooks(self) -> int:
        self.token_space.range_of("audio", 0)
        return self.token_space.audio.num_codebooks if self.token_space.audio else 0

    def _range(self, modality: Content, codebook: int | None = None) -> ScoreRange:
        span = self.token_space.range_of(modality, codebook)
        return span.first, span.last + 1


class GrammarProcessor(LogitsProcessor):
    """Scores → log-probabilities among the ids that may come, −∞ for all others.

    For greedy decoding, beams, or the library's own sampling. Whether the scores of other ids were computed makes no
    difference, in beams neither: probabilities are among the ids that may come. Where one id alone may come its
    score is not read.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """(B, T) ids, (B, V) scores → (B, V).

        Raises:
            ModelError: the scores are not of this token space, or are no numbers.
        """
        result = torch.full_like(scores, -torch.inf)
        for slot, rows in by_slot(self.grammar.positions(input_ids)):
            if slot.only is not None:
                result[rows, slot.only] = 0.0
                continue
            log_probs = log_probabilities(scores, slot, rows, self.grammar)  # (r, N)
            sizes = [last - first for first, last in slot.ranges]
            for (first, last), part in zip(slot.ranges, log_probs.split(sizes, dim=-1), strict=True):
                result[rows, first:last] = part
        return result


def by_slot(positions: Sequence[Position]) -> Iterator[tuple[Slot, Any]]:
    """Rows that stand at the same place, as an index: usually all of them."""
    groups: dict[Slot, list[int]] = {}
    for row, position in enumerate(positions):
        groups.setdefault(position.slot, []).append(row)
    for slot, rows in groups.items():
        yield slot, slice(None) if len(groups) == 1 else rows


def log_probabilities(scores: Tensor, slot: Slot, rows: Any, grammar: Grammar) -> Tensor:
    """(B, V) scores → (r, N) log-probabilities among the ids that may come, fp32.

    Raises:
        ModelError: the scores are not of the grammar's token space, or are no numbers.
    """
    if scores.shape[-1] != grammar.token_space.vocab_size_total:
        raise ModelError(
            f"The model scores {scores.shape[-1]:,} ids; the token space has {grammar.token_space.vocab_size_total:,}."
        )
    log_probs = slot.cut(scores, rows).float().log_softmax(dim=-1)
    if not log_probs.amax(dim=-1).isfinite().all():
        raise ModelError(
            "The model's scores of the ids that may come are no numbers (NaN or infinite): its weights are damaged, "
            "or its training diverged."
        )
    return log_probs


def _one(value: int) -> ScoreRange:
    return value, value + 1

"""Task formats over the token space: which segments follow one another, and where the labels stand.

    <|aud_start|> A… <|aud_end|>  <|gen_text|>  <|text_start|> T… <|text_end|>        a2t
    └──────── source ─────────┘  └──── prompt ends here ────┘ └── labels ──┘

All tasks have this shape; the table `SEQUENCES` says what goes in and what comes out. Labels stand on the target and
its end token alone; everything before is the prompt, and `prompt_ids` gives exactly that for generation. Labels
are aligned with the inputs (the model shifts them). Nothing is ever cut: a record that lacks a modality or does
not fit is a `TokenError` with a countable reason, for the `DropCounter`.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qwen3_vlm.errors import TokenError
from qwen3_vlm.tokenization.token_space import MODALITIES, Content, Modality, TokenSpace

IGNORED = -100  # the label that no loss is computed at
Ids = npt.NDArray[np.int32]


class Boundary(NamedTuple):
    """The special tokens of one modality."""

    start: str
    end: str
    gen: str  # "now comes": the switch that generation begins with


BOUNDARIES: dict[Content, Boundary] = {
    "text": Boundary("<|text_start|>", "<|text_end|>", "<|gen_text|>"),
    "image": Boundary("<|img_start|>", "<|img_end|>", "<|gen_img|>"),
    "audio": Boundary("<|aud_start|>", "<|aud_end|>", "<|gen_aud|>"),
}


@dataclass(frozen=True, slots=True)
class SequenceFormat:
    """One task: what is given and what is to be said."""

    source: Content
    target: Content
    noise_rate: float = 0.0  # share of the source's ids that are replaced, within their own range


SEQUENCES: dict[str, SequenceFormat] = {
    "a2t": SequenceFormat("audio", "text"),
    "i2t": SequenceFormat("image", "text"),
    "t2a": SequenceFormat("text", "audio"),
    "t2i": SequenceFormat("text", "image"),
    "a2i": SequenceFormat("audio", "image"),
    "i2a": SequenceFormat("image", "audio"),
    "copy_image": SequenceFormat("image", "image"),
    "copy_audio": SequenceFormat("audio", "audio"),
    "denoise_image": SequenceFormat("image", "image", noise_rate=0.15),
    "denoise_audio": SequenceFormat("audio", "audio", noise_rate=0.15),
}
TEXT = "text"  # a text by itself, every id of it a label: no task of its own, but graded beside them
GRADED = (*SEQUENCES, TEXT)  # what a loss is told of, by number
TASK_FAMILIES: dict[str, tuple[str, ...]] = {
    "copy": ("copy_image", "copy_audio"),
    "denoise": ("denoise_image", "denoise_audio"),
}
OVERHEAD = 5  # special tokens of every sequence


class Span(NamedTuple):
    """Positions [start, stop) of one part of a sequence."""

    name: str  # "source_start", "source", "source_end", "gen", "target_start", "target", "target_end"
    modality: Modality
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One training example."""

    task: str
    input_ids: Ids  # (T,) global ids
    labels: Ids  # (T,), IGNORED before the target
    spans: tuple[Span, ...]  # cover the sequence, in order

    def __len__(self) -> int:
        return len(self.input_ids)

    def span(self, name: str) -> Span:
        """The span of that name."""
        return next(span for span in self.spans if span.name == name)

    @classmethod
    def of_text(cls, ids: Ids) -> "TokenSequence":
        """A text by itself (T,): all of it is predicted, but for its first id, which has nothing before it."""
        labels = ids.copy()
        labels[0] = IGNORED
        return cls(TEXT, ids, labels, ())

    def with_source(self, source: Ids) -> "TokenSequence":
        """The same example with other ids, of any number, in the place of its source's own.

        With none at all its prompt is the `unconditional_prompt`.
        """
        own, target = self.span("source"), self.span("target")
        before = np.full(own.start + len(source), IGNORED, dtype=np.int32)
        return TokenSequence(
            self.task,
            np.concatenate([self.input_ids[: own.start], source, self.input_ids[own.stop :]]).astype(np.int32),
            np.concatenate([before, self.labels[own.stop :]]),
            _spans(sequence_format(self.task), len(source), target.stop - target.start),
        )

    @property
    def num_label_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class ParsedSequence:
    """A sequence taken apart again."""

    source: Content
    target: Content
    source_ids: Ids
    target_ids: Ids
    spans: tuple[Span, ...]


class DropCounter:
    """What was left out: task → reason → count."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}

    def add(self, task: str, reason: str, count: int = 1) -> None:
        """Count a sample that was dropped."""
        self.counts.setdefault(task, Counter())[reason] += count

    def merge(self, other: "DropCounter") -> None:
        """Take over another worker's counts."""
        for task, reasons in other.counts.items():
            for reason, count in reasons.items():
                self.add(task, reason, count)

    @property
    def total(self) -> int:
        return sum(sum(reasons.values()) for reasons in self.counts.values())

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Plain and in a fixed order, for logs."""
        return {task: dict(sorted(reasons.items())) for task, reasons in sorted(self.counts.items())}


def task_names(names: Iterable[str]) -> list[str]:
    """Tasks by name, families such as "copy" replaced by their members.

    Raises:
        TokenError: there is no such task.
    """
    tasks = [task for name in names for task in TASK_FAMILIES.get(name, (name,))]
    for task in tasks:
        sequence_format(task)
    return list(dict.fromkeys(tasks))


def sequence_format(task: str) -> SequenceFormat:
    """The declared format of a task.

    Raises:
        TokenError: there is no such task.
    """
    if task not in SEQUENCES:
        raise TokenError(f"There is no task {task!r}; there are {', '.join(SEQUENCES)}.", "unknown_task")
    return SEQUENCES[task]


def build_sequence(
    token_space: TokenSpace,
    task: str,
    ids: Mapping[str, npt.NDArray[Any]],
    *,
    max_len: int | None = None,
    noise_key: str = "",
) -> TokenSequence:
    """One record as one example of `task`.

    Args:
        ids: global ids by modality, as a tokenized record has them.
        max_len: the most ids that the whole sequence may have; what is longer is refused, never cut.
        noise_key: decides which ids a denoising task replaces, such as f"{seed}/{epoch}/{record id}".

    Raises:
        TokenError: "missing_…", "empty_…", "too_long", or ids that are not those of their modality.
    """
    wanted = sequence_format(task)
    target = _content(token_space, wanted.target, ids)
    end = np.array([token_space.special(BOUNDARIES[wanted.target].end)], dtype=np.int32)
    prompt = prompt_ids(token_space, task, ids, noise_key=noise_key)
    input_ids = np.concatenate([prompt, target, end])
    if max_len is not None and len(input_ids) > max_len:
        raise TokenError(
            f"As {task} the record has {len(input_ids):,} ids, {len(target):,} of them {wanted.target} to be learnt; "
            f"at most {max_len:,} fit, and nothing is cut.",
            "too_long",
        )
    labels = np.full_like(input_ids, IGNORED)
    labels[len(prompt) :] = input_ids[len(prompt) :]
    return TokenSequence(task, input_ids, labels, _spans(wanted, len(prompt) - 4, len(target)))


def prompt_ids(token_space: TokenSpace, task: str, ids: Mapping[str, npt.NDArray[Any]], *, noise_key: str = "") -> Ids:
    """What a model is given before it begins with the target: up to the target's start token, included.

    The same as the part of `build_sequence` that has no labels; the target's ids are not needed.

    Raises:
        TokenError: the source is missing or empty, or its ids are not those of its modality.
    """
    wanted = sequence_format(task)
    source = _content(token_space, wanted.source, ids)
    if wanted.noise_rate:
        source = replace_ids(token_space, wanted.source, source, wanted.noise_rate, f"{task}\0{noise_key}")
    around = unconditional_prompt(token_space, task)
    return np.concatenate([around[:1], source, around[1:]])


def unconditional_prompt(token_space: TokenSpace, task: str) -> Ids:
    """The prompt of a task with nothing in its source: its boundaries alone.

        <|text_start|> <|text_end|>  <|gen_img|>  <|img_start|>        t2i

    What guidance compares a prompt with, and what an "empty" prompt of an ablation is. `build_sequence` refuses an
    empty source; a training example looks like this only where `TokenSequence.with_source` made it so.

    Raises:
        TokenError: there is no such task.
    """
    wanted = sequence_format(task)
    before, after = BOUNDARIES[wanted.source], BOUNDARIES[wanted.target]
    names = (before.start, before.end, after.gen, after.start)
    return np.array([token_space.special(name) for name in names], dtype=np.int32)


def sequence_lengths(task: str, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(n,) lengths of the sequences of n records, 0 where a modality is missing; nothing is read.

    Args:
        lengths: (n, 3) ids of text, image and audio, as `Shards.lengths` has them.
    """
    wanted = sequence_format(task)
    parts = [lengths[:, MODALITIES.index(modality)] for modality in (wanted.source, wanted.target)]
    return np.where((parts[0] > 0) & (parts[1] > 0), parts[0] + parts[1] + OVERHEAD, 0)


def replace_ids(token_space: TokenSpace, modality: Content, ids: Ids, rate: float, key: str) -> Ids:
    """Ids of which `rate` (at least one) are replaced by other ids of the same range or codebook, as `key` says.

    Only PCG64's raw stream is drawn from: NumPy promises that it stays the same between versions.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:16], "big")
    draws = np.random.PCG64(seed).random_raw(2 * len(ids)).reshape(2, len(ids))
    count = min(len(ids), max(1, round(rate * len(ids))))
    places = np.sort(np.argsort(draws[0], kind="stable")[:count])
    first, size = _ranges(token_space, modality, places)
    local = ids[places].astype(np.int64) - first
    others = np.maximum(size - 1, 1)
    step = np.where(size > 1, 1 + (draws[1][places] % others.astype(np.uint64)).astype(np.int64), 0)
    replaced = ids.copy()
    replaced[places] = first + (local + step) % size
    return replaced


def parse_sequence(token_space: TokenSpace, input_ids: npt.NDArray[Any]) -> ParsedSequence:
    """Take a whole sequence apart; the inverse of `build_sequence`.

    Raises:
        TokenError: it is not source, switch, target with the right boundaries, or a segment holds other ids.
    """
    values = np.asarray(input_ids)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise TokenError(f"A sequence is one list of ids; {values.dtype} {values.shape} was given.", "malformed")
    source, stop = _segment(token_space, values, 0)
    switches = {token_space.special(boundary.gen): modality for modality, boundary in BOUNDARIES.items()}
    wanted = switches.get(_at(values, stop))
    if wanted is None:
        raise _malformed(values, stop, "one of <|gen_text|>, <|gen_img|> and <|gen_aud|>")
    target, end = _segment(token_space, values, stop + 1)
    if target != wanted:
        raise _malformed(values, stop + 1, BOUNDARIES[wanted].start)
    if end != len(values):
        raise _malformed(values, end, "the end of the sequence")
    if (source, target) not in {(known.source, known.target) for known in SEQUENCES.values()}:
        raise TokenError(f"No task goes from {source} to {target}.", "unknown_task")
    spans = _spans(SequenceFormat(source, target), stop - 2, end - stop - 3)
    parts = {span.name: values[span.start : span.stop].astype(np.int32) for span in spans}
    return ParsedSequence(source, target, parts["source"], parts["target"], spans)


def _segment(token_space: TokenSpace, values: npt.NDArray[Any], position: int) -> tuple[Content, int]:
    """Modality of the segment that starts at `position`, and the position after its end token."""
    starts = {token_space.special(boundary.start): modality for modality, boundary in BOUNDARIES.items()}
    modality = starts.get(_at(values, position))
    if modality is None:
        raise _malformed(values, position, "a start token")
    specials = token_space.range_of("special")
    after = values[position + 1 :]
    found = np.flatnonzero((after >= specials.first) & (after <= specials.last))
    stop = position + 1 + int(found[0]) if len(found) else len(values)
    if _at(values, stop) != token_space.special(BOUNDARIES[modality].end):
        raise _malformed(values, stop, BOUNDARIES[modality].end)
    _content(token_space, modality, {modality: values[position + 1 : stop]})
    return modality, stop + 1


def _content(token_space: TokenSpace, modality: Content, ids: Mapping[str, npt.NDArray[Any]]) -> Ids:
    """The ids of one modality: whole content of its own range, or refused."""
    if modality not in ids:
        raise TokenError(f"The record has no {modality}.", f"missing_{modality}")
    values = np.asarray(ids[modality])
    if values.ndim != 1 or not len(values):
        raise TokenError(
            f"The {modality} has the shape {values.shape}; at least one id is needed.", f"empty_{modality}"
        )
    token_space.require_content(values, modality)
    return values.astype(np.int32)


def _ranges(
    token_space: TokenSpace, modality: Content, places: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First id and size of the range that each place of a segment takes its ids from."""
    if modality == "audio" and token_space.audio is not None:
        spans = [token_space.range_of("audio", codebook) for codebook in range(token_space.audio.num_codebooks)]
    else:
        spans = [token_space.range_of(modality)]
    table = np.array([(span.first, span.size) for span in spans], dtype=np.int64)[places % len(spans)]
    return table[:, 0], table[:, 1]


def _spans(wanted: SequenceFormat, num_source: int, num_target: int) -> tuple[Span, ...]:
    parts: list[tuple[str, Modality, int]] = [
        ("source_start", "special", 1),
        ("source", wanted.source, num_source),
        ("source_end", "special", 1),
        ("gen", "special", 1),
        ("target_start", "special", 1),
        ("target", wanted.target, num_target),
        ("target_end", "special", 1),
    ]
    spans, start = [], 0
    for name, modality, size in parts:
        spans.append(Span(name, modality, start, start + size))
        start += size
    return tuple(spans)


def _at(values: npt.NDArray[Any], position: int) -> int:
    return int(values[position]) if position < len(values) else -1


def _malformed(values: npt.NDArray[Any], position: int, expected: str) -> TokenError:
    found = f"the id {int(values[position]):,}" if position < len(values) else "nothing"
    return TokenError(f"Position {position:,} of a sequence holds {found}; {expected} is due there.", "malformed")

"""Does everything that the model generates become a text, a picture or a sound? The gate is 100 %.

How ids are generated is the caller's business: a function from prompts to ids, such as a grammar makes it. What
comes back is judged here by the token space and the tokenizers alone: the segment ends with its end token, holds
whole content of its modality, and decodes to something of the right size with nothing but finite values.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from qwen3_vlm.errors import DataError, TokenError
from qwen3_vlm.evaluate.conditions import json_interval
from qwen3_vlm.evaluate.gates import rate_gate
from qwen3_vlm.evaluate.intervals import Interval, wilson_interval
from qwen3_vlm.evaluate.token_losses import TokenRecord
from qwen3_vlm.tokenization.sequences import BOUNDARIES, Ids, prompt_ids, sequence_format
from qwen3_vlm.tokenization.token_space import Content, TokenSpace
from qwen3_vlm.tokenization.waveforms import Waveform

Decoded = str | Image.Image | tuple[Waveform, int]
Prompt = tuple[str, Mapping[str, npt.NDArray[Any]]]  # task, and the source's ids by modality
Generate = Callable[[Sequence[Prompt]], Iterable[npt.NDArray[Any]]]
"""What follows each prompt, as it was generated: the segment's ids, its end token, and anything after that."""


class Decoder(Protocol):
    """What a UnifiedTokenizer decodes with."""

    token_space: TokenSpace

    def decode_text(self, ids: Any) -> str: ...

    def decode_image(self, ids: Any) -> Image.Image: ...

    def decode_audio(self, ids: Any) -> tuple[Waveform, int]: ...


@dataclass(frozen=True)
class DecodeReport:
    """What became of the generated segments of one task."""

    task: str
    tried: int
    rate: Interval  # share that decoded, Wilson
    failures: dict[str, int]  # reason → segments
    settings: dict[str, Any] = field(default_factory=dict)  # how they were generated, in the caller's words

    @property
    def passed(self) -> bool:
        """Enough were tried and every one decoded."""
        return all(gate["passed"] for gate in self.gates())

    def gates(self) -> list[dict[str, Any]]:
        """The `gates` of evidence.json."""
        return [rate_gate(f"{self.task}: decodes", self.rate, self.tried)]

    def to_dict(self) -> dict[str, Any]:
        """The section of evidence.json."""
        return {
            "passed": self.passed,
            "task": self.task,
            "tried": self.tried,
            "rate": json_interval(self.rate),
            "failures": self.failures,
            "settings": self.settings,
        }

    def summary(self) -> dict[str, Any]:
        """Flat, for a line of metrics.jsonl."""
        return {"passed": self.passed, "tried": self.tried, "rate": self.rate.value, "rate_low": self.rate.low}


def measure_decoding(
    tokenizer: Decoder,
    task: str,
    records: Iterable[TokenRecord],
    generate: Generate,
    *,
    samples: int = 64,
    batch_size: int = 64,
    confidence: float = 0.95,
    settings: Mapping[str, Any] | None = None,
) -> DecodeReport:
    """Generate the target of `samples` records and decode each.

    Args:
        tokenizer: the UnifiedTokenizer.
        records: (id, {modality: global ids}); those without the task's source are passed over.
        generate: see `Generate`.
        settings: how it generates, for the evidence.

    Raises:
        TokenError: there is no such task.
        DataError: no record has the task's source.
    """
    target = sequence_format(task).target
    prompts = take_prompts(tokenizer.token_space, task, records, samples)
    failures: Counter[str] = Counter()
    for start in range(0, len(prompts), batch_size):
        for generated in generate(prompts[start : start + batch_size]):
            try:
                decode_segment(tokenizer, target, read_segment(tokenizer.token_space, target, generated))
            except TokenError as error:
                failures[error.reason] += 1
    rate = wilson_interval(len(prompts) - failures.total(), len(prompts), confidence)
    return DecodeReport(task, len(prompts), rate, dict(sorted(failures.items())), dict(settings or {}))


def take_prompts(token_space: TokenSpace, task: str, records: Iterable[TokenRecord], count: int) -> list[Prompt]:
    """The sources of the first `count` records that have what the task begins with; no target is among them.

    Raises:
        DataError: there is none.
    """
    prompts: list[Prompt] = []
    for _, ids in records:
        if len(prompts) == count:
            break
        try:
            prompts.append(prompt_of(token_space, task, ids))
        except TokenError as error:
            if error.reason in ("unknown", "unknown_task"):
                raise
    if not prompts:
        raise DataError(f"None of the records given has what {task} begins with: {sequence_format(task).source}.")
    return prompts


def prompt_of(token_space: TokenSpace, task: str, ids: Mapping[str, npt.NDArray[Any]]) -> Prompt:
    """A record's source alone.

    Raises:
        TokenError: it is missing, empty, or of other ids than its modality has.
    """
    prompt_ids(token_space, task, ids)
    source = sequence_format(task).source
    return task, {source: ids[source]}


def read_segment(token_space: TokenSpace, modality: Content, generated: npt.NDArray[Any]) -> Ids:
    """The ids of a generated segment, its end token and what follows left out.

    Raises:
        TokenError: it has no end ("no_end"), nothing in it ("empty"), or other ids than its modality has.
    """
    values = np.asarray(generated)
    boundary = BOUNDARIES[modality].end
    ends = np.flatnonzero(values == token_space.special(boundary))
    if not len(ends):
        raise TokenError(f"The {len(values):,} generated ids have no {boundary}.", "no_end")
    if not ends[0]:
        raise TokenError(f"The generated {modality} ends before its first id.", "empty")
    ids = values[: ends[0]]
    token_space.require_content(ids, modality)
    return ids.astype(np.int32)


def decode_segment(tokenizer: Decoder, modality: Content, ids: Ids) -> Decoded:
    """Text, picture, or waveform (A, S) with its rate.

    Raises:
        TokenError: it does not decode, or ("bad_output") to something of another size or not finite.
    """
    space = tokenizer.token_space
    if modality == "text":
        return tokenizer.decode_text(ids)
    if modality == "image" and space.image is not None:
        picture, (height, width) = tokenizer.decode_image(ids), space.image.resolution
        if picture.size != (width, height):
            raise TokenError(
                f"The picture came out as {picture.width} × {picture.height} pixels, not {width} × {height}.",
                "bad_output",
            )
        return picture
    waveform, rate = tokenizer.decode_audio(ids)
    if space.audio is not None:
        samples = len(ids) // space.audio.num_codebooks * space.audio.samples_per_frame
        if waveform.shape != (space.audio.channels, samples) or not np.isfinite(waveform).all():
            raise TokenError(
                f"The sound came out as {waveform.shape}, or not finite; ({space.audio.channels}, {samples}) is right.",
                "bad_output",
            )
    return waveform, rate

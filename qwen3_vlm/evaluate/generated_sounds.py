"""What an independent recogniser understands of generated speech, beside what it understands of the references.

The references are what the codec gives back of the true ids. A recogniser mishears those too, and a small codec makes
it worse: so the figure that judges the *model* is the ratio of the two word error rates, over the same sentences.
The recogniser is that of `speech`: English, and of the extra `asr`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import soxr
from numpy.typing import NDArray

from qwen3_vlm.errors import DataError
from qwen3_vlm.evaluate.intervals import Interval
from qwen3_vlm.evaluate.speech import (
    SAMPLING_RATE,
    WINDOW_SECONDS,
    WordErrors,
    normalise,
    word_error_rate,
    word_error_ratio,
)
from qwen3_vlm.tokenization.waveforms import Waveform

Sound = tuple[Waveform, int]  # (A, S) samples, and their rate in Hz
MIN_SECONDS = 0.05  # what is shorter holds no word, and is not even listened to


class Listener(Protocol):
    """A recogniser."""

    def transcribe(self, sounds: Sequence[NDArray[np.floating[Any]]], batch_size: int = 8) -> list[str]:
        """One transcript for each 16 kHz mono sound."""


@dataclass(frozen=True)
class SpeechScores:
    """The sounds that were generated for one task."""

    task: str
    tried: int
    decoded: int  # of those judged; the others count as silence
    left_out: int  # without an English word to be right about, or too long for the recogniser
    generated: WordErrors
    round_trip: WordErrors  # of the references, through the codec alone
    ratio: Interval  # errors of the generated ÷ errors of the references, paired bootstrap
    heard: tuple[str, ...] = ()  # what was understood of each generated sound

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable, without the transcripts."""
        return {
            "task": self.task,
            "tried": self.tried,
            "decoded": self.decoded,
            "left_out": self.left_out,
            "words": self.generated.words,
            "generated": _errors(self.generated),
            "round_trip": _errors(self.round_trip),
            "ratio": self.ratio.to_dict(),
        }

    def row(self) -> dict[str, Any]:
        """One row of a table of results."""
        return {
            "task": self.task,
            "sounds": self.tried - self.left_out,
            "words": self.generated.words,
            "word errors": _percent(self.generated.rate),
            "of the codec's round trip": _percent(self.round_trip.rate),
            "ratio": self.ratio.to_dict(),
            "left out": self.left_out,
        }


def measure_speech(
    task: str,
    texts: Sequence[str],
    generated: Sequence[Sound | None],
    references: Sequence[Sound],
    listener: Listener,
) -> SpeechScores:
    """Word error rates of generated sounds and of their references, over the same texts.

    Args:
        texts: what was to be said.
        generated: None for what did not decode. What lasts longer than the recogniser can hear is cut there: all
            that it says beyond is lost, not forgiven.

    Raises:
        DataError: the three differ in number, or no text has a word to be right about.
        ModelError: the extra `asr` is not installed.
    """
    if not len(texts) == len(generated) == len(references):
        raise DataError(f"{len(texts)} texts, {len(generated)} sounds and {len(references)} references: give as many.")
    judged = [
        number
        for number, (text, (wave, rate)) in enumerate(zip(texts, references, strict=True))
        if normalise(text) and wave.shape[-1] <= WINDOW_SECONDS * rate
    ]
    if not judged:
        raise DataError(
            f"No sound of {task} can be judged: none of the {len(texts)} texts has an English word to hear."
        )
    said = [texts[number] for number in judged]
    made = [generated[number] for number in judged]
    heard = listen(listener, made)
    again = listen(listener, [references[number] for number in judged])
    return SpeechScores(
        task,
        tried=len(texts),
        decoded=sum(sound is not None for sound in made),
        left_out=len(texts) - len(judged),
        generated=word_error_rate(said, heard),
        round_trip=word_error_rate(said, again),
        ratio=word_error_ratio(said, heard, again),
        heard=tuple(heard),
    )


def listen(listener: Listener, sounds: Sequence[Sound | None]) -> list[str]:
    """One transcript per sound; none ("") of what is missing or too short to hold a word."""
    waves = [np.zeros(0, np.float32) if sound is None else at_16_khz(*sound) for sound in sounds]
    audible = [number for number, wave in enumerate(waves) if len(wave) >= MIN_SECONDS * SAMPLING_RATE]
    texts = [""] * len(sounds)
    for number, text in zip(audible, listener.transcribe([waves[number] for number in audible]), strict=True):
        texts[number] = text
    return texts


def at_16_khz(waveform: Waveform, sampling_rate_hz: int) -> NDArray[np.float32]:
    """(A, S) at any rate → the mean of its channels at 16 kHz, the recogniser's window at most."""
    mono = np.atleast_2d(waveform).mean(axis=0, dtype=np.float64).astype(np.float32)
    if sampling_rate_hz != SAMPLING_RATE and len(mono):
        mono = soxr.resample(mono, sampling_rate_hz, SAMPLING_RATE, quality="HQ")
    return mono[: WINDOW_SECONDS * SAMPLING_RATE]


def _errors(errors: WordErrors) -> dict[str, Any]:
    return {
        **errors.rate.to_dict(),
        "substitutions": errors.substitutions,
        "deletions": errors.deletions,
        "insertions": errors.insertions,
    }


def _percent(rate: Interval) -> dict[str, float]:
    return {"percent": rate.value, "low": rate.low, "high": rate.high}

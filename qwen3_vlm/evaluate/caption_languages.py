"""Captions in several languages: scored within each, for idf and words of one language mean nothing in another."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen3_vlm.evaluate.caption_scores import score_captions
from qwen3_vlm.evaluate.caption_words import words_for
from qwen3_vlm.evaluate.intervals import wilson_interval


def score_languages(
    candidates: Sequence[str],
    references: Sequence[str | Sequence[str]],
    languages: Sequence[str],
    confidence: float = 0.95,
) -> dict[str, dict[str, Any]]:
    """Language → `score_captions` of its captions, the most frequent language first.

    Texts are compared in Unicode's composed form (NFC): "é" is one letter however it was typed.

    Raises:
        ValueError: the three differ in length, or a candidate has no reference.
    """
    if not len(candidates) == len(references) == len(languages):
        raise ValueError(f"{len(candidates)} captions, {len(references)} references, {len(languages)} languages")
    scores = {}
    for name, _ in Counter(languages).most_common():
        chosen = [index for index, language in enumerate(languages) if language == name]
        said = [_composed(candidates[index]) for index in chosen]
        wanted = [_all_composed(references[index]) for index in chosen]
        scores[name] = score_captions(said, wanted, confidence, words_for(name))
    return scores


def over_languages(scores: dict[str, dict[str, Any]], confidence: float = 0.95) -> dict[str, Any]:
    """Exact match over all captions with Wilson's interval, and the plain mean of the languages' CIDEr-D."""
    count = sum(part["n"] for part in scores.values())
    right = round(sum(part["n"] * (part["exact_match"] or 0.0) for part in scores.values()))
    exact = wilson_interval(right, count, confidence)
    cider = [part["cider_d"] for part in scores.values() if part["n"]]
    return {
        "n": count,
        "exact_match": exact.value,
        "exact_match_low": exact.low,
        "exact_match_high": exact.high,
        "cider_d": float(np.mean(cider)) if cider else None,
    }


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _all_composed(wanted: str | Sequence[str]) -> str | list[str]:
    return _composed(wanted) if isinstance(wanted, str) else [_composed(text) for text in wanted]

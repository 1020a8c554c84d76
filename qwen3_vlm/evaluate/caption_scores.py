"""Caption scores: exact match and CIDEr-D.

CIDEr-D (Vedantam et al., arXiv:1411.5726) is computed as the published COCO caption tool computes
it: n-grams up to 4, sigma 6, idf from the references at hand, clipping, and the Gaussian penalty on
the number of *bigrams* (that is what the tool calls length). A test holds it to the tool's values.

`ptb_words` stands in for the tool's Java tokenizer (Penn Treebank rules, lower case, punctuation
removed). It agrees with it on ordinary captions; it knows only common abbreviations, and has no
rules for URLs, fractions or emoticons. Captions of other languages are cut by `caption_words`, and scored by language
in `caption_languages`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_vlm.evaluate.intervals import bootstrap_mean, wilson_interval

MAX_NGRAM = 4
SIGMA = 6.0

_ABBREVIATIONS = (
    "mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|inc|ltd|corp|co|ave|blvd|rd|jan|feb|mar|apr|aug|sept|sep|oct|nov|dec"
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_CONTRACTED = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me",
               "gimme": "gim me"}  # fmt: skip
_TYPOGRAPHY = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": " -- ", "—": " -- ", "…": " ... "})
_TOKEN = re.compile(
    r"(?P<acronym>(?:[a-z]\.){2,})"
    rf"|(?P<abbreviation>\b(?:{_ABBREVIATIONS})\.)"
    r"|(?P<number>\d+(?:[.,:/]\d+)+)"
    r"|(?P<clitic>'(?:s|re|ve|ll|d|m)\b)"
    r"|(?P<word>\w+(?:[-']\w+)*)"
    r"|(?P<mark>[^\s\w])"
)
_CLITIC = re.compile(r"^(.+?)(n't|'s|'re|'ve|'ll|'d|'m)$")
_REMOVED = frozenset("'`\".?!,:-;")

NGrams = Counter[tuple[str, ...]]


@dataclass(frozen=True)
class CiderD:
    """The corpus score (a mean) and each caption's own; 10 is the highest."""

    score: float
    per_caption: NDArray[np.float64]  # (n,)


def exact_match(candidates: Sequence[str], references: Sequence[str | Sequence[str]]) -> NDArray[np.bool_]:
    """(n,) true where a candidate equals one of its references, outer and repeated blanks aside."""
    _require_pairs(candidates, references)
    pairs = zip(candidates, map(_as_list, references), strict=True)
    return np.array([_squeeze(text) in map(_squeeze, wanted) for text, wanted in pairs], dtype=np.bool_)


def cider_d(
    candidates: Sequence[str],
    references: Sequence[str | Sequence[str]],
    words: Callable[[str], list[str]] | None = None,
) -> CiderD:
    """Score each candidate against its references; idf comes from all references given.

    A set of one sample has no idf: every score is 0, as in the published tool.

    Args:
        words: cuts a text into words; None: `ptb_words`.

    Raises:
        ValueError: the two differ in length, are empty, or a candidate has no reference.
    """
    _require_pairs(candidates, references)
    cut = words or ptb_words
    cooked = [[_ngrams(cut(text)) for text in _as_list(wanted)] for wanted in references]
    frequency: NGrams = Counter(gram for refs in cooked for gram in {gram for ref in refs for gram in ref})
    idf = {gram: math.log(len(cooked)) - math.log(count) for gram, count in frequency.items()}
    unseen = math.log(len(cooked))
    pairs = zip(candidates, cooked, strict=True)
    scores = [_caption_score(_ngrams(cut(text)), refs, idf, unseen) for text, refs in pairs]
    return CiderD(float(np.mean(scores)), np.array(scores))


def score_captions(
    candidates: Sequence[str],
    references: Sequence[str | Sequence[str]],
    confidence: float = 0.95,
    words: Callable[[str], list[str]] | None = None,
) -> dict[str, Any]:
    """Exact match (Wilson's interval) and CIDEr-D (bootstrap over captions, idf as it is), JSON-serialisable."""
    if not candidates:
        names = ("exact_match", "exact_match_low", "exact_match_high", "cider_d", "cider_d_low", "cider_d_high")
        return {"n": 0, **dict.fromkeys(names)}
    exact = wilson_interval(int(exact_match(candidates, references).sum()), len(candidates), confidence)
    cider = bootstrap_mean(cider_d(candidates, references, words).per_caption, confidence=confidence)
    return {
        "n": len(candidates),
        "exact_match": exact.value,
        "exact_match_low": exact.low,
        "exact_match_high": exact.high,
        "cider_d": cider.value,
        "cider_d_low": cider.low,
        "cider_d_high": cider.high,
    }


def ptb_words(text: str) -> list[str]:
    """Lower-case Penn Treebank words without punctuation: "It's a cat." → ["it", "'s", "a", "cat"]."""
    words: list[str] = []
    for match in _TOKEN.finditer(text.lower().translate(_TYPOGRAPHY)):
        token = match.group()
        if match.lastgroup == "word":
            clitic = _CLITIC.match(token)
            words += clitic.groups() if clitic else _CONTRACTED.get(token, token).split()
        elif token not in _REMOVED:
            words.append(_BRACKETS.get(token, token))
    return words


def _ngrams(words: Sequence[str]) -> NGrams:
    return Counter(
        tuple(words[start : start + n]) for n in range(1, MAX_NGRAM + 1) for start in range(len(words) - n + 1)
    )


def _caption_score(
    candidate: NGrams, references: list[NGrams], idf: dict[tuple[str, ...], float], unseen: float
) -> float:
    """10 × the mean over references and n of the clipped, length-penalised tf-idf cosine."""
    hypothesis, hypothesis_norms = _tf_idf(candidate, idf, unseen)
    total = 0.0
    for reference in references:
        wanted, wanted_norms = _tf_idf(reference, idf, unseen)
        products = [0.0] * MAX_NGRAM
        for gram, weight in hypothesis.items():
            other = wanted.get(gram, 0.0)
            products[len(gram) - 1] += min(weight, other) * other
        norms = [a * b or 1.0 for a, b in zip(hypothesis_norms, wanted_norms, strict=True)]
        penalty = math.exp(-((_length(candidate) - _length(reference)) ** 2) / (2 * SIGMA**2))
        total += penalty * sum(product / norm for product, norm in zip(products, norms, strict=True)) / MAX_NGRAM
    return 10 * total / len(references)


def _tf_idf(
    grams: NGrams, idf: dict[tuple[str, ...], float], unseen: float
) -> tuple[dict[tuple[str, ...], float], list[float]]:
    weights = {gram: count * idf.get(gram, unseen) for gram, count in grams.items()}
    squares = [0.0] * MAX_NGRAM
    for gram, weight in weights.items():
        squares[len(gram) - 1] += weight * weight
    return weights, [math.sqrt(square) for square in squares]


def _length(grams: NGrams) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _as_list(wanted: str | Sequence[str]) -> Sequence[str]:
    return [wanted] if isinstance(wanted, str) else wanted


def _require_pairs(candidates: Sequence[str], references: Sequence[str | Sequence[str]]) -> None:
    if len(candidates) != len(references) or not candidates:
        raise ValueError(f"one reference per candidate is needed, got {len(candidates)} and {len(references)}")
    if not all(map(_as_list, references)):
        raise ValueError("a candidate has no reference")

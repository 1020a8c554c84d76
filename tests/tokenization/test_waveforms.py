"""Sounds of any rate, level, length and number of channels to clips: against plain formulas."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.errors import TokenError
from qwen3_vlm.tokenization.token_space import AudioIdentity
from qwen3_vlm.tokenization.uti_config import AudioConfig
from qwen3_vlm.tokenization.waveforms import prepare_sound

CODEC = AudioIdentity("c", "dac", (8, 8), 1000, 1, 10, 0.1, "0" * 64)  # frames of 10 samples, clips of 10 frames
STEREO = replace(CODEC, channels=2)
CONFIG = AudioConfig(source="x", clip_seconds=0.1)


def tone(samples: int, rate: int = 1000, hertz: float = 50.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)


@given(st.integers(1, 450), st.sampled_from(["chunk", "crop"]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_clips_hold_the_sound_and_then_silence(samples: int, long_audio: str, pad_to_clip: bool) -> None:
    sound = np.random.default_rng(samples).uniform(-1, 1, samples).astype(np.float32)
    config = replace(CONFIG, long_audio=long_audio, pad_to_clip=pad_to_clip)  # type: ignore[arg-type]
    prepared = prepare_sound(sound, 1000, CODEC, config)
    joined = np.concatenate(prepared.clips, axis=1)
    kept = samples if long_audio == "chunk" else min(samples, 100)
    assert prepared.samples == kept
    assert prepared.cropped == (kept < samples)
    assert np.array_equal(joined[0, :kept], sound[:kept])
    assert not joined[:, kept:].any()
    assert joined.shape[1] == -(-kept // (100 if pad_to_clip else 10)) * (100 if pad_to_clip else 10)
    assert all(clip.shape[1] == 100 for clip in prepared.clips[:-1])
    assert all(clip.shape[1] % 10 == 0 for clip in prepared.clips)


def test_channels_are_mixed() -> None:
    left, right = np.full(20, 0.5, np.float32), np.full(20, -0.1, np.float32)
    mono = prepare_sound(np.stack([left, right]), 1000, CODEC, CONFIG)
    assert np.allclose(mono.clips[0], 0.2)
    stereo = prepare_sound(left, 1000, STEREO, CONFIG)
    assert np.array_equal(stereo.clips[0], np.stack([left, left]))
    with pytest.raises(TokenError, match="3 channels"):
        prepare_sound(np.zeros((3, 20)), 1000, STEREO, CONFIG)


@pytest.mark.parametrize("rate", [500, 2000, 44_100])
def test_resampling_keeps_pitch_level_and_length(rate: int) -> None:
    prepared = prepare_sound(tone(2 * rate, rate), rate, replace(CODEC, clip_seconds=5.0), CONFIG)
    assert abs(prepared.samples - 2000) <= 1
    sound = prepared.clips[0][0, :2000]
    middle = slice(200, -200)  # away from the filter's ends
    assert np.abs(sound[middle] - tone(2000)[middle]).max() < 2e-3


@pytest.mark.parametrize(("policy", "peak", "clipped", "gain"), [("clip", 1.0, 2, 1.0), ("scale", 1.0, 0, 0.5)])
def test_beyond_full_scale(policy: str, peak: float, clipped: int, gain: float) -> None:
    sound = np.array([0.5, 2.0, -1.5, 0.0], np.float32)
    prepared = prepare_sound(sound, 1000, CODEC, replace(CONFIG, clipping=policy))  # type: ignore[arg-type]
    assert np.abs(prepared.clips[0]).max() == peak
    assert (prepared.clipped_samples, prepared.gain) == (clipped, gain)
    assert np.allclose(prepared.clips[0][0, 0], 0.5 * gain)


def test_int16_is_scaled() -> None:
    prepared = prepare_sound(np.array([-32768, 16384], np.int16), 1000, CODEC, CONFIG)
    assert prepared.clips[0][0, :2].tolist() == [-1.0, 0.5]


def test_silence_is_marked() -> None:
    assert prepare_sound(np.zeros(20), 1000, CODEC, CONFIG).silent
    assert prepare_sound(np.full(20, 0.9e-3), 1000, CODEC, CONFIG).silent
    assert not prepare_sound(np.full(20, 1.1e-3), 1000, CODEC, CONFIG).silent


@pytest.mark.parametrize(
    ("sound", "rate", "change", "reason"),
    [
        (np.array([0.0, np.nan]), 1000, {}, "audio_not_finite"),
        (np.array([0.0, 1e300]), 1000, {}, "audio_not_finite"),
        (np.array([]), 1000, {}, "audio_empty"),
        (np.zeros((2, 3, 4)), 1000, {}, "audio_shape"),
        (np.zeros((1000, 2)), 1000, {}, "audio_shape"),
        (np.zeros(10, np.int32), 1000, {}, "audio_dtype"),
        (np.zeros(10), 0, {}, "audio_rate"),
        (np.zeros(10), True, {}, "audio_rate"),
        (np.zeros(2001), 1000, {"max_seconds": 2.0}, "audio_too_long"),
        (np.zeros(101), 1000, {"long_audio": "refuse"}, "audio_too_long"),
        (np.zeros(10), 1000, {"silence": "refuse"}, "audio_silent"),
        (np.full(10, 1.5), 1000, {"clipping": "refuse"}, "audio_clipping"),
    ],
)
def test_what_is_refused(sound: np.ndarray, rate: int, change: dict[str, object], reason: str) -> None:
    with pytest.raises(TokenError) as caught:
        prepare_sound(sound, rate, CODEC, replace(CONFIG, **change))  # type: ignore[arg-type]
    assert caught.value.reason == reason

"""A sound of any rate, length and number of channels to the clips that an audio codec takes.

Shapes: A channels, S samples. Full scale is ±1.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen3_vlm.errors import TokenError
from qwen3_vlm.tokenization.token_space import AudioIdentity
from qwen3_vlm.tokenization.uti_config import AudioConfig

Waveform = npt.NDArray[np.float32]

MAX_CHANNELS = 64
MIN_RATE_HZ, MAX_RATE_HZ = 100, 1_000_000


@dataclass(frozen=True, slots=True)
class PreparedSound:
    """Clips as the codec takes them, each a whole number of frames, and what was done to get there."""

    clips: tuple[Waveform, ...]  # float32 (A, S), S a multiple of samples_per_frame
    samples: int  # of sound in the clips together; the rest is silence that fills the last frame or clip
    clipped_samples: int  # samples beyond full scale that were cut off
    gain: float  # what the sound was multiplied by
    cropped: bool  # the end was left out
    silent: bool
    source: dict[str, int]  # sampling_rate_hz, channels and samples of what was given


def prepare_sound(waveform: Any, sampling_rate_hz: int, codec: AudioIdentity, config: AudioConfig) -> PreparedSound:
    """Mix, resample, bound and cut a sound (S,) or (A, S), float or int16, by the config's policy.

    Raises:
        TokenError: it is no sound, or the policy refuses it; `reason` says which.
    """
    sound = _checked(waveform, sampling_rate_hz, config.max_seconds)
    source = {"sampling_rate_hz": sampling_rate_hz, "channels": sound.shape[0], "samples": sound.shape[1]}
    sound = _resample(_mix(sound, codec.channels), sampling_rate_hz, codec.sampling_rate_hz)
    sound, clipped, gain = _bound(sound, config)
    silent = _is_silent(sound, config)
    sound, cropped = _cut(sound, codec, config)
    return PreparedSound(_clips(sound, codec, config), sound.shape[1], clipped, gain, cropped, silent, source)


def _checked(waveform: Any, rate: int, max_seconds: float) -> Waveform:
    if isinstance(rate, bool) or not isinstance(rate, int) or not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
        raise TokenError(f"A sampling rate of {rate!r} Hz can't be; it lies in {MIN_RATE_HZ:,}–{MAX_RATE_HZ:,}.",
                         "audio_rate")  # fmt: skip
    sound = np.asarray(waveform)
    sound = sound[None] if sound.ndim == 1 else sound
    if sound.ndim != 2 or not 1 <= sound.shape[0] <= MAX_CHANNELS:
        raise TokenError(
            f"A sound has the shape (samples,) or (channels, samples), not {np.shape(waveform)}.", "audio_shape"
        )
    if not sound.shape[1]:
        raise TokenError("The sound has no samples.", "audio_empty")
    if sound.shape[1] > max_seconds * rate:
        raise TokenError(
            f"The sound is {sound.shape[1] / rate:,.1f} s long; at most {max_seconds:g} s are encoded "
            "(audio.max_seconds).", "audio_too_long",
        )  # fmt: skip
    if sound.dtype == np.int16:
        return (sound / np.float32(32768)).astype(np.float32)
    if sound.dtype.kind != "f":
        raise TokenError(f"Samples are floating point or int16, not {sound.dtype}.", "audio_dtype")
    with np.errstate(over="ignore"):  # what float32 can't hold is refused with the rest
        samples = sound.astype(np.float32)
    bad = int(np.count_nonzero(~np.isfinite(samples)))
    if bad:
        raise TokenError(f"{bad:,} samples of the sound are not finite (NaN or infinite).", "audio_not_finite")
    return samples


def _mix(sound: Waveform, channels: int) -> Waveform:
    if sound.shape[0] == channels:
        return sound
    if channels == 1:
        return sound.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
    if sound.shape[0] == 1:
        return np.repeat(sound, channels, axis=0)
    raise TokenError(f"The sound has {sound.shape[0]} channels, the codec {channels}; mix it first.", "audio_channels")


def _resample(sound: Waveform, rate: int, wanted: int) -> Waveform:
    if rate == wanted:
        return sound
    import soxr

    resampled = soxr.resample(np.ascontiguousarray(sound.T), rate, wanted, quality="HQ")
    if not len(resampled):
        raise TokenError(f"The sound is too short to be resampled from {rate:,} to {wanted:,} Hz.", "audio_empty")
    return np.ascontiguousarray(resampled.T, dtype=np.float32)


def _bound(sound: Waveform, config: AudioConfig) -> tuple[Waveform, int, float]:
    """Within full scale: the sound, how many samples were cut off, and the gain."""
    peak = float(np.abs(sound).max())
    if peak <= 1:
        return sound, 0, 1.0
    if config.clipping == "refuse":
        raise TokenError(f"The sound goes beyond full scale (peak {peak:.3f}).", "audio_clipping")
    if config.clipping == "scale":
        return (sound / np.float32(peak)).clip(-1, 1), 0, 1 / peak
    return sound.clip(-1, 1), int(np.count_nonzero(np.abs(sound) > 1)), 1.0


def _is_silent(sound: Waveform, config: AudioConfig) -> bool:
    level = math.sqrt(float(np.mean(np.square(sound, dtype=np.float64))))
    silent = level < 10 ** (config.silence_dbfs / 20)
    if silent and config.silence == "refuse":
        decibels = f"{20 * math.log10(level):.0f} dBFS" if level else "nothing at all"
        raise TokenError(f"The sound is silent: {decibels}, below {config.silence_dbfs:g} dBFS.", "audio_silent")
    return silent


def _cut(sound: Waveform, codec: AudioIdentity, config: AudioConfig) -> tuple[Waveform, bool]:
    longest = codec.frames_per_clip * codec.samples_per_frame
    if sound.shape[1] <= longest or config.long_audio == "chunk":
        return sound, False
    if config.long_audio == "refuse":
        seconds = sound.shape[1] / codec.sampling_rate_hz
        raise TokenError(
            f"The sound is {seconds:.1f} s long, a clip {codec.clip_seconds:g} s (audio.long_audio is refuse).",
            "audio_too_long",
        )
    return sound[:, :longest], True


def _clips(sound: Waveform, codec: AudioIdentity, config: AudioConfig) -> tuple[Waveform, ...]:
    """Clips of at most clip_seconds; the last one is filled up to whole frames, or to a whole clip."""
    longest = codec.frames_per_clip * codec.samples_per_frame
    unit = longest if config.pad_to_clip else codec.samples_per_frame
    filled = np.pad(sound, ((0, 0), (0, -sound.shape[1] % unit)))
    return tuple(
        np.ascontiguousarray(filled[:, start : start + longest]) for start in range(0, filled.shape[1], longest)
    )

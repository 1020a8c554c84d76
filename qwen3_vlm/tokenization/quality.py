"""How close a decoded picture or sound is to its original: PSNR, SSIM, SNR and log-mel distance.

All four are plain numbers that JSON can hold: decibels end at ±`MAX_DB`, which stands for "equal".
They compare what went into the tokenizer (resized, resampled) with what came out of it, so they
measure the codec and not the policy before it.

Shapes: H W pixels, A audio channels, S samples.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_DB = 100.0  # dB; reported for equal inputs, and for those closer than that
PEAK = 255.0  # of uint8 pixels
SSIM_WINDOW = 11  # pixels; the window, σ, K1 and K2 of Wang et al. 2004, section III.B
_SSIM_SIGMA, _SSIM_K1, _SSIM_K2 = 1.5, 0.01, 0.03
MEL_WINDOW_SECONDS, MEL_HOP_SECONDS, MEL_BANDS = 0.064, 0.016, 80
MEL_FLOOR = 1e-4  # of full scale: −80 dB, below which speech counts as silence


def psnr(reference: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two pictures (H, W, 3), dB, at most `MAX_DB`.

    The squared error is averaged over all pixels and channels, and the peak is 255.

    Raises:
        ValueError: they are not uint8, differ in shape, or are empty.
    """
    _same_pictures(reference, decoded)
    error = float(np.mean((reference.astype(np.float64) - decoded) ** 2))
    return _decibels(PEAK**2, error)


def ssim(reference: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> float:
    """Structural similarity of two pictures (H, W, C), −1…1; 1 is equal.

    Wang et al. 2004 (doi:10.1109/TIP.2003.819861): a Gaussian window of 11×11 pixels with σ 1.5 that stays
    inside the picture, population variances; the mean over places, then over channels.

    Raises:
        ValueError: they are not uint8, differ in shape, or a side is shorter than the window.
    """
    _same_pictures(reference, decoded)
    if min(reference.shape[:2]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs {SSIM_WINDOW} pixels on each side, and the picture is {reference.shape}")
    x, y = reference.astype(np.float64), decoded.astype(np.float64)
    mean_x, mean_y = _gaussian(x), _gaussian(y)
    variance_x = _gaussian(x * x) - mean_x**2
    variance_y = _gaussian(y * y) - mean_y**2
    covariance = _gaussian(x * y) - mean_x * mean_y
    c1, c2 = (_SSIM_K1 * PEAK) ** 2, (_SSIM_K2 * PEAK) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(likeness / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))))


def snr_db(reference: NDArray[np.floating[Any]], decoded: NDArray[np.floating[Any]]) -> float | None:
    """Signal-to-noise ratio of two sounds (A, S), dB within ±`MAX_DB`; None where the original is silent.

    Sample against sample, neither shifted nor scaled: a codec that keeps the sound but not the phase scores
    low here and well in `log_mel_l1`.

    Raises:
        ValueError: they differ in shape, are empty, or not finite.
    """
    x, y = _same_sounds(reference, decoded)
    signal, noise = float(np.sum(x**2)), float(np.sum((x - y) ** 2))
    return None if signal == 0 else _decibels(signal, noise)


def log_mel_l1(
    reference: NDArray[np.floating[Any]], decoded: NDArray[np.floating[Any]], sampling_rate_hz: int
) -> float:
    """Mean absolute difference of log10 mel magnitudes of two sounds (A, S); 0 is equal, 0.05 is 1 dB.

    See `log_mel` for windows and bands. Averaged over frames, bands and channels.

    Raises:
        ValueError: they differ in shape, are empty, or not finite.
    """
    x, y = _same_sounds(reference, decoded)
    pairs = zip(x, y, strict=True)
    return float(np.mean([np.abs(log_mel(a, sampling_rate_hz) - log_mel(b, sampling_rate_hz)) for a, b in pairs]))


def log_mel(samples: NDArray[np.floating[Any]], sampling_rate_hz: int) -> NDArray[np.float64]:
    """log10 magnitudes of one channel (S,) → (80 bands, frames).

    Hann windows of 64 ms every 16 ms, at any sampling rate; zeros around the sound; 80 Slaney mel bands
    from 0 to half the rate (below 5 kHz fewer, since each needs a frequency of its own). A full-scale sine
    has a magnitude of about 1, and the floor is 1e-4.
    """
    from transformers.audio_utils import spectrogram, window_function

    window = round(MEL_WINDOW_SECONDS * sampling_rate_hz)
    shape = window_function(window, "hann")
    magnitudes = spectrogram(
        np.asarray(samples, dtype=np.float64) * (2 / shape.sum()),
        shape,
        frame_length=window,
        hop_length=round(MEL_HOP_SECONDS * sampling_rate_hz),
        pad_mode="constant",
        mel_filters=_mel_filters(window, sampling_rate_hz),
        mel_floor=MEL_FLOOR,
        dtype=np.dtype(np.float64),
    )
    return np.log10(magnitudes)


@lru_cache(maxsize=8)
def _mel_filters(window: int, sampling_rate_hz: int) -> NDArray[np.float64]:
    from transformers.audio_utils import mel_filter_bank

    bins, half = window // 2 + 1, sampling_rate_hz / 2
    bands = min(MEL_BANDS, bins // 2)
    return mel_filter_bank(bins, bands, 0.0, half, sampling_rate_hz, norm=None, mel_scale="slaney")


def _gaussian(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Windowed means of (H, W, C), where the whole window fits: (H − 10, W − 10, C)."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SSIM_SIGMA**2))
    weights /= weights.sum()
    rows, columns = (size - SSIM_WINDOW + 1 for size in values.shape[:2])
    tall = sum(weight * values[start : start + rows] for start, weight in enumerate(weights))
    return np.asarray(sum(weight * tall[:, start : start + columns] for start, weight in enumerate(weights)))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return MAX_DB
    if signal == 0:
        return -MAX_DB
    return float(np.clip(10 * (np.log10(signal) - np.log10(noise)), -MAX_DB, MAX_DB))


def _same_pictures(reference: NDArray[Any], decoded: NDArray[Any]) -> None:
    if reference.dtype != np.uint8 or decoded.dtype != np.uint8:
        raise ValueError(f"pictures are compared as uint8, not as {reference.dtype} and {decoded.dtype}")
    if reference.shape != decoded.shape or reference.ndim != 3 or not reference.size:
        raise ValueError(f"pictures are compared as (H, W, C) of one shape, not {reference.shape} and {decoded.shape}")


def _same_sounds(reference: NDArray[Any], decoded: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if reference.shape != decoded.shape or reference.ndim != 2 or not reference.size:
        raise ValueError(f"sounds are compared as (A, S) of one shape, not {reference.shape} and {decoded.shape}")
    x, y = reference.astype(np.float64), decoded.astype(np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("sounds are compared where all samples are finite, and some are not")
    return x, y

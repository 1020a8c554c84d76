"""The quality figures against scikit-image, a plain STFT, and what can be said without either."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from qwen3_vlm.tokenization.quality import MAX_DB, MEL_BANDS, log_mel, log_mel_l1, psnr, snr_db, ssim

RATE = 16_000


def noisy_pair(height: int, width: int, amount: float, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A smooth picture and the same with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([127 + 90 * np.sin(x / 5 + c) * np.cos(y / 7 - c) for c in range(3)], axis=-1)
    spoilt = smooth + rng.normal(0, amount, smooth.shape)
    return smooth.round().astype(np.uint8), spoilt.clip(0, 255).round().astype(np.uint8)


def sine(frequency: float, seconds: float = 1.0, rate: int = RATE) -> NDArray[np.float32]:
    return np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate).astype(np.float32)[None]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (11, 11), (13, 40), (96, 31)])
@pytest.mark.parametrize("amount", [0.6, 5.0, 60.0])
def test_pictures_as_scikit_image_has_them(height: int, width: int, amount: float) -> None:
    reference, decoded = noisy_pair(height, width, amount)
    assert psnr(reference, decoded) == pytest.approx(peak_signal_noise_ratio(reference, decoded), abs=1e-9)
    theirs = structural_similarity(
        reference,
        decoded,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=2,
    )
    assert ssim(reference, decoded) == pytest.approx(theirs, abs=1e-9)


def test_psnr_by_hand() -> None:
    black, grey = np.zeros((4, 5, 3), np.uint8), np.full((4, 5, 3), 16, np.uint8)
    assert psnr(black, grey) == pytest.approx(20 * np.log10(255 / 16), abs=1e-12)
    one = black.copy()
    one[2, 3, 1] = 1
    assert psnr(black, one) == pytest.approx(10 * np.log10(255**2 * 60), abs=1e-12)
    assert psnr(black, black + np.uint8(255)) == 0.0


def test_ssim_of_flat_pictures_by_hand() -> None:
    """Without structure only the luminance term is left."""
    first, second = np.full((20, 20, 3), 100, np.uint8), np.full((20, 20, 3), 140, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(first, second) == pytest.approx((2 * 100 * 140 + c1) / (100**2 + 140**2 + c1), abs=1e-9)


def test_equal_is_a_number_that_json_holds() -> None:
    picture, _ = noisy_pair(32, 32, 1.0)
    sound = sine(440)
    figures = [psnr(picture, picture), ssim(picture, picture), snr_db(sound, sound), log_mel_l1(sound, sound, RATE)]
    assert figures == pytest.approx([MAX_DB, 1.0, MAX_DB, 0.0])
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_snr_by_hand() -> None:
    clean = np.array([[3.0, -4.0, 0.0], [0.0, 0.0, 5.0]])
    spoilt = clean + np.array([[0.1, 0.0, 0.0], [0.0, -0.2, 0.0]])
    assert snr_db(clean, spoilt) == pytest.approx(10 * np.log10(50 / 0.05), abs=1e-9)
    assert snr_db(clean, 0 * clean) == 0.0
    assert snr_db(clean, -clean) == pytest.approx(-20 * np.log10(2), abs=1e-9)


def test_snr_of_silence_is_no_number() -> None:
    """There is no signal to compare the noise with, however small it is."""
    silence = np.zeros((1, 100), np.float32)
    assert snr_db(silence, silence) is None
    assert snr_db(silence, silence + 1e-9) is None


def test_snr_stays_within_its_limits() -> None:
    sound = sine(300)
    assert snr_db(sound, sound + np.float32(1e-7)) == MAX_DB
    assert snr_db(sound * np.float32(1e-20), sound) == -MAX_DB


def plain_log_mel(samples: NDArray[np.float64], rate: int) -> NDArray[np.float64]:
    """The same figure from the definition: a DFT matrix, and triangles between points that are even in mel."""
    window, hop = round(0.064 * rate), round(0.016 * rate)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    padded = np.concatenate([np.zeros(window // 2), samples, np.zeros(window // 2)])
    starts = range(0, len(padded) - window + 1, hop)
    frames = np.stack([padded[start : start + window] * hann for start in starts])
    bins = np.arange(window // 2 + 1)
    spectrum = np.abs(frames @ np.exp(-2j * np.pi * np.outer(np.arange(window), bins) / window)) * 2 / hann.sum()
    step = 27 / np.log(6.4)
    top = rate / 2 * 3 / 200 if rate <= 2000 else 15 + step * np.log(rate / 2000)
    mels = np.linspace(0, top, MEL_BANDS + 2)
    corners = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) / step))
    hertz = bins * (rate / 2) / (window // 2)
    rising = (hertz[:, None] - corners[:-2]) / np.diff(corners)[:-1]
    falling = (corners[2:] - hertz[:, None]) / np.diff(corners)[1:]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return np.log10(np.maximum(1e-4, (spectrum @ triangles).T))


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 44_100])
def test_log_mel_from_its_definition(rate: int) -> None:
    rng = np.random.default_rng(1)
    samples = (sine(700, 0.3, rate) * 0.5)[0].astype(np.float64) + rng.normal(0, 0.01, round(0.3 * rate))
    assert log_mel(samples, rate) == pytest.approx(plain_log_mel(samples, rate), abs=1e-5)
    other = samples * 0.5
    expected = np.mean(np.abs(plain_log_mel(samples, rate) - plain_log_mel(other, rate)))
    assert log_mel_l1(samples[None], other[None], rate) == pytest.approx(expected, abs=1e-5)


def test_log_mel_measures_level_in_tenths_of_bels() -> None:
    """Half the amplitude is 0.301 everywhere above the floor; the phase does not matter."""
    noise = np.random.default_rng(2).normal(0, 0.2, (2, RATE))
    assert log_mel_l1(noise, noise / 2, RATE) == pytest.approx(np.log10(2), abs=1e-3)
    assert log_mel_l1(noise, -noise, RATE) == 0.0
    assert log_mel(sine(1000)[0], RATE).max() == pytest.approx(0.0, abs=0.25)


@pytest.mark.parametrize("rate", [500, 800, 1000, 1500, 2000, 3000, 4000, 5000, 6000])
def test_low_rates_have_fewer_bands(rate: int) -> None:
    """None of them empty: the library warns of an empty one, and warnings are errors here."""
    bands, frames = log_mel(sine(rate / 5, 1.0, rate)[0], rate).shape
    assert bands <= MEL_BANDS
    assert frames > 60
    assert (bands == MEL_BANDS) == (rate >= 5000)


def test_log_mel_of_silence_and_short_sounds() -> None:
    silence = np.zeros((1, 500), np.float32)
    assert log_mel_l1(silence, silence, RATE) == 0.0
    assert log_mel_l1(silence, silence + np.float32(1e-6), RATE) == 0.0  # below the floor
    assert log_mel_l1(np.ones((1, 1)), np.zeros((1, 1)), RATE) >= 0.0
    assert (log_mel(silence[0], RATE) == -4).all()


@pytest.mark.parametrize("figure", [psnr, ssim])
def test_pictures_that_can_not_be_compared(figure: Any) -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    for reference, decoded in (
        (picture, picture[:15]),
        (picture, picture[..., :1]),
        (picture[..., 0], picture[..., 0]),
        (picture[:0], picture[:0]),
        (picture, picture.astype(np.float32)),
        (picture.astype(np.int64), picture),
    ):
        with pytest.raises(ValueError, match="compared"):
            figure(reference, decoded)


def test_ssim_needs_a_whole_window() -> None:
    small = np.zeros((10, 40, 3), np.uint8)
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(small, small)


@pytest.mark.parametrize("figure", [snr_db, lambda x, y: log_mel_l1(x, y, RATE)], ids=["snr_db", "log_mel_l1"])
def test_sounds_that_can_not_be_compared(figure: Any) -> None:
    sound = np.ones((1, 200))
    broken = sound.copy()
    broken[0, 7] = np.nan
    for reference, decoded in (
        (sound, sound[:, :-1]),
        (sound, np.ones((2, 200))),
        (sound[0], sound[0]),
        (sound[:, :0], sound[:, :0]),
        (sound, broken),
        (sound * np.inf, sound),
    ):
        with pytest.raises(ValueError, match="compared"):
            figure(reference, decoded)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.5, 80))
def test_figures_are_symmetric_and_bounded(seed: int, amount: float) -> None:
    reference, decoded = noisy_pair(16, 19, amount, seed)
    assert psnr(reference, decoded) == psnr(decoded, reference)
    assert ssim(reference, decoded) == pytest.approx(ssim(decoded, reference), abs=1e-12)
    assert -1 <= ssim(reference, decoded) <= 1
    assert 0 <= psnr(reference, decoded) <= MAX_DB

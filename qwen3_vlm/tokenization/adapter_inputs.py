"""What the built-in adapters refuse before a model sees it: wrong dtypes, shapes, ranges. Nothing is clamped."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_vlm.errors import TokenError

__all__ = ["check_codes", "check_pixels", "check_waveforms"]


def check_pixels(pixels: NDArray[Any], resolution: tuple[int, int]) -> None:
    """Refuse anything but a batch of RGB bytes of the one size.

    Raises:
        TokenError: reason "wrong_dtype" or "wrong_shape".
    """
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        found = pixels.dtype if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise TokenError(f"Pictures must be an array of uint8, not {found}.", "wrong_dtype")
    if pixels.ndim != 4 or pixels.shape[0] == 0 or pixels.shape[1:] != (*resolution, 3):
        wanted = f"(batch, {resolution[0]}, {resolution[1]}, 3)"
        raise TokenError(f"Pictures have the shape {pixels.shape}; this tokenizer takes {wanted}.", "wrong_shape")


def check_codes(codes: NDArray[Any], shape: tuple[int | None, ...], sizes: tuple[int, ...]) -> NDArray[np.int64]:
    """Ids as int64, if they can be decoded; None in `shape` is any length from 1.

    Args:
        sizes: of the codebooks along axis 1, or a single size for all ids.

    Raises:
        TokenError: reason "wrong_dtype", "wrong_shape" or "out_of_range"; names the first id that is at fault.
    """
    if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu":
        found = codes.dtype if isinstance(codes, np.ndarray) else type(codes).__name__
        raise TokenError(f"Ids must be an array of integers, not {found}.", "wrong_dtype")
    fits = len(codes.shape) == len(shape) and all(
        have > 0 if want is None else have == want for have, want in zip(codes.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise TokenError(f"Ids have the shape {codes.shape}; ({wanted}) can be decoded.", "wrong_shape")
    limits = np.asarray(sizes).reshape((-1,) + (1,) * (len(shape) - 2))
    bad = (codes < 0) | (codes >= limits)
    if bad.any():
        place = tuple(int(index) for index in np.argwhere(bad)[0])
        size = sizes[0] if len(sizes) == 1 else sizes[place[1]]
        raise TokenError(
            f"The id {codes[place]} at {place} is not one of the codebook's 0 … {size - 1:,}; ids of another range, "
            "or global ids instead of local ones, can't be decoded.",
            "out_of_range",
        )
    return codes.astype(np.int64)


def check_waveforms(waveforms: NDArray[Any], channels: int, samples_per_frame: int) -> None:
    """Refuse anything but a batch of float32 clips of whole frames.

    Raises:
        TokenError: reason "wrong_dtype", "wrong_shape", "short_frame" or "not_finite".
    """
    if not isinstance(waveforms, np.ndarray) or waveforms.dtype != np.float32:
        found = waveforms.dtype if isinstance(waveforms, np.ndarray) else type(waveforms).__name__
        raise TokenError(f"Sounds must be an array of float32, full scale ±1, not {found}.", "wrong_dtype")
    if waveforms.ndim != 3 or waveforms.shape[0] == 0 or waveforms.shape[1] != channels:
        wanted = f"(batch, {channels}, samples)"
        raise TokenError(f"Sounds have the shape {waveforms.shape}; this codec takes {wanted}.", "wrong_shape")
    samples = waveforms.shape[2]
    if samples == 0 or samples % samples_per_frame:
        raise TokenError(
            f"A clip of {samples:,} samples is not a whole number of frames of {samples_per_frame:,}; pad it.",
            "short_frame",
        )
    if not np.isfinite(waveforms).all():
        raise TokenError("A sound holds samples that are not finite numbers.", "not_finite")

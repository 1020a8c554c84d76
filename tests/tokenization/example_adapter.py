"""A third party's image tokenizer and audio codec: numpy alone, nothing of ours imported.

`test_conformance` installs this file as a distribution of its own, with entry points.
"""

import os
from typing import Any

import numpy as np

SIDE, CELL, LEVELS = 32, 4, 8
RATE, HOP, STEPS = 8000, 16, 32


class BlockColours:
    """The mean colour of each 4 × 4 pixels, in eight levels of red, green and blue."""

    codebook_size = LEVELS**3
    resolution = (SIDE, SIDE)
    grid = (SIDE // CELL, SIDE // CELL)
    weights_sha256 = "b10c" * 16

    def encode(self, pixels: Any) -> Any:
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (SIDE, SIDE, 3):
            raise ValueError(f"32 × 32 RGB bytes are encoded, not {pixels.dtype} of shape {pixels.shape}")
        cells = pixels.reshape(-1, SIDE // CELL, CELL, SIDE // CELL, CELL, 3).sum((2, 4), dtype=np.int64)
        levels = cells * LEVELS // (256 * CELL * CELL)
        return (levels * [LEVELS * LEVELS, LEVELS, 1]).sum(-1)

    def decode(self, codes: Any) -> Any:
        if codes.dtype.kind not in "iu" or codes.ndim != 3 or codes.shape[1:] != self.grid:
            raise ValueError(f"an 8 × 8 grid of ints is decoded, not {codes.dtype} of shape {codes.shape}")
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise ValueError("an id is not in the codebook")
        levels = np.stack([codes // LEVELS**2, codes // LEVELS % LEVELS, codes % LEVELS], -1)
        colours = ((2 * levels + 1) * 128 // LEVELS).astype(np.uint8)
        return colours.repeat(CELL, 1).repeat(CELL, 2)


class OtherElsewhere(BlockColours):
    """What must not pass: other ids in another process."""

    def __init__(self) -> None:
        self.home = os.getpid()

    def encode(self, pixels: Any) -> Any:
        return (super().encode(pixels) + (os.getpid() != self.home)) % self.codebook_size


class MeanSteps:
    """The mean of each 16 samples, coarse in the first codebook and what is left over in the second."""

    sampling_rate_hz, channels, samples_per_frame = RATE, 1, HOP
    codebook_sizes = (STEPS, STEPS)
    weights_sha256 = "57e9" * 16

    def encode(self, waveforms: Any) -> Any:
        if waveforms.dtype != np.float32 or waveforms.ndim != 3 or waveforms.shape[1] != 1:
            raise ValueError(f"mono float32 is encoded, not {waveforms.dtype} of shape {waveforms.shape}")
        if not waveforms.shape[2] or waveforms.shape[2] % HOP or not np.isfinite(waveforms).all():
            raise ValueError("whole frames of finite samples are encoded")
        means = waveforms.astype(np.float64).reshape(len(waveforms), -1, HOP).mean(-1)
        total = STEPS * STEPS
        steps = np.clip((means + 1) / 2 * total, 0, total - 1).astype(np.int64)
        return np.stack([steps // STEPS, steps % STEPS], 1)

    def decode(self, codes: Any) -> Any:
        if codes.dtype.kind not in "iu" or codes.ndim != 3 or codes.shape[1] != 2 or not codes.shape[2]:
            raise ValueError(f"two rows of ints are decoded, not {codes.dtype} of shape {codes.shape}")
        if codes.min() < 0 or codes.max() >= STEPS:
            raise ValueError("an id is not in the codebook")
        means = (codes[:, :1] * STEPS + codes[:, 1:] + 0.5) / (STEPS * STEPS) * 2 - 1
        return means.repeat(HOP, 2).astype(np.float32)


def open_image(config: Any) -> BlockColours:
    """The entry point `block_colours`."""
    return BlockColours()


def open_audio(config: Any) -> MeanSteps:
    """The entry point `mean_steps`."""
    return MeanSteps()


def fail(config: Any) -> None:
    """The entry point `broken_factory`."""
    raise RuntimeError("the licence server does not answer")

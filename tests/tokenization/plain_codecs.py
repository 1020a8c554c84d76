"""Codecs without a network, as a third party might write them: numpy, two minutes to understand, exact.

And a few that break one promise each.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_vlm.errors import TokenError
from qwen3_vlm.tokenization.text import LosslessText
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from qwen3_vlm.tokenization.uti_config import AudioConfig, ImageConfig, TextConfig, UTIConfig
from tests.tiny import VOCABULARY_ROWS, tiny_tokenizer

SIDE, BLOCK = 16, 4  # pixels
RATE, FRAME, LEVELS = 8_000, 4, 16  # Hz, samples, codes per codebook


class BlockColours:
    """Pictures of 16 × 16 pixels as 4 × 4 mean colours, two bits per channel."""

    codebook_size = 64
    resolution = (SIDE, SIDE)
    grid = (SIDE // BLOCK, SIDE // BLOCK)
    weights_sha256 = "b10c" * 16

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
        blocks = pixels.reshape(len(pixels), 4, BLOCK, 4, BLOCK, 3).mean((2, 4))
        levels = (blocks // 64).astype(np.int64)
        return levels @ np.array([16, 4, 1])

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.uint8]:
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise TokenError("There is no such colour.", "out_of_range")
        levels = np.stack([codes // 16, codes // 4 % 4, codes % 4], axis=-1)
        return np.kron(levels * 64 + 32, np.ones((1, BLOCK, BLOCK, 1))).astype(np.uint8)


class Steps:
    """Sound at 8 kHz as one value per 0.5 ms: a coarse codebook, and a fine one for what is left."""

    sampling_rate_hz = RATE
    channels = 1
    codebook_sizes: tuple[int, ...] = (LEVELS, LEVELS)
    samples_per_frame = FRAME
    weights_sha256 = "57e9" * 16

    def encode(self, waveforms: NDArray[np.float32]) -> NDArray[np.int64]:
        means = waveforms.reshape(len(waveforms), -1, FRAME).mean(-1, dtype=np.float64)
        steps = np.clip((means + 1) / 2 * LEVELS**2, 0, LEVELS**2 - 1).astype(np.int64)
        return np.stack([steps // LEVELS, steps % LEVELS], axis=1)

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        if codes.min() < 0 or codes.max() >= LEVELS:
            raise TokenError("There is no such level.", "out_of_range")
        values = (codes[:, 0] * LEVELS + codes[:, 1] + 0.5) / LEVELS**2 * 2 - 1
        return np.repeat(values, FRAME, axis=-1)[:, None].astype(np.float32)


class Dice(BlockColours):
    """Ids that depend on chance."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng()

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
        return self.rng.integers(0, 64, (len(pixels), 4, 4))


class Gossip(Steps):
    """Ids that depend on the neighbours in the batch."""

    def encode(self, waveforms: NDArray[np.float32]) -> NDArray[np.int64]:
        return super().encode(waveforms * np.float32(0.9 / max(0.1, np.abs(waveforms).max())))


class Memory(BlockColours):
    """Decodes by what it has seen, not by the ids."""

    def __init__(self) -> None:
        self.last: Any = None

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
        self.last = pixels.mean((1, 2), keepdims=True, dtype=np.float64)
        return super().encode(pixels)

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.uint8]:
        return (super().decode(codes) * 0.5 + (0 if self.last is None else self.last[0] * 0.5)).astype(np.uint8)


class Broken(Steps):
    """Decodes to numbers that are none."""

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        return super().decode(codes) * np.float32(np.nan)


class Short(Steps):
    """Decodes fewer samples than were encoded."""

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        return super().decode(codes)[:, :, : -FRAME - 1]


class Worse(BlockColours):
    """The same ids and the same name, but darker pictures: what a changed library may do."""

    amount = 40

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.maximum(super().decode(codes).astype(int) - self.amount, 0).astype(np.uint8)


class Noisy(Steps):
    """The same for sounds."""

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        sound = super().decode(codes)
        return sound + np.random.default_rng(0).normal(0, 0.05, sound.shape).astype(np.float32)


def plain_uti(image: Any = None, audio: Any = None, *, batch_size: int = 1, **sound: Any) -> UnifiedTokenizer:
    """Both codecs, or those that are given, behind one token space."""
    config = UTIConfig(
        text=TextConfig(tokenizer="tiny"),
        image=ImageConfig(type="blocks", source="blocks", fit="pad", batch_size=batch_size),
        audio=AudioConfig(type="steps", source="steps", clip_seconds=0.2, batch_size=batch_size, **sound),
    )
    text = LosslessText(tiny_tokenizer(), VOCABULARY_ROWS, "tiny")
    return UnifiedTokenizer(config, text, image or BlockColours(), audio or Steps())


def plain_pictures() -> dict[str, NDArray[np.uint8]]:
    """Three sizes, one of them the tokenizer's own."""
    rng = np.random.default_rng(0)
    sizes = {"square.png": (16, 16), "wide.png": (20, 33), "tall.png": (50, 12)}
    noise = {name: rng.integers(-20, 20, (*size, 3)) for name, size in sizes.items()}
    ramps = {name: np.linspace(20, 230, value.shape[0])[:, None, None] for name, value in noise.items()}
    return {name: (ramps[name] + value).astype(np.uint8) for name, value in noise.items()}


def plain_sounds() -> dict[str, tuple[NDArray[np.float32], int]]:
    """Shorter than a clip, longer, in stereo, at another rate, and silent."""
    time = np.arange(4_000) / 8_000
    tone = (0.5 * np.sin(2 * np.pi * 220 * time)).astype(np.float32)
    return {
        "short.wav": (tone[:701], 8_000),
        "long.wav": (tone, 8_000),
        "stereo.wav": (np.stack([tone[:2_000], -0.5 * tone[:2_000]]), 8_000),
        "fast.wav": (tone[:3_000], 11_025),
        "silent.wav": (np.zeros(900, np.float32), 8_000),
    }

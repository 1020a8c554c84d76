"""Audio codecs: clips of sound become frames of ids, one from each codebook, and come back.

The protocol speaks numpy, so that a third party's codec needs no torch. Sizes are the codec's own;
what uti.yaml says about them has to agree.

Shapes: B clips, A channels, S samples, K codebooks, F frames.
"""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qwen3_vlm.tokenization.opening import check_agreement, check_attributes, known_types, open_third_party

if TYPE_CHECKING:
    from qwen3_vlm.tokenization.uti_config import AudioConfig

__all__ = ["AudioCodec", "audio_codec_types", "open_audio_codec"]

GROUP = "qwen3_vlm.audio_codecs"
# type → class in audio_models, which imports torch
_BUILT_IN = {"encodec": "EncodecCodec", "dac": "DacCodec", "mimi": "MimiCodec"}
_SIZES = ("sampling_rate_hz", "channels", "codebook_sizes", "samples_per_frame")
_ATTRIBUTES = (*_SIZES, "weights_sha256", "encode", "decode")


@runtime_checkable
class AudioCodec(Protocol):
    """What an audio codec is.

    The same clip gives the same ids in every call of the same shape, wherever it stands in the batch and
    whatever stands beside it. Ids that can't be decoded raise a TokenError; they are never clamped.
    """

    @property
    def sampling_rate_hz(self) -> int:
        """Samples per second and channel."""

    @property
    def channels(self) -> int:
        """1 mono, 2 stereo."""

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """(K,): ids of codebook k are 0 … codebook_sizes[k] − 1."""

    @property
    def samples_per_frame(self) -> int:
        """Samples (per channel) that become one frame of K ids."""

    @property
    def weights_sha256(self) -> str:
        """Changes whenever ids or decoded sounds could change: weights and settings."""

    def encode(self, waveforms: NDArray[np.float32]) -> NDArray[np.int64]:
        """(B, A, S), S a multiple of samples_per_frame → (B, K, F), F = S / samples_per_frame."""

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """(B, K, F) → (B, A, F · samples_per_frame)."""


def open_audio_codec(config: "AudioConfig", *, download: bool = True) -> AudioCodec:
    """The audio codec that the configuration names.

    Args:
        download: false looks on this machine only (built-in types; a third party's factory gets the config alone).

    Raises:
        ConfigError: the type is not known, or a value of the config is not the codec's.
        ModelError: it can't be loaded, or its ids alone would not be enough to decode.
    """
    if config.type in _BUILT_IN:
        from qwen3_vlm.tokenization import audio_models

        codec: Any = getattr(audio_models, _BUILT_IN[config.type]).open(config, download=download)
    else:
        codec = open_third_party(config, GROUP, _BUILT_IN)
    check_attributes(codec, _ATTRIBUTES, config.type)
    sizes = tuple(codec.codebook_sizes)
    wanted = {f"audio.{key}": getattr(config, key) for key in ("sampling_rate_hz", "channels", "num_codebooks")}
    found = {"audio.sampling_rate_hz": codec.sampling_rate_hz, "audio.channels": codec.channels}
    found |= {"audio.num_codebooks": len(sizes), "audio.codebook_size": sizes[0] if len(set(sizes)) == 1 else sizes}
    check_agreement({**wanted, "audio.codebook_size": config.codebook_size}, found, f"the audio codec {config.source}")
    return codec


def audio_codec_types() -> list[str]:
    """What `audio.type` may be on this machine."""
    return known_types(_BUILT_IN, GROUP)

"""Adapters of the audio codecs that transformers has: EnCodec, DAC and Mimi.

All three are residual: each codebook says what the ones before it left over. So a part of the codebooks, from
the first on, is itself a codec, with fewer ids and less detail.

Shapes: B clips, A channels, S samples, K codebooks, F frames.
"""

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_vlm.errors import ConfigError, ModelError
from qwen3_vlm.tokenization.adapter_inputs import check_codes, check_waveforms
from qwen3_vlm.tokenization.exact import exact_arithmetic
from qwen3_vlm.tokenization.pretrained import Adapter, Loaded, ModelKind

if TYPE_CHECKING:
    from qwen3_vlm.tokenization.uti_config import AudioConfig

__all__ = ["DacCodec", "EncodecCodec", "MimiCodec"]

# Settings that change ids without changing a tensor's shape.
_PADDING = ("pad_mode", "use_causal_conv", "trim_right_ratio")
_CONVOLUTIONS = ("sampling_rate", "upsampling_ratios", "dilation_growth_rate", *_PADDING)
_ATTENTION = ("num_attention_heads", "head_dim", "sliding_window", "rope_parameters.rope_theta")
_TRANSFORMER = (*_ATTENTION, "norm_eps", "hidden_act")


class _AudioModel(Adapter):
    """What the adapters of sounds share: checks and exact arithmetic."""

    def __init__(self, config: "AudioConfig", loaded: Loaded, device: torch.device) -> None:
        super().__init__(config, loaded, device)
        self._check_usable()
        sizes = self.all_codebook_sizes()
        count = len(sizes) if config.num_codebooks is None else config.num_codebooks
        if count > len(sizes):
            raise ConfigError(f"audio.num_codebooks is {count}, but {loaded.folder} has {len(sizes)} codebooks.")
        self.codebook_sizes = sizes[:count]
        self.sampling_rate_hz = int(self.model.config.sampling_rate)
        self.channels = self.own_channels()
        self.samples_per_frame = self.own_samples_per_frame()
        self.weights_sha256 = loaded.digest(compute_dtype=config.dtype)

    def encode(self, waveforms: NDArray[np.float32]) -> NDArray[np.int64]:
        """(B, A, S) → (B, K, F).

        Raises:
            TokenError: wrong dtype or shape, a part of a frame, or samples that are not finite.
            ModelError: the model does not give one frame per `samples_per_frame`.
        """
        check_waveforms(waveforms, self.channels, self.samples_per_frame)
        batch, _, samples = waveforms.shape
        with exact_arithmetic(self.device):
            values = torch.from_numpy(np.array(waveforms, order="C")).to(self.device, self.dtype)
            codes = self._encode(values)[:, : len(self.codebook_sizes)].cpu().numpy().astype(np.int64)
        wanted = (batch, len(self.codebook_sizes), samples // self.samples_per_frame)
        if codes.shape != wanted:
            raise ModelError(f"{type(self.model).__name__} gives ids of shape {codes.shape}; {wanted} is needed.")
        return codes

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """(B, K, F) → (B, A, F · samples_per_frame).

        Raises:
            TokenError: wrong dtype, shape or range.
            ModelError: the model computes values that are not finite.
        """
        codes = check_codes(codes, (None, len(self.codebook_sizes), None), self.codebook_sizes)
        batch, _, frames = codes.shape
        with exact_arithmetic(self.device):
            values = self._decode(torch.from_numpy(codes).to(self.device)).float().cpu().numpy()
        if not np.isfinite(values).all():
            raise ModelError(f"{type(self.model).__name__} decodes to values that are not finite; try float32.")
        return _fit(values.reshape(batch, self.channels, -1), frames * self.samples_per_frame)

    def _check_usable(self) -> None:
        """Raise a ModelError if ids alone do not say what was heard."""

    @abstractmethod
    def all_codebook_sizes(self) -> tuple[int, ...]:
        """Sizes of all codebooks that the model has."""

    def own_channels(self) -> int:
        return int(self.model.config.audio_channels)

    def own_samples_per_frame(self) -> int:
        return int(self.model.config.hop_length)

    @abstractmethod
    def _encode(self, values: Tensor) -> Tensor:
        """(B, A, S) → (B, at least K, F)."""

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """(B, K, F) → (B, A, about F · samples_per_frame)."""


def _fit(values: NDArray[np.float32], samples: int) -> NDArray[np.float32]:
    """Exactly `samples` samples: a strided decoder may give some more, or (odd strides) lack some at the end."""
    values = values[..., :samples]
    return np.ascontiguousarray(np.pad(values, ((0, 0), (0, 0), (0, samples - values.shape[-1]))))


class EncodecCodec(_AudioModel):
    """`EncodecModel`. It is asked for by bandwidth; the smallest that has all wanted codebooks is used."""

    kind = ModelKind(
        "EncodecModel",
        "encodec",
        (*_CONVOLUTIONS, "norm_type"),
    )

    def _check_usable(self) -> None:
        config = self.model.config
        name = f"EnCodec of {config.sampling_rate:,} Hz"
        if config.normalize:
            raise ModelError(
                f"This {name} normalises the loudness of its input (normalize: true) and needs that number again to "
                "decode: it is not among the ids, so they alone could not be decoded. Use a model with normalize: "
                "false, such as facebook/encodec_24khz."
            )
        if config.chunk_length_s is not None:
            raise ModelError(
                f"This {name} cuts sounds into overlapping chunks of {config.chunk_length_s} s, so its frames do not "
                "follow one another in time. Use a model without chunk_length_s, such as facebook/encodec_24khz."
            )

    def all_codebook_sizes(self) -> tuple[int, ...]:
        widest = self.model.config.target_bandwidths[-1]
        usable = min(len(self.model.quantizer.layers), self._quantizers(widest))
        return tuple(int(layer.codebook.embed.shape[0]) for layer in self.model.quantizer.layers[:usable])

    def _quantizers(self, bandwidth: float) -> int:
        return int(self.model.quantizer.get_num_quantizers_for_bandwidth(bandwidth))

    def _encode(self, values: Tensor) -> Tensor:
        wanted = len(self.codebook_sizes)
        bandwidths = sorted(self.model.config.target_bandwidths)
        bandwidth = next(value for value in bandwidths if self._quantizers(value) >= wanted)
        return self.model.encode(values, bandwidth=bandwidth).audio_codes[0]  # the only chunk

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes[None], [None]).audio_values


class DacCodec(_AudioModel):
    """`DacModel`, mono. Its decoder gives a few samples less than F hops where a stride is odd."""

    kind = ModelKind("DacModel", "dac", ("sampling_rate", "downsampling_ratios"))

    def all_codebook_sizes(self) -> tuple[int, ...]:
        return tuple(int(layer.codebook.weight.shape[0]) for layer in self.model.quantizer.quantizers)

    def own_channels(self) -> int:
        return int(self.model.encoder.conv1.in_channels)

    def own_samples_per_frame(self) -> int:
        return math.prod(self.model.config.downsampling_ratios)

    def _encode(self, values: Tensor) -> Tensor:
        return self.model.encode(values, n_quantizers=len(self.codebook_sizes)).audio_codes

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(audio_codes=codes).audio_values


class MimiCodec(_AudioModel):
    """`MimiModel`: the first codebooks hear what is said (semantic), the others how it sounds.

    A clip's ids depend on the silence that it was padded with to the length of its batch (transformers#43377): the
    class knows no mask. Here all clips of a call have one length, so there is nothing to pad.
    """

    kind = ModelKind(
        "MimiModel",
        "mimi",
        (*_CONVOLUTIONS, *_TRANSFORMER, "num_semantic_quantizers"),
    )

    def __init__(self, config: "AudioConfig", loaded: Loaded, device: torch.device) -> None:
        super().__init__(config, loaded, device)
        semantic = int(self.model.config.num_semantic_quantizers)
        if len(self.codebook_sizes) < semantic:
            raise ConfigError(
                f"audio.num_codebooks is {len(self.codebook_sizes)}, but {loaded.folder} needs at least its {semantic} "
                "semantic codebooks."
            )

    def _check_usable(self) -> None:
        if self.model.encoder is None or self.model.decoder is None:
            raise ModelError("This Mimi was saved with its encoder or its decoder dropped; both are needed.")

    def all_codebook_sizes(self) -> tuple[int, ...]:
        quantizer = self.model.quantizer
        parts = (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer)
        return tuple(int(layer.codebook.embed_sum.shape[0]) for part in parts for layer in part.layers)

    def own_samples_per_frame(self) -> int:
        return int(self.model.config.frame_size)

    def _encode(self, values: Tensor) -> Tensor:
        return self.model.encode(values, num_quantizers=len(self.codebook_sizes), use_streaming=False).audio_codes

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes).audio_values

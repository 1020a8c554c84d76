"""Adapters of the image tokenizers that transformers and diffusers have: both directions, real weights.

Pixels are normalised as the tokenizer's own image processor does it, read from its preprocessor_config.json or
else from its class, and brought back to bytes the same way, rounded half to even.

Shapes: B pictures, H W pixels, R C grid rows and columns, E codebook width.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_vlm.errors import ConfigError, ModelError
from qwen3_vlm.storage import read_json
from qwen3_vlm.tokenization.adapter_inputs import check_codes, check_pixels
from qwen3_vlm.tokenization.exact import exact_arithmetic
from qwen3_vlm.tokenization.pretrained import Adapter, Loaded, ModelKind

if TYPE_CHECKING:
    from qwen3_vlm.tokenization.uti_config import ImageConfig

__all__ = ["DiffusersTokenizer", "Emu3Tokenizer", "JanusTokenizer"]

_PROCESSOR_FILE, _PROCESSORS_FILE = "preprocessor_config.json", "processor_config.json"


@dataclasses.dataclass(frozen=True, slots=True)
class PixelScaling:
    """Bytes → (byte · factor − mean) / deviation, per channel, in fp32, and back."""

    factor: float
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    def to_values(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B, H, W, 3) bytes → (B, 3, H, W), the same floats as the PIL image processors of transformers."""
        bytes_ = np.arange(256, dtype=np.float64)[:, None]
        mean, deviation = np.asarray(self.mean, np.float32), np.asarray(self.deviation, np.float32)
        table = ((bytes_ * self.factor).astype(np.float32) - mean) / deviation  # (256, 3)
        return np.ascontiguousarray(table[pixels, np.arange(3)].transpose(0, 3, 1, 2), dtype=np.float32)

    def to_bytes(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """(B, 3, H, W) → (B, H, W, 3), rounded half to even and cut at black and white."""
        exact = values.astype(np.float64).transpose(0, 2, 3, 1) * self.deviation + self.mean
        return np.clip(np.rint(exact / self.factor), 0, 255).astype(np.uint8)

    @classmethod
    def read(cls, folder: Path, defaults: Mapping[str, Any]) -> "PixelScaling":
        """From the processor's own file in the folder; what it does not say, `defaults` do."""
        values = {**defaults, **_processor_values(folder)}
        one, zero = (1.0,) * 3, (0.0,) * 3
        factor = float(values["rescale_factor"]) if values["do_rescale"] else 1.0
        mean = _triple(values["image_mean"], folder) if values["do_normalize"] else zero
        deviation = _triple(values["image_std"], folder) if values["do_normalize"] else one
        if not np.isfinite([factor, *mean, *deviation]).all() or factor <= 0 or min(deviation) <= 0:
            raise ModelError(f"The image processor of {folder} scales by {factor}, {deviation}; both must be above 0.")
        return cls(factor, mean, deviation)


def _processor_values(folder: Path) -> dict[str, Any]:
    values = _json_object(folder / _PROCESSOR_FILE) or _json_object(folder / _PROCESSORS_FILE).get(
        "image_processor", {}
    )
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    return {name: values[name] for name in names if values.get(name) is not None}


def _json_object(file: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    return read_json(file, error=ModelError) if file.is_file() else {}


def _triple(value: Any, folder: Path) -> tuple[float, float, float]:
    values = [value] * 3 if isinstance(value, int | float) else list(value)
    if len(values) != 3:
        raise ModelError(f"The image processor of {folder} normalises {len(values)} channels; pictures have three.")
    return float(values[0]), float(values[1]), float(values[2])


def _class_defaults(processor: Any) -> dict[str, Any]:
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    return {name: getattr(processor, name) for name in names}


class _ImageModel(Adapter):
    """What the adapters of pictures share: checks, bytes ↔ values, exact arithmetic."""

    def __init__(self, config: "ImageConfig", loaded: Loaded, device: torch.device) -> None:
        super().__init__(config, loaded, device)
        self.scaling = PixelScaling.read(loaded.folder, self.processor_defaults(loaded.folder))
        self.resolution, self.grid = self._sizes(config, loaded.folder)
        self.codebook_size = int(self.codebook().shape[0])
        pixels = dataclasses.asdict(self.scaling)
        self.weights_sha256 = loaded.digest(pixels=pixels, compute_dtype=config.dtype)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
        """(B, H, W, 3) → (B, R, C).

        Raises:
            TokenError: wrong dtype or shape.
        """
        check_pixels(pixels, self.resolution)
        with exact_arithmetic(self.device):
            values = torch.from_numpy(self.scaling.to_values(pixels)).to(self.device, self.dtype)
            codes: Tensor = self._encode(values)
            found = codes.cpu().numpy().astype(np.int64)
        return found.reshape(len(pixels), *self.grid)

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(B, R, C) → (B, H, W, 3).

        Raises:
            TokenError: wrong dtype, shape or range.
            ModelError: the model computes values that are not finite.
        """
        codes = check_codes(codes, (None, *self.grid), (self.codebook_size,))
        with exact_arithmetic(self.device):
            values = self._decode(torch.from_numpy(codes).to(self.device)).float().cpu().numpy()
        if not np.isfinite(values).all():
            raise ModelError(f"{type(self.model).__name__} decodes to values that are not finite; try float32.")
        return self.scaling.to_bytes(values)

    def _sizes(self, config: "ImageConfig", folder: Path) -> tuple[tuple[int, int], tuple[int, int]]:
        """Resolution and grid; every stage but one halves the sides."""
        factor = self.pixels_per_id()
        side = config.resolution or self.own_side()
        if side is None:
            raise ConfigError(f"image.resolution must be given: {folder} works at any multiple of {factor} pixels.")
        if side % factor:
            near = max(factor, round(side / factor) * factor)
            raise ConfigError(f"image.resolution is {side}, but {folder} needs a multiple of {factor}, such as {near}.")
        return (side, side), (side // factor, side // factor)

    @abstractmethod
    def processor_defaults(self, folder: Path) -> dict[str, Any]:
        """How the model's own image processor scales pixels, where its folder does not say."""

    @abstractmethod
    def pixels_per_id(self) -> int:
        """Pixels of a side that one id stands for."""

    def own_side(self) -> int | None:
        """The side that the model was made for, where its config says so."""
        return None

    def codebook(self) -> Tensor:
        """(codebook size, E)."""
        return self.model.quantize.embedding.weight

    @abstractmethod
    def _encode(self, values: Tensor) -> Tensor:
        """(B, 3, H, W) values → ids, one grid a picture."""

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """(B, R, C) → (B, 3, H, W) values."""


class JanusTokenizer(_ImageModel):
    """`JanusVQVAE`, alone or inside a whole Janus model. The class decodes on one grid; it is set to the wanted one."""

    kind = ModelKind("JanusVQVAE", "janus_vqgan", digest_keys=(), whole_model="janus")

    def __init__(self, config: "ImageConfig", loaded: Loaded, device: torch.device) -> None:
        super().__init__(config, loaded, device)
        self.model.quantize.quant_state_dims = list(self.grid)

    def processor_defaults(self, folder: Path) -> dict[str, Any]:
        from transformers import JanusImageProcessorPil

        return _class_defaults(JanusImageProcessorPil())

    def pixels_per_id(self) -> int:
        return int(2 ** (self.model.encoder.num_resolutions - 1))

    def own_side(self) -> int:
        return int(self.model.config.num_patches) * self.pixels_per_id()

    def _encode(self, values: Tensor) -> Tensor:
        return self.model.encode(values).image_tokens  # (B·R·C,)

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes.flatten(1))


class Emu3Tokenizer(_ImageModel):
    """`Emu3VQVAE`, alone or inside a whole Emu3 model. It sees a picture as a video of one repeated frame."""

    kind = ModelKind(
        "Emu3VQVAE", "emu3_vqgan", ("temporal_downsample_factor", "num_attention_heads"), whole_model="emu3"
    )

    def processor_defaults(self, folder: Path) -> dict[str, Any]:
        from transformers import Emu3ImageProcessor

        return _class_defaults(Emu3ImageProcessor())

    def pixels_per_id(self) -> int:
        return int(self.model.spatial_scale_factor)

    def _encode(self, values: Tensor) -> Tensor:
        sizes = torch.tensor([self.resolution] * len(values))
        return torch.stack(list(self.model.encode(values, sizes).image_tokens))  # (B, R, C)

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes)


class DiffusersTokenizer(_ImageModel):
    """diffusers' `VQModel`. Latents are quantized as they are: its `scaling_factor` is the diffusion model's.

    The class has no image processor; diffusers' own scales to −1…1, but the pipelines listed here tell it not to.
    """

    kind = ModelKind(
        "VQModel", "VQModel", ("act_fn", "norm_num_groups", "norm_type", "block_out_channels"), package="diffusers"
    )
    _UNIT_RANGE_PIPELINES = ("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline")

    def processor_defaults(self, folder: Path) -> dict[str, Any]:
        pipeline = _json_object(folder.parent / "model_index.json").get("_class_name")
        do_normalize = pipeline not in self._UNIT_RANGE_PIPELINES
        scale = {"do_rescale": True, "rescale_factor": 1 / 255}
        return {**scale, "do_normalize": do_normalize, "image_mean": 0.5, "image_std": 0.5}

    def pixels_per_id(self) -> int:
        return int(2 ** (len(self.model.config.block_out_channels) - 1))

    def _encode(self, values: Tensor) -> Tensor:
        latents = self.model.encode(values).latents
        return self.model.quantize(latents)[2][2]  # (B·R·C,)

    def _decode(self, codes: Tensor) -> Tensor:
        shape = (*codes.shape, int(self.codebook().shape[1]))  # (B, R, C, E)
        if self.model.config.lookup_from_codebook:
            return self.model.decode(codes.flatten(), force_not_quantize=True, shape=shape).sample
        quantized = self.model.quantize.get_codebook_entry(codes.flatten(), shape)  # (B, E, R, C)
        return self.model.decode(quantized, force_not_quantize=True).sample

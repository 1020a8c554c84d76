"""Image tokenizers: pictures of one size become grids of ids, and come back.

The protocol speaks numpy, so that a third party's tokenizer needs no torch. Sizes are the tokenizer's own;
what uti.yaml says about them has to agree.

Shapes: B pictures, H W pixels, R C grid rows and columns.
"""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qwen3_vlm.tokenization.opening import check_agreement, check_attributes, known_types, open_third_party

if TYPE_CHECKING:
    from qwen3_vlm.tokenization.uti_config import ImageConfig

__all__ = ["ImageTokenizer", "image_tokenizer_types", "open_image_tokenizer"]

GROUP = "qwen3_vlm.image_tokenizers"
# type → class in image_models, which imports torch
_BUILT_IN = {"janus_vqvae": "JanusTokenizer", "emu3_vqvae": "Emu3Tokenizer", "diffusers_vq": "DiffusersTokenizer"}
_ATTRIBUTES = ("codebook_size", "resolution", "grid", "weights_sha256", "encode", "decode")


@runtime_checkable
class ImageTokenizer(Protocol):
    """What a picture tokenizer is.

    The same picture gives the same ids in every call of the same batch size, wherever it stands in the batch
    and whatever stands beside it. Ids that can't be decoded raise a TokenError; they are never clamped.
    """

    @property
    def codebook_size(self) -> int:
        """Ids are 0 … codebook_size − 1."""

    @property
    def resolution(self) -> tuple[int, int]:
        """(H, W) in pixels; the only size that is encoded and decoded."""

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C) of the ids of one picture."""

    @property
    def weights_sha256(self) -> str:
        """Changes whenever ids or decoded pictures could change: weights, settings, pixel normalisation."""

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
        """(B, H, W, 3) RGB → (B, R, C)."""

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(B, R, C) → (B, H, W, 3) RGB."""


def open_image_tokenizer(config: "ImageConfig", *, download: bool = True) -> ImageTokenizer:
    """The image tokenizer that the configuration names.

    Args:
        download: false looks on this machine only (built-in types; a third party's factory gets the config alone).

    Raises:
        ConfigError: the type is not known, or a value of the config is not the tokenizer's.
        ModelError: it can't be loaded.
    """
    if config.type in _BUILT_IN:
        from qwen3_vlm.tokenization import image_models

        tokenizer: Any = getattr(image_models, _BUILT_IN[config.type]).open(config, download=download)
    else:
        tokenizer = open_third_party(config, GROUP, _BUILT_IN)
    check_attributes(tokenizer, _ATTRIBUTES, config.type)
    height, width = tokenizer.resolution
    wanted = {"image.codebook_size": config.codebook_size, "image.resolution": config.resolution}
    found = {"image.codebook_size": tokenizer.codebook_size}
    found["image.resolution"] = height if height == width else (height, width)
    check_agreement(wanted, found, f"the image tokenizer {config.source}")
    return tokenizer


def image_tokenizer_types() -> list[str]:
    """What `image.type` may be on this machine."""
    return known_types(_BUILT_IN, GROUP)

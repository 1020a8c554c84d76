"""Image tokenizers: pictures of one size become grids of ids, and come back.

The protocol speaks numpy, so that a third party's tokenizer needs no torch. Sizes are the tokenizer's own;
what uti.yaml says about them has to agree.

Shapes: B pictures, H W pixels, R C grid rows and columns.
"""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qwen3_vlm.errors import TokenError
from qwen3_vlm.tokenization.opening import check_agreement, check_attributes, known_types, open_third_party

if TYPE_CHECKING:
    from qwen3_vlm.tokenization.uti_config import ImageConfig

__all__ = ["ImageTokenizer", "check_codes", "check_pixels", "image_tokenizer_types", "open_image_tokenizer"]

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

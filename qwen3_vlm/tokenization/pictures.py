"""A picture of any size to the one size that an image tokenizer takes, and the way back.

Shapes: H W pixels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from qwen3_vlm.errors import TokenError
from qwen3_vlm.tokenization.uti_config import ImageConfig

Pixels = npt.NDArray[np.uint8]

RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
PLAIN_MODES = ("RGB", "L", "P", "1", "CMYK", "YCbCr", "HSV", "LAB")


@dataclass(frozen=True, slots=True)
class FittedPicture:
    """Pixels as the tokenizer takes them, and where the picture is among them."""

    pixels: Pixels  # uint8 (H, W, 3)
    content_box: tuple[int, int, int, int]  # left, top, right, bottom: what is not border
    original_size: tuple[int, int]  # height, width


def fit_picture(image: Image.Image | Pixels, resolution: tuple[int, int], config: ImageConfig) -> FittedPicture:
    """Bring a picture to `resolution` (height, width) by the config's policy; a picture of that size stays as it is.

    Raises:
        TokenError: it is no RGB-like picture.
    """
    picture = as_rgb(image)
    height, width = resolution
    resampling = RESAMPLING[config.interpolation]
    original = (picture.height, picture.width)
    if config.fit == "crop":
        box = _centre_box(picture.width, picture.height, width, height)
        fitted = picture.resize((width, height), resampling, box=box)
        return FittedPicture(np.asarray(fitted, dtype=np.uint8), (0, 0, width, height), original)
    scale = min(width / picture.width, height / picture.height)
    inner = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    red, green, blue = config.pad_color
    canvas = Image.new("RGB", (width, height), (red, green, blue))
    canvas.paste(picture.resize(inner, resampling), (left, top))
    content = (left, top, left + inner[0], top + inner[1])
    return FittedPicture(np.asarray(canvas, dtype=np.uint8), content, original)


def _centre_box(width: int, height: int, new_width: int, new_height: int) -> tuple[float, float, float, float]:
    """The largest centred box with the new proportions: left, top, right, bottom."""
    scale = min(width / new_width, height / new_height)
    left, top = (width - new_width * scale) / 2, (height - new_height * scale) / 2
    return (left, top, width - left, height - top)


def as_rgb(image: Any) -> Image.Image:
    """A PIL image of any mode or pixels (H, W, 3) as an RGB image; what is transparent becomes white.

    Raises:
        TokenError: it is no picture.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise TokenError(
                f"A picture is a PIL image or a uint8 array (height, width, 3), not {image.dtype} {image.shape}.",
                "not_a_picture",
            )
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise TokenError(f"A picture is a PIL image or a uint8 array, not {type(image).__name__}.", "not_a_picture")
    if 0 in image.size:
        raise TokenError("The picture has no pixels.", "not_a_picture")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode not in PLAIN_MODES:
        raise TokenError(f"A picture of mode {image.mode} has no 8-bit colours; convert it to RGB.", "not_a_picture")
    return image.convert("RGB")

"""One picture file, however awkward, to one upright RGB picture on a white ground.

Pictures from the web are rotated by EXIF, transparent, grey, CMYK, palette-based, 16 bits deep,
animated, cut off or bombs. Each becomes RGB or an ImageError with a countable reason:
`missing_image`, `unreadable_image`, `image_too_large`. It knows nothing of records or models.
"""

import io
import stat
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from qwen3_vlm.errors import ImageError

MAX_IMAGE_BYTES = 256 * 1024**2  # of the encoded file
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "AVIF", "JPEG2000")  # none that runs programs
# Endings of their names, the usual ones first
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    ".avif", ".jp2", ".jfif", ".apng", ".pbm", ".pgm", ".pnm", ".ppm",
)  # fmt: skip
EXIF_ORIENTATION = 0x0112
# EXIF orientation → what turns the stored pixels upright (TIFF 6.0, "Orientation")
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: Path | bytes | BinaryIO, *, max_pixels: int, name: str) -> Image.Image:
    """Decode one picture completely; of an animation, the first frame.

    `name` is what error messages call the picture. Pillow's own bomb limit (about 179 million
    pixels) stays in force above `max_pixels`.

    Raises:
        ImageError: with reason `missing_image`, `unreadable_image` or `image_too_large`.
    """
    data = source if isinstance(source, bytes) else _read(source, name)
    if len(data) > MAX_IMAGE_BYTES:
        raise _too_large(name, f"it has {len(data):,} bytes; at most {MAX_IMAGE_BYTES:,} are read")
    try:
        with warnings.catch_warnings():
            # About damaged metadata, and about sizes: our own limit is checked before any pixel is unpacked.
            warnings.simplefilter("ignore")
            return _decode(data, max_pixels, name)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(name, "it would unpack to more pixels than Pillow allows") from error
    except Exception as error:  # decoders fed with damaged bytes raise nearly anything
        raise ImageError(f"The picture {name} can't be read: {_first_line(error)}.", "unreadable_image") from error


def _decode(data: bytes, max_pixels: int, name: str) -> Image.Image:
    with _open(data) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise _too_large(name, f"{width} × {height} pixels; at most {max_pixels:,} in all are read")
        image.load()
        orientation = _orientation(image)  # read after loading: a TIFF is turned, and says so, by then
        upright = image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
        return to_rgb(upright)


def _open(data: bytes) -> Image.Image:
    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1–8; 1 where the metadata is absent or damaged (the pixels may still be fine)."""
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: transparency on white, deep greyscale scaled to 8 bits rather than clipped."""
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_grey(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Modes I;16*, I and F. Integers count as 16 bits unless larger; floats as 0–1 unless larger."""
    values = np.asarray(image)
    white = _transparent_values(image, values)
    if image.mode == "F":
        values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        top = 1.0
    else:
        values = values.astype(np.float64)
        top = 65535.0
    values = values.clip(min=0.0)
    top = max(top, float(values.max()))
    grey = np.floor(values / top * 255.0 + 0.5).astype(np.uint8)
    grey[white] = 255
    return Image.fromarray(grey).convert("RGB")


def _transparent_values(image: Image.Image, values: "np.ndarray[Any, Any]") -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Where a 16-bit greyscale PNG's one transparent value (tRNS) stands."""
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return np.zeros(values.shape, dtype=bool)
    return np.asarray(values == transparent)


def _read(source: Path | BinaryIO, name: str) -> bytes:
    try:
        if not isinstance(source, Path):
            return source.read(MAX_IMAGE_BYTES + 1)
        if not stat.S_ISREG(source.stat().st_mode):
            raise ImageError(f"The picture {name} is not a regular file.", "unreadable_image")
        with source.open("rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)
    except FileNotFoundError as error:
        raise ImageError(f"The picture {name} does not exist.", "missing_image") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"The picture {name} can't be read: {_first_line(error)}.", "unreadable_image") from error


def _too_large(name: str, why: str) -> ImageError:
    return ImageError(f"The picture {name} is too large: {why}.", "image_too_large")


def _first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        text = "its format is not one that is read here"
    return " ".join(str(text).split())[:200].rstrip(".")

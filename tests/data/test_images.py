"""Every awkward kind of picture, made here, against what its pixels must be."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen3_vlm.data.images import UPRIGHT, load_image, to_rgb
from qwen3_vlm.errors import ImageError
from tests.data.helpers import encoded, png

LIMIT = 1_000_000
RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)


def pixels(data: bytes) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    image = load_image(data, max_pixels=LIMIT, name="it")
    assert image.mode == "RGB"
    return np.asarray(image)


def quarters() -> Image.Image:
    """Red and green above blue and yellow, wider than high."""
    image = Image.new("RGB", (24, 16), RED)
    image.paste(GREEN, (12, 0, 24, 8))
    image.paste(BLUE, (0, 8, 12, 16))
    image.paste(YELLOW, (12, 8, 24, 16))
    return image


# Where row 0 and column 0 of the *stored* picture are seen (TIFF 6.0, tag 274), so the stored picture's corners
# (top left, top right, bottom left, bottom right) are seen as these colours:
SEEN = {
    1: (RED, GREEN, BLUE, YELLOW),
    2: (GREEN, RED, YELLOW, BLUE),  # row 0 top, column 0 right
    3: (YELLOW, BLUE, GREEN, RED),  # bottom, right
    4: (BLUE, YELLOW, RED, GREEN),  # bottom, left
    5: (RED, BLUE, GREEN, YELLOW),  # left, top
    6: (BLUE, RED, YELLOW, GREEN),  # right, top
    7: (YELLOW, GREEN, BLUE, RED),  # right, bottom
    8: (GREEN, YELLOW, RED, BLUE),  # left, bottom
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = pixels(encoded(quarters(), format, exif=exif, **({"quality": 100} if format in ("JPEG", "WEBP") else {})))
    height, width = seen.shape[:2]
    assert (width, height) == ((16, 24) if orientation >= 5 else (24, 16))
    corners = [seen[4, 4], seen[4, -5], seen[-5, 4], seen[-5, -5]]
    np.testing.assert_allclose(corners, SEEN[orientation], atol=12)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_impossible_orientations_change_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert orientation not in UPRIGHT
    np.testing.assert_array_equal(pixels(encoded(quarters(), "PNG", exif=exif)), np.asarray(quarters()))


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encoded(quarters(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert pixels(data).shape == (16, 24, 3)


def test_half_transparent_pixels_are_composited_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 128))
    np.testing.assert_array_equal(pixels(encoded(image, "PNG")), [[[255, 255, 255], [255, 127, 127]]])


def test_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(pixels(encoded(image, "PNG", transparency=0)), [[[255, 255, 255], [40, 50, 60]]])
    np.testing.assert_array_equal(pixels(encoded(image, "GIF", transparency=1)), [[[10, 20, 30], [255, 255, 255]]])


def test_transparent_colour_of_rgb_and_grey_pictures() -> None:
    colour = Image.new("RGB", (2, 1), (1, 2, 3))
    colour.putpixel((1, 0), (9, 8, 7))
    np.testing.assert_array_equal(
        pixels(encoded(colour, "PNG", transparency=(1, 2, 3))), [[[255, 255, 255], [9, 8, 7]]]
    )
    grey = Image.fromarray(np.array([[5, 6]], dtype=np.uint8))
    np.testing.assert_array_equal(pixels(encoded(grey, "PNG", transparency=6)), [[[5] * 3, [255] * 3]])


@pytest.mark.parametrize(
    ("mode", "value", "rgb"), [("L", 77, (77,) * 3), ("1", 1, (255,) * 3), ("LA", (90, 255), (90,) * 3)]
)
def test_grey_pictures(mode: str, value: object, rgb: tuple[int, int, int]) -> None:
    np.testing.assert_array_equal(pixels(encoded(Image.new(mode, (3, 2), value), "PNG")), np.full((2, 3, 3), rgb))


def test_cmyk_jpeg_and_tiff() -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    np.testing.assert_allclose(pixels(encoded(cyan, "JPEG", quality=100))[8, 8], (0, 255, 255), atol=3)
    np.testing.assert_array_equal(pixels(encoded(cyan, "TIFF"))[8, 8], (0, 255, 255))


def test_sixteen_bit_greyscale_is_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=np.uint16)
    grey = [0, 0, 1, 1, 128, 255]  # round(value / 257), by hand
    for format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(pixels(encoded(Image.fromarray(values), format))[0, :, 0], grey)
    big_endian = b"P5 6 1 65535\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(pixels(big_endian)[0, :, 0], grey)


def test_sixteen_bit_greyscale_with_a_transparent_value() -> None:
    header = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"tRNS", struct.pack(">H", 500)),
        (b"IDAT", zlib.compress(b"\0" + struct.pack(">HH", 500, 0))),
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in [*chunks, (b"IEND", b"")])
    np.testing.assert_array_equal(pixels(data), [[[255] * 3, [0] * 3]])


def test_rotated_sixteen_bit_greyscale() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)), "PNG", exif=exif)
    np.testing.assert_array_equal(pixels(data)[:, 0, 0], [0, 255])


def test_floating_point_tiff() -> None:
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0, np.nan, -3.0]], dtype=np.float32))
    np.testing.assert_array_equal(pixels(encoded(unit, "TIFF"))[0, :, 0], [0, 128, 255, 0, 0])
    wide = Image.fromarray(np.array([[0.0, 100.0, 1000.0]], dtype=np.float32))
    np.testing.assert_array_equal(pixels(encoded(wide, "TIFF"))[0, :, 0], [0, 26, 255])


def test_signed_32_bit_values_beyond_16_bits_are_scaled() -> None:
    image = Image.fromarray(np.array([[-5, 0, 1 << 20]], dtype=np.int32))
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[0, :, 0], [0, 0, 255])


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_animations(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(pixels(data), np.full((8, 8, 3), RED))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_pictures_are_refused(format: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    assert reason(data[: int(len(data) * kept)]) == "unreadable_image"


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", png()[:45] + b"x" * 30]
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    assert reason(data) == "unreadable_image"


def test_bombs_are_refused_from_the_header_alone_and_without_warnings() -> None:
    for width, height in ((1001, 1000), (12_000, 12_000), (60_000, 60_000)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"") + _chunk(b"IEND", b"")
        before = Image.MAX_IMAGE_PIXELS
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert reason(data) == "image_too_large"
        assert before == Image.MAX_IMAGE_PIXELS


def test_a_picture_of_exactly_the_limit_passes() -> None:
    assert load_image(png(size=(10, 10)), max_pixels=100, name="it").size == (10, 10)
    with pytest.raises(ImageError, match="The picture it is too large: 11 × 10"):
        load_image(png(size=(11, 10)), max_pixels=100, name="it")


def test_files_streams_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    from_file = load_image(path, max_pixels=LIMIT, name="a")
    from_stream = load_image(io.BytesIO(png()), max_pixels=LIMIT, name="a")
    assert from_file.tobytes() == from_stream.tobytes()
    assert reason(tmp_path / "missing.png") == "missing_image"
    assert reason(tmp_path) == "unreadable_image"
    os.mkfifo(tmp_path / "pipe")
    assert reason(tmp_path / "pipe") == "unreadable_image"


def test_messages_are_one_sentence_that_names_the_picture() -> None:
    with pytest.raises(ImageError) as caught:
        load_image(b"rubbish", max_pixels=LIMIT, name="shard.tar/7.jpg")
    assert str(caught.value) == "The picture shard.tar/7.jpg can't be read: its format is not one that is read here."


def reason(source: Path | bytes) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, max_pixels=LIMIT, name="it")
    assert "\n" not in str(caught.value)
    return caught.value.reason


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

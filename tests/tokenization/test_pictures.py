"""Pictures of any size and mode to one size: against hand-made pixels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen3_vlm.errors import TokenError
from qwen3_vlm.tokenization.pictures import fit_picture
from qwen3_vlm.tokenization.uti_config import ImageConfig

CROP = ImageConfig(source="x", fit="crop")
PAD = ImageConfig(source="x", fit="pad", pad_color=(10, 20, 30))


def halves(width: int, height: int) -> Image.Image:
    """Red left of the middle, blue right of it."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("config", [CROP, PAD])
def test_a_picture_of_the_right_size_is_untouched(config: ImageConfig) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for image in (pixels, Image.fromarray(pixels)):
        assert np.array_equal(fit_picture(image, (8, 8), config).pixels, pixels)


def test_crop_takes_the_centre() -> None:
    fitted = fit_picture(halves(48, 16), (16, 16), CROP)
    assert fitted.original_size == (16, 48)
    assert fitted.content_box == (0, 0, 16, 16)
    assert (fitted.pixels[:, :8] == [255, 0, 0]).all()
    assert (fitted.pixels[:, 8:] == [0, 0, 255]).all()


def test_pad_keeps_all_of_it_between_borders() -> None:
    fitted = fit_picture(halves(32, 16), (16, 16), PAD)
    assert fitted.content_box == (0, 4, 16, 12)
    assert (fitted.pixels[:4] == [10, 20, 30]).all()
    assert (fitted.pixels[12:] == [10, 20, 30]).all()
    assert (fitted.pixels[4:12, :6] == [255, 0, 0]).all()


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([CROP, PAD]))
@settings(max_examples=60, deadline=None)
def test_any_size_fits(width: int, height: int, config: ImageConfig) -> None:
    fitted = fit_picture(Image.new("RGB", (width, height)), (12, 20), config)
    assert fitted.pixels.shape == (12, 20, 3)
    left, top, right, bottom = fitted.content_box
    assert 0 <= left < right <= 20
    assert 0 <= top < bottom <= 12


def test_modes_become_rgb_and_transparency_white() -> None:
    assert (fit_picture(Image.new("LA", (4, 4), (0, 0)), (4, 4), CROP).pixels == 255).all()
    assert (fit_picture(Image.new("L", (4, 4), 77), (4, 4), CROP).pixels == 77).all()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4)),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        "picture.png",
        Image.new("I;16", (4, 4)),
        Image.new("F", (4, 4)),
    ],
)
def test_what_is_no_picture_is_refused(image: object) -> None:
    with pytest.raises(TokenError) as caught:
        fit_picture(image, (4, 4), CROP)  # type: ignore[arg-type]
    assert caught.value.reason == "not_a_picture"

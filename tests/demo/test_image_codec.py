"""The shipped image tokenizer is a real JanusVQVAE: small, exact, and good on pairs of objects it never saw."""

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, JanusVQVAE

from qwen3_vlm.demo import image_codec as recipe
from qwen3_vlm.demo.drawings import drawing_is_held_out, named_drawings
from qwen3_vlm.demo.run import BASES
from qwen3_vlm.demo.tower import to_pixel_values
from qwen3_vlm.demo.world import NAMES

FOLDER = BASES / "image_tokenizer"


@pytest.fixture(scope="module")
def codec() -> JanusVQVAE:
    model, info = JanusVQVAE.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return recipe.held_out_scenes(100, seed="test")


def test_it_is_small(codec: JanusVQVAE) -> None:
    assert sum(parameter.numel() for parameter in codec.parameters()) <= 2_000_000
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000


def test_scenes_with_unseen_pairs_come_back_at_22_decibels(codec: JanusVQVAE, pixels: np.ndarray) -> None:
    ids, drawn = recipe.round_trip(codec, pixels)
    assert ids.shape == (100, 64)
    assert ids.min() >= 0
    assert ids.max() < codec.config.num_embeddings
    assert recipe.psnr(pixels, drawn).mean() >= 22
    assert recipe.ssim(pixels, drawn).mean() >= 0.8


def test_ids_do_not_depend_on_the_batch(codec: JanusVQVAE, pixels: np.ndarray) -> None:
    together = recipe.round_trip(codec, pixels[:8])
    again = recipe.round_trip(codec, pixels[:8])
    alone = [recipe.round_trip(codec, pixels[index : index + 1]) for index in range(8)]
    np.testing.assert_array_equal(together[0], again[0])
    np.testing.assert_array_equal(together[1], again[1])
    np.testing.assert_array_equal(together[0], np.concatenate([ids for ids, _ in alone]))


def test_encode_and_decode_see_the_same_codebook(codec: JanusVQVAE) -> None:
    """`encode` compares raw rows and `decode` scales them to length 1: these have that length already."""
    lengths = codec.quantize.embedding.weight.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=2e-3, rtol=0)


def test_an_id_alone_tells_background_and_size_and_often_the_object(codec: JanusVQVAE) -> None:
    told = recipe.what_ids_tell(codec, known=200, asked=50)
    assert told["background"] > 0.9
    assert told["size"] > 0.7
    assert told["object"] > 10 / len(NAMES)  # ten times chance, from 200 scenes


def test_the_processor_scales_as_the_codec_was_trained(pixels: np.ndarray) -> None:
    processor = AutoImageProcessor.from_pretrained(FOLDER, backend="pil")
    given = processor(pixels[0], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(given, to_pixel_values(pixels[:1]), atol=1e-5, rtol=0)


def test_psnr_and_ssim_of_known_pictures() -> None:
    black = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    np.testing.assert_allclose(recipe.psnr(black, black + 1), 10 * np.log10(255**2))
    np.testing.assert_allclose(recipe.ssim(black, black), 1)
    c1 = (0.01 * 255) ** 2  # with no variance, only the means count
    np.testing.assert_allclose(recipe.ssim(black, black + 10), c1 / (100 + c1))


def test_the_codebook_follows_its_vectors_and_revives_the_dead() -> None:
    torch.manual_seed(0)
    rows = torch.zeros(4, 8)
    codebook = recipe.Codebook(rows)
    vectors = torch.nn.functional.normalize(torch.randn(6, 8), dim=-1)[torch.arange(600) % 6]
    assert codebook.revive(vectors) == 4
    assert len({tuple(row) for row in rows.tolist()}) == 4  # k-means++ takes no vector twice
    for _ in range(300):
        codebook.update(vectors, (vectors @ rows.T).argmax(-1).clamp(max=2))
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(4))
    assert codebook.revive(vectors) == 1  # nothing was sent to the last row


def test_a_tenth_of_the_drawings_is_kept_to_measure_with() -> None:
    names = named_drawings()
    kept = {code for code, name in names.items() if not recipe.drawing_is_for_training(code, name)}
    assert 0.08 < len(kept) / len(names) < 0.2
    assert kept >= {code for code, name in names.items() if drawing_is_held_out(code, name)}

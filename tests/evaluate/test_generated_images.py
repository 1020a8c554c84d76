"""Retrieval ranks against counts by hand, picture figures against skimage, features against the tower itself."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, Siglip2VisionConfig, Siglip2VisionModel

from qwen3_vlm.errors import DataError, ModelError
from qwen3_vlm.evaluate.generated_images import (
    Features,
    TowerFeatures,
    measure_pictures,
    on_grid,
    retrieval_ranks,
)
from tests.evaluate.helpers import picture

NEAR = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=np.float32)  # mean zero


def test_ranks_by_hand() -> None:
    made = np.array([[2.0, 0.1], [1.0, 0.2], [0.5, 0.4], [0.0, -3.0]], dtype=np.float32)
    # 0: its own first; 1: opposite to its own, all others before; 2: one before it; 3: its own first
    assert retrieval_ranks(made, NEAR, np.eye(4, dtype=bool)).tolist() == [1, 4, 2, 1]


def test_what_all_share_tells_nothing_apart() -> None:
    """Far from zero all cosines are near 1; without the mean the ranks are the same as around zero."""
    made = np.array([[2.0, 0.1], [1.0, 0.2], [0.5, 0.4], [0.0, -3.0]], dtype=np.float32)
    assert retrieval_ranks(made + 1000, NEAR + 1000, np.eye(4, dtype=bool)).tolist() == [1, 4, 2, 1]


def test_ties_count_against() -> None:
    """Something that is drawn whatever was asked for stands between all references, and comes last."""
    blank = np.zeros((4, 2), dtype=np.float32)
    assert retrieval_ranks(blank, NEAR, np.eye(4, dtype=bool)).tolist() == [4, 4, 4, 4]


def test_several_may_be_right() -> None:
    own = np.zeros((1, 4), dtype=bool)
    own[0, [1, 2]] = True
    assert retrieval_ranks(np.array([[0.1, 1.0]], dtype=np.float32), NEAR, own).tolist() == [1]


def colours(pictures: Sequence[Image.Image]) -> Features:
    """One cell of three features: the mean colour."""
    return np.stack([np.asarray(p, dtype=np.float32).mean(axis=(0, 1))[None] for p in pictures])


def flat(*rgb: int) -> Image.Image:
    return Image.new("RGB", (16, 16), rgb)


def test_a_set_of_pictures() -> None:
    references = [flat(255, 0, 0), flat(0, 255, 0), flat(0, 0, 255), flat(0, 0, 255), flat(255, 255, 0)]
    prompts = ["red", "green", "blue", "sea", "red"]  # two pictures are right for "red", one picture for two prompts
    generated = [flat(250, 240, 0), flat(10, 250, 10), None, flat(0, 0, 200), flat(250, 0, 0)]
    scores = measure_pictures("t2i", generated, references, prompts, colours)
    assert scores.placed is not None
    assert scores.placed.gallery == 4
    assert scores.placed.ranks.tolist() == [1, 1, 4, 1, 1]
    assert scores.placed.chance == pytest.approx((2 + 1 + 1 + 1 + 2) / (5 * 4))
    assert scores.placed.rank_one.value == 0.8
    assert 0.3 < scores.placed.rank_one.low < 0.8 < scores.placed.rank_one.high < 1
    assert (scores.tried, scores.decoded) == (5, 4)
    assert scores.row()["own reference first"]["percent"] == 0.8
    assert scores.to_dict()["placed"]["median_rank"] == 1.0


def test_psnr_and_ssim_equal_skimage() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    references, generated = [picture(seed) for seed in range(4)], [picture(seed) for seed in range(10, 14)]
    scores = measure_pictures("t2i", generated, references, range(4), None)
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(references, generated, strict=True)]
    ssim = [
        metrics.structural_similarity(
            a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        for a, b in pairs
    ]
    assert scores.psnr_db is not None
    assert scores.ssim is not None
    assert scores.psnr_db.value == pytest.approx(
        np.mean([metrics.peak_signal_noise_ratio(a, b) for a, b in pairs]), abs=1e-9
    )
    assert scores.ssim.value == pytest.approx(np.mean(ssim), abs=1e-6)
    assert scores.psnr_db.low <= scores.psnr_db.value <= scores.psnr_db.high
    assert scores.placed is None


def test_small_pictures_and_none_at_all() -> None:
    scores = measure_pictures("t2i", [picture(1, 8), None], [picture(1, 8), picture(2, 8)], [0, 1], None)
    assert (scores.ssim, scores.psnr_db and scores.psnr_db.value) == (None, 100.0)
    nothing = measure_pictures("t2i", [None], [picture(1)], [0], colours)
    assert nothing.psnr_db is None
    assert nothing.placed is not None


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match="2 generated pictures, 1 references"):
        measure_pictures("t2i", [None, None], [picture(1)], [0], None)
    with pytest.raises(DataError, match=r"Picture 0 has the shape \(8, 8, 3\)"):
        measure_pictures("t2i", [picture(1, 8)], [picture(1)], [0], None)
    with pytest.raises(ModelError, match="neither a model folder"):
        TowerFeatures("/nowhere")


def test_features_are_the_towers_patches(tiny_tower_dir: Path) -> None:
    pictures = [picture(seed, 16) for seed in range(5)]
    cells = TowerFeatures(tiny_tower_dir, batch_size=2)(pictures)
    tower = AutoModel.from_pretrained(tiny_tower_dir, dtype=torch.float32).vision_model
    processor = AutoImageProcessor.from_pretrained(tiny_tower_dir, backend="pil")
    with torch.no_grad():
        expected = tower(**processor(pictures, return_tensors="pt")).last_hidden_state
    np.testing.assert_allclose(cells, expected.numpy(), atol=1e-5)  # 4 × 4 patches: fewer than the grid has cells


def test_many_patches_are_averaged_in_place() -> None:
    patches = torch.arange(16 * 24, dtype=torch.float32).reshape(-1, 1)
    cells = on_grid(torch.cat([patches, torch.full((7, 1), 1e9)]), 16, 24)  # padding after the patches
    expected = patches.reshape(8, 2, 8, 3).mean(dim=(1, 3)).reshape(-1, 1)
    torch.testing.assert_close(cells, expected)


def test_a_tower_of_varying_shapes(tmp_path: Path) -> None:
    from transformers import Siglip2ImageProcessorPil

    config = Siglip2VisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        patch_size=4,
        num_patches=16,
    )
    Siglip2VisionModel(config).save_pretrained(tmp_path)
    Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16).save_pretrained(tmp_path)
    cells = TowerFeatures(tmp_path)([picture(1), picture(2)])
    assert cells.shape == (2, 16, 16)
    assert np.isfinite(cells).all()

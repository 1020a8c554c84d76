"""The sizes the architecture names, counted by hand and on the meta device."""

import pytest
import torch
from transformers import Qwen3Config, SiglipVisionConfig

from qwen3_vlm.models import MLPProjector, PerceiverResampler, Qwen3VLMConfig, Qwen3VLMForConditionalGeneration

SO400M = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
QWEN3_8B = Qwen3Config(
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=12_288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)


def full_size(**fields: object) -> Qwen3VLMForConditionalGeneration:
    with torch.device("meta"):
        return Qwen3VLMForConditionalGeneration(
            Qwen3VLMConfig(text_config=QWEN3_8B, vision_config=SO400M, **fields)  # type: ignore[arg-type]
        )


def count(parameters: object) -> int:
    return sum(parameter.numel() for parameter in parameters)  # type: ignore[attr-defined]


def test_connector_of_qwen3_8b_has_the_published_sizes() -> None:
    model = full_size()
    assert count(model.model.resampler.parameters()) == 6_927_872
    assert count(model.model.projector.parameters()) == 75_517_952
    assert count(model.connector_parameters().values()) == 82_445_824
    assert model.model.vision_ln is None


def test_vision_ln_adds_2304() -> None:
    model = full_size(vision_ln=True)
    assert count(model.model.vision_ln.parameters()) == 2_304
    assert count(model.connector_parameters().values()) == 82_445_824 + 2_304


def test_resampler_adds_up_part_by_part() -> None:
    proj_in = 1152 * 512 + 512
    attention = 4 * (512 * 512 + 512)
    feed_forward = 512 * 2048 + 2048 + 2048 * 512 + 512
    assert proj_in + 64 * 512 + 2 * (1024 + attention + 1024 + feed_forward) == 6_927_872
    assert count(PerceiverResampler(1152).parameters()) == 6_927_872
    assert count(MLPProjector(512, 16_384, 4096).parameters()) == 75_517_952


@pytest.mark.parametrize("batch", [1, 3])
def test_shapes_at_full_size(batch: int) -> None:
    model = full_size()
    patches = model.encode_patches(torch.empty(batch, 3, 384, 384, device="meta"))
    assert patches.shape == (batch, 729, 1152)
    assert model.model.resampler(patches).shape == (batch, 64, 512)
    assert model.model.connect(patches).shape == (batch, 64, 4096)

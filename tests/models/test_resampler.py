"""Fused attention against the formula, masks, and what a latent may depend on."""

import pytest
import torch

from qwen3_vlm.models import PerceiverResampler

PATCHES = 50


def resampler(implementation: str = "sdpa", seed: int = 0) -> PerceiverResampler:
    torch.manual_seed(seed)
    return PerceiverResampler(
        24, latent_dim=32, num_latents=6, depth=2, num_heads=4, head_dim=8, attn_implementation=implementation
    )


def written_out(model: PerceiverResampler, patches: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The resampler as formulas, in float64, one head at a time."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    linear = lambda name, x: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]  # noqa: E731

    def layer_norm(name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return centred / (variance + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    keys = linear("proj_in", patches.double())
    latents = weights["latents"].expand(len(patches), -1, -1)
    for index in range(2):
        layer = f"layers.{index}"
        normed = layer_norm(f"{layer}.ln1", latents)
        query, key, value = (
            linear(f"{layer}.attention.{name}_proj", x) for name, x in (("q", normed), ("k", keys), ("v", keys))
        )
        heads = []
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / 8**0.5
            if mask is not None:
                scores = scores + torch.where(mask[:, None, :], 0.0, -torch.inf)
            exponent = (scores - scores.amax(-1, keepdim=True)).exp()
            heads.append(exponent / exponent.sum(-1, keepdim=True) @ value[..., part])
        latents = latents + linear(f"{layer}.attention.out_proj", torch.cat(heads, -1))
        hidden = linear(f"{layer}.feed_forward.0", layer_norm(f"{layer}.ln2", latents))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        latents = latents + linear(f"{layer}.feed_forward.2", hidden)
    return latents


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_written_out_formula(implementation: str, masked: bool) -> None:
    model = resampler(implementation)
    patches = torch.randn(3, PATCHES, 24)
    mask = torch.rand(3, PATCHES) > 0.4 if masked else None
    torch.testing.assert_close(model(patches, mask).double(), written_out(model, patches, mask), atol=1e-5, rtol=1e-5)


def test_masked_patches_have_no_influence() -> None:
    model = resampler()
    patches = torch.randn(2, PATCHES, 24)
    mask = torch.ones(2, PATCHES, dtype=torch.bool)
    mask[:, 30:] = False
    cut = model(patches[:, :30])
    torch.testing.assert_close(model(patches, mask), cut, atol=1e-5, rtol=1e-5)


def test_one_picture_does_not_depend_on_its_batch() -> None:
    model = resampler()
    patches = torch.randn(4, PATCHES, 24)
    together = model(patches)
    for index in range(4):
        torch.testing.assert_close(together[index : index + 1], model(patches[index : index + 1]), atol=1e-5, rtol=1e-5)


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="flash9"):
        resampler("flash9")

"""PerceiverResampler: any number of patch embeddings in, a fixed number of latents out.

A learned set of N latents reads the patches by cross-attention, `depth` times (the resampler of
Flamingo, arXiv:2204.14198, after Perceiver, arXiv:2103.03206). What differs here: patches are
projected to the latent width once and shared by all layers, and keys and values come from the
patches alone. It knows nothing of towers or language models: patches in, latents out.

Shapes: B images, P patches, N latents, D latent width, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")


class CrossAttention(nn.Module):
    """Multi-head attention from latents to patches, with biases on all four projections."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, implementation: str = "sdpa") -> None:
        super().__init__()
        if implementation not in ATTENTION_IMPLEMENTATIONS:
            raise ValueError(
                f"resampler attention {implementation!r} is unknown; choose one of {ATTENTION_IMPLEMENTATIONS}"
            )
        inner_dim = num_heads * head_dim
        self.num_heads = num_heads
        self.implementation = implementation
        self.q_proj = nn.Linear(dim, inner_dim)
        self.k_proj = nn.Linear(dim, inner_dim)
        self.v_proj = nn.Linear(dim, inner_dim)
        self.out_proj = nn.Linear(inner_dim, dim)

    def forward(self, latents: Tensor, patches: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D), (B, P, D), optional mask (B, 1, 1, P), True = read this patch → (B, N, D)."""
        query = self._split_heads(self.q_proj(latents))  # (B, H, N, D/H)
        key = self._split_heads(self.k_proj(patches))  # (B, H, P, D/H)
        value = self._split_heads(self.v_proj(patches))
        attend = F.scaled_dot_product_attention if self.implementation == "sdpa" else eager_attention
        mixed = attend(query, key, value, attn_mask=mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def _split_heads(self, hidden: Tensor) -> Tensor:
        return hidden.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def eager_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Attention written out: what `F.scaled_dot_product_attention` is held against."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(dim=-1) @ value


class ResamplerLayer(nn.Module):
    """Pre-norm cross-attention and feed-forward, each with a residual."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, ff_mult: int, implementation: str) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, num_heads, head_dim, implementation)
        self.ln2 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, ff_mult * dim), nn.GELU(), nn.Linear(ff_mult * dim, dim))

    def forward(self, latents: Tensor, patches: Tensor, mask: Tensor | None) -> Tensor:
        latents = latents + self.attention(self.ln1(latents), patches, mask)
        return latents + self.feed_forward(self.ln2(latents))


class PerceiverResampler(nn.Module):
    """(B, P, vision_dim) patch embeddings → (B, num_latents, latent_dim).

    With the defaults and `vision_dim` 1152 (SigLIP2 SO400M) it has 6,927,872 parameters.
    """

    def __init__(
        self,
        vision_dim: int,
        latent_dim: int = 512,
        num_latents: int = 64,
        depth: int = 2,
        num_heads: int = 8,
        head_dim: int = 64,
        ff_mult: int = 4,
        attn_implementation: str = "sdpa",
    ) -> None:
        super().__init__()
        self.proj_in = nn.Linear(vision_dim, latent_dim)
        self.latents = nn.Parameter(torch.empty(num_latents, latent_dim).normal_(std=0.02))
        self.layers = nn.ModuleList(
            ResamplerLayer(latent_dim, num_heads, head_dim, ff_mult, attn_implementation) for _ in range(depth)
        )

    def forward(self, patch_embeddings: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """Read the patches of each image into the latents.

        Args:
            patch_embeddings: (B, P, vision_dim).
            patch_mask: (B, P), true where a patch is real; towers of variable resolution pad.

        Returns:
            (B, num_latents, latent_dim).
        """
        patches = self.proj_in(patch_embeddings)
        mask = None if patch_mask is None else patch_mask.bool()[:, None, None, :]
        latents = self.latents.expand(patches.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, patches, mask)
        return latents

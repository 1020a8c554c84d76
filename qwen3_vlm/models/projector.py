"""MLPProjector: from the resampler's width to the language model's."""

from torch import Tensor, nn
from transformers.activations import ACT2FN


class MLPProjector(nn.Module):
    """Two linear layers with an activation between: `latent_dim → hidden_dim → llm_dim`.

    512 → 16,384 → 4,096 (Qwen3-8B) has 75,517,952 parameters.
    """

    def __init__(self, latent_dim: int, hidden_dim: int, llm_dim: int, activation: str = "gelu") -> None:
        super().__init__()
        self.linear_1 = nn.Linear(latent_dim, hidden_dim)
        self.activation = ACT2FN[activation]
        self.linear_2 = nn.Linear(hidden_dim, llm_dim)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, N, latent_dim) → (B, N, llm_dim)."""
        return self.linear_2(self.activation(self.linear_1(latents)))

"""Qwen3VLMConfig: a language model's config, a vision tower's config and the connector between them."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

CONNECTOR_FIELDS = (
    "num_latents",
    "latent_dim",
    "depth",
    "num_heads",
    "head_dim",
    "ff_mult",
    "projector_hidden_size",
    "projector_hidden_act",
    "vision_ln",
)


@strict
class Qwen3VLMConfig(PreTrainedConfig):
    """Sizes of the connector; those of the bases stand in their own configs.

    Args:
        text_config: of any decoder-only causal LM (default Qwen3-8B's shape class).
        vision_config: of a SigLIP or SigLIP2 vision tower.
        num_latents: vectors that one image becomes, N.
        latent_dim: width D inside the resampler.
        depth, num_heads, head_dim, ff_mult: of the resampler.
        projector_hidden_size: None means 4 × the LLM's hidden size.
        vision_ln: LayerNorm on the tower's output.
        image_token_id: id of `<image_patch>`; it may lie beyond the embedding's rows, it is never looked up.
        lm_head_bias: whether the LLM's head has a bias.
    """

    model_type = "qwen3_vlm"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen3"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model"),
    }

    text_config: Any = None  # a config object, or its dict
    vision_config: Any = None
    num_latents: int = 64
    latent_dim: int = 512
    depth: int = 2
    num_heads: int = 8
    head_dim: int = 64
    ff_mult: int = 4
    projector_hidden_size: int | None = None
    projector_hidden_act: str = "gelu"
    vision_ln: bool = False
    image_token_id: int = 151_669
    initializer_range: float = 0.02
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        # The top level decides whether head and embedding are one tensor, so the text config's word is copied.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if self.projector_hidden_size is None:
            self.projector_hidden_size = 4 * self.text_config.hidden_size


__all__ = ["Qwen3VLMConfig"]

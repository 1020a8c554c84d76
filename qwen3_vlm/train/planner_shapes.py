"""Sizes of the models that a run is made of, read from configs alone: no weights, no torch.

A base is named by a folder with a config.json, or by a hub id. A hub id's config.json is taken from the local cache
if it is there, else its sizes from the tables below, which hold the public shapes of the bases that the configs of this
package name. Shapes: D width, V vocabulary, P patches.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_vlm.config import ModelConfig
from qwen3_vlm.errors import ModelError

MAX_CONFIG_BYTES = 1_000_000
SIGLIP2_NAFLEX_PATCHES = 256  # most patches of a picture by default: google/siglip2-so400m-patch16-naflex
# Decoders with RMSNorm, rotary grouped-query attention and a gated product → (norm on q and k, bias on q, k, v).
DECODERS = {"qwen3": (True, False), "qwen2": (False, True), "llama": (False, False), "mistral": (False, False)}
TOWERS = ("siglip_vision_model", "siglip2_vision_model")


@dataclass(frozen=True, slots=True)
class TextShape:
    """A decoder-only language model."""

    width: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int  # rows of the embedding
    tied: bool  # head and embedding are one matrix
    qk_norm: bool = True
    qkv_bias: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(input, output) widths of one layer's matrices: q, k, v, o, gate, up, down."""
        width, query, kv, inner = self.width, self.query_width, self.kv_width, self.feed_forward
        return (width, query), (width, kv), (width, kv), (query, width), (width, inner), (width, inner), (inner, width)


@dataclass(frozen=True, slots=True)
class TowerShape:
    """A SigLIP or SigLIP2 vision tower without its pooling head."""

    width: int
    feed_forward: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    variable: bool = False  # NaFlex: pictures come as patches, at most `patches` of them

    @property
    def patches(self) -> int:
        return SIGLIP2_NAFLEX_PATCHES if self.variable else (self.image_size // self.patch_size) ** 2

    @property
    def pixels_per_patch(self) -> int:
        return 3 * self.patch_size**2


@dataclass(frozen=True, slots=True)
class ConnectorShape:
    """Resampler and projector, and the tower's and the LLM's widths that they lie between."""

    vision_width: int
    latent_dim: int
    num_latents: int
    depth: int
    inner_dim: int  # heads × head_dim
    ff_mult: int
    projector_hidden: int
    text_width: int
    vision_ln: bool

    @classmethod
    def of(cls, model: ModelConfig, text: TextShape, tower: TowerShape) -> "ConnectorShape":
        """As `Qwen3VLMConfig` resolves it."""
        return cls(
            tower.width,
            model.latent_dim,
            model.num_latents,
            model.depth,
            model.num_heads * model.head_dim,
            model.ff_mult,
            model.projector_hidden_size or 4 * text.width,
            text.width,
            model.vision_ln,
        )


@dataclass(frozen=True, slots=True)
class LoraShape:
    """An adapter on every linear layer of the decoder's blocks."""

    rank: int
    dropout: float = 0.0
    dora: bool = False


def _qwen3(width: int, feed_forward: int, layers: int, heads: int, *, tied: bool) -> TextShape:
    return TextShape(width, feed_forward, layers, heads, 8, 128, 151_936, tied)


# config.json of Qwen/Qwen3-0.6B … Qwen3-32B on huggingface.co, base and post-trained alike; also in torchtune's
# torchtune/models/qwen3/_model_builders.py. A test compares the parameters that follow with those that keras-hub
# publishes (keras_hub/src/models/qwen3/qwen3_presets.py).
QWEN3 = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32, tied=False),
    "qwen3-14b": _qwen3(5120, 17_408, 40, 40, tied=False),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64, tied=False),
}
# SigLIP 2 (arXiv:2502.14786), ViT-B, L, So400m and g; widths as in config.json of google/siglip2-* on huggingface.co.
SIGLIP = {
    "base": (768, 3072, 12, 12),
    "large": (1024, 4096, 24, 16),
    "so400m": (1152, 4304, 27, 16),
    "giant-opt": (1536, 6144, 40, 16),
}


def read_text_shape(name: str) -> TextShape:
    """The language model behind a folder or hub id.

    Raises:
        ModelError: it is nowhere to be found, or of a family whose formulas are not here.
    """
    config = _find_config(name)
    if config is not None:
        return text_shape(config, name)
    bare = name.rsplit("/", 1)[-1].lower().removesuffix("-base")
    if bare not in QWEN3:
        raise ModelError(_unknown(name, [f"Qwen/{known}" for known in QWEN3]))
    return QWEN3[bare]


def read_tower_shape(name: str) -> TowerShape:
    """The vision tower behind a folder or hub id.

    Raises:
        ModelError: it is nowhere to be found, or no SigLIP.
    """
    config = _find_config(name)
    if config is not None:
        return tower_shape(config, name)
    shape = _published_tower(name.rsplit("/", 1)[-1].lower())
    if shape is None:
        raise ModelError(_unknown(name, ["google/siglip2-so400m-patch14-384"]))
    return shape


def text_shape(config: Mapping[str, Any], name: str) -> TextShape:
    """From the contents of a config.json."""
    config = config.get("text_config") or config
    family = config.get("model_type")
    if family not in DECODERS:
        raise ModelError(
            f"{name} is a {family!r} model; the planner has formulas for {', '.join(DECODERS)} and no other family."
        )
    qk_norm, bias = DECODERS[family]
    width, heads = _number(config, "hidden_size", name), _number(config, "num_attention_heads", name)
    return TextShape(
        width,
        _number(config, "intermediate_size", name),
        _number(config, "num_hidden_layers", name),
        heads,
        int(config.get("num_key_value_heads") or heads),
        int(config.get("head_dim") or width // heads),
        _number(config, "vocab_size", name),
        bool(config.get("tie_word_embeddings", False)),
        qk_norm,
        bool(config.get("attention_bias", bias)),
    )


def tower_shape(config: Mapping[str, Any], name: str) -> TowerShape:
    """From the contents of a config.json, of a whole SigLIP or of its vision tower alone."""
    config = config.get("vision_config") or config
    family = str(config.get("model_type") or "siglip_vision_model")
    if family not in TOWERS:
        raise ModelError(f"{name} is a {family!r} model; the vision tower must be SigLIP or SigLIP2.")
    return TowerShape(
        int(config.get("hidden_size", 768)),
        int(config.get("intermediate_size", 3072)),
        int(config.get("num_hidden_layers", 12)),
        int(config.get("num_attention_heads", 12)),
        int(config.get("image_size", 224)),
        int(config.get("patch_size", 16)),
        family == "siglip2_vision_model",
    )


def _published_tower(name: str) -> TowerShape | None:
    """`siglip2-so400m-patch14-384` → its shape; None for a name of another form."""
    for size, widths in SIGLIP.items():
        for family in ("siglip2", "siglip"):
            start = f"{family}-{size}-patch"
            if name.startswith(start):
                patch, _, side = name.removeprefix(start).partition("-")
                if patch.isdigit() and side == "naflex":
                    return TowerShape(*widths, 0, int(patch), variable=True)
                if patch.isdigit() and side.isdigit():
                    return TowerShape(*widths, int(side), int(patch))
    return None


def _find_config(name: str) -> dict[str, Any] | None:
    """config.json of a folder, or of a hub id in the local cache; None where there is neither."""
    file = Path(name) / "config.json"
    if not Path(name).is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            return None
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{file} is too large for a config.json.")
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ModelError(f"{file} can't be read: {problem}.") from problem
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds no mapping.")
    return config


def _number(config: Mapping[str, Any], key: str, name: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"The config.json of {name} has {key} = {value!r}; a number above 0 is needed.")
    return value


def _unknown(name: str, known: list[str]) -> str:
    return (
        f"The sizes of {name} are not known here: it is no folder, its config.json is not in the hub's cache, and it "
        f"is not among the published shapes ({', '.join(known)}). Give a folder that holds its config.json."
    )

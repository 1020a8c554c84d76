"""Two tiny add-ons of one base, each with an adapter that has something to say, as directories."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn
from transformers import AutoModelForCausalLM

from qwen3_vlm.models.bases import load_bases
from qwen3_vlm.models.lora import add_lora, lora_parameters
from qwen3_vlm.models.row_files import describe_base, save_rows
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from qwen3_vlm.train.add_ons import save_connector
from qwen3_vlm.train.identity import describe_bases
from tests.tiny import TINY_CONNECTOR
from tests.tokenization.tiny_models import save_tiny

RANKS = {"connector": 2, "rows": 3}  # so that one can't be taken for the other


def give_adapter(trunk: nn.Module, *, rank: int, seed: int, dora: bool = False) -> None:
    """An adapter that changes what the trunk says."""
    add_lora(trunk, rank=rank, alpha=2.0 * rank, dora=dora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(trunk).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def save_connector_of(
    folder: Path, llm: Path, tower: Path, *, dtype: torch.dtype = torch.float32, adapter: bool = True
) -> Path:
    """A connector directory such as stage 2 leaves, or stage 1 without an adapter."""
    torch.manual_seed(2)
    model, processor = load_bases(llm, tower, dtype=dtype, initializer_range=0.2, **TINY_CONNECTOR)
    bases = describe_bases(llm, tower, processor)
    if adapter:
        give_adapter(model.model.language_model, rank=RANKS["connector"], seed=11)
    details = {"stage": "stage2_sft", "step": 7, "dtype": str(dtype).removeprefix("torch.")}
    return save_connector(folder, model, bases, details=details)


def save_rows_of(
    folder: Path,
    llm: Path,
    uti: UnifiedTokenizer,
    *,
    source: Path | None = None,
    dtype: torch.dtype = torch.float32,
    adapter: bool = True,
) -> Path:
    """A trainable-rows folder such as stage 4 leaves, or stage 3 without an adapter; `source` has its uti.yaml."""
    base = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype)
    model = TokenLM.grow(base, uti.token_space, seed=3)
    if adapter:
        give_adapter(model.language_model, rank=RANKS["rows"], seed=12, dora=True)
    details = {"stage": "stage4_mmpt", "step": 9}
    return save_rows(folder, model, describe_base(llm), uti=source, details=details)


def save_uti(folder: Path, llm: Path) -> Path:
    """A folder with the uti.yaml of tiny real codecs: 16 image ids a picture, three codebooks at 800 Hz."""
    config = {
        "text": {"tokenizer": str(llm), "name": "tiny"},
        "image": {"type": "janus_vqvae", "source": str(save_tiny(folder / "picture", "janus_vqvae"))},
        "audio": {"type": "dac", "source": str(save_tiny(folder / "sound", "dac")), "clip_seconds": 0.5},
    }
    (folder / "uti.yaml").write_text(yaml.safe_dump(config))
    return folder


def picture(seed: int = 0) -> Image.Image:
    """16 × 16 pixels of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def sound(seed: int = 0) -> tuple[Any, int]:
    """20 ms at 8 kHz."""
    return np.random.default_rng(seed).uniform(-0.9, 0.9, 160).astype(np.float32), 8_000

"""A tiny TokenLM over exact little codecs: untrained, but its scores are wide enough to tell samples apart."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from tests.tokenization.plain_codecs import plain_uti


def tiny_speaker(llm: Path, uti: UnifiedTokenizer | None = None, **options: Any) -> tuple[TokenLM, UnifiedTokenizer]:
    """The base in `llm`, grown to the space of `uti`, by default that of `plain_codecs`: fp32, eval mode.

    Pictures have 16 ids of 64, sounds two codebooks of 16 and 400 frames a clip.
    """
    uti = uti or plain_uti()
    base = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    return TokenLM.grow(base, uti.token_space, **options).eval(), uti

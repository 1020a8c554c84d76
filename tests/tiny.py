"""Tiny real models for the tests: seeded, built in code, saved to disk like pretrained ones."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from qwen3_vlm.tokenization.text import open_text
from qwen3_vlm.tokenization.token_space import AudioIdentity, ImageIdentity, TokenSpace
from qwen3_vlm.tokenization.uti_config import TextConfig

SENTENCES = (
    "a red heart left of a small dog on a white background",
    "what is in the picture? describe it in one sentence.",
    "two big apples above a green tree, and a blue car below",
)
PASSED_GATE: dict[str, object] = {
    "name": "zero − correct",
    "value": 0.5,
    "low": 0.4,
    "high": 0.6,
    "threshold": 0.05,
    "samples": 300,
    "passed": True,
    "reason": "",
}
VOCABULARY_ROWS = 384  # more than the tokenizer has ids, like the real Qwen3


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML marks; byte fallback makes any text encodable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def save_tiny_llm(folder: Path, *, tied: bool = True, family: str = "qwen3", seed: int = 0) -> Path:
    """A two-layer Qwen3 (or Llama) of width 32 with its tokenizer."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY_ROWS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 0,
        "initializer_range": 0.2,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**sizes)) if family == "qwen3" else LlamaForCausalLM(LlamaConfig(**sizes))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_tower(folder: Path, *, seed: int = 1) -> Path:
    """A whole SigLIP (text tower too, as on the hub) with 16-pixel pictures and 16 patches of width 24."""
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SiglipModel(SiglipConfig(text_config={**text, "vocab_size": 64}, vision_config=vision))
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


TINY_CONNECTOR = {
    "num_latents": 4,
    "latent_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "head_dim": 8,
    "projector_hidden_size": 32,
}


def tiny_row_space(llm: Path) -> TokenSpace:
    """A token space over a tiny base: 2 × 3 pictures of 16 codes, sound of 3 codebooks (4, 5, 6)."""
    text = open_text(TextConfig(tokenizer=str(llm), name="tiny-text")).identity
    image = ImageIdentity("tiny-vq", "janus_vqvae", 16, (16, 24), (2, 3), "1" * 64)
    audio = AudioIdentity("tiny-codec", "dac", (4, 5, 6), 16_000, 1, 320, 2.0, "2" * 64)
    return TokenSpace.build(text, image, audio)


def save_tiny_rows(folder: Path, llm: Path, *, seed: int = 3) -> Path:
    """A trainable-rows folder of fresh rows behind the base in `llm`, with a gate that passed."""
    from qwen3_vlm.models.row_files import describe_base, save_rows
    from qwen3_vlm.models.token_lm import TokenLM

    base = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    model = TokenLM.grow(base, tiny_row_space(llm), seed=seed)
    uti = folder.with_name(f"{folder.name}-uti.yaml")
    uti.write_text("text: {}\n", encoding="utf-8")
    evidence = {"format": 1, "gates": [PASSED_GATE]}
    return save_rows(
        folder, model, describe_base(llm), uti=uti, evidence=evidence, details={"stage": "stage3_rows", "step": 7}
    )

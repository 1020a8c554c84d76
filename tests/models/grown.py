"""Tiny bases of several families, grown to a token space, and what the tests feed to them."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.tokenization.sequences import SEQUENCES, TokenSequence, build_sequence
from qwen3_vlm.tokenization.token_space import TokenSpace
from tests.data.tiny_shards import tiny_record, tiny_space

ROWS = 384  # of the base; its tokenizer has five ids fewer
SPACE: TokenSpace = tiny_space(ROWS)
USED, TOTAL = SPACE.text.tokenizer_size, SPACE.vocab_size_total
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, Any] = {
    "qwen3": lambda **more: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, **more)),
    "llama": lambda **more: LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=8, **more)),
    "gemma2": lambda **more: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0, attn_implementation="eager", **more)
    ),
    "gpt2": lambda **more: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=ROWS, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=None,
            eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **more,
        )
    ),
    "granite": lambda **more: GraniteForCausalLM(
        GraniteConfig(**SIZES, logits_scaling=3.0, embedding_multiplier=2.0, **more)
    ),
    "cohere": lambda **more: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.5, **more)),
}  # fmt: skip


def make_base(family: str = "qwen3", *, tied: bool = True, seed: int = 0) -> Any:
    """A causal LM with two layers of width 32, in eval mode."""
    torch.manual_seed(seed)
    return FAMILIES[family](tie_word_embeddings=tied).eval()


def grow(base: Any, **options: Any) -> TokenLM:
    """A TokenLM over a copy of the base."""
    return TokenLM.grow(copy.deepcopy(base), SPACE, **options)


def joined(base: Any, model: TokenLM) -> Any:
    """The same model with plain joined matrices: what transformers itself computes."""
    plain = copy.deepcopy(base)
    plain.resize_token_embeddings(TOTAL, mean_resizing=False)
    with torch.no_grad():
        plain.get_input_embeddings().weight[ROWS:] = model.embedding.rows
        plain.get_output_embeddings().weight[ROWS:] = model.lm_head.rows
    return plain


def sequences(tasks: Sequence[str] = tuple(SEQUENCES), first: int = 1) -> list[TokenSequence]:
    """One made-up record as each task."""
    made = []
    for number, task in enumerate(tasks, first):
        ids = dict(tiny_record(number, SPACE).ids) | {"text": np.arange(3 + number % 5) * 7 + number}
        made.append(build_sequence(SPACE, task, ids))
    return made


def pad(made: Sequence[TokenSequence]) -> dict[str, Tensor]:
    """Right-padded inputs, labels and task numbers, (B, T) each."""
    width = max(map(len, made))
    names = list(SEQUENCES)

    def stack(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*map(int, row), *[fill] * (width - len(row))] for row in rows])

    return {
        "input_ids": stack([sequence.input_ids for sequence in made], SPACE.special("<|pad_mm|>")),
        "attention_mask": stack([[1] * len(sequence) for sequence in made], 0),
        "labels": stack([sequence.labels for sequence in made], -100),
        "task_ids": stack([[names.index(sequence.task)] * len(sequence) for sequence in made], 0),
    }


def texts(count: int = 8, length: int = 23, seed: int = 5) -> Tensor:
    """(count, length) ids that the base's tokenizer has."""
    return torch.randint(USED, (count, length), generator=torch.Generator().manual_seed(seed))

"""Models that keep packed samples apart pass; one whose state runs on across samples is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, MistralConfig, MistralForCausalLM

from qwen3_vlm.errors import ModelError
from qwen3_vlm.models.bases import load_bases
from qwen3_vlm.train.packing_check import check_packing, packing_error
from tests.tiny import TINY_CONNECTOR, VOCABULARY_ROWS, tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_ROWS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def with_language_model(language_model: Any, folder: Path, tower: Path) -> Any:
    language_model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_bases(folder, tower, dtype=torch.float32, **TINY_CONNECTOR)[0]


def test_qwen3_passes_and_its_modes_are_restored(tiny_vlm: tuple[Any, Any]) -> None:
    model = tiny_vlm[0].train()
    model.model.language_model.eval()
    check_packing(model)
    assert packing_error(model.eval()) < 1e-5
    assert not model.model.language_model.training


def test_a_sliding_window_passes(tmp_path: Path, tiny_tower_dir: Path) -> None:
    torch.manual_seed(0)
    mistral = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3))
    check_packing(with_language_model(mistral, tmp_path, tiny_tower_dir))


def test_state_that_runs_on_across_samples_is_refused(tmp_path: Path, tiny_tower_dir: Path) -> None:
    torch.manual_seed(0)
    layers = ["conv", "full_attention"]
    lfm2 = Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=layers, block_auto_adjust_ff_dim=False))
    with pytest.raises(ModelError, match=r"lfm2.*packing=false"):
        check_packing(with_language_model(lfm2, tmp_path, tiny_tower_dir))

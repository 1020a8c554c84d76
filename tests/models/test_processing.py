"""Placeholders, masks and chat text against hand-made tables."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.models import Qwen3VLMProcessor
from tests.tiny import save_tiny_llm, save_tiny_tower

Vlm = tuple[Any, Any]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Qwen3VLMProcessor:
    folder = tmp_path_factory.mktemp("bases")
    return Qwen3VLMProcessor.from_bases(save_tiny_llm(folder / "llm"), save_tiny_tower(folder / "tower"), 4)


def test_image_patch_takes_the_first_unused_row(processor: Qwen3VLMProcessor) -> None:
    assert processor.image_token_id == len(processor.tokenizer) - 1 < 384


def test_chat_text_is_as_published(processor: Qwen3VLMProcessor) -> None:
    messages = [
        {"role": "user", "content": "<image_patch>\ndescribe"},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "and these?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|im_start|>user\n<image_patch>\ndescribe<|im_end|>\n<|im_start|>assistant\na dog<|im_end|>\n"
        "<|im_start|>user\n<image_patch>\n<image_patch>\nand these?<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n"
    )


def test_mask_covers_answers_and_their_end_alone(processor: Qwen3VLMProcessor) -> None:
    messages = [
        {"role": "user", "content": "<image_patch>\ndescribe"},
        {"role": "assistant", "content": "a red heart"},
        {"role": "user", "content": "and <image_patch>?"},
        {"role": "assistant", "content": "a dog"},
    ]
    ids, mask = processor.encode_conversation(messages)
    graded = processor.tokenizer.decode([token for token, keep in zip(ids, mask, strict=True) if keep])
    assert graded == "a red heart<|im_end|>a dog<|im_end|>"
    assert ids.count(processor.image_token_id) == 8
    assert processor.placeholders(ids) == 2


def test_prompt_is_the_conversation_up_to_the_answer(processor: Qwen3VLMProcessor) -> None:
    question = {"role": "user", "content": "<image_patch>\ndescribe"}
    prompt = processor.encode_prompt([question])
    ids, mask = processor.encode_conversation([question, {"role": "assistant", "content": "a dog"}])
    assert prompt == ids[: mask.index(1)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20), st.integers(0, 3)),
        min_size=1,
        max_size=4,
    )
)
def test_any_text_keeps_its_placeholders(processor: Qwen3VLMProcessor, turns: list[tuple[str, int]]) -> None:
    messages = []
    for text, images in turns:
        messages.append({"role": "user", "content": "<image_patch>\n" * images + text})
        messages.append({"role": "assistant", "content": "yes"})
    ids, mask = processor.encode_conversation(messages)
    total = sum(images for _, images in turns)
    assert ids.count(processor.image_token_id) == 4 * total
    assert processor.tokenizer.decode([i for i, keep in zip(ids, mask, strict=True) if keep]) == "yes<|im_end|>" * len(
        turns
    )


def test_plain_template_where_there_is_no_chatml(tmp_path: Path, tiny_tower_dir: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {character: index for index, character in enumerate(["</s>", *pre_tokenizers.ByteLevel.alphabet()])}
    raw = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(tmp_path)
    processor = Qwen3VLMProcessor.from_bases(tmp_path, tiny_tower_dir, 4)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert processor.apply_chat_template(messages, tokenize=False) == "USER: hi\nASSISTANT: yo</s>\n"
    assert processor.stop_token_ids() == [processor.tokenizer.eos_token_id]

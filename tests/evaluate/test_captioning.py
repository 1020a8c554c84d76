"""Greedy answers: against a decoding loop without cache or padding, and whatever batch they are in."""

from typing import Any

import pytest
import torch

from qwen3_vlm.errors import ModelError
from qwen3_vlm.evaluate.captioning import Request, caption_images, generate_answers
from tests.evaluate.helpers import picture


def plain_greedy(model: Any, processor: Any, request: Request, steps: int) -> str:
    """One sample, no padding, no cache: the whole sequence again for every token."""
    ids = processor.encode_prompt(request.messages)
    pixels = processor.pixel_values(request.images) if request.images else {}
    answer: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answer]), **pixels).logits
        token = int(logits[0, -1].argmax())
        if token in processor.stop_token_ids():
            break
        answer.append(token)
    return str(processor.tokenizer.decode(answer, skip_special_tokens=True)).strip()


def requests() -> list[Request]:
    image = "<image_patch>"
    return [
        Request([{"role": "user", "content": f"{image}\nwhat is in the picture?"}], [picture(0)]),
        Request([{"role": "user", "content": "describe it in one sentence."}]),
        Request([{"role": "user", "content": f"{image} and {image}, which is red?"}], [picture(1), picture(2)]),
        Request([{"role": "user", "content": f"{image}\nwhat?"}], [picture(3)]),
    ]


def test_answers_equal_plain_greedy_decoding_in_any_batch(tiny_vlm: tuple[Any, Any]) -> None:
    model, processor = tiny_vlm
    expected = [plain_greedy(model, processor, request, 6) for request in requests()]
    assert len(set(expected)) > 1
    for batch_size in (1, 3, 4):
        answers = generate_answers(model, processor, requests(), max_new_tokens=6, batch_size=batch_size)
        assert answers == expected


def test_captions_come_in_order_from_a_lazy_source(tiny_vlm: tuple[Any, Any]) -> None:
    model, processor = tiny_vlm
    straight = caption_images(model, processor, map(picture, range(5)), max_new_tokens=4, batch_size=2)
    single = [caption_images(model, processor, [picture(n)], max_new_tokens=4)[0] for n in range(5)]
    assert straight == single
    assert caption_images(model, processor, []) == []


def test_only_one_batch_of_pictures_is_open_at_a_time(tiny_vlm: tuple[Any, Any], monkeypatch: Any) -> None:
    model, processor = tiny_vlm
    drawn: list[int] = []
    seen: list[int] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: seen.append(len(drawn)) or generate(**kw))
    pictures = (drawn.append(n) or picture(n) for n in range(5))  # type: ignore[func-returns-value]
    caption_images(model, processor, pictures, max_new_tokens=1, batch_size=2)
    assert seen == [2, 4, 5]


def test_the_bases_own_sampling_settings_do_not_matter(tiny_vlm: tuple[Any, Any]) -> None:
    model, processor = tiny_vlm
    before = generate_answers(model, processor, requests(), max_new_tokens=5)
    for name, value in {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 9.0}.items():
        setattr(model.generation_config, name, value)
    assert generate_answers(model, processor, requests(), max_new_tokens=5) == before


def test_the_prompt_may_say_where_the_picture_is(tiny_vlm: tuple[Any, Any]) -> None:
    model, processor = tiny_vlm
    given = {"max_new_tokens": 5}
    marked = caption_images(model, processor, [picture(1)], prompt="<image>\nwhat?", **given)
    assert marked == caption_images(model, processor, [picture(1)], prompt="what?", **given)
    with pytest.raises(ModelError, match="2 places"):
        caption_images(model, processor, [picture(1)], prompt="<image> or <image>?")


def test_text_and_pictures_must_agree(tiny_vlm: tuple[Any, Any]) -> None:
    model, processor = tiny_vlm
    with pytest.raises(ModelError, match=r"Request 0 has 0 <image_patch> in its text and 1"):
        generate_answers(model, processor, [Request([{"role": "user", "content": "what?"}], [picture(0)])])


def test_the_models_mode_is_kept(tiny_vlm: tuple[Any, Any]) -> None:
    model, processor = tiny_vlm
    model.train()
    caption_images(model, processor, [picture(0)], max_new_tokens=1)
    assert model.training


def test_prompts_that_no_model_can_read(tiny_vlm: tuple[Any, Any], monkeypatch: Any) -> None:
    model, processor = tiny_vlm
    with pytest.raises(ModelError, match=r"takes \d{3} tokens with its picture; the model reads 512 at most"):
        caption_images(model, processor, [picture(0)], prompt="\u00e9!" * 250)
    monkeypatch.setattr(type(processor), "encode_prompt", lambda self, messages: pytest.fail("it was tokenized"))
    with pytest.raises(ModelError, match="5,000,000 characters, far more than the 512 tokens"):
        caption_images(model, processor, [picture(0)], prompt="a " * 2_500_000)
    with pytest.raises(ModelError, match="its character 3 stands for no character"):
        caption_images(model, processor, [picture(0)], prompt="is\ud800")

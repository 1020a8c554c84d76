"""Greedy answers in batches: the command line, the golden set and the demo all read from here.

Prompts are padded on the left and decoded by the model's own `generate`, with one fixed decoding:
greedy, whatever sampling settings the base brings along. In fp32 an answer does not depend on the
batch it is in; in bf16 rounding can tip a close call between two tokens.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from transformers import GenerationConfig

from qwen3_vlm.data.records import CAPTION_PROMPT, IMAGE_MARK
from qwen3_vlm.errors import ModelError
from qwen3_vlm.evaluate.batches import device_of
from qwen3_vlm.models.modes import evaluation_mode

_CHARACTERS_PER_TOKEN = 16  # more than any text has on average; what is longer is not even tokenized
_IMAGE_MARKS = ("<image_patch>", IMAGE_MARK)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Request:
    """A conversation that waits for its next answer.

    `messages` are [{"role", "content": text}], each picture standing as `<image_patch>` in the text;
    `images` are those pictures in that order.
    """

    messages: Sequence[Mapping[str, Any]]
    images: Sequence[Image.Image] = ()


def caption_images(
    model: Any,
    processor: Any,
    images: Iterable[Image.Image],
    *,
    prompt: str = CAPTION_PROMPT,
    max_new_tokens: int = 64,
    batch_size: int = 8,
) -> list[str]:
    """One caption per picture, in order. `images` may be lazy: a batch of them is open at a time.

    Args:
        prompt: what is asked of each picture. The picture comes before it, unless the text says where
            with `<image>`.

    Raises:
        ModelError: the prompt is not text, is longer than the model can read, or has more than one place for a
            picture.
    """
    positions = _positions(model)
    _check_text(prompt, positions)
    messages = [{"role": "user", "content": _with_picture(prompt, processor.image_token)}]
    if positions is not None and (length := len(processor.encode_prompt(messages))) > positions:
        raise ModelError(f"The prompt takes {length:,} tokens with its picture; the model reads {positions:,} at most.")
    captions: list[str] = []
    for chunk in _chunks(images, batch_size):
        requests = [Request(messages, [image]) for image in chunk]
        captions += generate_answers(model, processor, requests, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return captions


def generate_answers(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    decoding: Mapping[str, Any] | None = None,
) -> list[str]:
    """One answer per request, in order; requests of like length share a batch.

    Args:
        decoding: fields of GenerationConfig for another decoding than the greedy one, such as `num_beams`.

    Raises:
        ModelError: a request's text and pictures do not agree in number; names the request.
    """
    prompts = [processor.encode_prompt(request.messages) for request in requests]
    for number, (ids, request) in enumerate(zip(prompts, requests, strict=True)):
        if (places := processor.placeholders(ids)) != len(request.images):
            raise ModelError(
                f"Request {number} has {places} {processor.image_token} in its text and {len(request.images)} "
                f"pictures; each picture needs one."
            )
    answers = [""] * len(requests)
    order = sorted(range(len(requests)), key=lambda index: len(prompts[index]))
    with evaluation_mode(model):
        for chunk in _chunks(order, batch_size):
            images = [image for index in chunk for image in requests[index].images]
            config = _greedy(max_new_tokens, processor, decoding or {})
            texts = _generate_batch(model, processor, [prompts[index] for index in chunk], images, config)
            for index, text in zip(chunk, texts, strict=True):
                answers[index] = text
    return answers


def _generate_batch(
    model: Any, processor: Any, prompts: Sequence[list[int]], images: list[Image.Image], config: GenerationConfig
) -> list[str]:
    device = device_of(model)
    pad_id = config.pad_token_id
    width = max(map(len, prompts))
    input_ids = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts])  # (B, T), padded on the left
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    pixels = {name: value.to(device) for name, value in processor.pixel_values(images).items()} if images else {}
    output = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        **pixels,
        generation_config=config,
    )
    return [text.strip() for text in processor.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]


def _greedy(max_new_tokens: int, processor: Any, changes: Mapping[str, Any]) -> GenerationConfig:
    """Every setting that could bend greedy decoding is given, or the base's own would be used."""
    stop_ids, pad_id = processor.stop_token_ids(), processor.tokenizer.pad_token_id
    plain = {
        "do_sample": False,
        "num_beams": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
    }
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0] if pad_id is None else pad_id,
        **{**plain, **changes},
    )


def _positions(model: Any) -> int | None:
    """How many tokens the language model can read, if its config says so."""
    config = getattr(model, "config", None)
    found = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def _check_text(prompt: str, positions: int | None) -> None:
    if positions is not None and len(prompt) > positions * _CHARACTERS_PER_TOKEN:
        raise ModelError(
            f"The prompt has {len(prompt):,} characters, far more than the {positions:,} tokens that the model reads."
        )
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise ModelError(
            f"The prompt is not valid text: its character {problem.start + 1:,} stands for no character of Unicode. "
            "Give it in UTF-8."
        ) from problem


def _with_picture(prompt: str, image_token: str) -> str:
    places = sum(prompt.count(mark) for mark in _IMAGE_MARKS)
    if places > 1:
        raise ModelError(f"The prompt {prompt!r} has {places} places for a picture; a caption is asked of one.")
    for mark in _IMAGE_MARKS:
        prompt = prompt.replace(mark, image_token)
    return prompt if places else f"{image_token}\n{prompt}"


def _chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk

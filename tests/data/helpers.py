"""A small stand-in for the processor, and record files made by hand."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

IMAGE_TOKEN_ID = 1
END_TOKEN_ID = 2
ROLE_TOKEN_IDS = {"user": 3, "assistant": 4}
FIRST_WORD_ID = 10


class WordTokenizer:
    """One id per word, given out by hash so that it is the same in every process."""

    pad_token_id = 0
    vocab_size = 1000
    all_special_tokens = ("<|im_end|>", "<|secret|>")


class WordProcessor:
    """Chat as: role id, one id per word, end id. An answer's words and its end id are the assistant's."""

    image_token = "<image_patch>"
    image_token_id = IMAGE_TOKEN_ID
    chat_template = "words"

    def __init__(self, num_image_tokens: int = 4) -> None:
        self.num_image_tokens = num_image_tokens
        self.tokenizer: Any = WordTokenizer()

    def encode_conversation(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        mask: list[int] = []
        for message in messages:
            body = [*self._words(message["content"]), END_TOKEN_ID]
            ids += [ROLE_TOKEN_IDS[message["role"]], *body]
            mask += [0, *[int(message["role"] == "assistant")] * len(body)]
        return ids, mask

    def encode_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return [*self.encode_conversation(messages)[0], ROLE_TOKEN_IDS["assistant"]]

    def pixel_values(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """The mean colour of each picture as a 1×1 picture: enough to see which picture came where."""
        means = [np.asarray(image).reshape(-1, 3).mean(axis=0) for image in images]
        return {"pixel_values": torch.tensor(np.array(means), dtype=torch.float32).reshape(-1, 3, 1, 1)}

    def _words(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in text.replace(self.image_token, f" {self.image_token} ").split():
            is_image = word == self.image_token
            ids += [IMAGE_TOKEN_ID] * self.num_image_tokens if is_image else [word_id(word)]
        return ids


def word_id(word: str) -> int:
    return FIRST_WORD_ID + sum(word.encode()) % 900


def png(color: tuple[int, int, int] = (200, 30, 40), size: tuple[int, int] = (8, 6)) -> bytes:
    return encoded(Image.new("RGB", size, color), "PNG")


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def caption_records(count: int) -> list[dict[str, Any]]:
    """Records k0, k1, … with pictures k0.png, k1.png, … and captions of 1 to 30 words."""
    return [
        {
            "id": f"k{number}",
            "image": f"k{number}.png",
            "conversations": conversation("What is it?\n<image>", " ".join(["word"] * (1 + number % 30))),
        }
        for number in range(count)
    ]


def write_json(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path

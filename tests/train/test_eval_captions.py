"""What is asked for, answer by answer: the messages before it, the pictures with it, and neither without sight."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen3_vlm.config import RunConfig
from qwen3_vlm.data.records import ImageRef, Record, Turn
from qwen3_vlm.evaluate.captioning import Request
from qwen3_vlm.train import eval_captions


class Processor:
    image_token = "<image_patch>"


def talk(identity: str, texts: Sequence[str], images: Sequence[Path]) -> Record:
    turns = tuple(Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts))
    return Record(identity, turns, tuple(ImageRef(str(path)) for path in images), identity)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[Request]]:
    """The requests of each call; request n of call c is answered `c.n`."""
    calls: list[list[Request]] = []

    def generate(model: Any, processor: Any, requests: Sequence[Request], **options: Any) -> list[str]:
        calls.append(list(requests))
        return [f"{len(calls)}.{number}" for number in range(len(requests))]

    monkeypatch.setattr(eval_captions, "generate_answers", generate)
    return calls


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Image.new("RGB", (4 + number, 4)).save(path)
    return [
        talk("long", ["<image>\nwhat", "a cat", "<image>\nand", "a dog", "both", "yes"], paths[:2]),
        talk("gone", ["<image>\nwhat", "a cat"], [tmp_path / "gone.png"]),
        talk("short", ["<image>\nwho", "me"], paths[2:]),
    ]


def messages(request: Request) -> list[str]:
    assert [message["role"] for message in request.messages] == ["user", "assistant", "user", "assistant", "user"][
        : len(request.messages)
    ]
    return [str(message["content"]) for message in request.messages]


def test_the_true_answers_stand_before_the_next_question(asked: list[list[Request]], records: list[Record]) -> None:
    answers, unreadable = eval_captions.answer(None, Processor(), records, RunConfig())
    assert unreadable == 1
    assert [len(call) for call in asked] == [2, 1, 1, 2, 1, 1]
    assert messages(asked[0][0]) == ["<image_patch>\nwhat"]
    assert messages(asked[0][1]) == ["<image_patch>\nwho"]
    assert messages(asked[2][0]) == ["<image_patch>\nwhat", "a cat", "<image_patch>\nand", "a dog", "both"]
    assert [[image.width for image in request.images] for call in asked[:3] for request in call] == [
        [4], [6], [4, 5], [4, 5],
    ]  # fmt: skip
    assert messages(asked[5][0]) == ["what", "a cat", "and", "a dog", "both"]
    assert not any(request.images for call in asked[3:] for request in call)
    found = [(item.id, item.turn, item.reference, item.prediction, item.blind) for item in answers]
    assert found == [
        ("long", 0, "a cat", "1.0", "4.0"),
        ("long", 1, "a dog", "2.0", "5.0"),
        ("long", 2, "yes", "3.0", "6.0"),
        ("short", 0, "me", "1.1", "4.1"),
    ]


def test_or_its_own_as_when_one_talks_with_it(asked: list[list[Request]], records: list[Record]) -> None:
    answers, _ = eval_captions.answer(None, Processor(), records, RunConfig(), own_answers=True)
    assert messages(asked[2][0]) == ["<image_patch>\nwhat", "1.0", "<image_patch>\nand", "2.0", "both"]
    assert messages(asked[5][0]) == ["what", "4.0", "and", "5.0", "both"], "blind, it hears what it said blind"
    assert [item.prediction for item in answers] == ["1.0", "2.0", "3.0", "1.1"]
    assert [item.question for item in answers] == ["<image>\nwhat", "<image>\nand", "both", "<image>\nwho"]


def test_nothing_is_asked_of_no_record(asked: list[list[Request]]) -> None:
    assert eval_captions.answer(None, Processor(), [], RunConfig()) == ([], 0)
    assert not asked

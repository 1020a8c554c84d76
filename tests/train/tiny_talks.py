"""Stage 2 small enough for a test: conversations about coloured squares, and the connector that it starts from."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from qwen3_vlm.train.train_utils import train
from tests.train.tiny_run import COLOURS, tiny_config, write_records


def write_conversations(folder: Path, count: int = 24) -> Path:
    """Conversations of one to three exchanges about one or two squares, and some without a picture."""
    folder.mkdir(parents=True)
    names = list(COLOURS)
    for name in names:
        Image.new("RGB", (16, 16), COLOURS[name]).save(folder / f"{name}.png")
    records = []
    for number in range(count):
        first, second = names[number % 4], names[number * 3 % 4]
        turns = [("human", "<image>\nwhat is it?"), ("gpt", f"a {first} heart")]
        images = [first]
        if number % 3 == 1:
            turns += [("human", "and this?\n<image>"), ("gpt", f"a {second} tree"), ("human", "same?"), ("gpt", "no")]
            images.append(second)
        if number % 3 == 2:
            turns, images = [("human", "what is a dog?"), ("gpt", "a small dog")], []
        record: dict[str, Any] = {
            "id": f"talk-{number}",
            "conversations": [{"from": who, "value": words} for who, words in turns],
        }
        if images:
            record["image"] = [f"{name}.png" for name in images]
        records.append(record)
    path = folder / "talks.json"
    path.write_text(json.dumps(records))
    return path


class Setting:
    def __init__(self, llm: Path, tower: Path, folder: Path) -> None:
        self.llm, self.tower, self.talks = llm, tower, write_conversations(folder / "talks")
        first = train(tiny_config(folder / "first", llm, tower, write_records(folder / "captions"), optim__max_steps=2))
        self.connector = first.add_on_dir

    def config(self, folder: Path, **changes: Any) -> Any:
        settings: dict[str, Any] = {"stage": "stage2_sft", "model__connector": str(self.connector), "lora__rank": 4}
        settings |= {"optim__learning_rate": 3e-3, "optim__accumulation": 4, "data__eval_fraction": 0.25}
        return tiny_config(folder, self.llm, self.tower, self.talks, **{**settings, **changes})


def write_texts(folder: Path, count: int = 6) -> Path:
    """Conversations without pictures, one a line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "texts.jsonl"
    talks = [
        [("human", f"what has {number} legs?"), ("gpt", "a small dog, a blue car below a green tree" + "!" * number)]
        for number in range(count)
    ]
    records = [
        {"id": f"text-{number}", "conversations": [{"from": who, "value": words} for who, words in talk]}
        for number, talk in enumerate(talks)
    ]
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path

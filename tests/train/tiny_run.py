"""A training run small enough for a test: coloured squares, tiny bases, a handful of steps."""

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from qwen3_vlm.config import RunConfig, dump_yaml, parse_config
from tests.tiny import TINY_CONNECTOR

COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
TIME_FIELDS = {"seconds", "tokens_per_second", "peak_memory_mib"}  # all that may differ between two equal runs


def write_records(folder: Path, count: int = 40, *, pictures: bool = True, missing: tuple[int, ...] = ()) -> Path:
    """A LLaVA JSON with `count` captions of varied length; the pictures of `missing` are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    records = []
    for index in range(count):
        colour = chance.choice(list(COLOURS))
        answer = f"a {colour} heart" + " on a white background" * chance.randint(0, 4)
        question = "what is in the picture?"
        record: dict[str, Any] = {"id": f"sample-{index}"}
        if pictures:
            record["image"] = f"{index}.png"
            question = f"<image>\n{question}"
            if index not in missing:
                Image.new("RGB", (16, 16), COLOURS[colour]).save(folder / f"{index}.png")
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({**record, "conversations": turns})
    path = folder / "records.json"
    path.write_text(json.dumps(records))
    return path


def tiny_config(output_dir: Path, llm: Path, tower: Path, records: Path, **overrides: Any) -> RunConfig:
    """Eight steps of 2 × 2 sequences with a checkpoint every third; dotted overrides with "__" for the dot."""
    tree: dict[str, Any] = {
        "output_dir": str(output_dir),
        "save_every": 3,
        "log_every": 2,
        "tensorboard": False,
        "model": {
            "llm": str(llm),
            "vision_tower": str(tower),
            "dtype": "float32",
            "initializer_range": 0.2,
            **TINY_CONNECTOR,
        },
        "data": {
            "train": [str(records)],
            "eval_fraction": 0.2,
            "max_seq_len": 96,
            "num_workers": 0,
        },
        "optim": {
            "batch_size": 1,
            "accumulation": 2,
            "learning_rate": 1e-2,
            "max_steps": 8,
            "mixed_precision": "no",
        },
        "eval": {
            "quick_every": 4,
            "quick_samples": 4,
            "ablation_samples": 6,
            "bootstrap_samples": 20,
            "golden_samples": 2,
            "golden_max_new_tokens": 2,
        },
    }
    return parse_config(tree, [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()])


def write_config(path: Path, config: RunConfig) -> Path:
    """The config as a YAML file, for a run in another process."""
    path.write_text(dump_yaml(config))
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what measures time and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIME_FIELDS} for line in lines]


def final_bytes(run: Path) -> dict[str, bytes]:
    """The files that two equal runs must have in common to the bit."""
    newest = max((run / "checkpoints").iterdir())
    return {
        "connector": (run / "connector" / "connector.safetensors").read_bytes(),
        "optimizer": (newest / "optimizer.safetensors").read_bytes(),
    }

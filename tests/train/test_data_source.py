"""Evaluation files of their own: what is bad in them is refused, listed and counted like training data."""

import json
from pathlib import Path

import pytest

from qwen3_vlm.config import RunConfig
from qwen3_vlm.errors import DataError
from qwen3_vlm.train.train_utils import train
from tests.train.tiny_run import metrics, tiny_config, write_records

CAPTIONS = {"good": "a red heart", "empty": "", "long": "a red heart " * 200}


@pytest.fixture
def config(tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path: Path) -> RunConfig:
    records = write_records(tmp_path / "records", 8, pictures=False)
    held_out = [str(tmp_path / "eval.json")]
    settings = {"optim__max_steps": 1, "data__max_bad_fraction": 0.5, "data__eval": held_out}
    return tiny_config(tmp_path / "run", tiny_llm_dir, tiny_tower_dir, records, **settings)


def write_eval(config: RunConfig, *kinds: str) -> None:
    turns = [[{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": CAPTIONS[kind]}] for kind in kinds]
    tree = [{"id": f"{kind}-{number}", "conversations": turns[number]} for number, kind in enumerate(kinds)]
    Path(config.data.eval[0]).write_text(json.dumps(tree))


def test_bad_evaluation_records_are_listed_and_counted(config: RunConfig) -> None:
    write_eval(config, "good", "long", "good", "long", "good")
    train(config)
    run = Path(config.output_dir)
    lines = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [(line["id"], line["reason"]) for line in lines] == [
        ("long-1", "truncates_answer"),
        ("long-3", "truncates_answer"),
    ]
    (figures,) = (line for line in metrics(run) if line["kind"] == "eval")
    assert (figures["samples"], figures["truncated"], figures["skipped"], figures["zero_label"]) == (3, 2, 2, 0)


def test_too_many_bad_evaluation_records_are_refused(config: RunConfig) -> None:
    write_eval(config, "good", "long", "long")
    with pytest.raises(DataError, match=r"2 of 3 records to evaluate on can't be used \(2 truncates_answer\)"):
        train(config)


def test_nothing_usable_to_evaluate_on_is_refused(config: RunConfig, tmp_path: Path) -> None:
    import dataclasses

    write_eval(config, "long", "long")
    data = dataclasses.replace(config.data, max_bad_fraction=1.0)
    with pytest.raises(DataError, match="No usable record is left to evaluate on"):
        train(dataclasses.replace(config, data=data))

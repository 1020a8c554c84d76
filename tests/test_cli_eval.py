"""`qwen3-vlm eval …` on tiny runs of every stage: what it measures, what it writes, and what it refuses."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen3_vlm.train.eval_run import find_subject
from qwen3_vlm.train.train_utils import train
from tests.conftest import Run
from tests.tiny import save_tiny_llm, save_tiny_tower
from tests.train.tiny_run import tiny_config, write_records
from tests.train.tiny_token_run import save_dataset, token_config

TASKS = {"i2t": {}, "a2t": {}, "t2i": {}, "t2a": {}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module")
def tower(root: Path) -> Path:
    return save_tiny_tower(root / "tower")


@pytest.fixture(scope="module")
def connector_run(root: Path, tower: Path) -> Path:
    records = write_records(root / "records", 40, missing=(3,))
    folder = root / "connector_run"
    train(tiny_config(folder, save_tiny_llm(root / "llm"), tower, records, data__max_bad_fraction=1.0))
    return folder


@pytest.fixture(scope="module")
def token_run(root: Path) -> Path:
    dataset = save_dataset(root / "tokens")
    train(token_config(root / "token_run", dataset, tokens__tasks=TASKS))
    return root / "token_run"


def tables(run: Path) -> dict[str, dict[str, Any]]:
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (run / "results").glob("eval_*.json")}
    return {name.removeprefix("eval_"): table for name, table in found.items()}


def test_a_connector(run: Run, connector_run: Path) -> None:
    other = connector_run / "results" / "mine.json"
    other.parent.mkdir(exist_ok=True)
    other.write_text('{"title": "Mine", "rows": []}')
    evidence = (connector_run / "connector" / "evidence.json").read_bytes()
    status, printed, err = run("eval", connector_run, "--samples", 5)
    assert (status, err) == (0, "")
    assert f"Report: {connector_run.resolve() / 'report.html'}" in printed
    found = tables(connector_run)
    assert found.keys() == {"loss", "answers", "gates"}
    logged = json.loads((connector_run / "result.json").read_text())["eval"]
    (loss,) = found["loss"]["rows"]
    assert loss["nats per token"]["value"] == pytest.approx(logged["loss"], abs=1e-5)
    assert (loss["samples"], loss["tokens"]) == (logged["samples"], logged["tokens"])
    assert [row["sees the picture"] for row in found["answers"]["rows"]] == ["yes", "no"]
    assert all(row["captions"] == 5 for row in found["answers"]["rows"])
    trained = json.loads(evidence)["gates"]
    again = found["gates"]["rows"]
    assert [row["gate"] for row in again] == [gate["name"] for gate in trained]
    assert [row["passed"] for row in again] == [gate["passed"] for gate in trained]
    assert (connector_run / "connector" / "evidence.json").read_bytes() == evidence, "evidence is the training's"
    lines = (connector_run / "eval" / "step-000008" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 5
    assert json.loads(lines[0]).keys() == {"id", "turn", "question", "reference", "prediction", "blind"}
    page = (connector_run / "report.html").read_text(encoding="utf-8")
    for text in ("Held-out answers", "Gates, measured again", "at step 8", "Mine"):
        assert text in page
    assert other.exists()


def test_a_checkpoint_and_an_add_on_by_itself(run: Run, connector_run: Path) -> None:
    assert run("eval", connector_run, "--checkpoint", 6, "--no-gates", "--samples", 2)[0] == 0
    found = tables(connector_run)
    assert found.keys() == {"loss", "answers"}, "the gates of another checkpoint are gone"
    assert "step-000006 at step 6" in found["loss"]["note"]
    assert run("eval", connector_run / "connector", "--no-gates", "--samples", 2)[0] == 0
    assert "connector at step 8" in tables(connector_run)["loss"]["note"]
    assert find_subject(connector_run / "checkpoints" / "step-000006").run == connector_run.resolve()


def test_conversations_are_asked_turn_by_turn(run: Run, root: Path, tower: Path, tmp_path: Path) -> None:
    """Each later question comes after the true answers, with the pictures shown so far; blind, with none of them."""
    records = json.loads(write_records(tmp_path / "data", 12).read_text())
    for number, record in enumerate(records):
        record["image"] = [record["image"], f"{(number + 1) % 12}.png"]
        record["conversations"] += [
            {"from": "human", "value": "and here?\n<image>"},
            {"from": "gpt", "value": f"answer {number}"},
        ]
    (tmp_path / "data" / "records.json").write_text(json.dumps(records))
    llm = save_tiny_llm(tmp_path / "llm")
    config = tiny_config(tmp_path / "run", llm, tower, tmp_path / "data" / "records.json", optim__max_steps=1)
    train(config)
    assert run("eval", tmp_path / "run", "--no-gates")[0] == 0
    rows = tables(tmp_path / "run")["answers"]["rows"]
    assert [(row["of"], row["sees the picture"]) for row in rows] == [
        ("first answers", "yes"),
        ("first answers", "no"),
        ("later answers", "yes"),
        ("later answers", "no"),
    ]
    folder = tmp_path / "run" / "eval" / "step-000001"
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [line["turn"] for line in lines[:2]] == [0, 1]
    assert lines[1]["question"] == "and here?\n<image>"


@pytest.mark.slow
def test_token_rows(run: Run, token_run: Path, tower: Path) -> None:
    status, printed, err = run("eval", token_run, "--samples", 6, "--vision-tower", tower)
    assert (status, err) == (0, "")
    found = tables(token_run)
    assert found.keys() == {"loss", "texts", "pictures", "sounds", "gates"}
    logged = json.loads((token_run / "result.json").read_text())["eval"]
    for row in found["loss"]["rows"]:
        assert row["nats per token"]["value"] == pytest.approx(logged[f"loss_{row['of']}"], abs=1e-5)
    assert [row["task"] for row in found["texts"]["rows"]] == ["i2t", "a2t"]
    (pictures,) = found["pictures"]["rows"]
    assert pictures["task"] == "t2i"
    assert pictures["decoded"] == pictures["pictures"]
    assert 0 < pictures["first by chance"]["percent"] <= 1
    assert pictures["own reference first"]["low"] <= pictures["own reference first"]["percent"]
    assert pictures["PSNR, dB"]["value"] > 0
    (sounds,) = found["sounds"]["rows"]
    assert sounds["task"] == "t2a"
    names = [row["gate"] for row in found["gates"]["rows"]]
    assert {"parameter integrity", "text identity: logits", "i2t: shuffled - correct", "t2i: decodes"} <= set(names)
    folder = token_run / "eval" / "step-000008"
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    assert {item["task"] for item in items} == set(TASKS)
    assert all((folder / item["prediction_file"]).is_file() for item in items if item["task"] == "t2i")
    assert "Held-out pictures:" in printed
    assert "Held-out pictures" in (token_run / "report.html").read_text(encoding="utf-8")


def test_without_judges_the_rest_is_measured(
    run: Run, token_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    moved = tmp_path / "moved"
    shutil.copytree(token_run, moved)
    assert run("eval", moved, "--samples", 2, "--no-gates", "--temperature", 1, "--guidance", 2)[0] == 0
    found = tables(moved)
    assert "No retrieval: name a frozen SigLIP tower with --vision-tower." in found["pictures"]["note"]
    assert "own reference first" not in found["pictures"]["rows"][0]
    assert "Word errors were not measured." in found["sounds"]["note"]
    assert "pip install 'qwen3-vlm[asr]'" in found["sounds"]["note"]
    assert found["sounds"]["rows"][0]["sounds"] == 2
    assert run("eval", moved, "--samples", 1, "--no-gates", "--vision-tower", "/nowhere")[0] == 0
    assert "No retrieval: /nowhere is neither a model folder" in tables(moved)["pictures"]["note"]


def test_what_is_refused(run: Run, connector_run: Path, token_run: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        status, _, err = run("eval", *arguments)
        assert status == 1
        return err

    assert "is not a folder" in refused(tmp_path / "nothing")
    assert "holds neither an add-on (connector, rows) nor a checkpoint" in refused(tmp_path)
    assert "no checkpoint of step 5; there are: 6, 8." in refused(connector_run, "--checkpoint", 5)
    assert "--checkpoint goes with the folder of its run" in refused(connector_run / "connector", "--checkpoint", 6)
    shutil.copytree(connector_run / "connector", tmp_path / "alone")
    assert "Give the run's folder, or its configuration with --config." in refused(tmp_path / "alone")
    assert "unknown key nothing" in refused(connector_run, "nothing=1")
    damaged = tmp_path / "damaged"
    shutil.copytree(token_run, damaged)
    with open(damaged / "rows" / "trainable_rows.pt", "r+b") as file:
        file.seek(2000)
        file.write(b"\xff\xff")
    assert "trainable_rows.pt" in refused(damaged)


def test_an_add_on_with_another_config(run: Run, connector_run: Path, tmp_path: Path) -> None:
    shutil.copytree(connector_run / "connector", tmp_path / "out" / "connector")
    config = connector_run / "config.yaml"
    status, printed, err = run("eval", tmp_path / "out" / "connector", "--config", config, "--no-gates", "--samples", 1)
    assert (status, err) == (0, "")
    assert f"Results: {tmp_path.resolve() / 'out' / 'results'}" in printed, "a report is written of a run folder"
    assert tables(tmp_path / "out").keys() == {"loss", "answers"}

"""Stage 2 of the guided run: its real path in a few steps, and its verdict."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qwen3_vlm.config import RunConfig
from qwen3_vlm.demo import talk_run
from qwen3_vlm.demo.conversations import KINDS, TalkSizes
from qwen3_vlm.demo.dataset import DemoSizes, build
from qwen3_vlm.demo.facts import score
from qwen3_vlm.demo.talk_run import Results, Talk, check, results_table, run_talk, talk_config, write_results
from qwen3_vlm.errors import GateError
from qwen3_vlm.train.add_ons import save_connector
from qwen3_vlm.train.connector_recipe import build_model
from qwen3_vlm.train.eval_captions import Answer
from qwen3_vlm.train.identity import describe_bases

PASSED = [{"name": "text drift: KL", "passed": True}]
CAPTION = "a small cat left of a big apple on a blue background"
SHOWN = "first picture\n<image>\nsecond picture\n<image>\n"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    build(folder / "data", DemoSizes(train=120, unseen=40, seen=1))
    return folder


@pytest.fixture(scope="module")
def connector(out: Path) -> Path:
    """A fresh one, as if stage 1 had learnt nothing."""
    settings = talk_config(out, out / "connector").model
    model, processor = build_model(settings, seed=0)
    bases = describe_bases(settings.llm, settings.vision_tower, processor, model=model)
    return save_connector(out / "connector", model, bases, details={"dtype": "float32"})


def small(config: RunConfig) -> RunConfig:
    """Two steps, and as little evaluation as there can be."""
    few = replace(config.eval, ablation_samples=4, bootstrap_samples=20, golden_samples=2, golden_max_new_tokens=3)
    return replace(config, optim=replace(config.optim, max_steps=2, batch_size=4), eval=few, tensorboard=False)


def test_it_writes_conversations_trains_talks_and_says_what_falls_short(
    out: Path, connector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(talk_run, "SIZES", TalkSizes(train=12, heldout=6, texts=8))
    monkeypatch.setattr(talk_run, "talk_config", lambda *paths: small(talk_config(*paths)))
    console = Console(record=True, width=120)
    with pytest.raises(GateError, match=r"gate .*answers \(all\) .* < 80%.*answers \(colour\)"):
        run_talk(out, connector, console)
    run = out / "talk_run"
    assert {"connector.safetensors", "adapter_model.safetensors"} <= {
        path.name for path in (run / "connector").iterdir()
    }
    table = json.loads((run / "results" / "held_out_answers.json").read_text(encoding="utf-8"))
    assert [row["question"] for row in table["rows"]] == ["all", *KINDS, talk_run.CONCLUSION]
    assert table["rows"][0]["answers"] == 18
    talks = json.loads((run / "results" / "conversations.json").read_text(encoding="utf-8"))["rows"]
    assert len(talks) == 18
    pictures = [row[f"{position} picture"] for row in talks for position in ("first", "second")]
    assert sum(isinstance(cell, dict) for cell in pictures) == 12, "each picture of each conversation once"
    page = (run / "report.html").read_text(encoding="utf-8")
    for text in ("Conversations about two pictures", "Held-out answers", "before and after", talks[0]["question"]):
        assert text in page
    printed = console.export_text()
    for text in ("gate: text drift: KL", "captions exact, after", "Report: "):
        assert text in printed


def test_the_configuration_starts_from_stage_1_and_points_below_the_runs_folder(out: Path, connector: Path) -> None:
    config = talk_config(out, connector)
    assert config.model.connector == str(connector)
    inside = [
        *config.data.train,
        *config.data.eval,
        *config.text.files,
        config.data.image_root,
        config.data.feature_cache,
    ]
    assert all(Path(str(path)).is_relative_to(out) for path in [*inside, config.output_dir])


def talk(said: str, blind: str, kinds: tuple[str, ...] = ("colour", "count", "which")) -> Talk:
    truth = ("blue", "two", "first")
    answers = [
        Answer("1", number, (SHOWN if not number else "") + "what", true, true if number < len(said) else "?", guess)
        for number, (true, guess) in enumerate(zip(truth, blind.split(), strict=True))
    ]
    return Talk(kinds, tuple(answers), (Path("a.png"), Path("b.png")))


def results(talks: list[Talk], after: str = CAPTION) -> Results:
    return Results(
        tuple(talks), score([CAPTION] * 50, [CAPTION] * 50), score([CAPTION] * 48 + [after] * 2, [CAPTION] * 50)
    )


def test_answers_are_counted_by_kind_with_and_without_sight() -> None:
    found = results([talk("xxx", "blue one neither"), talk("x", "red one first")])
    shares = {name: (it.answers, it.seeing.value, it.blind.value) for name, it in found.rows().items()}
    assert shares == {
        "all": (6, pytest.approx(4 / 6), pytest.approx(2 / 6)),
        "colour": (2, 1.0, 0.5),
        "count": (2, 0.5, 0.0),
        "object": (0, 0.0, 0.0),
        "which": (2, 0.5, 0.5),
        "which: its last word": (2, 0.5, 0.5),
    }
    assert found.whole().value == 0.5
    assert results_table(found).row_count == 6 + 3


def everything_right() -> list[Talk]:
    kinds = [("colour", "count", "which"), ("object", "count", "which")]
    return [talk("xxx", "red one neither", kinds[number % 2]) for number in range(20)]


def test_the_verdict_names_what_falls_short() -> None:
    good = everything_right()
    check(PASSED, results(good))
    with pytest.raises(GateError, match=r"answers \(all\) 33.3% < 80%; .*answers \(count\) 0.0% < 80%"):
        check(PASSED, results([talk("x", "red one neither") for _ in range(20)]))
    with pytest.raises(GateError, match=r"blind answers 44.4% > 35%"):
        check(PASSED, results([*good, *[talk("xxx", "blue two first")] * 16]))
    with pytest.raises(GateError, match=r"exact captions 4.0% fewer than after stage 1; 2% at most"):
        check(PASSED, results(good, after="a small cat"))
    with pytest.raises(GateError, match=r"promises: gate text drift: KL\."):
        check([{**PASSED[0], "passed": False}], results(good))
    with pytest.raises(GateError, match="no gate was run"):
        check([], results(good))


def test_no_more_conversations_are_shown_than_a_page_bears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = []
    monkeypatch.setattr(talk_run, "_talk_rows", lambda number, talk: rows.append(number) or [{"": number}])
    write_results(tmp_path, results(everything_right()))
    assert rows == list(range(1, talk_run.SHOWN + 1))


def test_a_comparison_is_right_as_a_whole_or_in_what_it_comes_to() -> None:
    """A wrong reading before a right conclusion counts against the answer, and not against its last word."""
    truth, said = "a cow no; a tree yes: second", "a pig no; a tree yes: second"
    answers = [Answer("1", 0, "which picture shows a tree", truth, given, "neither") for given in (truth, said)]
    found = results([Talk(("which",), (answer,), (Path("a.png"), Path("b.png"))) for answer in answers]).rows()
    assert (found["which"].seeing.value, found["which: its last word"].seeing.value) == (0.5, 1.0)
    assert found["which: its last word"].blind.value == 0.0

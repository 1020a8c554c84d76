"""Stage 4 of the guided run: its data, whose folders serve which task, a run of two steps, and the verdict."""

import io
import json
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from qwen3_vlm.config import RunConfig
from qwen3_vlm.demo import draw_run
from qwen3_vlm.demo.draw_dataset import (
    FRAME,
    PACE,
    SPEAKER,
    DrawSizes,
    build,
    neat_picture,
    scene_of,
    settled,
    unheard_voice,
    word_by_word,
)
from qwen3_vlm.demo.token_run import UTI_CONFIG, uti_overrides
from qwen3_vlm.demo.voices import TRAINING_VOICES, Line
from qwen3_vlm.demo.world import CELLS, NAMES, Scene, is_held_out, scenes
from qwen3_vlm.errors import GateError
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer

SIZES = DrawSizes(neat=6, neat_unseen=4, spoken=6, spoken_unseen=6, heard=3, heard_unseen=3, texts=9)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    build(folder / "draw_data", SIZES)
    return folder


def lines(out: Path, part: str) -> list[dict[str, Any]]:
    text = (out / "draw_data" / f"manifest_{part}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def pairs(text: str) -> list[frozenset[str]]:
    names = [word.removesuffix(",") for word in text.split() if word.removesuffix(",") in NAMES]
    return [frozenset((first, second)) for first in names for second in names if first < second]


def test_held_out_pairs_are_in_the_held_out_parts_alone(out: Path) -> None:
    for part in ("neat", "spoken"):
        assert not any(map(is_held_out, (pair for line in lines(out, part) for pair in pairs(line["text"]))))
    assert all(any(map(is_held_out, pairs(line["text"]))) for line in lines(out, "neat_unseen"))
    spoken = [line["text"] for line in lines(out, "spoken_unseen") if " and " in line["text"]]
    assert len(spoken) == 4
    assert all(is_held_out(pairs(text)[0]) for text in spoken)


def test_what_is_written_is_the_same_for_the_same_words(out: Path) -> None:
    """One voice at one speed and pitch, one picture of a scene; names to draw come in many voices."""
    for line in [*lines(out, "spoken"), *lines(out, "spoken_unseen")]:
        said = line["meta"]
        told = (said["voice"], said["words_per_minute"], said["pitch"])
        assert told == (SPEAKER.name, PACE, SPEAKER.pitch)
    assert {line["modalities"].keys() == {"image"} for line in lines(out, "neat")} == {True}
    for line in lines(out, "heard"):
        assert line["meta"]["voice"] != unheard_voice(line["text"].split()[1]).name
    for line in lines(out, "heard_unseen"):
        assert line["meta"]["voice"] == unheard_voice(line["text"].split()[1]).name
        assert unheard_voice(line["text"].split()[1]) in TRAINING_VOICES


def test_a_cell_looks_the_same_wherever_it_is() -> None:
    """An object's pixels at the top left are those at the bottom right, in whole patches of the image tokenizer."""
    rng, found = random.Random(0), {}
    while len(found) < 2:
        scene = scene_of("a small cat", rng)
        thing = scene.things[0]
        if scene.background == "white" and (thing.column, thing.row) in {("left", "top"), ("right", "bottom")}:
            found[thing.column] = neat_picture(scene)
    np.testing.assert_array_equal(found["left"][8:24, 8:24], found["right"][40:56, 40:56])
    assert (found["left"][8:24, 8:24] != 255).any()
    rest = found["left"].copy()
    rest[8:24, 8:24] = 255
    assert (rest == 255).all()


def test_one_picture_for_each_caption() -> None:
    """Whatever a caption leaves open is the same: scenes of one caption are one scene, its caption still true."""
    stream = [*islice(scenes("settled"), 4000), *islice(scenes("settled", unseen=True), 500)]
    found: dict[str, Scene] = {}
    for scene in stream:
        same = settled(scene)
        assert found.setdefault(same.caption(), same) == same
        assert same.caption() == scene.caption()
        cells = tuple((thing.column, thing.row) for thing in same.things)
        layouts = ("row", "column", "trio_row", "trio_column") if same.layout == "group" else (same.layout,)
        assert any(cells in CELLS[layout] for layout in layouts)
    assert len(found) > 2000


def test_a_name_sounds_the_same_in_every_phrase() -> None:
    """Its samples begin on a frame of the codec, and are the same wherever it stands."""
    line = Line("a cat", SPEAKER, PACE, SPEAKER.pitch)
    alone, sized, first, second = (
        word_by_word(replace(line, text=text)).reshape(-1, FRAME)
        for text in ("a cat", "a small cat", "a cat and a horse", "a horse and a cat")
    )
    cat = next(alone[start:] for start in range(len(alone)) if (sized[start - len(alone) :] == alone[start:]).all())
    assert len(cat) > 10
    assert (second[-len(cat) :] == cat).all()
    assert (first[: len(alone)] == alone).all()


def test_the_data_set_is_kept_when_it_is_there(out: Path) -> None:
    before = (out / "draw_data" / "images" / "neat" / "000000.png").stat().st_mtime_ns
    build(out / "draw_data", SIZES)
    assert (out / "draw_data" / "images" / "neat" / "000000.png").stat().st_mtime_ns == before


def two_steps(out: Path, rows: Path) -> RunConfig:
    """The demo's configuration, but for its length and what it starts from."""
    config = config_of(out, rows)
    optim = replace(config.optim, max_steps=2, batch_size=4, accumulation=1)
    tasks = {name: replace(config.tokens.tasks[name], ramp_until=0.0) for name in ("i2t", "t2i")}
    measured = replace(
        config.eval, quick_every=9, ablation_samples=2, bootstrap_samples=20, golden_samples=1, decode_samples=1
    )
    return replace(
        config,
        rows=replace(config.rows, add_on=None),
        lora=replace(config.lora, rank=2),
        text=replace(config.text, share=0.25),
        tokens=replace(config.tokens, tasks=tasks),
        optim=optim,
        eval=measured,
        tensorboard=False,
    )


config_of = draw_run.draw_config


def test_each_task_has_its_own_folders(out: Path) -> None:
    """Reading goes on with stage 3's records; every folder has its held-out one beside it."""
    config = config_of(out, out / "tokens_run" / "rows")
    served = {task: [Path(folder).relative_to(out).as_posix() for folder in settings.folders]
              for task, settings in config.tokens.tasks.items()}  # fmt: skip
    assert served == {
        "i2t": ["tokens/pictures", "tokens/pictures_unseen"],
        "a2t": ["tokens/phrases", "tokens/phrases_unseen"],
        "t2i": ["draw_tokens/neat", "draw_tokens/neat_unseen"],
        "t2a": ["draw_tokens/spoken", "draw_tokens/spoken_unseen"],
        "a2i": ["draw_tokens/heard", "draw_tokens/heard_unseen"],
        "i2a": ["draw_tokens/spoken", "draw_tokens/spoken_unseen"],
    }
    assert set(config.tokens.folders) == {folder for task in config.tokens.tasks.values() for folder in task.folders}
    assert config.eval.golden_samples == 64


@pytest.mark.slow
def test_two_steps_are_trained_generated_and_judged(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path on real tokenizers and the real text base, of pictures alone: sounds take a minute of generating.

    Two steps keep no promise, and it says so.
    """
    monkeypatch.setattr(draw_run, "READ", dict.fromkeys(("i2t", "a2t"), "neat"))
    monkeypatch.setattr(draw_run, "WRITTEN", dict.fromkeys(("t2i", "t2a", "a2i", "i2a"), "neat"))
    UnifiedTokenizer.open(UTI_CONFIG, uti_overrides()).save(out / "space")
    rows = out / "tokens_run" / "rows"
    rows.parent.mkdir()
    (rows.parent / "result.json").write_text(json.dumps({"eval": {"loss_i2t": 0.1, "loss_a2t": 100.0}}))
    monkeypatch.setattr(draw_run, "draw_config", two_steps)
    monkeypatch.setattr(draw_run, "SIZES", SIZES)
    monkeypatch.setattr(draw_run, "OPTIONS", replace(draw_run.OPTIONS, samples=2))
    with pytest.raises(GateError) as caught:
        draw_run.run_draw(out, rows, Console(quiet=True))
    said = str(caught.value)
    assert "i2t is worse than after stage 3" in said
    assert "word errors ÷ round trip not measured" in said
    assert "gate t2i:" in said
    drawn = list((out / "draw_run" / "eval" / "step-000002").glob("t2i-*.png"))
    assert len(drawn) == 2
    with Image.open(drawn[0]) as picture:
        assert picture.size == (64, 64)
    assert (out / "draw_run" / "report.html").is_file()
    assert {path.name for path in (out / "draw_run" / "rows").iterdir()} >= {"trainable_rows.pt", "adapter_config.json"}


def results(first: float = 0.6, ratio: float | None = 1.2, loss: float = 0.3) -> draw_run.Results:
    def cell(value: float, kind: str = "value") -> dict[str, float]:
        return {kind: value, "low": value - 0.05, "high": value + 0.05}

    share: dict[str, Any] = {
        "own reference first": cell(first, "percent"),
        "of": 200,
        "first by chance": {"percent": 0.005},
    }
    errors = {"word errors": cell(0.7, "percent"), draw_run.ROUND_TRIP: cell(0.6, "percent")}
    tables: dict[str, Any] = {
        "loss": [{"of": task, "nats per token": cell(loss)} for task in ("i2t", "a2t")],
        "texts": [{"task": task, "exact": cell(0.5, "percent")} for task in ("i2t", "a2t")],
        "pictures": [{"task": task, **share} for task in ("t2i", "a2i")],
        "sounds": [{"task": "t2a", **errors, **({} if ratio is None else {"ratio": cell(ratio)})}],
    }
    return draw_run.Results(tables, {"i2t": 0.3, "a2t": 0.3})


PASSED = [{"name": "text drift: KL", "passed": True}]


@pytest.mark.parametrize(
    ("found", "gates", "said"),
    [
        (results(first=0.49), PASSED, "pictures nearest to their own reference 49% < 50%"),
        (results(ratio=1.51), PASSED, "round trip 1.51, not ≤ 1.5"),
        (results(ratio=None), PASSED, "round trip not measured"),
        (results(loss=0.36), PASSED, "a2t is worse than after stage 3: 0.360 > 0.300"),
        (results(), [{"name": "text drift: KL", "passed": False}], "gate text drift: KL"),
        (results(), [], "no gate was run"),
    ],
)
def test_what_falls_short_is_named(found: draw_run.Results, gates: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(GateError, match=said):
        draw_run.check(gates, found)


def test_what_keeps_the_promises_passes_and_is_shown() -> None:
    """A loss that is higher than stage 3's by less than its interval is not worse."""
    draw_run.check(PASSED, results(loss=0.34))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(draw_run.results_table(results()))
    shown = console.export_text()
    line = next(line for line in shown.splitlines() if "t2i: own reference first" in line)
    assert "60.0 (55.0–65.0)" in line
    assert "0.5 by chance, among 200" in line
    assert "60.0 (55.0–65.0) of the codec's round trip" in shown
    assert "not measured" in shown  # nothing was said by i2a

"""The guided run's own parts: its files, its configuration, its verdict."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen3_vlm.demo.dataset import DemoSizes, build
from qwen3_vlm.demo.facts import score
from qwen3_vlm.demo.run import TESTS, _check, demo_config, read_test_set, running_command
from qwen3_vlm.demo.world import HELD_OUT_PAIRS, NAMES
from qwen3_vlm.errors import GateError

SMALL = DemoSizes(train=30, unseen=20, seen=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("demo") / "data", SMALL)


def objects_of(caption: str) -> set[str]:
    """The objects that a caption names one by one (groups of the same thing form no pair)."""
    return set(caption.replace(",", "").split()) & set(NAMES)


def test_the_data_set_is_the_same_each_time_and_is_kept(folder: Path, tmp_path: Path) -> None:
    first, second = folder, build(tmp_path / "b", SMALL)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) > 60 + len(NAMES)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    before = (first / "train.json").stat().st_mtime_ns
    assert (build(first, SMALL) / "train.json").stat().st_mtime_ns == before
    other = build(tmp_path / "c", DemoSizes(train=5, unseen=2, seen=2), seed=1)
    assert json.loads((other / "train.json").read_text()) != json.loads((first / "train.json").read_text())[:5]


def test_the_files_keep_held_out_pairs_apart_and_hold_their_pictures(folder: Path) -> None:
    for name, expected in (("train", False), ("heldout_seen", False), ("heldout_unseen", True)):
        for record in json.loads((folder / f"{name}.json").read_text()):
            named = objects_of(record["conversations"][1]["value"])
            assert any(pair <= named for pair in HELD_OUT_PAIRS) == expected
            with Image.open(folder / record["image"]) as picture:
                assert (picture.size, picture.mode) == ((64, 64), "RGB")
    assert "CC BY-SA" in (folder / "ATTRIBUTION.txt").read_text()


def test_no_test_picture_is_a_training_picture(folder: Path) -> None:
    pixels = {
        part: {np.asarray(Image.open(path)).tobytes() for path in (folder / "images" / part).iterdir()}
        for part in ("train", "unseen", "seen")
    }
    assert not pixels["train"] & (pixels["unseen"] | pixels["seen"])


def test_the_configuration_points_below_the_runs_folder(tmp_path: Path) -> None:
    config = demo_config(tmp_path)
    inside = [*config.data.train, *config.data.eval, config.data.feature_cache, config.output_dir]
    assert all(Path(str(path)).is_relative_to(tmp_path) for path in inside)
    assert (Path(config.model.llm) / "config.json").is_file()


def test_test_sets_are_read_back(folder: Path) -> None:
    for name in TESTS:
        test = read_test_set(folder / f"heldout_{name}.json")
        assert len(test.pictures) == len(test.captions) > 0
        assert all(path.is_file() for path in test.pictures)
        assert "<image>" not in test.prompt


def test_the_verdict_names_what_falls_short() -> None:
    truth = [f"a small {name} left of a big cat on a blue background" for name in NAMES if name != "cat"]
    good, poor = score(truth, truth), score(["a small cat"] * len(truth), truth)
    passed: dict[str, object] = {"gates": [{"name": "shuffled", "passed": True}]}
    _check(passed, {"unseen": good})
    with pytest.raises(GateError, match=r"exact captions 0% < 50%.*background 0% < 80%"):
        _check(passed, {"unseen": poor})
    with pytest.raises(GateError, match="gate shuffled"):
        _check({"gates": [{"name": "shuffled", "passed": False}]}, {"unseen": good})
    with pytest.raises(GateError, match="no gate was run"):
        _check(None, {"unseen": good})


def test_the_command_to_call_is_the_one_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make` installs into .venv alone, so the bare name is found by no shell."""
    command = tmp_path / "work" / ".venv" / "bin" / "qwen3-vlm"
    command.parent.mkdir(parents=True)
    command.touch()
    monkeypatch.chdir(tmp_path / "work")
    for called, expected in (
        (str(command), ".venv/bin/qwen3-vlm"),
        (".venv/bin/qwen3-vlm", ".venv/bin/qwen3-vlm"),
        ("qwen3-vlm", "qwen3-vlm"),
        ("/somewhere/pytest", "qwen3-vlm"),
    ):
        monkeypatch.setattr("sys.argv", [called, "demo"])
        assert running_command() == expected
    monkeypatch.chdir(command.parent.parent.parent.parent)
    monkeypatch.setattr("sys.argv", [str(command)])
    assert running_command() == "work/.venv/bin/qwen3-vlm"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert running_command() == str(command)

"""The later stages of the guided run need what the first ones leave."""

from pathlib import Path
from typing import Any

import pytest

from qwen3_vlm.demo import later_run
from qwen3_vlm.errors import GateError
from tests.conftest import Run


def test_without_the_first_stages_it_says_what_to_do(run: Run, tmp_path: Path) -> None:
    status, printed, err = run("demo", "--later", "--out", tmp_path)
    assert (status, printed) == (1, "")
    assert f"There is no {tmp_path / 'run' / 'connector'}: it comes from" in err
    assert f"demo --out {tmp_path}; run that first." in err


@pytest.mark.parametrize("stopped", [None, "talk", "draw"])
def test_each_goes_on_from_its_own_add_on(
    stopped: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Any, ...]] = []

    def stage(name: str) -> Any:
        def go(*arguments: Any) -> Path | None:
            asked.append((name, *arguments[:2]))
            return None if name == stopped else tmp_path / name

        return go

    monkeypatch.setattr(later_run, "run_talk", stage("talk"))
    monkeypatch.setattr(later_run, "run_draw", stage("draw"))
    connector, rows = tmp_path / "run" / "connector", tmp_path / "tokens_run" / "rows"
    for folder in (connector, rows):
        folder.mkdir(parents=True)
    later_run.run_later(tmp_path)
    expected = [("talk", tmp_path, connector), ("draw", tmp_path, rows)]
    assert asked == expected[: 1 if stopped == "talk" else 2]
    printed = capsys.readouterr().out
    assert ("was stopped" in printed) == (stopped is not None)
    assert (f"chat --connector {tmp_path / 'talk'} --rows {tmp_path / 'draw'}" in printed) == (stopped is None)


def test_the_second_stage_is_run_though_the_first_falls_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*arguments: Any) -> Path:
        raise GateError("answers 70 %")

    asked: list[Path] = []
    monkeypatch.setattr(later_run, "run_talk", short)
    monkeypatch.setattr(later_run, "run_draw", lambda out, rows, console: asked.append(rows) or tmp_path)
    for folder in (tmp_path / "run" / "connector", tmp_path / "tokens_run" / "rows"):
        folder.mkdir(parents=True)
    with pytest.raises(GateError, match="answers 70 %"):
        later_run.run_later(tmp_path)
    assert asked == [tmp_path / "tokens_run" / "rows"]

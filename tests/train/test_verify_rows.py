"""Verifying a trainable-rows folder: what was looked at is said, what is wrong is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_vlm.errors import AddOnError, BaseMismatchError, ConfigError, GateError, ModelError, TamperedFileError
from qwen3_vlm.evaluate.gates import equality_gate
from qwen3_vlm.fingerprint import fingerprint_file
from qwen3_vlm.train.verify import VerifyReport, verify_add_on, verify_rows
from tests.conftest import Run
from tests.tiny import PASSED_GATE, save_tiny_llm, save_tiny_rows

GATES = [
    equality_gate("parameter integrity", "tensors", 0, 24),
    equality_gate("text identity: logits", "texts", 0, 32),
    PASSED_GATE,
]


@pytest.fixture(scope="module")
def template(tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_rows(tmp_path_factory.mktemp("rows") / "rows", tiny_llm_dir)


@pytest.fixture
def rows(template: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(template, tmp_path / "rows"))
    write_gates(folder, GATES)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "trainable_rows.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def record(path: Path) -> None:
    entry = {path.name: {"sha256": fingerprint_file(path), "bytes": path.stat().st_size}}
    edit(path.parent, lambda info: info["files"].update(entry))


def write_gates(folder: Path, gates: Any) -> None:
    (folder / "evidence.json").write_text(json.dumps({"format": 1, "gates": gates}))
    record(folder / "evidence.json")


def marks(report: VerifyReport) -> list[str]:
    return [line.split()[0] for line in str(report).splitlines()]


def test_it_says_what_was_checked(rows: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    report = verify_add_on(rows, gates=True)
    assert report.passed
    assert marks(report) == ["ok"] * 9
    assert "embeddings of ids 384–478, 3,040 parameters, all finite" in str(report)
    assert verify_add_on(rows, llm=tiny_llm_dir).passed
    with pytest.raises(BaseMismatchError, match="LLM weights differ"):
        verify_add_on(rows, llm=save_tiny_llm(tmp_path / "other", seed=3))


def test_the_folder_decides_what_is_verified(rows: Path, connector: Path, tmp_path: Path) -> None:
    assert [check.name for check in verify_add_on(connector).checks][2] == "tensors"
    with pytest.raises(ConfigError, match="leave --vision-tower out"):
        verify_add_on(rows, vision_tower=tmp_path)
    with pytest.raises(AddOnError, match="no connector directory"):
        verify_add_on(tmp_path)


def test_a_base_that_is_not_here_is_not_checked(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows / "trainable_rows.pt"
    torch.save(torch.load(path, weights_only=True) | {"base_llm": "owner/base"}, path)
    record(path)
    edit(rows, lambda info: info.update(base_llm="owner/base"))
    asked: list[tuple[str, bool]] = []

    def snapshot_download(name: str, *, local_files_only: bool, **settings: Any) -> str:
        asked.append((name, local_files_only))
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    report = verify_rows(rows)
    assert report.passed
    assert [check.passed for check in report.checks if check.name == "llm"] == [None]
    assert asked == [("owner/base", True)]
    with pytest.raises(ModelError):
        verify_rows(rows, llm="owner/other")


def test_no_base_is_loaded(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *args, **kwargs: pytest.fail("a base was loaded")
    )
    assert verify_rows(rows).passed


def test_without_uti_yaml_that_is_said(rows: Path) -> None:
    (rows / "uti.yaml").unlink()
    edit(rows, lambda info: info["files"].pop("uti.yaml"))
    assert [check.passed for check in verify_rows(rows).checks if check.name == "uti"] == [None]


def test_a_uti_yaml_that_is_none(rows: Path) -> None:
    (rows / "uti.yaml").write_text("texts: {}\n")
    record(rows / "uti.yaml")
    with pytest.raises(ConfigError, match="texts"):
        verify_rows(rows)


@pytest.mark.parametrize("name", ["trainable_rows.pt", "evidence.json", "uti.yaml", "token_space.json"])
def test_changed_files_are_refused(rows: Path, name: str) -> None:
    (rows / name).write_bytes((rows / name).read_bytes() + b" ")
    with pytest.raises(TamperedFileError, match="Fetch it again"):
        verify_rows(rows)


def test_rows_that_are_not_finite_are_refused(rows: Path) -> None:
    path = rows / "trainable_rows.pt"
    content = torch.load(path, weights_only=True)
    content["embeddings"][0, 0] = float("inf")
    torch.save(content, path)
    record(path)
    with pytest.raises(AddOnError, match="not finite"):
        verify_rows(rows)


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        ([], "none was run"),
        ([PASSED_GATE], r"parameter integrity \(it was not run\); text identity \(it was not run\)"),
        (GATES[1:], r"parameter integrity \(it was not run\)"),
        ([*GATES[:2], {**PASSED_GATE, "value": 0.01}], "0.05 is needed"),
        ([equality_gate("parameter integrity", "tensors", 1, 24), *GATES[1:]], "1 of 24 tensors differ"),
        ([{**GATES[0], "value": 1, "passed": True}, *GATES[1:]], "1 of 24 tensors differ"),
        ([{**GATES[0], "samples": 0}, *GATES[1:]], "No tensors were compared"),
        ([{**GATES[0], "passed": False}, *GATES[1:]], "marked as failed"),
        ([{**GATES[0], "kind": "free"}, *GATES[1:]], "no kind of gate"),
    ],
)
def test_gates_are_judged_by_their_figures(rows: Path, gates: Any, words: str) -> None:
    write_gates(rows, gates)
    verify_rows(rows)
    with pytest.raises(GateError, match=words):
        verify_rows(rows, gates=True)


@pytest.mark.parametrize("gates", [5, [1], [{}], [{**GATES[0], "value": "0"}], [{**GATES[0], "samples": []}]])
def test_broken_evidence_is_a_sentence(rows: Path, gates: Any) -> None:
    write_gates(rows, gates)
    with pytest.raises(AddOnError, match=r"evidence\.json"):
        verify_rows(rows)


def test_the_command(rows: Path, run: Run) -> None:
    status, out, _ = run("verify", rows, "--gates")
    assert (status, out.count("ok ")) == (0, 9)
    write_gates(rows, [])
    assert run("verify", rows)[0] == 0
    status, _, err = run("verify", rows, "--gates")
    assert status == 1
    assert "was not run" in err
    (rows / "trainable_rows.pt").write_bytes(b"")
    status, _, err = run("verify", rows)
    assert (status, err.count("\n")) == (1, 1)

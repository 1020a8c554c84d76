"""The command line: what it prints, its exit status, and that no stack trace ever reaches the user."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from qwen3_vlm import cli
from qwen3_vlm.errors import BaseMismatchError, GateError, StorageError
from tests.conftest import Run
from tests.tiny import PASSED_GATE
from tests.train.tiny_run import tiny_config, write_config, write_records


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for name, colour in (("b.png", "red"), ("a.JPG", "blue"), ("deeper/c.webp", "green")):
        Image.new("RGB", (20, 12), colour).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def raiser(error: BaseException) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        raise error

    return call


def test_help_names_every_command(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    for command in ("train", "sweep", "verify", "caption", "data", "report", "golden-diff", "export", "demo"):
        assert f" {command} " in out
        assert run(command, "--help")[0] == 0
    assert {" doctor ", " cache-benchmark "} <= {
        name for name in (" doctor ", " cache-benchmark ") if name in run("data")[1]
    }


def test_usage_errors_exit_with_2(run: Run) -> None:
    for arguments in (["nonsense"], ["train"], ["caption", "x.png"], ["caption", "--max-new-tokens", "0"]):
        status, _, err = run(*arguments)
        assert status == 2
        assert err.strip()


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ("optim: {learning_rat: 1}", [], "unknown key optim.learning_rat. Did you mean learning_rate?"),
        ("seed: 1", ["optim.batch_size=0"], "optim.batch_size is 0; it must be above 0"),
        ("seed: 1", ["optim.batch_size"], "not of the form key=value"),
        ("[", [], "is not valid YAML"),
    ],
)
def test_a_bad_configuration_is_one_sentence(
    run: Run, tmp_path: Path, content: str, overrides: list[str], message: str
) -> None:
    (tmp_path / "run.yaml").write_text(content)
    for command in (["train"], ["sweep"], ["data", "doctor"], ["data", "cache-benchmark"]):
        status, out, err = run(*command, tmp_path / "run.yaml", *overrides)
        assert (status, out) == (1, "")
        assert err.startswith("Error: ")
        assert message in err
        assert err.count("\n") == 1


def test_train_prints_where_things_are(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("seed: 3")
    seen: list[Any] = []
    done = SimpleNamespace(
        output_dir="runs/x", step=1200, add_on_dir="runs/x/connector", evidence={"gates": [PASSED_GATE]}
    )
    monkeypatch.setattr("qwen3_vlm.train.train_utils.train", lambda config: seen.append(config) or done)
    status, out, _ = run("train", tmp_path / "run.yaml", "optim.learning_rate=2e-4", "output_dir=runs/x")
    assert status == 0
    assert (seen[0].seed, seen[0].optim.learning_rate, seen[0].output_dir) == (3, 2e-4, "runs/x")
    assert "runs/x (step 1,200)" in out
    assert "Gate zero − correct: passed, 0.500 [0.400, 0.600], threshold 0.05" in out


def test_text_only_data_train_to_the_end(run: Run, tmp_path: Path, tiny_llm_dir: Path, tiny_tower_dir: Path) -> None:
    """There is nothing to measure the use of pictures by; that fails the gate, not the run."""
    text = write_records(tmp_path / "records", pictures=False)
    config = tiny_config(tmp_path / "run", tiny_llm_dir, tiny_tower_dir, text, optim__max_steps=1)
    status, out, _ = run("train", write_config(tmp_path / "run.yaml", config))
    assert status == 0
    reason = "No held-out sample has a picture, so whether the model uses its pictures can't be measured."
    assert f"Gate ablation: FAILED, {reason}" in out
    status, out, _ = run("verify", tmp_path / "run" / "connector")
    assert status == 0
    assert f"FAILED gate ablation: {reason}" in out
    status, _, err = run("verify", tmp_path / "run" / "connector", "--gates")
    assert (status, reason in err) == (1, True)


def test_a_stopped_run_exits_with_0(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("")
    stopped = SimpleNamespace(output_dir="runs/x", step=5, add_on_dir=None, evidence=None)
    monkeypatch.setattr("qwen3_vlm.train.train_utils.train", lambda config: stopped)
    status, out, _ = run("train", tmp_path / "run.yaml")
    assert (status, "goes on from there" in out) == (0, True)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (StorageError("The disk is full."), 1, "Error: The disk is full.\n"),
        (BaseMismatchError("Wrong base:\n  llm: a, not b"), 1, "Error: Wrong base:\n  llm: a, not b\n"),
        (GateError("A gate failed."), 1, "Error: A gate failed.\n"),
        (RuntimeError("boom\nbang"), 1, "unexpected RuntimeError: boom bang. Run again with QWEN3_VLM_DEBUG=1"),
        (MemoryError(), 1, "the memory is full"),
        (ModuleNotFoundError("No module named 'resvg_py'", name="resvg_py"), 1, "pip install 'qwen3-vlm[demo]'"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_sentences(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, message: str
) -> None:
    (tmp_path / "run.yaml").write_text("")
    monkeypatch.setattr("qwen3_vlm.train.train_utils.train", raiser(error))
    found, _, err = run("train", tmp_path / "run.yaml")
    assert found == status
    assert message in err


def test_the_stack_trace_is_there_for_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("")
    monkeypatch.setattr("qwen3_vlm.train.train_utils.train", raiser(RuntimeError("boom")))
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    with pytest.raises(RuntimeError, match="boom"):
        cli.main(["train", str(tmp_path / "run.yaml")])


def test_caption_files_and_folders(run: Run, connector: Path, pictures: Path) -> None:
    limits = ["--checkpoint", connector, "--max-new-tokens", "4"]
    status, out, _ = run("caption", pictures, "--json", "--batch-size", "2", *limits)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    names = [str(pictures / name) for name in ("a.JPG", "b.png", "deeper/c.webp")]
    assert [line["image"] for line in lines] == names
    assert all(isinstance(line["caption"], str) for line in lines)
    status, out, _ = run("caption", pictures / "b.png", "--prompt", "What colour is it?", *limits)
    assert status == 0
    assert out.startswith(f"{pictures / 'b.png'}: ")


def test_a_prompt_that_is_no_text_is_a_sentence(run: Run, connector: Path, pictures: Path) -> None:
    status, out, err = run("caption", pictures / "b.png", "--checkpoint", connector, "--prompt", "what\udcff?")
    assert (status, out) == (1, "")
    assert err == (
        "Error: The prompt is not valid text: its character 5 stands for no character of Unicode. Give it in UTF-8.\n"
    )


def test_caption_goes_on_after_a_bad_picture(run: Run, connector: Path, pictures: Path) -> None:
    (pictures / "b.png").write_bytes(b"\x89PNG broken")
    status, out, err = run("caption", pictures, "--checkpoint", connector, "--max-new-tokens", "2", "--json")
    assert status == 1
    assert len(out.splitlines()) == 2
    assert "b.png" in err
    assert "1 of 3 pictures could not be read." in err


def test_caption_refuses_what_is_not_there(run: Run, connector: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    for path, message in ((tmp_path / "empty", "holds no picture"), (tmp_path / "no.png", "does not exist")):
        status, out, err = run("caption", path, "--checkpoint", connector)
        assert (status, out) == (1, "")
        assert message in err
        assert err.count("\n") == 1
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    status, _, err = run("caption", tmp_path / "x.png", "--checkpoint", tmp_path / "empty")
    assert status == 1
    assert err.startswith("Error: ")


def test_verify_says_what_it_checked(run: Run, connector: Path, tiny_tower_dir: Path) -> None:
    status, out, _ = run("verify", connector, "--gates")
    assert status == 0
    assert "connector.safetensors" in out
    assert "zero − correct" in out
    status, _, err = run("verify", connector, "--llm", tiny_tower_dir)
    assert (status, err.startswith("Error: ")) == (1, True)
    path = connector / "connector.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    status, _, err = run("verify", connector)
    assert status == 1
    assert "connector.safetensors" in err


def test_a_folder_that_is_not_there_is_called_that(run: Run) -> None:
    for name in ("/no/such/dir", "runs/a/connector", "../no-such"):
        status, out, err = run("verify", name)
        assert (status, out) == (1, "")
        assert err == f"Error: The connector {name} can't be read: there is no such folder.\n"


def test_export_loads_with_the_auto_classes(run: Run, connector: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    status, out, _ = run("export", connector, tmp_path / "out")
    assert (status, str(tmp_path / "out") in out) == (0, True)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").config.num_latents == 4
    assert AutoProcessor.from_pretrained(tmp_path / "out").num_image_tokens == 4
    status, _, err = run("export", connector, tmp_path / "out")
    assert (status, "not empty" in err) == (1, True)


def records(folder: Path, *names: str) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a small red dog"}]
    path = folder / "records.json"
    path.write_text(json.dumps([{"id": name, "image": name, "conversations": turns} for name in names]))
    return path


def test_doctor_takes_files_or_a_configuration(
    run: Run, pictures: Path, tmp_path: Path, tiny_llm_dir: Path, tiny_tower_dir: Path
) -> None:
    good = records(pictures, "a.JPG", "b.png")
    assert run("data", "doctor", good, "--no-tokens", "data.num_workers=0")[0] == 0
    (tmp_path / "run.yaml").write_text(
        f"model: {{llm: {tiny_llm_dir}, vision_tower: {tiny_tower_dir}, num_latents: 4}}\n"
        f"data: {{train: ['{records(pictures, 'a.JPG', 'missing.png')}'], num_workers: 0, max_seq_len: 96}}\n"
    )
    status, out, _ = run("data", "doctor", tmp_path / "run.yaml", "--export", tmp_path / "findings")
    assert status == 1
    assert "missing_image" in out
    assert (tmp_path / "findings" / "report.json").exists()


def test_doctor_without_its_tokenizer_says_what_to_do(run: Run, pictures: Path, tmp_path: Path) -> None:
    good = records(pictures, "a.JPG")
    status, _, err = run("data", "doctor", good, f"model.llm={tmp_path / 'nothing'}")
    assert (status, "--no-tokens" in err) == (1, True)


def test_cache_benchmark_is_one_sentence(
    run: Run, pictures: Path, tmp_path: Path, tiny_llm_dir: Path, tiny_tower_dir: Path
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"output_dir: {tmp_path / 'run'}\n"
        f"model: {{llm: {tiny_llm_dir}, vision_tower: {tiny_tower_dir}, num_latents: 4, dtype: float32}}\n"
        f"data: {{train: ['{records(pictures, 'a.JPG', 'b.png')}']}}\n"
    )
    status, out, _ = run("data", "cache-benchmark", tmp_path / "run.yaml", "--images", "2")
    assert status == 0
    assert out.startswith("The feature cache ")
    assert "2 pictures take" in out


def test_report_and_golden_diff(run: Run, tmp_path: Path) -> None:
    assert run("report", tmp_path / "nothing")[0] == 1
    status, _, err = run("golden-diff", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert status == 1
    assert err.startswith("Error: ")
    assert "a.jsonl" in err


def test_no_module_of_the_package_is_taken_for_a_missing_extra() -> None:
    ours = ModuleNotFoundError("No module named 'qwen3_vlm.x'", name="qwen3_vlm.x")
    assert "pip install" not in cli.explain(ours)
    assert sys.modules["qwen3_vlm.cli"] is cli

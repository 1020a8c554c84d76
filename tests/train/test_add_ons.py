"""Connector directories: what is written comes back; anything else is refused with a reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from qwen3_vlm.errors import AddOnError, BaseMismatchError, GateError, ModelError, StorageError, TamperedFileError
from qwen3_vlm.fingerprint import fingerprint_file, fingerprint_text
from qwen3_vlm.train.add_ons import (
    export_vlm,
    load_connector,
    load_vlm,
    save_connector,
)
from qwen3_vlm.train.connector_files import read_info
from qwen3_vlm.train.identity import describe_bases
from qwen3_vlm.train.verify import verify_connector
from tests.tiny import save_tiny_llm, save_tiny_tower


@pytest.fixture
def directory(connector: Path) -> Path:
    return connector


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors and make the checksum agree, as somebody would who knows the format."""
    path = directory / "connector.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)
    record(path)


def record(path: Path) -> None:
    """Put the checksum that a changed file now has into connector.json."""
    entry = {path.name: {"sha256": fingerprint_file(path), "bytes": size(path)}}
    edit(path.parent, lambda info: info["files"].update(entry))


def write_evidence(directory: Path, text: str) -> None:
    (directory / "evidence.json").write_text(text)
    record(directory / "evidence.json")


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "connector.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def size(path: Path) -> int:
    return path.stat().st_size


def test_round_trip(directory: Path, tiny_vlm: tuple[Any, Any]) -> None:
    model, processor = load_vlm(directory)
    expected = tiny_vlm[0].connector_state_dict()
    assert model.connector_state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.connector_state_dict().items())
    assert not model.training
    assert model.dtype == torch.float32
    assert processor.chat_template == tiny_vlm[1].chat_template
    info = read_info(directory)
    assert (info["stage"], info["step"], info["parameters"]) == ("stage1_align", 7, 8_624)


def test_names_in_the_file_are_the_format(directory: Path) -> None:
    names = safetensors.torch.load_file(directory / "connector.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"resampler", "projector"}
    assert "resampler.latents" in names


def test_vision_ln_is_part_of_it(tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path: Path) -> None:
    from qwen3_vlm.models.bases import load_bases
    from tests.tiny import TINY_CONNECTOR

    model, processor = load_bases(tiny_llm_dir, tiny_tower_dir, dtype=torch.float32, vision_ln=True, **TINY_CONNECTOR)
    bases = describe_bases(tiny_llm_dir, tiny_tower_dir, processor)
    folder = save_connector(tmp_path / "c", model, bases, details={"dtype": "float32"})
    loaded, _ = load_vlm(folder)
    assert "vision_ln.weight" in loaded.connector_parameters()


def test_loading_in_another_dtype(directory: Path) -> None:
    model, _ = load_vlm(directory, dtype="bfloat16")
    assert model.model.language_model.dtype == torch.bfloat16
    assert model.model.resampler.latents.dtype == torch.float32
    with pytest.raises(ModelError, match="no dtype"):
        load_vlm(directory, dtype="int8")


def test_another_llm_is_refused_by_part(directory: Path, tmp_path: Path) -> None:
    other = save_tiny_llm(tmp_path / "other", seed=9)
    with pytest.raises(BaseMismatchError) as caught:
        load_vlm(directory, llm=other)
    assert "LLM weights differ in embed_tokens, layers.0, layers.1" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_another_tower_is_refused(directory: Path, tmp_path: Path) -> None:
    other = save_tiny_tower(tmp_path / "other", seed=9)
    with pytest.raises(BaseMismatchError, match="vision tower weights differ"):
        load_vlm(directory, vision_tower=other)


def test_another_tokenizer_is_refused(directory: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llm_dir, other)
    text = (other / "tokenizer.json").read_text()
    state = json.loads(text)
    state["model"]["merges"] = state["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(BaseMismatchError, match="tokenizer merges"):
        load_vlm(directory, llm=other)


def test_another_image_processor_is_refused(directory: Path, tiny_tower_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_tower_dir, other)
    (path,) = other.glob("*processor*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    with pytest.raises(BaseMismatchError, match="image processor image_mean"):
        load_vlm(directory, vision_tower=other)


def test_other_sizes_are_refused_line_by_line(directory: Path, tiny_vlm: tuple[Any, Any]) -> None:
    edit(directory, lambda info: info["connector"].update(num_latents=8, latent_dim=32))
    with pytest.raises(BaseMismatchError) as caught:
        load_connector(directory, tiny_vlm[0])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:-1] + b"\x01", lambda data: b""])
def test_changed_bytes_are_refused(directory: Path, damage: Callable[[bytes], bytes]) -> None:
    path = directory / "connector.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    for read in (load_vlm, verify_connector):
        with pytest.raises(TamperedFileError, match="Fetch it again") as caught:
            read(directory)
        assert "\n" not in str(caught.value)


def poisoned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors["resampler.latents"][0, 0] = float("nan")
    return tensors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (poisoned, "resampler.latents holds values that are not finite"),
        (lambda t: {n: x for n, x in t.items() if n != "resampler.latents"}, "resampler.latents is missing"),
        (lambda t: {**t, "extra": torch.ones(1)}, "extra is unexpected"),
        (lambda t: {**t, "resampler.latents": torch.ones(4, 15)}, r"has shape \(4, 15\); the model has \(4, 16\)"),
        (lambda t: {n: x.bfloat16() for n, x in t.items()}, "is bfloat16; connectors are float32"),
        (lambda t: {"nothing": torch.zeros(0)}, "is missing"),
    ],
)
def test_wrong_tensors_are_refused(directory: Path, change: Any, words: str) -> None:
    rewrite(directory, change)
    for read in (load_vlm, verify_connector):
        with pytest.raises(AddOnError, match=words):
            read(directory)


def test_broken_descriptions_are_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(AddOnError, match="no connector directory"):
        read_info(tmp_path)
    good = (directory / "connector.json").read_text()
    for change in (
        lambda info: info.update(format=2),
        lambda info: info.pop("llm"),
        lambda info: info["llm"].update(id=5),
        lambda info: info["files"].clear(),
        lambda info: info["files"].update({"evidence.json": 1}),
        lambda info: info["llm"].update(fingerprint=3),
        lambda info: info["tokenizer"].update(fingerprint=[]),
        lambda info: info["chat_template"].update(text=7),
        lambda info: info["chat_template"].update(text="\ud800"),
        lambda info: info["llm"].update(id="\udcff"),
        lambda info: info.update(dtype=5),
        lambda info: info["chat_template"].update(text="{{ 'other' }}"),
    ):
        (directory / "connector.json").write_text(good)
        edit(directory, change)
        with pytest.raises(AddOnError):
            read_info(directory)
    (directory / "connector.json").write_text(good)
    edit(directory, lambda info: info["connector"].pop("depth"))
    with pytest.raises(AddOnError, match="do not describe a connector"):
        verify_connector(directory)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_latents", 10**9, r"num_latents is 1000000000, not a whole number from 1 to 65,536"),
        ("depth", True, "depth is True, not a whole number"),
        ("llm_width", "64", "llm_width is 64, not a whole number"),
        ("projector_hidden_act", "zzz", "projector_hidden_act is zzz, no known activation"),
        ("vision_ln", 0, "vision_ln is 0, not true or false"),
        ("num_latents", 8, r"resampler.latents has shape \(4, 16\); the model has \(8, 16\)"),
    ],
)
def test_sizes_are_looked_at_before_a_base_is_loaded(
    directory: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, words: str
) -> None:
    edit(directory, lambda info: info["connector"].update({name: value}))
    monkeypatch.setattr(
        "qwen3_vlm.train.add_ons.load_strictly", lambda *args, **kwargs: pytest.fail("bases were loaded")
    )
    for read in (load_vlm, verify_connector):
        with pytest.raises(AddOnError, match=words):
            read(directory)


@pytest.mark.parametrize("template", ["{% for %}", "{{ messages.nothing.at_all }}", "{{ 1 / 0 }}", "x" * 200_000])
def test_a_chat_template_that_fails_is_refused(directory: Path, template: str) -> None:
    edit(directory, lambda info: info.update(chat_template={"text": template, "sha256": fingerprint_text(template)}))
    for read in (load_vlm, verify_connector):
        with pytest.raises(AddOnError, match=r"chat template in .* can't be used") as caught:
            read(directory)
        assert "\n" not in str(caught.value)


def test_changed_evidence_is_refused(directory: Path) -> None:
    path = directory / "evidence.json"
    path.write_text(path.read_text().replace("0.5", "0.6"))
    for read in (read_info, load_vlm, verify_connector):
        with pytest.raises(TamperedFileError, match=r"evidence\.json was changed after it was written"):
            read(directory)


def test_older_directories_without_a_checksum_of_the_evidence(directory: Path) -> None:
    edit(directory, lambda info: info["files"].pop("evidence.json"))
    report = verify_connector(directory, gates=True)
    assert report.passed
    assert [check.passed for check in report.checks if check.name == "evidence"] == [None]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 255}, "255 samples were graded"),
        ({"value": 0.01}, "0.05 is needed"),
        ({"low": -0.1}, "must lie above zero"),
        ({"low": None}, "must lie above zero"),
        ({"passed": False}, "marked as failed"),
        ({"value": None, "reason": "There is no picture."}, "There is no picture."),
    ],
)
def test_gates_are_judged_by_their_figures(directory: Path, change: dict[str, Any], words: str) -> None:
    tree = json.loads((directory / "evidence.json").read_text())
    tree["gates"][0] |= change
    write_evidence(directory, json.dumps(tree))
    (gate,) = (check for check in verify_connector(directory).checks if check.name.startswith("gate"))
    assert gate.passed is False
    assert words in gate.detail
    with pytest.raises(GateError, match=words):
        verify_connector(directory, gates=True)


def test_verify_downloads_only_what_it_was_given(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def snapshot_download(name: str, *, local_files_only: bool, **settings: Any) -> str:
        asked.append((name, local_files_only))
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    edit(directory, lambda info: info["llm"].update(id="owner/base"))
    report = verify_connector(directory)
    assert asked == [("owner/base", True)]
    assert [check.passed for check in report.checks if check.name == "llm"] == [None]
    with pytest.raises(ModelError):
        verify_connector(directory, llm="owner/other")
    assert asked[1:] == [("owner/other", True), ("owner/other", False)]


def test_missing_bases_say_how_to_name_them(directory: Path) -> None:
    edit(directory, lambda info: info["llm"].update(id="no-such-owner/no-such-model"))
    with pytest.raises(ModelError, match="--llm"):
        load_vlm(directory)
    report = verify_connector(directory)
    assert [check.passed for check in report.checks if check.name == "llm"] == [None]


def test_verify_says_what_was_checked(directory: Path, tmp_path: Path) -> None:
    report = verify_connector(directory, gates=True)
    assert report.passed
    assert [line.split()[0] for line in str(report).splitlines()] == ["ok"] * 6
    with pytest.raises(BaseMismatchError):
        verify_connector(directory, llm=save_tiny_llm(tmp_path / "other", seed=3))


@pytest.mark.parametrize("gates", [[], [{"name": "zero", "value": 0.01, "threshold": 0.05, "passed": False}]])
def test_verify_with_gates_wants_them_passed(directory: Path, gates: list[Any]) -> None:
    write_evidence(directory, json.dumps({"format": 1, "gates": gates}))
    verify_connector(directory)
    with pytest.raises(GateError, match="does not show that every gate passed"):
        verify_connector(directory, gates=True)


@pytest.mark.parametrize("evidence", ["[]", "{", '{"gates": [1]}', '{"gates": [{}]}'])
def test_broken_evidence_is_a_sentence(directory: Path, evidence: str) -> None:
    write_evidence(directory, evidence)
    with pytest.raises(AddOnError, match=r"evidence\.json"):
        verify_connector(directory)


def test_saving_again_replaces_the_whole_directory(
    directory: Path, tiny_vlm: tuple[Any, Any], tiny_llm_dir: Path, tiny_tower_dir: Path
) -> None:
    (directory / "stray").write_text("x")
    model, processor = tiny_vlm
    save_connector(directory, model, describe_bases(tiny_llm_dir, tiny_tower_dir, processor))
    assert sorted(path.name for path in directory.iterdir()) == [
        "connector.json",
        "connector.safetensors",
        "evidence.json",
    ]


def test_bases_without_files_are_fingerprinted_in_memory(
    tiny_vlm: tuple[Any, Any], tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path: Path
) -> None:
    """An old base of pickled weights has no safetensors; its fingerprint is that of the same values in memory."""
    model, processor = tiny_vlm
    old = tmp_path / "old"
    shutil.copytree(tiny_llm_dir, old)
    (old / "model.safetensors").unlink()
    (old / "pytorch_model.bin").write_bytes(b"weights")
    found = describe_bases(old, tiny_tower_dir, processor, model=model)
    expected = describe_bases(tiny_llm_dir, tiny_tower_dir, processor)
    assert found["llm"]["fingerprint"] == expected["llm"]["fingerprint"]


def test_export_is_one_folder_that_loads(directory: Path, tmp_path: Path, tiny_vlm: tuple[Any, Any]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    sentence = export_vlm(directory, tmp_path / "out")
    assert str(tmp_path / "out") in sentence
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    ids = torch.tensor([processor.encode_prompt([{"role": "user", "content": "<image_patch>what is it?"}])])
    pixels = torch.rand(1, 3, 16, 16)
    reference = tiny_vlm[0].eval()
    with torch.no_grad():
        found, expected = (m(input_ids=ids, pixel_values=pixels).logits for m in (model, reference))
    assert torch.equal(found, expected)
    with pytest.raises(StorageError, match="not empty"):
        export_vlm(directory, tmp_path / "out")

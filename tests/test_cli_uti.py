"""`qwen3-vlm uti …` on tiny tokenizers saved to disk, and the commands of docs/tokens.md."""

import json
import re
import shlex
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

from qwen3_vlm import cli, cli_uti
from qwen3_vlm.tokenization.token_space import TokenSpace
from qwen3_vlm.tokenization.uti_config import UTIConfig, load_uti_config
from tests.conftest import Run
from tests.tiny import save_tiny_llm
from tests.tokenization.tiny_models import save_tiny

ROOT = Path(__file__).parent.parent
RATE = 800


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A uti.yaml and what it names."""
    root = tmp_path_factory.mktemp("uti")
    config = {
        "text": {"tokenizer": str(save_tiny_llm(root / "llm")), "name": "tiny"},
        "image": {"type": "janus_vqvae", "source": str(save_tiny(root / "picture", "janus_vqvae"))},
        "audio": {"type": "dac", "source": str(save_tiny(root / "sound", "dac")), "clip_seconds": 0.5},
    }
    (root / "uti.yaml").write_text(yaml.safe_dump(config))
    return root


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures, two sounds and a text file."""
    root = tmp_path_factory.mktemp("media")
    (root / "sounds" / "deeper").mkdir(parents=True)
    (root / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("b.png", (16, 16)), ("a.JPG", (30, 20))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / "pictures" / name)
    for name, samples in (("one.wav", 300), ("deeper/two.wav", 900)):
        with wave.open(str(root / "sounds" / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes((rng.uniform(-0.5, 0.5, samples) * 32767).astype("<i2").tobytes())
    (root / "texts.txt").write_text("a red heart\n\nzwölf Boxkämpfer 🥊\n", encoding="utf-8")
    (root / "pictures" / "notes.txt").write_text("not a picture")
    return root


def audit_arguments(media: Path) -> list[object]:
    return ["--images", media / "pictures", "--sounds", media / "sounds", "--texts", media / "texts.txt"]


def test_build_writes_a_token_space_and_shows_it(run: Run, folder: Path, tmp_path: Path) -> None:
    status, out, _ = run("uti", "build", folder / "uti.yaml", tmp_path / "space", "special.count=70")
    assert status == 0
    assert {path.name for path in (tmp_path / "space").iterdir()} == {
        "uti.yaml",
        "token_space.json",
        "token_space.sha256",
    }
    space = TokenSpace.load(tmp_path / "space")
    assert space.ranges["SPECIAL"].size == 70
    assert space.sha256 in out
    assert "AUDIO_CB2" in out
    assert load_uti_config(tmp_path / "space").special.count == 70
    assert run("uti", "build", folder / "uti.yaml", tmp_path / "space", "special.count=70")[0] == 0, "again"
    status, _, err = run("uti", "build", folder / "uti.yaml", tmp_path / "space")
    assert status == 1
    assert "holds another token space" in err
    assert "ranges.SPECIAL" in err


def test_describe(run: Run, folder: Path, tmp_path: Path) -> None:
    run("uti", "build", folder, tmp_path)
    for path in (tmp_path, tmp_path / "token_space.json"):
        status, out, _ = run("uti", "describe", path)
        assert (status, "<|img_start|>" in out) == (0, True)
    status, out, _ = run("uti", "describe", tmp_path, "--json")
    assert json.loads(out) == TokenSpace.load(tmp_path).to_dict()
    status, _, err = run("uti", "describe", tmp_path / "uti.yaml")
    assert (status, "uti build" in err) == (1, True)
    (tmp_path / "token_space.sha256").write_text("0" * 64)
    status, _, err = run("uti", "describe", tmp_path)
    assert (status, err.startswith("Error: "), err.count("\n")) == (1, True, 1)


def test_diff_lists_every_difference(run: Run, folder: Path, tmp_path: Path) -> None:
    run("uti", "build", folder, tmp_path / "a")
    run("uti", "build", folder, tmp_path / "b", "text.name=other", "audio.num_codebooks=2")
    status, out, _ = run("uti", "diff", tmp_path / "a", tmp_path / "a")
    assert (status, "The same token space" in out) == (0, True)
    status, out, _ = run("uti", "diff", tmp_path / "a", tmp_path / "b")
    assert status == 1
    for field in ("base_text_model: tiny ≠ other", "ranges.AUDIO_CB2", "audio_codec.num_codebooks: 3 ≠ 2"):
        assert field in out
    status, _, err = run("uti", "diff", tmp_path / "a", tmp_path / "nothing")
    assert (status, "nothing" in err) == (1, True)


def test_audit_writes_its_files_and_gates_the_next(run: Run, folder: Path, media: Path, tmp_path: Path) -> None:
    status, out, err = run("uti", "audit", folder, tmp_path / "one", *audit_arguments(media), "--device", "cpu")
    assert (status, err) == (0, "")
    assert "PSNR: " in out
    assert "checks passed." in out
    assert str(tmp_path / "one" / "index.html") in out
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert [item["name"] for item in report["items"]] == ["a.JPG", "b.png", "deeper/two.wav", "one.wav"]
    assert str(tmp_path) not in json.dumps(report), "no paths of this machine"
    baseline = ["--baseline", tmp_path / "one" / "report.json"]
    status, out, _ = run("uti", "audit", folder, tmp_path / "two", *audit_arguments(media), *baseline)
    assert (status, out.count("passed, ")) == (0, 4)
    report["figures"]["audio"]["snr_db"]["mean"] += 2
    (tmp_path / "one" / "report.json").write_text(json.dumps(report))
    status, out, _ = run("uti", "audit", folder, tmp_path / "two", *audit_arguments(media), *baseline)
    assert (status, "Gate SNR: FAILED, " in out) == (1, True)
    report["items_sha256"]["image"] = "0" * 64
    (tmp_path / "one" / "report.json").write_text(json.dumps(report))
    status, _, err = run("uti", "audit", folder, tmp_path / "three", *audit_arguments(media), *baseline)
    assert (status, "other items (image)" in err) == (1, True)
    assert not (tmp_path / "three").exists()


def test_audit_says_what_it_can_not_use(run: Run, folder: Path, media: Path, tmp_path: Path) -> None:
    for option, value, message in (
        ("--images", tmp_path / "none", "does not exist"),
        ("--images", media / "sounds", "holds no picture"),
        ("--sounds", media / "pictures", "holds no sound"),
        ("--texts", tmp_path / "none.txt", "can't be read"),
        ("--texts", media / "pictures" / "b.png", "is not UTF-8"),
        ("--baseline", tmp_path / "none.json", "can't be read"),
        ("--baseline", media / "texts.txt", "is not valid JSON"),
    ):
        arguments = [*audit_arguments(media), option, value]
        status, out, err = run("uti", "audit", folder, tmp_path / "out", *arguments)
        assert (status, out) == (1, "")
        assert message in err
        assert err.startswith("Error: ")


def test_conformance_judges_both_adapters(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3_vlm.checks import Check
    from qwen3_vlm.tokenization import conformance
    from qwen3_vlm.tokenization.conformance import ConformanceReport

    seen: list[UTIConfig] = []
    rows = (Check("encode_result", True, "fine"), Check("decode_result", False, "too dark"))

    def checked(config: UTIConfig) -> list[ConformanceReport]:
        seen.append(config)
        return [ConformanceReport("image", "Mine", rows[: len(seen)])]

    monkeypatch.setattr(conformance, "run_conformance_for", checked)
    status, out, _ = run("uti", "conformance", folder, "image.batch_size=2")
    assert (status, "Mine" in out, seen[0].image and seen[0].image.batch_size) == (0, True, 2)
    status, out, _ = run("uti", "conformance", folder, "--json")
    assert (status, json.loads(out)[0]["checks"][1]["detail"]) == (1, "too dark")


def test_conformance_of_nothing_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "uti.yaml").write_text("text: {tokenizer: x}")
    status, _, err = run("uti", "conformance", tmp_path)
    assert (status, "neither an image nor an audio section" in err) == (1, True)


@pytest.mark.parametrize(
    ("name", "back"), [("pictures/b.png", "back.png"), ("sounds/deeper/two.wav", "back.wav"), ("texts.txt", "back.txt")]
)
def test_encode_and_decode_are_inverse(
    run: Run, folder: Path, media: Path, tmp_path: Path, name: str, back: str
) -> None:
    status, out, _ = run("uti", "encode", folder, media / name)
    assert status == 0
    printed = json.loads(out)
    status, out, _ = run("uti", "encode", folder, media / name, "--out", tmp_path / "ids.json")
    assert json.loads((tmp_path / "ids.json").read_text()) == printed
    assert f"{len(printed['ids']):,} {printed['modality']} ids" in out
    status, out, _ = run("uti", "decode", folder, tmp_path / "ids.json", tmp_path / back)
    assert (status, out) == (0, f"{tmp_path / back}\n")
    if back == "back.txt":
        assert (tmp_path / back).read_bytes() == (media / name).read_bytes()
    elif back == "back.png":
        with Image.open(tmp_path / back) as picture:
            assert picture.size == (16, 16)
    else:
        with wave.open(str(tmp_path / back)) as file:
            assert (file.getframerate(), file.getnframes()) == (RATE, 900)


def test_decode_refuses_other_ids(run: Run, folder: Path, media: Path, tmp_path: Path) -> None:
    run("uti", "encode", folder, media / "pictures" / "b.png", "--out", tmp_path / "ids.json")
    values = json.loads((tmp_path / "ids.json").read_text())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"token_space_sha256": "0" * 64}, "mean something else"),
        ({"ids": [*values["ids"][:-1], 5]}, "belongs to TEXT"),
        ({"ids": values["ids"][:-1]}, "15 ids"),
        ({"ids": "1 2 3"}, "no file of ids"),
        ({"modality": "smell"}, "no file of ids"),
        ({"format": 2}, "no file of ids"),
        ({"metadata": {**values["metadata"], "content_box": [0, 0, 99, 99]}}, "content_box"),
    ]
    for change, message in cases:
        (tmp_path / "changed.json").write_text(json.dumps({**values, **change}))
        status, out, err = run("uti", "decode", folder, tmp_path / "changed.json", tmp_path / "x.png")
        assert (status, out) == (1, "")
        assert message in err
        assert not (tmp_path / "x.png").exists()
    status, _, err = run("uti", "decode", folder, tmp_path / "ids.json", tmp_path / "x.docx")
    assert (status, "suffix" in err) == (1, True)


def test_files_of_no_known_kind(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.docx").write_text("hello")
    status, _, err = run("uti", "encode", folder, tmp_path / "letter.docx")
    assert (status, "--as image, audio or text" in err) == (1, True)
    status, out, _ = run("uti", "encode", folder, tmp_path / "letter.docx", "--as", "text")
    assert (status, json.loads(out)["modality"]) == (0, "text")
    status, _, err = run("uti", "encode", folder, tmp_path / "letter.docx", "--as", "image")
    assert (status, "can't be read" in err) == (1, True)


def test_a_device_that_is_not_there(run: Run, folder: Path, media: Path) -> None:
    status, _, err = run("uti", "encode", folder, media / "pictures" / "b.png", "--device", "cuda:77")
    assert (status, "cuda:77" in err) == (1, True)


def test_file_names_of_any_bytes_are_names(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.png").touch()
    names = [cli_uti._name(path.relative_to(tmp_path)) for path in tmp_path.iterdir()]
    assert names == ["caf\ufffd.png"]


def test_demo_items_are_the_same_every_time() -> None:
    pictures, again = cli_uti.demo_pictures(), cli_uti.demo_pictures()
    assert len(pictures) == cli_uti.DEMO_PICTURES
    assert all(np.array_equal(pictures[name], again[name]) for name in pictures)
    assert len(set(cli_uti.demo_texts())) > 10


# docs/tokens.md -----------------------------------------------------------------------------------------------


def guide() -> str:
    return (ROOT / "docs" / "tokens.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Every `$ qwen3-vlm …` line of the guide, without comments, as arguments."""
    blocks = "\n".join(re.findall(r"```console\n(.*?)```", guide(), re.S)).replace("\\\n", " ")
    lines = [line[2:] for line in blocks.split("\n") if line.startswith("$ qwen3-vlm ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_the_commands_of_the_guide_can_be_parsed(arguments: list[str]) -> None:
    command: Any = typer.main.get_command(cli.app)
    rest = list(arguments)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    command.make_context(" ".join(arguments), rest)  # a UsageError if an argument or option is not the command's


def test_the_configurations_of_the_guide_are_valid() -> None:
    from qwen3_vlm.config import parse_as

    blocks = re.findall(r"```yaml\n(.*?)```", guide(), re.S)
    assert blocks
    for block in blocks:
        parse_as(UTIConfig, yaml.safe_load(block))


def test_every_key_of_uti_yaml_is_in_the_guide() -> None:
    import dataclasses

    from qwen3_vlm.tokenization.uti_config import AudioConfig, ImageConfig, SpecialConfig, TextConfig

    for section in (TextConfig, SpecialConfig, ImageConfig, AudioConfig):
        for field in dataclasses.fields(section):
            assert f"`{field.name}`" in guide(), f"{section.__name__}.{field.name}"


def test_the_links_of_the_guide_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", guide()):
        if not target.startswith("http"):
            assert (ROOT / "docs" / target).exists(), target

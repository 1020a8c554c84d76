"""`qwen3-vlm generate …` on a tiny add-on with tiny real codecs, and the commands of docs/generation.md."""

import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image
from transformers import AutoModelForCausalLM

from qwen3_vlm.cli_uti import read_picture, read_sound
from qwen3_vlm.errors import ModelError
from qwen3_vlm.generate.generation import generate
from qwen3_vlm.generate.grammar import Grammar
from qwen3_vlm.models.row_files import describe_base, read_rows_info, save_rows
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.tokenization.audit_page import wav_bytes
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from qwen3_vlm.tokenization.uti_config import TextConfig
from tests.conftest import Run
from tests.models.tiny_omni import give_adapter, save_uti
from tests.tiny import save_tiny_llm
from tests.tokenization.tiny_models import save_tiny

ROOT = Path(__file__).parent.parent
RATE = 800


@pytest.fixture(scope="module")
def addon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trainable-rows folder whose rows are fresh."""
    root = tmp_path_factory.mktemp("generate")
    llm = save_tiny_llm(root / "llm")
    space = UnifiedTokenizer.open(save_uti(root, llm)).token_space
    model = TokenLM.grow(AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32), space)
    return save_rows(root / "addon", model, describe_base(llm), uti=root / "uti.yaml", details={"step": 1})


def test_pictures(run: Run, addon: Path, tmp_path: Path) -> None:
    out = tmp_path / "heart.png"
    command = ("generate", "image", "a red heart", "--checkpoint", addon)
    assert run(*command, "-o", out)[:2] == (0, f"{out}\n")
    with Image.open(out) as picture:
        assert picture.size == (16, 16)
    status, printed, _ = run(*command, "-o", out, "--count", 3, "--seed", 7, "--json", "--guidance", 2, "--top-k", 9)
    assert status == 0
    files = [tmp_path / f"heart-{seed}.png" for seed in (7, 8, 9)]
    assert [json.loads(line) for line in printed.splitlines()] == [
        {"file": str(file), "seed": seed} for file, seed in zip(files, (7, 8, 9), strict=True)
    ]
    run(*command, "-o", out, "--seed", 8, "--guidance", 2, "--top-k", 9)
    assert out.read_bytes() == files[1].read_bytes() != files[0].read_bytes()


def test_sounds(run: Run, addon: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.wav"
    lengths = ("--min-seconds", 0.2, "--max-seconds", 0.3, "--temperature", "0.5,1,1.5")
    assert run("generate", "audio", "a red heart", "--checkpoint", addon, "-o", out, *lengths)[:2] == (0, f"{out}\n")
    sound, rate = soundfile.read(out)
    assert rate == RATE
    assert 0.2 <= len(sound) / RATE <= 0.3


def test_words(run: Run, addon: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 20, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    soundfile.write(tmp_path / "x.wav", np.sin(np.arange(80)), RATE)
    command = ("generate", "text", "--checkpoint", addon, "--max-tokens", 5)
    for source in (("--image", tmp_path / "p.png"), ("--audio", tmp_path / "x.wav")):
        first, again = run(*command, *source), run(*command, *source)
        assert first == again
        assert first[0] == 0
        assert first[1].strip("\n")
    status, printed, _ = run(*command, "--image", tmp_path / "p.png", "--temperature", 2, "--count", 4, "--json")
    answers = [json.loads(line) for line in printed.splitlines()]
    assert (status, [answer["seed"] for answer in answers]) == (0, [0, 1, 2, 3])
    assert len({answer["text"] for answer in answers}) == 4


def test_pictures_of_sounds_and_sounds_of_pictures(run: Run, addon: Path, tmp_path: Path) -> None:
    """The files are what the functions make of the same sources."""
    Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(tmp_path / "p.png")
    soundfile.write(tmp_path / "x.wav", np.sin(np.arange(80)), RATE)
    sources = {"image": read_picture(tmp_path / "p.png", "p"), "audio": read_sound(tmp_path / "x.wav", "x")}
    model, uti = TokenLM.from_add_on(addon), UnifiedTokenizer.open(addon)
    files: dict[Any, list[bytes]] = {"image": [], "audio": []}
    for target, out in (("image", tmp_path / "a.png"), ("audio", tmp_path / "a.wav")):
        for kind, file in (("image", "p.png"), ("audio", "x.wav")):
            command = ("generate", target, "--checkpoint", addon, f"--{kind}", tmp_path / file, "-o", out)
            short = ("--max-seconds", 0.2) if target == "audio" else ()
            assert run(*command, "--seed", 3, *short)[:2] == (0, f"{out}\n")
            files[target].append(out.read_bytes())
    assert len({*files["image"], *files["audio"]}) == 4
    (drawn,) = generate(model, uti, "image", [{"audio": sources["audio"]}], seed=3)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(files["image"][1]))), np.asarray(drawn))
    grammar = Grammar(uti.token_space, max_frames=int(0.2 * RATE / 8))
    ((waveform, rate),) = generate(model, uti, "audio", [{"image": sources["image"]}], seed=3, grammar=grammar)
    assert files["audio"][0] == wav_bytes(waveform, rate)


def test_an_adapter_beside_the_rows_is_used(run: Run, addon: Path, tmp_path: Path) -> None:
    """What a stage-4 folder draws is what the trained model in memory draws."""
    model = TokenLM.from_add_on(addon)
    out = tmp_path / "a.png"
    assert run("generate", "image", "x", "--checkpoint", addon, "-o", out)[0] == 0
    without = np.asarray(Image.open(out))
    give_adapter(model.language_model, rank=2, seed=1)
    base = describe_base(read_rows_info(addon)["base_llm"])
    folder = save_rows(tmp_path / "addon", model, base, uti=addon)
    assert run("generate", "image", "x", "--checkpoint", folder, "-o", out)[0] == 0
    (expected,) = generate(model, UnifiedTokenizer.open(addon), "image", [{"text": "x"}])
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected))
    assert not np.array_equal(without, np.asarray(expected))


def test_tokenizers_that_moved(run: Run, addon: Path, tmp_path: Path) -> None:
    moved = save_tiny(tmp_path / "moved", "janus_vqvae")
    config = yaml.safe_load((addon / "uti.yaml").read_text())
    config["image"] |= {"source": str(moved), "name": "picture"}
    (tmp_path / "uti.yaml").write_text(yaml.safe_dump(config))
    command = (
        "generate",
        "image",
        "x",
        "--checkpoint",
        addon,
        "-o",
        tmp_path / "a.png",
        "--uti",
        tmp_path / "uti.yaml",
    )
    assert run(*command)[0] == 0
    config["image"] |= {"source": str(save_tiny(tmp_path / "other", "janus_vqvae", num_res_blocks=2))}
    (tmp_path / "uti.yaml").write_text(yaml.safe_dump(config))
    status, _, err = run(*command)
    assert (status, "another token space" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("image", "x", "-o", "a.docx"), "suffix"),
        (("audio", "x", "-o", "a.mp3"), ".wav"),
        (("image", "x", "--temperature", "hot"), "--temperature is 'hot'; it must be a number"),
        (("image", "x", "--temperature", "1,1"), "--temperature has 2 numbers; give one."),
        (("image", "x", "--top-k", "1.5"), "--top-k is '1.5'; it must be a whole number"),
        (("image", "x", "--top-p", "0"), "top_p is 0.0"),
        (("audio", "x", "--top-k", "1,2"), "--top-k has 2 numbers; give one, or 3."),
        (("audio", "x", "--max-seconds", "0.001"), "max_frames"),
        (("text",), "Give --image or --audio, one"),
        (("image",), "Give a text, --image or --audio, one"),
        (("audio", "x", "--image", "a.png"), "Give a text, --image or --audio, one"),
        (("image", "--audio", "nothing.wav"), "nothing.wav"),
    ],
)
def test_what_is_refused(run: Run, addon: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    suffix = {"image": "png", "audio": "wav"}.get(arguments[0])
    out = () if suffix is None or "-o" in arguments else ("-o", tmp_path / f"a.{suffix}")
    status, _, err = run("generate", *arguments, *out, "--checkpoint", addon)
    assert (status, message in err) == (1, True), err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_add_on(run: Run, tmp_path: Path) -> None:
    status, _, err = run("generate", "image", "x", "-o", tmp_path / "a.png", "--checkpoint", tmp_path)
    assert (status, err.startswith("Error: ")) == (1, True)


@pytest.mark.parametrize("trusted", [False, True])
def test_an_add_on_may_not_ask_for_code_by_itself(
    run: Run, addon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    folder = Path(shutil.copytree(addon, tmp_path / "addon"))
    config = yaml.safe_load((folder / "uti.yaml").read_text())
    config["text"]["trust_remote_code"] = True
    (folder / "uti.yaml").write_text(yaml.safe_dump(config))
    asked: list[bool] = []

    def open_text(config: TextConfig, **_: object) -> None:
        asked.append(config.trust_remote_code)
        raise ModelError("Enough.")

    monkeypatch.setattr("qwen3_vlm.tokenization.unified_tokenizer.open_text", open_text)
    flags = ["--trust-remote-code"] * trusted
    assert run("generate", "image", "x", "-o", tmp_path / "x.png", "--checkpoint", folder, *flags)[0] == 1
    assert asked == [trusted]


def blocks(language: str) -> list[str]:
    """The fenced blocks of docs/generation.md in one language."""
    text = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_commands_of_the_docs(run: Run, addon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [line[2:] for line in blocks("console")[0].splitlines() if line.startswith("$ ")]
    assert len(commands) == 7
    for command in commands:
        adapted = command.replace("runs/stage3/rows", str(addon)).replace("--max-seconds 3", "--max-seconds 0.3")
        adapted = adapted.replace("0.7,0.9,1,1", "0.7,0.9,1")  # the tiny codec has three codebooks and short clips
        status, printed, err = run(*shlex.split(adapted)[1:])
        assert (status, err) == (0, "")
        assert printed


def test_the_python_of_the_docs(addon: Path) -> None:
    from qwen3_vlm.generate.generation import pad_left

    pieces: list[object] = []
    rows = [np.array([5, 6])]
    input_ids, attention_mask = pad_left(rows, 0)
    names = {"play": pieces.append, "input_ids": input_ids, "attention_mask": attention_mask}
    for block in blocks("python"):
        exec(block.replace("runs/stage3/rows", str(addon)).replace("top_k=50", "top_k=5"), names)
    assert pieces
    assert len(names["pictures"]) == 2  # type: ignore[arg-type]

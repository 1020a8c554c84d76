"""`qwen3-vlm chat`: one message, and a conversation line by line, as the package itself answers."""

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from qwen3_vlm.cli_chat import open_omni
from qwen3_vlm.cli_uti import read_picture, read_sound
from qwen3_vlm.generate.chat import chat
from qwen3_vlm.models.omni import OmniModel
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from qwen3_vlm.train.omni_files import load_omni
from tests.conftest import Run
from tests.models.tiny_omni import picture, save_connector_of, save_rows_of, save_uti, sound

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llm_dir: Path, tiny_tower_dir: Path) -> Path:
    """connector, rows, p.png and x.wav."""
    root = tmp_path_factory.mktemp("chat")
    uti = UnifiedTokenizer.open(save_uti(root, tiny_llm_dir))
    save_connector_of(root / "connector", tiny_llm_dir, tiny_tower_dir)
    save_rows_of(root / "rows", tiny_llm_dir, uti, source=root / "uti.yaml")
    picture().save(root / "p.png")
    soundfile.write(root / "x.wav", sound()[0], 800)
    return root


@pytest.fixture(scope="module")
def omni(home: Path) -> OmniModel:
    return load_omni(home / "connector", home / "rows")


@pytest.fixture(scope="module")
def opened() -> dict[str, OmniModel]:
    """What was loaded for which arguments; once is enough."""
    return {}


@pytest.fixture(autouse=True)
def _open_once(opened: dict[str, OmniModel], monkeypatch: pytest.MonkeyPatch) -> None:
    def open_once(*arguments: Any, **options: Any) -> OmniModel:
        key = repr((arguments, options))
        if key not in opened:
            opened[key] = open_omni(*arguments, **options)
        return opened[key]

    monkeypatch.setattr("qwen3_vlm.cli_chat.open_omni", open_once)


@pytest.fixture
def command(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[object, ...]:
    """In a folder of its own, where replies are written."""
    monkeypatch.chdir(tmp_path)
    return ("chat", "--connector", home / "connector", "--rows", home / "rows", "--max-tokens", 6)


def message(home: Path, *kinds: str, text: str = "") -> dict[str, Any]:
    parts: dict[str, Any] = {
        "image": {"type": "image", "image": read_picture(home / "p.png", "p")},
        "audio": {"type": "audio", "audio": read_sound(home / "x.wav", "x")},
        "text": {"type": "text", "text": text},
    }
    return {"role": "user", "content": [parts[kind] for kind in kinds]}


def test_one_message(run: Run, command: tuple[object, ...], home: Path, omni: OmniModel) -> None:
    asked = message(home, "image", "text", text="what is it?")
    answer = chat(omni, [asked], max_new_tokens=6)
    assert run(*command, "what is it?", "--image", home / "p.png")[:2] == (0, f"{answer.text}\n")
    said = run(*command, "--json", "--reply", "image", "--audio", home / "x.wav", "--seed", 4, "-o", "a/b.png")
    assert (said[0], json.loads(said[1])) == (0, {"file": "a/b.png", "words": None, "seed": 4})
    drawn = chat(omni, [message(home, "audio")], reply="image", seed=4)
    assert np.array_equal(np.asarray(Image.open("a/b.png")), np.asarray(drawn.image))
    status, printed, _ = run(*command, "hm?", "--image", home / "p.png", "--reply", "audio", "--of", "answer", "--json")
    line = json.loads(printed)
    assert (status, line["file"]) == (0, "reply.wav")
    assert line["words"] == chat(omni, [message(home, "image", "text", text="hm?")], max_new_tokens=6).text
    assert soundfile.info("reply.wav").samplerate == 800


def test_another_adapter_makes_the_reply(run: Run, command: tuple[object, ...], home: Path, omni: OmniModel) -> None:
    expected = chat(omni, [{"role": "user", "content": "a"}], adapter="rows", max_new_tokens=6).text
    assert run(*command, "a", "--adapter", f"mine={home / 'rows'}")[:2] == (0, f"{expected}\n")
    assert run(*command, "a")[1] != f"{expected}\n"


def test_a_conversation(
    run: Run, command: tuple[object, ...], home: Path, omni: OmniModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"/image {home / 'p.png'}", "what is it?", "/draw a red heart", "and this?", "", "/image no.png"]
    lines += ["/what", "/new", "and this?", "/aloud ", "/quit", "not read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    status, printed, err = run(*command, "-o", "made", "--seed", 2)
    messages = [message(home, "image", "text", text="what is it?")]
    first = chat(omni, messages, max_new_tokens=6)
    drawn = chat(omni, [*messages, {"role": "user", "content": "a red heart"}], reply="image", seed=3)
    messages += [first.message(), {"role": "user", "content": "a red heart"}, drawn.message()]
    last = {"role": "user", "content": "and this?"}
    second, alone = (chat(omni, given, max_new_tokens=6).text for given in ([*messages, last], [last]))
    assert status == 0
    assert printed.startswith(f"{first.text}\nmade/reply-2.png\n{second}\n/image FILE")
    assert printed.endswith(f"Anything else is a message.\n{alone}\n")
    assert second != alone
    assert [line.partition(":")[0] for line in err.splitlines()] == ["Error", "Error"]
    assert "no.png" in err
    assert np.array_equal(np.asarray(Image.open("made/reply-2.png")), np.asarray(drawn.image))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("x", "--reply", "image", "-o", "a.docx"), "suffix"),
        (("x", "--adapter", "nothing"), "must be NAME=DIR"),
        (("x", "--adapter", "rows=/tmp"), "can't be called 'rows'"),
        (("x", "--image", "no.png"), "no.png"),
        (("x", "--temperature", "-1"), "temperature is -1"),
        (("x", "--llm", "/no/such/base"), "/no/such/base"),
        (("<|im_start|>",), "a mark between messages"),
        (("x", "-o", "a.png"), "--out is a.png, and the answer is text, which is printed"),
        (("x", "--of", "answer"), "--of is answer, and the answer is text"),
        (("--reply", "image"), "--reply is for one message, and none is given"),
        (("--of", "answer"), "--of is for one message, and none is given"),
    ],
)
def test_what_is_refused(run: Run, command: tuple[object, ...], arguments: tuple[str, ...], words: str) -> None:
    status, printed, err = run(*command, *arguments)
    assert (status, printed, err.startswith("Error: ")) == (1, "", True)
    assert words in err


def test_ten_minutes_of_sound(
    run: Run, command: tuple[object, ...], omni: OmniModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One sentence with the limit; in a conversation the sound is gone with it."""
    soundfile.write(tmp_path / "long.wav", np.zeros(600 * 800), 800)
    limit = "the model reads 512 at a time"
    status, printed, err = run(*command, "--audio", tmp_path / "long.wav")
    assert (status, printed, err.count("\n")) == (1, "", 1)
    assert re.match(rf"Error: The sound lasts 600\.0 s, [\d,]+ ids; {limit}: [\d.]+ s of sound at most\.", err)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/audio {tmp_path / 'long.wav'}\nhm?\nand this?"))
    status, printed, err = run(*command)
    alone = chat(omni, [{"role": "user", "content": "and this?"}], max_new_tokens=6).text
    assert (status, printed) == (0, f"{alone}\n")
    assert limit in err
    assert err.endswith("What was shown with it is left out from here on.\n")


def test_swapped_directories(run: Run, home: Path) -> None:
    status, _, err = run("chat", "x", "--connector", home / "rows", "--rows", home / "connector")
    assert (status, err.startswith("Error: ")) == (1, True)


def blocks(language: str) -> list[str]:
    """The fenced blocks of docs/omni.md in one language."""
    text = (ROOT / "docs" / "omni.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def adapted(text: str, home: Path) -> str:
    for kind in ("connector", "rows"):
        text = re.sub(rf"runs/\w+/{kind}", str(home / kind), text)
    return text.replace("two-drawings.png", str(home / "p.png")).replace("name.wav", str(home / "x.wav"))


def test_the_commands_of_the_docs(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit"))
    joined = blocks("console")[0].replace("\\\n", " ")
    commands = [line[2:] for line in joined.splitlines() if line.startswith("$ qwen3-vlm")]
    assert len(commands) >= 4
    for one in commands:
        status, _, err = run(*shlex.split(adapted(one, home))[1:], "--max-tokens", 4)
        assert (status, err) == (0, "")


def test_the_python_of_the_docs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    names: dict[str, Any] = {"picture": read_picture(home / "p.png", "p")}
    monkeypatch.setattr("qwen3_vlm.chat", partial(chat, max_new_tokens=4), raising=False)
    assert len(blocks("python")) >= 2
    for block in blocks("python"):
        exec(adapted(block, home), names)
    assert names["drawn"].image.size == (16, 16)

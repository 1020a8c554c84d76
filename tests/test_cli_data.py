"""`qwen3-vlm data …`: what is printed, exit status, and that what is wrong is a sentence."""

import json
from pathlib import Path

from tests.conftest import Run
from tests.data.speaking_pictures import line, png, save_tokenizers, wav, write_manifest


def test_help_names_every_command(run: Run) -> None:
    out = run("data", "--help")[1]
    for command in ("doctor", "cache-benchmark", "import", "manifest-audit", "tokenize", "audit"):
        assert f" {command} " in out
        assert run("data", command, "--help")[0] == 0
    for command in ("pairs", "audio-csv", "llava", "hf"):
        assert run("data", "import", command, "--help")[0] == 0


def test_from_a_folder_to_an_audited_data_set(run: Run, tmp_path: Path) -> None:
    """The way that a user goes, command by command."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(6):
        (data / f"{number}.png").write_bytes(png(number))
        (data / f"{number}.txt").write_text(f"noise {number}")
    (data / "cut.png").write_bytes(png(1)[:90])
    (data / "cut.txt").write_text("cut off")
    (data / "lonely.png").write_bytes(png(9))
    status, out, _ = run("data", "import", "pairs", data)
    assert (status, "7 records" in out, "1 left out: no_caption" in out) == (0, True, True)
    manifest = data / "manifest.jsonl"
    assert f"Next: qwen3-vlm data manifest-audit {manifest}" in out
    assert run("data", "manifest-audit", manifest)[0] == 0
    status, out, _ = run("data", "manifest-audit", manifest, "--decode", "--problems", tmp_path / "p.jsonl")
    assert (status, "unreadable_image" in out, "NOT FINE" in out) == (1, True, True)
    (problem,) = [json.loads(text) for text in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert problem["id"] == "cut.png"
    uti = save_tokenizers(tmp_path / "uti")
    arguments = ["tokenize", manifest, tmp_path / "out", "--uti", uti, "--workers", 0, "--val", 0.3]
    status, out, _ = run("data", *arguments, "image.batch_size=2", "--no-download")
    assert (status, "1 left out: unreadable_image" in out) == (0, True)
    assert f"Next: qwen3-vlm data audit {tmp_path / 'out'}" in out
    assert "batch_size: 2" in (tmp_path / "out" / "uti.yaml").read_text()
    status, out, err = run("data", "audit", tmp_path / "out", "--manifest", manifest, "--no-download")
    assert status == 0, out + err
    assert (tmp_path / "out" / "audit.json").is_file()
    status, _, err = run("data", *arguments, "image.batch_size=4")
    assert status == 1
    assert err.startswith("Error: ")
    assert "uti.yaml: image.batch_size: 2 before, 4 now" in err


def test_the_other_importers(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(1))
    (tmp_path / "t.csv").write_text("file,words\na.wav,hello\n")
    status, _, err = run("data", "import", "audio-csv", tmp_path, tmp_path / "t.csv")
    assert (status, err.startswith("Error: None of the columns")) == (1, True)
    status, out, _ = run(
        "data", "import", "audio-csv", tmp_path, tmp_path / "t.csv", "--text-column", "words", "--task", "a2t"
    )
    assert (status, "1 records" in out) == (0, True)
    record = {"id": "1", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    (tmp_path / "l.json").write_text(json.dumps([record]))
    status, out, _ = run("data", "import", "llava", tmp_path / "l.json", "--out", tmp_path / "l.jsonl")
    assert (status, "1 records" in out) == (0, True)
    status, _, err = run("data", "import", "hf", tmp_path / "none", tmp_path / "hf")
    assert (status, err.startswith("Error: ")) == (1, True)


def test_what_is_missing_is_a_sentence(run: Run, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", [line("a", text="t")])
    for arguments, words in (
        (("tokenize", manifest, tmp_path / "out"), "has no uti.yaml to go on with"),
        (("tokenize", tmp_path / "none.jsonl", tmp_path / "out", "--uti", tmp_path / "none.yaml"), "none.jsonl"),
        (("tokenize", manifest, tmp_path / "out", "--uti", tmp_path / "none.yaml"), "none.yaml"),
        (("manifest-audit", tmp_path / "none.jsonl"), "does not exist"),
        (("audit", tmp_path / "none"), "dataset.json"),
    ):
        status, out, err = run("data", *arguments)
        assert (status, out) == (1, "")
        assert err.splitlines()[-1].startswith("Error: ")
        assert words in err

"""One data set with every fault known by hand, and the doctor's count of each."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen3_vlm.config import RunConfig, parse_config
from qwen3_vlm.data.doctor import examine
from qwen3_vlm.data.doctor_report import CHECKS, DoctorReport
from qwen3_vlm.errors import DataError, StorageError
from tests.data.helpers import WordProcessor, caption_records, conversation, png, write_json


def bomb() -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def captioned(name: str, text: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "image": f"{name}.png", "conversations": conversation("<image> q", text), **more}


def sick(folder: Path) -> RunConfig:
    """Nine good training records and three good held-out ones among the faults."""
    train = [captioned(f"good{number}", f"number {number}") for number in range(9)]
    train += [
        captioned("silent", " "),
        captioned("uneven", "x", image=["good0.png", "good1.png"]),
        captioned("endless", "word " * 60),
        {**captioned("good0", "x"), "id": "flood", "conversations": conversation("w " * 60 + "<image>", "x")},
        captioned("broken", "x"),
        captioned("bomb", "x"),
        captioned("missing", "x"),
        captioned("robot", "x", conversations=[{"from": "robot", "value": "x"}]),
        {"id": "long talk", "conversations": conversation(*["word " * 12] * 6)},
    ]
    held_out = [captioned(f"held{number}", f"other {number}") for number in range(3)]
    held_out += [captioned("good1", "new text"), captioned("copy", "number 2")]
    for tree in (*train, *held_out):
        if tree["id"] not in ("missing", "long talk"):
            color = (len(tree["id"]) * 7, sum(tree["id"].encode()) % 250, 3)
            (folder / f"{tree['id']}.png").write_bytes(png(color))
    (folder / "broken.png").write_bytes(png()[:-30])
    (folder / "bomb.png").write_bytes(bomb())
    # The copy's picture has good2's pixels in another file format.
    stream = io.BytesIO()
    Image.open(folder / "good2.png").save(stream, "BMP")
    (folder / "copy.png").write_bytes(stream.getvalue())
    write_json(folder / "train.json", train)
    write_json(folder / "eval.json", held_out)
    return config(folder, eval=[str(folder / "eval.json")], max_bad_fraction=0.2)


def config(folder: Path, **data: Any) -> RunConfig:
    data = {"train": [str(folder / "train.json")], "max_seq_len": 50, "num_workers": 0, **data}
    return parse_config({"data": data})


def test_every_fault_is_counted(tmp_path: Path) -> None:
    report = examine(sick(tmp_path), WordProcessor())
    assert report.counts == {
        "no_labels": 1,
        "placeholder_count": 1,
        "truncates_image": 1,
        "truncates_answer": 1,
        "missing_image": 1,
        "unreadable_image": 1,
        "image_too_large": 1,
        "duplicate_id": 1,
        "duplicate_sample": 1,
        "bad_conversation": 1,
    }
    assert report.bad_records == 8
    assert report.leaks == 2
    assert report.records == 18 + 5
    train, held_out = report.sides["train"], report.sides["eval"]
    assert (train.records, train.usable, train.pictures, train.shortened, train.duplicates) == (18, 10, 9, 1, 0)
    assert (held_out.records, held_out.usable, held_out.duplicates) == (5, 5, 0)
    assert train.answers == {"le10": 9, "11_20": 1, "ge21": 0}  # of the long talk, the first answer is left
    assert train.tokens == {"median": 11, "95 %": 20, "max": 28}  # nine of 11 and one of 28; 11 + 0.55 × 17
    assert report.exit_status == 1
    by_id = {problem.id: problem for problem in report.problems}
    assert by_id["missing"].side == "train"
    assert by_id["missing"].message.startswith(f"{tmp_path}/train.json[15]: The picture ")
    assert by_id["copy"].message.endswith(f"{tmp_path}/train.json[2].")
    assert list(report.notes) == ["2 held-out records show a picture that is also trained on."]


def test_worker_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = sick(tmp_path)
    plain = examine(run, WordProcessor())
    monkeypatch.setattr("qwen3_vlm.data.doctor.WORK_RECORDS", 4)
    many = parse_config({"data": {**_data(run), "num_workers": 2}})
    assert examine(many, WordProcessor(), progress=True).to_dict() == plain.to_dict()


def test_exports(tmp_path: Path) -> None:
    report = examine(sick(tmp_path), WordProcessor())
    report.export(tmp_path / "out")
    tree = json.loads((tmp_path / "out" / "report.json").read_text())
    assert tree["counts"] == report.counts
    assert tree["exit_status"] == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "problems.jsonl").read_text().splitlines()]
    assert len(lines) == len(report.problems) == sum(report.counts.values())
    assert set(lines[0]) == {"side", "index", "id", "origin", "reason", "message"}
    assert (tmp_path / "out" / "report.txt").read_text() == report.table() + "\n"
    with pytest.raises(StorageError):
        report.export(tmp_path / "train.json" / "below")


def test_the_table_names_every_check_and_the_verdict(tmp_path: Path) -> None:
    table = examine(sick(tmp_path), WordProcessor()).table()
    for reason in CHECKS:
        assert reason in table
    assert table.splitlines()[-1] == (
        "NOT FINE: 8 of 23 records (34.78 %) can't be used; data.max_bad_fraction allows 20 %. "
        "2 held-out records are also trained on."
    )
    assert all(len(line) < 300 for line in table.splitlines())


def healthy(folder: Path, count: int = 40) -> RunConfig:
    trees = caption_records(count)
    for number, tree in enumerate(trees):
        tree["conversations"][1]["value"] += f" {number}"
        (folder / tree["image"]).write_bytes(png((number, 2, 3)))
    write_json(folder / "train.json", trees)
    return config(folder, eval_fraction=0.25)


def test_a_healthy_data_set_is_fine(tmp_path: Path) -> None:
    report = examine(healthy(tmp_path), WordProcessor())
    assert report.exit_status == 0
    assert sum(report.counts.values()) == 0
    assert report.table().splitlines()[-1].startswith("Fine: 0 of 40 records (0.00 %)")
    assert report.sides["eval"].records == 10
    assert report.sides["train"].records == 30


def test_one_content_under_two_ids_on_both_sides_is_found(tmp_path: Path) -> None:
    """A split by id can't see these; the doctor does."""
    run = healthy(tmp_path)
    trees = json.loads((tmp_path / "train.json").read_text())
    twins = [{**tree, "id": f"twin of {tree['id']}"} for tree in trees]
    write_json(tmp_path / "train.json", [*trees, *twins])
    report = examine(run, WordProcessor())
    assert report.counts["duplicate_sample"] > 0
    assert report.counts["duplicate_id"] == 0
    assert report.exit_status == 1
    both = report.sides["train"].duplicates + report.sides["eval"].duplicates + report.counts["duplicate_sample"]
    assert both == 40


def test_the_threshold_decides(tmp_path: Path) -> None:
    run = healthy(tmp_path)
    (tmp_path / "k3.png").unlink()
    for allowed, status in ((0.01, 1), (0.03, 0)):
        limited = parse_config({"data": {**_data(run), "max_bad_fraction": allowed}})
        assert examine(limited, WordProcessor()).exit_status == status


def test_pictures_may_be_left_undecoded(tmp_path: Path) -> None:
    report = examine(sick(tmp_path), WordProcessor(), decode_images=False)
    assert report.counts["missing_image"] == 1
    assert report.counts["unreadable_image"] == report.counts["image_too_large"] == 0
    assert any("not decoded" in note for note in report.notes)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    report = examine(sick(tmp_path))
    assert report.counts["truncates_answer"] == 0
    assert report.counts["unreadable_image"] == 1
    assert report.sides["train"].tokens == {}
    assert any("counted in words" in note for note in report.notes)


def test_a_single_record_can_not_be_split_but_is_examined(tmp_path: Path) -> None:
    report = examine(healthy(tmp_path, count=1), WordProcessor())
    assert set(report.sides) == {"train"}
    assert any("can't be split" in note for note in report.notes)
    assert report.exit_status == 0


def test_a_data_set_of_bad_records_alone(tmp_path: Path) -> None:
    write_json(tmp_path / "train.json", [captioned("a", ""), captioned("b", " ")])
    report = examine(config(tmp_path), WordProcessor())
    assert isinstance(report, DoctorReport)
    assert report.counts["no_labels"] == 2
    assert report.exit_status == 1


def test_nothing_to_examine() -> None:
    with pytest.raises(DataError, match="nothing to examine"):
        examine(parse_config({}))


def _data(run: RunConfig) -> dict[str, Any]:
    from qwen3_vlm.config import to_dict

    return dict(to_dict(run)["data"])

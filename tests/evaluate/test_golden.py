"""The golden set: chosen once, evenly; dumped whole; compared by id."""

import base64
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen3_vlm.data.records import ImageRef, Record, Turn
from qwen3_vlm.errors import DataError
from qwen3_vlm.evaluate.captioning import Request, generate_answers
from qwen3_vlm.evaluate.golden import (
    GoldenItem,
    choose_golden,
    diff_golden,
    dump_golden,
    read_golden,
    thumbnail_uri,
)
from tests.evaluate.helpers import make_records, picture


def test_choice_is_even_over_the_buckets_and_kept(tmp_path: Path) -> None:
    ids = [f"s{number}" for number in range(1000)]
    lengths = [5] * 600 + [15] * 380 + [30] * 20
    path = tmp_path / "golden" / "ids.json"
    chosen = choose_golden(ids, lengths, count=64, seed=3, path=path)
    counts = [sum(lengths[place] == length for place in chosen) for length in (5, 15, 30)]
    assert counts == [22, 22, 20]
    assert [lengths[place] for place in chosen] == sorted(lengths[place] for place in chosen)
    reordered = choose_golden(ids[::-1], lengths[::-1], count=64, seed=99, path=path)
    assert [ids[::-1][place] for place in reordered] == [ids[place] for place in chosen]


def test_choice_does_not_depend_on_the_order_of_samples() -> None:
    ids, lengths = [f"s{number}" for number in range(100)], [number % 30 for number in range(100)]
    straight = {ids[place] for place in choose_golden(ids, lengths, count=12)}
    assert straight == {ids[::-1][place] for place in choose_golden(ids[::-1], lengths[::-1], count=12)}


def test_one_prompt_per_id_and_small_sets() -> None:
    assert choose_golden(["a", "a", "b"], [3, 3, 3], count=64) == [0, 2]
    assert choose_golden([], [], count=4) == []
    with pytest.raises(ValueError, match="answer lengths"):
        choose_golden(["a"], [])


def test_ids_of_other_data_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    choose_golden(["a", "b"], [3, 3], path=path)
    with pytest.raises(DataError, match="such as 'b'"):
        choose_golden(["a", "c"], [3, 3], path=path)
    path.write_text('{"ids": 3}')
    with pytest.raises(DataError, match="remove the file"):
        choose_golden(["a", "c"], [3, 3], path=path)


def test_dump_answers_the_first_question(tiny_vlm: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny_vlm
    records = make_records(tmp_path, 5, text_only=[1])
    later = (Turn("user", "<image> and this?"), Turn("assistant", "a cat"))
    second = ImageRef(str(tmp_path / "0.png"))
    records[4] = Record("multi", records[4].turns + later, (*records[4].images, second), "f[4]")
    path = tmp_path / "golden" / "step-000020.jsonl"
    items = dump_golden(model, processor, records, path, step=20, max_new_tokens=5, batch_size=2)
    assert read_golden(path) == items
    assert [item.id for item in items] == ["r0", "r1", "r2", "r3", "multi"]
    assert items[4].reference == records[4].turns[1].text
    assert items[4].images == ("4.png",)
    content = records[0].turns[0].text.replace("<image>", "<image_patch>")
    request = Request([{"role": "user", "content": content}], [picture(0)])
    assert items[0].prediction == generate_answers(model, processor, [request], max_new_tokens=5)[0]
    thumbnails = json.loads((path.parent / "thumbnails.json").read_text())
    assert [len(thumbnails[item.id]) for item in items] == [1, 0, 1, 1, 1]
    again = dump_golden(model, processor, records, tmp_path / "again.jsonl", step=20, max_new_tokens=5, batch_size=5)
    assert again == items


def test_an_unreadable_picture_does_not_stop_the_dump(tiny_vlm: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny_vlm
    records = make_records(tmp_path, 3)
    (tmp_path / "1.png").write_bytes(b"no picture")
    items = dump_golden(model, processor, records, tmp_path / "step-000001.jsonl", step=1, max_new_tokens=2)
    assert [item.error for item in items] == ["", "unreadable_image", ""]
    assert items[1].prediction == ""
    assert not items[1].exact


def item(name: str, prediction: str, step: int, reference: str = "a cat") -> GoldenItem:
    return GoldenItem(name, step, "<image>\nwhat?", reference, prediction, prediction == reference, ("x.png",))


def write(path: Path, *items: GoldenItem) -> Path:
    path.write_text("".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in items), encoding="utf-8")
    return path


def test_diff(tmp_path: Path) -> None:
    a = write(tmp_path / "a", item("1", "a dog", 10), item("2", "a cat", 10), item("3", "cow", 10), item("4", "x", 10))
    b = write(tmp_path / "b", item("5", "y", 20), item("3", "cow", 20), item("2", "a car", 20), item("1", "a cat", 20))
    diff = diff_golden(a, b)
    assert [(old.id, old.prediction, new.prediction) for old, new in diff.changed] == [
        ("2", "a cat", "a car"),
        ("1", "a dog", "a cat"),
    ]
    assert (diff.unchanged, diff.only_in_a, diff.only_in_b) == (1, ("4",), ("5",))
    assert (diff.exact_a, diff.exact_b) == (1, 1)
    text = diff.to_text()
    assert text.startswith("2 of 3 answers changed; exact matches 1 → 1.")
    assert "1  (now right)" in text
    assert "2  (no longer right)" in text
    json.dumps(diff.to_dict())


def test_a_diff_can_not_steer_the_terminal(tmp_path: Path) -> None:
    a = write(tmp_path / "a", item("1\x1b", "ok", 10), item("\x07", "x", 10))
    b = write(tmp_path / "b", item("1\x1b", "\x1b]0;owned\x07\n \u202e é 猫", 20))
    text = diff_golden(a, b).to_text()
    assert all(char.isprintable() or char == "\n" for char in text)
    assert r"\x1b]0;owned\x07\n \u202e é 猫" in text


def test_line_separators_within_an_answer_survive(tmp_path: Path) -> None:
    odd = item("1", "one\u2028two\u0085three", 10)
    assert read_golden(write(tmp_path / "a", odd)) == [odd]


@pytest.mark.parametrize("content", ["{", "[1]", '{"id": "a"}', "nonsense"])
def test_what_is_no_dump_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "dump.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"dump\.jsonl:1 is not a line"):
        read_golden(path)
    with pytest.raises(DataError, match="can't be read"):
        diff_golden(tmp_path / "missing", path)


def test_thumbnails_are_small_and_small_pictures_exact() -> None:
    def decode(uri: str) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))

    small = decode(thumbnail_uri(picture(0, 64)))
    assert small.format == "PNG"
    assert small.tobytes() == picture(0, 64).tobytes()
    large = decode(thumbnail_uri(Image.new("RGB", (4000, 1000), "red")))
    assert (large.format, large.size) == ("PNG", (160, 40))
    assert decode(thumbnail_uri(picture(0, 400))).format == "JPEG"

"""Records from every format, and every way in which a record or a file can be wrong."""

import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3_vlm.data import json_files
from qwen3_vlm.data.captions import CAPTION_PROMPT, Records, Turn, open_records
from qwen3_vlm.data.records import MAX_IMAGES, MAX_TURNS, parse_record
from qwen3_vlm.errors import DataError, ImageError, RecordError
from tests.data.helpers import caption_records, conversation, png, write_json, write_tar

PAIR = conversation("What?\n<image>", "A cat.")


def parsed(tree: Any) -> tuple[Turn, ...]:
    return parse_record(tree, "here", image_root="/pictures").turns


def reason(tree: Any) -> str:
    with pytest.raises(RecordError) as caught:
        parse_record(tree, "file.json[3]", image_root="/pictures")
    assert "\n" not in str(caught.value)
    assert "file.json[3]" in str(caught.value)
    return caught.value.reason


def test_llava_record() -> None:
    tree = {"id": 7, "image": "00/1.jpg", "conversations": PAIR}
    record = parse_record(tree, "here", image_root="/pictures")
    assert record.id == "7"
    assert record.turns == (Turn("user", "What?\n<image>"), Turn("assistant", "A cat."))
    assert [ref.path for ref in record.images] == ["/pictures/00/1.jpg"]
    assert record.origin == "here"


def test_other_role_names_and_message_keys() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert parsed({"messages": messages}) == (Turn("user", "Hi"), Turn("assistant", "Ho"))


def test_captions_get_the_default_question() -> None:
    for key in ("caption", "text"):
        turns = parsed({"image": "a.png", key: " A cat. "})
        assert turns == (Turn("user", f"<image>\n{CAPTION_PROMPT}"), Turn("assistant", "A cat."))


def test_missing_marks_are_put_first() -> None:
    turns = parsed({"image": ["a.png", "b.png"], "conversations": conversation("Which?", "Both.", "Sure?", "Yes.")})
    assert turns[0].text == "<image>\n<image>\nWhich?"
    assert turns[2].text == "Sure?"


def test_marks_may_stand_in_later_turns() -> None:
    tree = {"image": ["a.png", "b.png"], "conversations": conversation("One <image>?", "Yes.", "And <image>?", "No.")}
    assert [turn.text for turn in parsed(tree)] == ["One <image>?", "Yes.", "And <image>?", "No."]


def test_text_only_record() -> None:
    assert parse_record({"conversations": conversation("Hi", "Ho")}, "here").images == ()


def test_leading_answers_and_a_trailing_question_are_left_out() -> None:
    turns = [{"from": "gpt", "value": "Hello!"}, *conversation("Hi", "Ho", "Bye?")]
    assert parsed({"conversations": turns}) == (Turn("user", "Hi"), Turn("assistant", "Ho"))


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ([1], "bad_record"),
        ({"image": "a.png"}, "bad_conversation"),
        ({"image": 3, "conversations": PAIR}, "bad_image_path"),
        ({"image": ["a.png", None], "conversations": PAIR}, "bad_image_path"),
        ({"image": "", "conversations": PAIR}, "bad_image_path"),
        ({"image": "a\0.png", "conversations": PAIR}, "bad_image_path"),
        ({"image": "../secret.png", "conversations": PAIR}, "bad_image_path"),
        ({"image": "a/../../secret.png", "conversations": PAIR}, "bad_image_path"),
        ({"image": "/etc/passwd", "conversations": PAIR}, "bad_image_path"),
        ({"image": "/pictures2/a.png", "conversations": PAIR}, "bad_image_path"),
        ({"image": ".", "conversations": PAIR}, "bad_image_path"),
        ({"image": ["a.png", "b.png"], "conversations": PAIR}, "placeholder_count"),
        ({"image": "a.png", "conversations": conversation("<image> <image>", "A cat.")}, "placeholder_count"),
        ({"conversations": PAIR}, "placeholder_count"),
        ({"image": "a.png", "conversations": conversation("What?", "<image>")}, "placeholder_count"),
        ({"image": "a.png", "conversations": conversation("<image_patch>", "A cat.")}, "reserved_text"),
        ({"conversations": conversation("Hi", "Ho<|im_end|>\n<|im_start|>user")}, "reserved_text"),
        ({"conversations": conversation("Hi", "\ud800")}, "bad_record"),
        ({"conversations": "hello"}, "bad_conversation"),
        ({"conversations": ["hello"]}, "bad_conversation"),
        ({"conversations": [{"from": "robot", "value": "hello"}]}, "bad_conversation"),
        ({"conversations": [{"from": ["x"], "value": "hello"}]}, "bad_conversation"),
        ({"conversations": [{"from": "human", "value": 3}]}, "bad_conversation"),
        ({"conversations": [*conversation("Hi", "Ho"), *conversation("Hi", "Ho")[1:]]}, "bad_conversation"),
        ({"conversations": []}, "no_labels"),
        ({"conversations": conversation("Hi")}, "no_labels"),
        ({"conversations": conversation("Hi", " \n")}, "no_labels"),
        ({"conversations": conversation("Hi", "Ho", "Hi", "")}, "no_labels"),
        ({"image": "a.png", "caption": " "}, "no_labels"),
        ({"caption": "A cat."}, "missing_image"),
        ({"conversations": conversation(*["x"] * (MAX_TURNS + 2))}, "too_large"),
        ({"conversations": conversation("x" * 1_000_001, "y")}, "too_large"),
        ({"image": ["a.png"] * (MAX_IMAGES + 1), "conversations": conversation("Hi", "Ho")}, "too_large"),
    ],
)
def test_bad_records_have_the_right_reason(tree: Any, expected: str) -> None:
    assert reason(tree) == expected


def test_ids_of_records_without_one_depend_on_content_alone(tmp_path: Path) -> None:
    one = parse_record({"image": "a.png", "conversations": PAIR}, "x[0]", image_root=str(tmp_path))
    elsewhere = parse_record({"image": "a.png", "conversations": PAIR}, "y[9]", image_root="/elsewhere")
    other = parse_record({"image": "b.png", "conversations": PAIR}, "x[0]", image_root=str(tmp_path))
    assert one.id == elsewhere.id != other.id


def test_symbolic_links_inside_the_root_are_followed(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a.png").write_bytes(png())
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "coco").symlink_to(tmp_path / "store")
    record = parse_record({"image": "coco/a.png", "conversations": PAIR}, "x", image_root=str(tmp_path / "root"))
    assert record.images[0].read_bytes() == png()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["id", "image", "images", "conversations", "messages", "caption", "text"])
TURNS = st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]) | JSON, "value": st.text() | JSON}))


@settings(deadline=None)
@given(st.dictionaries(KEYS, JSON | TURNS, max_size=5) | JSON)
@example({"conversations": [{"from": "human", "value": "?"}, {"from": "human", "value": "??"}]})
@example({"conversations": [{"from": role, "value": "x"} for role in ("human", "gpt", "human", "human")]})
def test_any_json_is_a_record_or_a_record_error(tree: Any) -> None:
    try:
        record = parse_record(tree, "here")
    except RecordError:
        return
    marks = sum(turn.text.count("<image>") for turn in record.turns)
    assert marks == len(record.images)
    assert [turn.role for turn in record.turns] == ["user", "assistant"] * (len(record.turns) // 2)


# Files


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every token of a small file is cut somewhere."""
    monkeypatch.setattr(json_files, "CHUNK_BYTES", 7)


TREES = [
    {"id": 'ä😀\\"[{', "conversations": conversation('Hé \n{"x": [1]}', "漢字, ]}")},
    {"id": "b", "image": "b.png", "caption": "A cat."},
    {"id": "c", "conversations": conversation("Hi", "Ho")},
]


def check_trees(records: Records) -> None:
    assert [record.id for record in records] == ['ä😀\\"[{', "b", "c"]
    assert records[0].turns[1].text == "漢字, ]}"
    assert records[-1].id == "c"
    assert [record.id for record in records[1:]] == ["b", "c"]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_arrays(tmp_path: Path, ascii: bool, indent: int | None, mark: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(mark + json.dumps(TREES, ensure_ascii=ascii, indent=indent) + " \n", encoding="utf-8")
    check_trees(open_records([str(path)]))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n  \n"])
@pytest.mark.parametrize("ending", ["", "\n"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_lines(tmp_path: Path, newline: str, ending: str, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes((newline.join(json.dumps(tree) for tree in TREES) + ending).encode())
    check_trees(open_records([str(path)]))


def test_image_root_defaults_to_the_folder_of_the_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", caption_records(1))
    (tmp_path / "k0.png").write_bytes(png())
    assert open_records([str(tmp_path / "a.json")])[0].images[0].read_bytes() == png()
    elsewhere = tmp_path / "pictures"
    elsewhere.mkdir()
    ref = open_records([str(tmp_path / "a.json")], str(elsewhere))[0].images[0]
    with pytest.raises(ImageError, match=r"k0\.png does not exist\.") as caught:
        ref.read_bytes()
    assert caught.value.reason == "missing_image"


def test_a_bad_line_costs_one_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(TREES[2]) + "\n{broken\n" + json.dumps(TREES[1]) + "\n")
    records = open_records([str(path)])
    assert [records[0].id, records[2].id] == ["c", "b"]
    with pytest.raises(RecordError, match=r"a\.jsonl:2 is not valid JSON") as caught:
        records[1]
    assert caught.value.reason == "bad_json"
    assert records.origin(1) == f"{path}:2"


@pytest.mark.parametrize(
    "text",
    [
        "[",
        '[{"a": 1}',
        '[{"a": 1},]',
        '[{"a": 1} {"a": 2}]',
        '[{"a": }]',
        "[]]",
        "[1, nope]",
        '["\ud800"]',
        "[" * 100_000,
    ],
)
def test_damaged_arrays_are_refused_with_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError) as caught:
        open_records([str(path)])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"[]", b"", b"  \n "])
def test_files_without_records_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match="no records"):
        open_records([str(tmp_path / "a.json")])


def test_names_folders_globs_and_ranges(tmp_path: Path) -> None:
    for number in (0, 1, 2):
        write_json(tmp_path / f"part-0{number}.json", [{"id": str(number), "conversations": conversation("Hi", "Ho")}])
    (tmp_path / "note.txt").write_text("not a record file")
    for name in (str(tmp_path), f"{tmp_path}/*.json", f"{tmp_path}/part-{{00..02}}.json"):
        assert [record.id for record in open_records([name])] == ["0", "1", "2"]
    assert len(open_records([str(tmp_path), f"{tmp_path}/part-00.json"])) == 3


@pytest.mark.parametrize("given", ["missing.json", "*.jsonl", "part-{3..1}.json", "note.txt", "empty"])
def test_names_that_lead_nowhere(tmp_path: Path, given: str) -> None:
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        open_records([f"{tmp_path}/{given}"])
    with pytest.raises(DataError, match="No record files"):
        open_records([])


def test_missing_image_root(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", TREES)
    with pytest.raises(DataError, match="image root"):
        open_records([str(path)], str(tmp_path / "missing"))


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    first = open_records([str(write_json(tmp_path / "a.json", TREES))])
    moved = open_records([str(write_json(tmp_path / "b" / "a.json", TREES))])
    other = open_records([str(write_json(tmp_path / "b" / "c.json", TREES[:2]))])
    assert first.fingerprint == moved.fingerprint != other.fingerprint


def test_records_travel_to_workers_as_little_data(tmp_path: Path) -> None:
    records = open_records([str(write_json(tmp_path / "a.json", caption_records(1000)))])
    data = pickle.dumps(records)
    assert len(data) < 20_000
    assert pickle.loads(data)[999].id == "k999"


def test_indexing_keeps_no_record_in_memory(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", caption_records(4_000))
    tracemalloc.start()
    records = open_records([str(path)])
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(records) == 4_000
    assert kept < 200_000  # 1.6 MB as objects


def test_a_deeply_nested_line_is_one_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000 + "]" * 100_000 + "\n")
    path.write_text('{"x": ' * 100_000 + "\n" + json.dumps(TREES[2]))
    records = open_records([str(path)])
    assert records[1].id == "c"
    with pytest.raises(RecordError):
        records[0]


# WebDataset


def members() -> list[tuple[str, bytes]]:
    return [
        ("a/001.jpg", b"one"),
        ("a/001.txt", "Eine Kätze.".encode()),
        ("a/002.json", json.dumps({"id": "two", "conversations": PAIR}).encode()),
        ("a/002.PNG", b"two!"),
        ("a/003.1.jpg", b"second"),
        ("a/003.0.jpg", b"first"),
        ("a/003.json", json.dumps({"caption": "Two."}).encode()),
        ("a/004.json", json.dumps({"conversations": conversation("Hi", "Ho")}).encode()),
        ("a/readme.md", b"ignored"),
        ("a/._001.jpg", b"ignored"),
    ]


@pytest.mark.parametrize("cached", [False, True])
def test_tars_are_read_in_place(tmp_path: Path, cached: bool) -> None:
    path = write_tar(tmp_path / "s.tar", members())
    cache = tmp_path / "cache" if cached else None
    for _ in range(2):
        records = open_records([str(path)], cache_dir=cache)
        assert [record.id for record in records] == ["a/001", "two", "a/003", "a/004"]
        assert records[0].turns[1] == Turn("assistant", "Eine Kätze.")
        assert records[0].images[0].name == f"{path}/a/001.jpg"
        assert records.origin(0) == records[0].origin == f"{path}/a/001"
        assert [[ref.read_bytes() for ref in record.images] for record in records] == [
            [b"one"], [b"two!"], [b"first", b"second"], [],
        ]  # fmt: skip
        assert records[2].turns[0].text == f"<image>\n<image>\n{CAPTION_PROMPT}"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == (["cache", "s.tar"] if cached else ["s.tar"])


def test_a_changed_tar_is_indexed_anew_and_a_damaged_index_ignored(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", members())
    cache = tmp_path / "cache"
    first = open_records([str(path)], cache_dir=cache)
    (kept,) = cache.iterdir()
    kept.write_bytes(b"rubbish")
    assert len(open_records([str(path)], cache_dir=cache)) == len(first)
    write_tar(path, [*members()[:2], ("b.txt", b"x" * 50_000)])
    changed = open_records([str(path)], cache_dir=cache)
    assert len(changed) == 2
    assert changed.fingerprint != first.fingerprint


def test_samples_of_one_name_stay_two(tmp_path: Path) -> None:
    twice = [("1.png", b"x"), ("1.txt", b"first"), ("1.png", b"yy"), ("1.txt", b"second")]
    records = open_records([str(write_tar(tmp_path / "s.tar", twice))])
    assert [(record.turns[1].text, record.images[0].read_bytes()) for record in records] == [
        ("first", b"x"),
        ("second", b"yy"),
    ]


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ([("1.png", b"x")], "bad_record"),
        ([("1.txt", b"A cat.")], "missing_image"),
        ([("1.png", b"x"), ("1.txt", b"\xff\xfe\xfa")], "bad_record"),
        ([("1.png", b"x"), ("1.json", b"{")], "bad_json"),
        ([("1.png", b"x"), ("1.txt", b" ")], "no_labels"),
        ([("1.png", b"x"), ("1.txt", b"y" * 4_000_001)], "too_large"),
    ],
)
def test_bad_samples_in_tars(tmp_path: Path, sample: list[tuple[str, bytes]], expected: str) -> None:
    records = open_records([str(write_tar(tmp_path / "s.tar", sample))])
    with pytest.raises(RecordError) as caught:
        records[0]
    assert caught.value.reason == expected


def test_damaged_and_compressed_tars_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [(f"{number}.txt", b"x" * 2000) for number in range(20)])
    data = path.read_bytes()
    for name, damaged in {
        "cut": data[:20_000],
        "header": data[:7680] + b"\x55" * 512 + data[8192:],
        "text": b"hello" * 1000,
        "gzip": b"\x1f\x8b\x08" + data,
    }.items():
        bad = tmp_path / f"{name}.tar"
        bad.write_bytes(damaged)
        with pytest.raises(DataError, match=name):
            open_records([str(bad)])


def test_a_tar_that_shrinks_later_costs_its_records(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("1.png", b"x" * 3000), ("1.txt", b"A cat.")])
    ref = open_records([str(path)])[0].images[0]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ImageError, match="cut off") as caught:
        ref.read_bytes()
    assert caught.value.reason == "unreadable_image"

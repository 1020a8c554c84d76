"""The raw manifest: every line becomes a record or a counted reason, whatever stands in it."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_vlm.data import manifest_index
from qwen3_vlm.data.manifest import (
    MAX_LINE_BYTES,
    MAX_META_BYTES,
    MAX_TEXT_CHARACTERS,
    BadLine,
    ManifestRecord,
    parse_line,
    read_line,
    read_manifest,
    resolve_media,
)
from qwen3_vlm.data.manifest_audit import audit_manifest
from qwen3_vlm.data.manifest_index import index_manifest
from qwen3_vlm.errors import DataError, ImageError
from tests.data.speaking_pictures import line, png, wav, write_manifest


def nested(depth: int) -> list[Any]:
    """So many lists in one another."""
    return [nested(depth - 1)] if depth > 1 else []


GOOD: dict[str, Any] = {"id": "a", "text": "hello"}
BAD: list[tuple[Any, str]] = [
    ("{", "bad_json"),
    (b"\xff\xfe{}", "bad_json"),
    ('{"id": "a", "id": "b", "text": "t"}', "bad_json"),
    ('{"id": "a", "text": "t", "meta": {"x": NaN}}', "bad_json"),
    ('{"id": "a", "text": "t", "meta": {"x": 1e999}}', "bad_json"),
    ("[" * 100_000, "bad_json"),
    ({"id": "a", "text": "t", "meta": {"x": nested(64)}}, "bad_json"),
    ("[]", "bad_record"),
    ("3", "bad_record"),
    ({"text": "t"}, "bad_id"),
    ({"id": "", "text": "t"}, "bad_id"),
    ({"id": 7, "text": "t"}, "bad_id"),
    ({"id": "x" * 501, "text": "t"}, "bad_id"),
    ({"id": "\ud800", "text": "t"}, "bad_text"),
    ({"id": "a", "text": "\udfff"}, "bad_text"),
    ({"id": "a", "text": "t", "meta": {"x": "\ud800"}}, "bad_text"),
    ({"id": "a", "text": 5}, "bad_record"),
    ({"id": "a", "text": "t" * (MAX_TEXT_CHARACTERS + 1)}, "text_too_long"),
    ({"id": "a", "text": "t", "meta": []}, "bad_record"),
    ({"id": "a", "text": "t", "meta": {"x": "y" * MAX_META_BYTES}}, "meta_too_large"),
    ({"id": "a", "text": "t", "txt": "typo"}, "unknown_field"),
    ({"id": "a", "text": "t", "source": 1}, "bad_record"),
    ({"id": "a", "text": "t", "task": ["i2t"]}, "bad_record"),
    ({"id": "a"}, "empty_record"),
    ({"id": "a", "text": None, "modalities": {}}, "empty_record"),
    ({"id": "a", "modalities": {"video": "a.mp4"}}, "bad_modality"),
    ({"id": "a", "modalities": ["image"]}, "bad_record"),
    ({"id": "a", "modalities": {"image": 3}}, "bad_path"),
    ({"id": "a", "modalities": {"image": " "}}, "bad_path"),
    ({"id": "a", "modalities": {"image": "a\0b"}}, "bad_path"),
    ({"id": "a", "modalities": {"image": "p" * 5000}}, "bad_path"),
    ({"id": "a", "modalities": {"image": "../a.png"}}, "path_escapes"),
    ({"id": "a", "modalities": {"image": "a/../../b.png"}}, "path_escapes"),
    ({"id": "a", "modalities": {"image": "/etc/passwd"}}, "path_escapes"),
    ({"id": "a", "modalities": {"image": "\\\\server\\share"}}, "path_escapes"),
    ({"id": "a", "modalities": {"audio": "C:\\a.wav"}}, "path_escapes"),
    ({"id": "a", "modalities": {"audio": "..\\a.wav"}}, "path_escapes"),
]


def as_bytes(content: Any) -> bytes:
    if isinstance(content, bytes):
        return content
    return (content if isinstance(content, str) else json.dumps(content)).encode()


@pytest.mark.parametrize(("content", "reason"), BAD, ids=lambda value: str(value)[:40])
def test_what_is_wrong_has_a_reason_and_a_line(content: Any, reason: str) -> None:
    entry = parse_line(as_bytes(content), 12, "m.jsonl")
    assert isinstance(entry, BadLine)
    assert (entry.reason, entry.line) == (reason, 12)
    assert entry.message.startswith("m.jsonl:12")
    entry.message.encode()  # printable, whatever the line held
    assert entry.id in ("", "a")


def test_a_full_record() -> None:
    tree = line("a/1", image="x/ä b.png", audio="x/1.wav", text="🐈 and\u0000tab\t", task="i2t", meta={"n": [1, None]})
    entry = parse_line(json.dumps(tree).encode(), 3, "m")
    assert entry == ManifestRecord(
        "a/1", "test", "x/ä b.png", "x/1.wav", "🐈 and\u0000tab\t", "i2t", {"n": [1, None]}, 3
    )
    assert json.loads(entry.to_json()) == tree
    assert entry.position == 2


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    name=TEXTS.filter(bool),
    text=TEXTS,
    source=TEXTS,
    task=st.none() | TEXTS,
    meta=st.dictionaries(TEXTS, st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS, max_size=3),
)
def test_written_records_are_read_back(
    name: str, text: str, source: str, task: str | None, meta: dict[str, Any]
) -> None:
    record = ManifestRecord(name, source, None, "a.wav", text, task, meta, 5)
    assert parse_line(record.to_json().encode(), 5, "m") == record


@given(data=st.binary(max_size=200) | st.from_regex(r'\{"id": ?"a".{0,60}\}').map(str.encode))
def test_no_bytes_can_do_worse_than_a_reason(data: bytes) -> None:
    entry = parse_line(data, 1, "m")
    assert isinstance(entry, ManifestRecord) or entry.reason


@given(pieces=st.lists(st.binary(max_size=30), max_size=12), end=st.sampled_from([b"", b"\n", b"\r\n"]))
def test_every_line_that_is_not_blank_is_counted_once(
    pieces: list[bytes], end: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    data = b"\n".join(pieces) + end
    path.write_bytes(data)
    digest = hashlib.sha256()
    found = list(read_manifest(path, digest))
    assert digest.digest() == hashlib.sha256(data).digest()
    wanted = [
        number for number, text in enumerate(data.split(b"\n"), start=1) if text.strip() not in (b"", b"\xef\xbb\xbf")
    ]
    assert [item.entry.line for item in found] == wanted
    with path.open("rb") as file:
        for item in found:
            assert read_line(file, item.offset, item.entry.line, path.name) == item.entry


def test_a_line_of_any_length_costs_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    long = b'{"id": "long", "text": "' + b"x" * (3 * MAX_LINE_BYTES) + b'"}\n'
    path.write_bytes(b"\xef\xbb\xbf" + as_bytes(GOOD) + b"\r\n\n" + long + as_bytes({"id": "b", "text": "t"}))
    first, second, third = (item.entry for item in read_manifest(path))
    assert (first.id, first.line) == ("a", 1)
    assert isinstance(second, BadLine)
    assert (second.reason, second.line) == ("line_too_long", 3)
    assert (third.id, third.line) == ("b", 4)


@pytest.mark.parametrize("collide", [False, True])
def test_duplicate_ids_are_found_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collide: bool) -> None:
    """Also where all 64-bit hashes are the same."""
    if collide:
        monkeypatch.setattr(manifest_index, "_hash", lambda name: 7)
    names = ["a", "b", "a", "c", "b", "a"]
    lines = [json.dumps({"id": name, "text": str(number)}) for number, name in enumerate(names)]
    lines.insert(1, '{"id": "c"}')  # no record: it claims no id
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    index = index_manifest(tmp_path / "m.jsonl")
    assert sorted(index.duplicates()) == [(3, 1, "a"), (5, 3, "b"), (6, 1, "a")]
    assert len(index) == 7
    assert index.sha256 == hashlib.sha256((tmp_path / "m.jsonl").read_bytes()).hexdigest()


def test_a_manifest_that_changes_is_told(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "m.jsonl", [line("a", text="t")])
    index = index_manifest(path)
    index.require_unchanged()
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DataError, match="was changed while it was being read"):
        index.require_unchanged()
    with pytest.raises(DataError, match="does not exist"):
        index_manifest(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is not a regular file"):
        index_manifest(tmp_path)


def test_a_name_that_no_disk_can_hold_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        resolve_media(tmp_path, "x" * 300 + ".png", "image", "m.jsonl:1")
    assert caught.value.reason == "missing_image"


def test_how_deep_a_line_may_nest_does_not_depend_on_the_caller() -> None:
    data = ('{"id": "a", "text": "t", "meta": {"x": ' + "[" * 700 + "]" * 700 + "}}").encode()

    def deeper(frames: int) -> ManifestRecord | BadLine:
        return deeper(frames - 1) if frames else parse_line(data, 1, "m.jsonl")

    assert deeper(0) == deeper(350)
    assert not isinstance(parse_line(as_bytes({**GOOD, "meta": {"x": nested(62)}}), 1, "m.jsonl"), BadLine)


def test_links_may_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "data" / "real.png").write_bytes(png(1))
    (tmp_path / "data" / "inside.png").symlink_to("real.png")
    (tmp_path / "data" / "out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    root = tmp_path / "data"
    assert resolve_media(root, "inside.png", "image", "m:1").read_bytes() == png(1)
    for name in ("out.png", "up/secret.png", "up/nothing.png"):
        with pytest.raises(ImageError) as error:
            resolve_media(root, name, "image", "m:1")
        assert error.value.reason == "path_escapes"
    with pytest.raises(ImageError) as error:
        resolve_media(root, "none.png", "image", "m:1")
    assert error.value.reason == "missing_image"


def test_audit_counts_everything_once(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "cut.png").write_bytes(png(1)[:200])
    (tmp_path / "a.wav").write_bytes(wav(1))
    records = [
        line("a", image="a.png", text="t", task="i2t"),
        line("b", audio="a.wav", text="t", task="a2t"),
        line("a", audio="a.wav"),
        line("c", image="none.png"),
        line("d", image="cut.png"),
        line("d", image="none.png"),  # missing and a duplicate: one problem
        line("e", image="../x.png"),
    ]
    path = write_manifest(tmp_path / "m.jsonl", records)
    path.write_text(path.read_text() + "\nnonsense\n")
    report = audit_manifest(path, problems=tmp_path / "problems.jsonl")
    expected = {"duplicate_id": 1, "missing_image": 2, "path_escapes": 1, "bad_json": 1}
    assert report.reasons == expected
    assert (report.records, report.bad_records, report.exit_status) == (8, 5, 1)
    assert report.modalities == {"text + image": 1, "text + audio": 1, "audio": 1, "image": 3}
    assert report.tasks == {"i2t": 1, "a2t": 1, "": 4}
    problems = [json.loads(text) for text in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert Counter(problem["reason"] for problem in problems) == expected
    assert {problem["line"] for problem in problems} == {3, 4, 6, 7, 9}
    assert "duplicate_id" in report.table()
    assert audit_manifest(path, media="decode").reasons == {**expected, "unreadable_image": 1}
    assert audit_manifest(path, media="none").reasons == {"duplicate_id": 2, "path_escapes": 1, "bad_json": 1}
    fine = audit_manifest(write_manifest(tmp_path / "fine.jsonl", records[:2]), media="decode")
    assert (fine.exit_status, fine.bad_records) == (0, 0)
    (tmp_path / "empty.jsonl").write_text("\n")
    assert audit_manifest(tmp_path / "empty.jsonl").exit_status == 1

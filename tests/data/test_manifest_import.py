"""What people have becomes a manifest: ids that do not depend on order, nothing lost without a reason."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qwen3_vlm.data.manifest import ManifestRecord, read_manifest
from qwen3_vlm.data.manifest_audit import audit_manifest
from qwen3_vlm.data.manifest_import import import_audio_csv, import_llava, import_pairs
from qwen3_vlm.data.manifest_import_hf import Columns, import_hf_dataset
from qwen3_vlm.errors import DataError
from tests.data.speaking_pictures import png, wav


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def records_of(manifest: Path) -> dict[str, ManifestRecord]:
    found = [item.entry for item in read_manifest(manifest)]
    assert all(isinstance(entry, ManifestRecord) for entry in found)
    assert audit_manifest(manifest, media="decode").exit_status == 0
    return {entry.id: entry for entry in found if isinstance(entry, ManifestRecord)}


# Pairs -----------------------------------------------------------------------------------------------------


def test_pairs(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png(1))
    put(tmp_path / "a.txt", "\ufeffa cat\n")
    put(tmp_path / "deep/er/b.PNG", png(2))
    put(tmp_path / "deep/er/b.caption", "ein Hund äöü")
    put(tmp_path / "c.png", png(3))
    put(tmp_path / "c.json", json.dumps({"caption": "a cow", "licence": "CC0", "width": 20}))
    put(tmp_path / "lonely.png", png(4))
    put(tmp_path / "lonely_text.txt", "no picture")
    put(tmp_path / "e.png", png(5))
    put(tmp_path / "e.txt", "  \n")
    put(tmp_path / "f.png", png(6))
    put(tmp_path / "f.txt", b"\xff\xfe\xff")
    put(tmp_path / "g.png", png(7))
    put(tmp_path / "g.json", "[]")
    put(tmp_path / "notes.json", "{}")
    put(tmp_path / ".hidden.png", png(8))
    report = import_pairs(tmp_path, source="zoo", task="i2t")
    assert report.manifest == tmp_path / "manifest.jsonl"
    assert report.skipped == {"no_caption": 2, "no_picture": 1, "empty_caption": 1, "unreadable_caption": 1}
    found = records_of(report.manifest)
    assert {name: (record.text, record.image) for name, record in found.items()} == {
        "a.png": ("a cat", "a.png"),
        "c.png": ("a cow", "c.png"),
        "deep/er/b.PNG": ("ein Hund äöü", "deep/er/b.PNG"),
    }
    assert found["c.png"].meta == {"licence": "CC0", "width": 20}
    assert (found["a.png"].source, found["a.png"].task) == ("zoo", "i2t")
    table = report.table()
    assert "3 records" in table
    assert "1 left out: no_picture; first: " in table
    before = report.manifest.read_bytes()
    assert import_pairs(tmp_path, source="zoo", task="i2t").manifest.read_bytes() == before


def test_a_manifest_above_the_folder_and_links_that_lead_out(tmp_path: Path) -> None:
    put(tmp_path / "all/zoo/a.png", png(1))
    put(tmp_path / "all/zoo/a.txt", "a")
    put(tmp_path / "secret.png", png(2))
    (tmp_path / "all/zoo/b.png").symlink_to(tmp_path / "secret.png")
    put(tmp_path / "all/zoo/b.txt", "b")
    report = import_pairs(tmp_path / "all/zoo", tmp_path / "all")
    assert report.skipped == {"path_escapes": 1}
    (record,) = records_of(tmp_path / "all/manifest.jsonl").values()
    assert (record.id, record.image) == ("a.png", "zoo/a.png")
    with pytest.raises(DataError, match="may not leave it"):
        import_pairs(tmp_path / "all/zoo", tmp_path / "elsewhere" / "m.jsonl")


def test_nothing_to_import_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png(1))
    with pytest.raises(DataError, match=r"no record came out \(1 × no_caption\)"):
        import_pairs(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.png"}
    with pytest.raises(DataError, match="does not exist"):
        import_pairs(tmp_path / "none")


# Audio and a table -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "table", "columns"),
    [
        ("t.csv", 'path,sentence,age\na.wav,"hello, you",30\nb.wav,bye,\nnone.wav,x,\n,y,\n', {}),
        ("t.tsv", "client\tpath\tsentence\n1\ta.wav\thello, you\n2\tb.wav\tbye\n3\tnone\tx\n4\t\ty\n", {}),
        (
            "t.csv",
            "words;my file\nhello, you;a.wav\nbye;b\nx;none\ny;\n",
            {"path_column": "my file", "text_column": "words"},
        ),
        ("t.csv", "a|hello, you\nb|bye\nnone|x\n|y\n", {"path_column": "0", "text_column": "1"}),
    ],
)
def test_audio_tables(tmp_path: Path, name: str, table: str, columns: dict[str, str]) -> None:
    put(tmp_path / "clips" / "a.wav", wav(1))
    put(tmp_path / "clips" / "b.wav", wav(2))
    put(tmp_path / name, table)
    report = import_audio_csv(tmp_path, tmp_path / name, **columns)
    found = records_of(report.manifest)
    assert {key: record.text for key, record in found.items()} == {"clips/a.wav": "hello, you", "clips/b.wav": "bye"}
    assert report.skipped == {"missing_audio": 1, "bad_row": 1}


def test_audio_tables_that_cannot_be_used(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", wav(1))
    with pytest.raises(DataError, match="--path-column"):
        import_audio_csv(tmp_path, put(tmp_path / "t.csv", "x,y\n1,2\n"))
    with pytest.raises(DataError, match="has no column 'z'"):
        import_audio_csv(tmp_path, tmp_path / "t.csv", path_column="z")
    with pytest.raises(DataError, match="is empty"):
        import_audio_csv(tmp_path, put(tmp_path / "e.csv", ""))
    with pytest.raises(DataError, match="can't be read"):
        import_audio_csv(tmp_path, tmp_path / "none.csv")
    climbing = put(tmp_path / "c.csv", "path,text\n../../etc/hostname,x\n/etc/hostname,x\na.wav,ok\na.wav,again\n")
    report = import_audio_csv(tmp_path, climbing)
    assert report.skipped == {"missing_audio": 2, "duplicate_id": 1}
    assert records_of(report.manifest)["a.wav"].text == "ok"


# LLaVA -----------------------------------------------------------------------------------------------------


def conversation(name: str, image: str | None, *words: str) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(words)]
    return {"id": name, **({"image": image} if image else {}), "conversations": turns}


def test_llava_json(tmp_path: Path) -> None:
    put(tmp_path / "images/1.png", png(1))
    records = [
        conversation("1", "images/1.png", "<image>\nWhat?", "A cat.", "Where?", "There."),
        conversation("1", "images/1.png", "Who?\n<image>", "Me."),  # one id, two conversations: as in LLaVA-Instruct
        conversation("2", None, "Say hi", "hi"),
        conversation("3", "images/none.png", "<image> What?", "Nothing."),
        conversation("4", "images/1.png", "<image> What?", ""),
        {
            "id": "5",
            "image": ["images/1.png"] * 2,
            "conversations": conversation("", None, "Both?", "Yes")["conversations"],
        },
    ]
    path = put(tmp_path / "llava.json", json.dumps(records))
    report = import_llava(path)
    assert report.skipped == {"missing_image": 1, "no_labels": 1, "several_pictures": 1}
    found = records_of(report.manifest)
    texts = {(record.id.split("-")[0], record.text, record.meta["prompt"]) for record in found.values()}
    assert texts == {("1", "A cat.", "What?"), ("1", "Me.", "Who?"), ("2", "hi", "Say hi")}
    assert "of 1 conversations with several answers" in report.table()
    put(tmp_path / "llava.json", json.dumps(records[::-1]))  # ids do not depend on the order
    assert set(records_of(import_llava(path).manifest)) == set(found)
    whole = records_of(import_llava(path, turns="all").manifest)
    assert "user: What?\nassistant: A cat.\nuser: Where?\nassistant: There." in {r.text for r in whole.values()}


def test_pictures_inside_tars_are_written_out(tmp_path: Path) -> None:
    for name, data in (("000.png", png(1)), ("000.txt", b"a cat"), ("001.png", png(2)), ("001.txt", b"a dog")):
        put(tmp_path / name, data)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name in ("000.png", "000.txt", "001.png", "001.txt"):
            tar.add(tmp_path / name, name)
    report = import_llava(tmp_path / "shard.tar")
    found = records_of(report.manifest)
    pictures = {record.text: (tmp_path / str(record.image)).read_bytes() for record in found.values()}
    assert pictures == {"a cat": png(1), "a dog": png(2)}


# Hugging Face ----------------------------------------------------------------------------------------------


def hf_table(named: bool = True) -> "pyarrow.Table":
    from datasets import Audio, Features, Value
    from datasets import Image as ImageFeature

    features = Features(
        {
            "id": Value("string"),
            "picture": ImageFeature(),
            "voice": Audio(),
            "caption": Value("string"),
            "year": Value("int32"),
            "score": Value("float32"),
        }
    )
    rows = {
        "id": ["a", "b", "c", "d"],
        "picture": [
            {"bytes": png(1), "path": None},
            {"bytes": png(1), "path": "x.png"},
            None,
            None,
        ],
        "voice": [{"bytes": wav(1), "path": "v.wav"}, None, {"bytes": wav(2), "path": None}, None],
        "caption": ["one", "two", "three", None],
        "year": [2001, 2002, 2003, 2004],
        "score": [0.5, float("nan"), 1.5, 2.5],
    }
    table = pyarrow.table(rows, schema=features.arrow_schema)
    return table if named else table.drop_columns(["id"])


def check_hf(manifest: Path, prefix: str = "") -> None:
    found = records_of(manifest)
    assert set(found) == {f"{prefix}{name}" for name in "abc"}
    a, b, c = (found[f"{prefix}{name}"] for name in "abc")
    assert (a.text, b.text, c.text) == ("one", "two", "three")
    assert a.image == b.image  # the same bytes are one file
    assert (manifest.parent / str(a.image)).read_bytes() == png(1)
    assert (manifest.parent / str(c.audio)).read_bytes() == wav(2)
    assert (b.audio, c.image) == (None, None)
    assert a.meta == {"year": 2001, "score": 0.5, **({"hf_split": prefix[:-1]} if prefix else {})}
    assert "score" not in b.meta


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    """Written by the real package."""
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    dataset = Dataset(hf_table())
    dataset.save_to_disk(tmp_path / "one", num_shards=2)
    report = import_hf_dataset(tmp_path / "one", tmp_path / "out")
    assert report.skipped == {"empty_record": 1}
    check_hf(report.manifest)
    DatasetDict({"train": dataset}).save_to_disk(tmp_path / "dict")
    check_hf(import_hf_dataset(tmp_path / "dict", tmp_path / "out2").manifest, "train/")
    dataset.to_parquet(tmp_path / "parquet" / "p.parquet")
    check_hf(import_hf_dataset(tmp_path / "parquet", tmp_path / "out3" / "m.jsonl").manifest)
    assert len(list((tmp_path / "out" / "media").rglob("*.*"))) == 3


def test_rows_without_ids_are_named_by_their_content(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(hf_table(named=False), tmp_path / "p.parquet")
    forward = set(records_of(import_hf_dataset(tmp_path / "p.parquet", tmp_path / "a").manifest))
    pyarrow.parquet.write_table(hf_table(named=False).take([3, 2, 1, 0]), tmp_path / "p.parquet")
    assert set(records_of(import_hf_dataset(tmp_path / "p.parquet", tmp_path / "b").manifest)) == forward
    assert all(name.startswith("sha256-") for name in forward)


def test_files_that_are_only_named_are_counted(tmp_path: Path) -> None:
    rows = {
        "image": [{"bytes": png(1), "path": "a.png"}, {"bytes": None, "path": "/somewhere/else.png"}],
        "text": ["a", "b"],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "p.parquet")
    report = import_hf_dataset(tmp_path / "p.parquet", tmp_path / "out")
    assert report.skipped == {"no_image": 1}
    assert [record.text for record in records_of(report.manifest).values()] == ["a"]


def test_plain_parquet_and_class_labels(tmp_path: Path) -> None:
    plain = pyarrow.table({"img": [png(1)], "audio_bytes": [wav(1)], "text": ["t"], "key": [7]})
    pyarrow.parquet.write_table(plain, tmp_path / "p.parquet")
    (record,) = records_of(import_hf_dataset(tmp_path / "p.parquet", tmp_path / "a").manifest).values()
    assert record.image is not None
    assert record.audio is not None
    assert (record.id, record.text) == ("7", "t")
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    labels = pyarrow.table({"image": [{"bytes": png(1), "path": None}], "label": [1]}).replace_schema_metadata(about)
    pyarrow.parquet.write_table(labels, tmp_path / "l.parquet")
    (record,) = records_of(import_hf_dataset(tmp_path / "l.parquet", tmp_path / "b").manifest).values()
    assert record.text == "dog"
    columns = Columns(image="img", text="nope")
    with pytest.raises(DataError, match="has no column 'nope'"):
        import_hf_dataset(tmp_path / "p.parquet", tmp_path / "c", columns=columns)


def test_what_is_no_data_set_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds neither"):
        import_hf_dataset(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="can't be read as an Arrow"):
        import_hf_dataset(put(tmp_path / "x.parquet", b"nothing"), tmp_path / "out")
    with pytest.raises(DataError, match="can't be read as an Arrow"):
        import_hf_dataset(put(tmp_path / "x.arrow", b"nothing"), tmp_path / "out")
    with pytest.raises(DataError, match="does not exist"):
        import_hf_dataset(tmp_path / "none", tmp_path / "out")
    put(tmp_path / "evil" / "state.json", json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    with pytest.raises(DataError, match="leads out"):
        import_hf_dataset(tmp_path / "evil", tmp_path / "out")

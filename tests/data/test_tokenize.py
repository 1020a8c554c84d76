"""From a manifest to a tokenized data set, on real files: what comes out, what is left out, and going on."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from qwen3_vlm.data import tokenize_unit
from qwen3_vlm.data.shards import SPLITS, open_shards, split_of
from qwen3_vlm.data.tokenize import run_tokenize, tokenize_manifest
from qwen3_vlm.data.tokenize_report import describe_lengths
from qwen3_vlm.data.tokenize_unit import encode_each
from qwen3_vlm.data.worker_pool import Event, WorkerPool
from qwen3_vlm.errors import ConfigError, DataError, StorageError, TokenError, TokenSpaceError
from qwen3_vlm.folder_lock import FolderLock
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from tests.data.speaking_pictures import (
    RATE_HZ,
    line,
    png,
    save_tokenizers,
    wav,
    write_manifest,
    write_speaking_pictures,
)

FRACTIONS = {"val": 0.15, "test": 0.1}
Tokenize = Callable[..., Any]


@pytest.fixture(scope="module")
def uti_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaking_pictures(tmp_path_factory.mktemp("data"), 60)


@pytest.fixture(scope="module")
def finished(uti_file: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set made in one go, in this process. Not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    tokenize(manifest, out, uti_file)
    return out


def tokenize(manifest: Path, out: Path, uti_file: Path, *overrides: str, **settings: Any) -> Any:
    values = {"workers": 0, "shard_records": 16, "fractions": FRACTIONS, "download": False, **settings}
    return tokenize_manifest(manifest, out, uti_file, overrides, **values)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a data set but its lock."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def errors_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (out / "tokenize_errors.jsonl").read_text().splitlines()]


def stored(out: Path) -> Iterator[tuple[dict[str, Any], "np.ndarray[Any, Any]"]]:
    """All records, read with the standard library and numpy alone."""
    for path in sorted((out / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            for name in names:
                if name.endswith(".json"):
                    key = name.removesuffix(".json")
                    about, array = (tar.extractfile(key + suffix) for suffix in (".json", ".npy"))
                    assert about is not None
                    assert array is not None
                    tree = json.loads(about.read()) | {"key": key, "shard": path.stem}
                    yield tree, np.load(io.BytesIO(array.read()), allow_pickle=False)


# What comes out --------------------------------------------------------------------------------------------


def test_ids_are_those_of_the_tokenizers_and_nothing_is_lost(finished: Path, manifest: Path, uti_file: Path) -> None:
    uti = UnifiedTokenizer.open(uti_file, download=False)
    records = {tree["id"]: (tree, ids) for tree, ids in stored(finished)}
    lines = [json.loads(text) for text in manifest.read_text().splitlines()]
    assert set(records) == {record["id"] for record in lines}
    for number, record in enumerate(lines):
        tree, ids = records[record["id"]]
        assert tree["key"] == f"{number:09d}"
        assert tree["shard"].startswith(split_of(record["id"], FRACTIONS))
        assert {name: tree[name] for name in ("text", "task", "source", "meta")} == {
            name: record[name] for name in ("text", "task", "source", "meta")
        }
        assert ids.dtype == np.int32
        expected = {"text": uti.encode_text(record["text"])}
        media = {kind: manifest.parent / path for kind, path in record["modalities"].items()}
        if "image" in media:
            expected["image"] = uti.encode_image(Image.open(media["image"])).ids.tolist()
        if "audio" in media:
            samples, rate = soundfile.read(media["audio"], dtype="float32")
            expected["audio"] = uti.encode_audio(samples, rate).ids.tolist()
        found = {name: ids[start:end].tolist() for name, (start, end) in tree["segments"].items()}
        assert found == expected
    assert not errors_of(finished)


def test_units_follow_the_manifest(finished: Path, manifest: Path) -> None:
    """Consecutive lines of one split, `shard_records` of them a shard."""
    order: dict[str, list[str]] = {split: [] for split in SPLITS}
    for text in manifest.read_text().splitlines():
        name = json.loads(text)["id"]
        order[split_of(name, FRACTIONS)].append(name)
    shards: dict[str, list[str]] = {}
    for tree, _ in stored(finished):
        shards.setdefault(tree["shard"], []).append(tree["id"])
    expected = {
        f"{split}-{number:06d}": names[16 * number : 16 * (number + 1)]
        for split, names in order.items()
        for number in range(-(-len(names) // 16))
    }
    assert shards == expected
    assert len(expected) >= 5


def test_statistics_agree_with_a_count_by_hand(finished: Path, manifest: Path) -> None:
    stats = json.loads((finished / "stats.json").read_text())
    lengths: dict[str, list[int]] = {"text": [], "image": [], "audio": []}
    for tree, _ in stored(finished):
        for name, (start, end) in tree["segments"].items():
            lengths[name].append(end - start)
    whole = stats["all"]
    for name, values in lengths.items():
        found = whole["lengths"][name]
        assert whole["tokens"][name] == sum(values)
        assert (found["records"], found["min"], found["max"]) == (len(values), min(values), max(values))
        for percent in (50, 90, 99):
            assert found[f"p{percent}"] == np.percentile(values, percent, method="inverted_cdf")
    lines = [json.loads(text) for text in manifest.read_text().splitlines()]
    sounds = [record["modalities"]["audio"] for record in lines if "audio" in record["modalities"]]
    samples = sum(soundfile.info(manifest.parent / path).frames for path in sounds)
    assert whole["audio_hours"] == pytest.approx(samples / RATE_HZ / 3600, abs=1e-6)
    assert whole["sounds"] == len(sounds)
    assert whole["tasks"] == {"": 15, "i2t": 45}
    for split, part in stats["splits"].items():
        assert part["records"] == sum(split_of(record["id"], FRACTIONS) == split for record in lines)
    assert sum(part["records"] for part in stats["splits"].values()) == whole["records"] == 60


@given(st.lists(st.integers(0, 500), min_size=1, max_size=60))
def test_percentiles_are_those_of_numpy(values: list[int]) -> None:
    found = describe_lengths(Counter(values))
    for percent in (50, 90, 99):
        assert found[f"p{percent}"] == np.percentile(values, percent, method="inverted_cdf")


def test_the_data_set_says_what_it_was_made_of(finished: Path, manifest: Path, uti_file: Path) -> None:
    tree = json.loads((finished / "dataset.json").read_text())
    assert tree["settings"]["manifest_sha256"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert tree["settings"]["fractions"] == {"train": 0.75, **FRACTIONS}
    uti_sha256 = hashlib.sha256((finished / "uti.yaml").read_bytes()).hexdigest()
    assert tree["settings"]["uti_sha256"] == tree["files"]["uti.yaml"] == uti_sha256
    space = UnifiedTokenizer.open(uti_file, download=False).token_space
    assert tree["token_space_sha256"] == space.sha256
    for split in SPLITS:
        shards = open_shards(finished, space, split=split, allow_unaudited=[finished.name])
        assert [record.id for record in shards] == [
            stored_record["id"] for stored_record, _ in stored(finished) if stored_record["shard"].startswith(split)
        ]
    names = {path.name for path in finished.iterdir()}
    assert names == {"plan.json", "shards", ".lock", "dataset.json", *tree["files"]}


# Splits ----------------------------------------------------------------------------------------------------


@given(
    ids=st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=40, unique=True),
    val=st.floats(0, 0.5),
    test=st.floats(0, 0.5),
    data=st.data(),
)
def test_a_split_depends_on_the_id_alone(ids: list[str], val: float, test: float, data: st.DataObject) -> None:
    fractions = {"val": val, "test": test}
    before = {name: split_of(name, fractions) for name in ids}
    some = data.draw(st.permutations(ids))[: len(ids) // 2]
    assert all(split_of(name, fractions) == before[name] for name in some)
    place = {
        name: int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
        for name in ids
    }
    for name, split in before.items():
        assert split == ("val" if place[name] < val else "test" if place[name] < val + test else "train")


def test_adding_and_removing_records_moves_nobody(
    finished: Path, manifest: Path, uti_file: Path, tmp_path: Path
) -> None:
    lines = [json.loads(text) for text in manifest.read_text().splitlines()]
    changed = [line("new", text="new"), *lines[5:40][::-1]]
    other = write_manifest(manifest.parent / "changed.jsonl", changed)
    tokenize(other, tmp_path / "out", uti_file)
    before = {tree["id"]: tree["shard"].split("-")[0] for tree, _ in stored(finished)}
    after = {tree["id"]: tree["shard"].split("-")[0] for tree, _ in stored(tmp_path / "out")}
    assert len(after) == 36
    assert all(before[name] == split for name, split in after.items() if name != "new")


# What is left out ------------------------------------------------------------------------------------------


def giant_png(width: int, height: int) -> bytes:
    """A valid PNG header, and next to nothing behind it."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1000)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [*chunks, (b"IEND", b"")]
    )


def text_bomb() -> bytes:
    """A small picture with 20 MB of compressed text in it."""
    about = PngImagePlugin.PngInfo()
    about.add_text("bomb", "x" * 20_000_000, zip=True)
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG", pnginfo=about)
    return stream.getvalue()


def pixel_bomb(side: int = 12_000) -> bytes:
    """A whole picture of 144 million pixels in a few hundred kilobytes."""
    stream = io.BytesIO()
    Image.new("1", (side, side)).save(stream, "PNG")
    return stream.getvalue()


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(png(3, 64))).save(stream, "JPEG")
    return stream.getvalue()


def not_finite_wav() -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.full(400, np.nan, np.float32), RATE_HZ, format="WAV", subtype="FLOAT")
    return stream.getvalue()


def int_wav_as_float() -> bytes:
    """A header that promises a sample type that there is none of."""
    data = bytearray(wav(1))
    struct.pack_into("<H", data, 20, 0x1234)
    return bytes(data)


def write_bad_files(folder: Path) -> list[tuple[dict[str, Any], str]]:
    """Records that can't be used, each with its reason."""
    files: dict[str, tuple[bytes, str]] = {
        "cut.jpg": (jpeg()[:600], "unreadable_image"),
        "corrupt.jpg": (jpeg()[:100] + bytes(200), "unreadable_image"),
        "no_picture.png": (b"hello", "unreadable_image"),
        "giant.png": (giant_png(60_000, 60_000), "image_too_large"),
        "text_bomb.png": (text_bomb(), "unreadable_image"),
        "pixel_bomb.png": (pixel_bomb(), "image_too_large"),
        "cut.wav": (wav(1)[:300], "truncated_audio"),
        "corrupt.wav": (b"RIFF" + bytes(40), "unreadable_audio"),
        "nan.wav": (not_finite_wav(), "audio_not_finite"),
        "dtype.wav": (int_wav_as_float(), "unreadable_audio"),
        "long.wav": (wav(1, 5 * RATE_HZ), "audio_too_long"),
        "empty.wav": (wav(1, 0), "empty_audio"),
        "silent.wav": (wav(1, 40)[:44] + bytes(80), "audio_silent"),
    }
    found = []
    for name, (data, reason) in files.items():
        (folder / name).write_bytes(data)
        kind = "audio" if name.endswith(".wav") else "image"
        found.append((line(name, **{kind: name}, text="words"), reason))
    (folder / "secret.png").write_bytes(png(1))
    (folder / "data").mkdir(exist_ok=True)
    (folder / "link.png").symlink_to("/etc/hostname")
    found += [
        (line("missing", image="none.png"), "missing_image"),
        (line("missing sound", audio="none.wav", text="words"), "missing_audio"),
        (line("climbs", image="../secret.png"), "path_escapes"),
        (line("absolute", audio="/etc/hostname"), "path_escapes"),
        (line("link", image="link.png"), "path_escapes"),
        (line("good picture, bad sound", image="0.png", audio="cut.wav"), "truncated_audio"),
        (line("surrogate", text="\ud800"), "bad_text"),
        (line("typo", image="0.png") | {"tetx": ""}, "unknown_field"),
        (line("nothing"), "empty_record"),
        (line("r1", text="the id of a good one"), "duplicate_id"),
    ]
    return found


def test_each_bad_record_is_counted_with_its_reason_and_nothing_else_is_lost(tmp_path: Path, uti_file: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "0.png").write_bytes(png(0))
    (data / "0.wav").write_bytes(wav(0))
    bad = write_bad_files(data)
    good = [line(f"r{number}", image="0.png", audio="0.wav", text="words") for number in range(len(bad) + 1)]
    lines = [good[0], good[1]]
    reasons = {}
    for number, (record, reason) in enumerate(bad):
        reasons[len(lines) + 1] = reason
        lines.append(record)
        lines += [good[number + 2]] if number + 2 < len(good) else []
    manifest = write_manifest(data / "manifest.jsonl", lines)
    manifest.write_bytes(manifest.read_bytes() + b"\n{broken\n\xff\xfe\n")
    reasons |= {len(lines) + 2: "bad_json", len(lines) + 3: "bad_json"}
    result = tokenize(manifest, tmp_path / "out", uti_file, "audio.silence=refuse")
    errors = errors_of(tmp_path / "out")
    assert {error["line"]: error["reason"] for error in errors} == reasons
    assert [error["line"] for error in errors] == sorted(reasons)
    assert all(error["message"] and str(tmp_path) not in error["message"] for error in errors)
    assert {tree["id"] for tree, _ in stored(tmp_path / "out")} == {record["id"] for record in good}
    assert result.total.reasons == Counter(reasons.values())
    assert "left out: path_escapes" in result.table()
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["all"]["reasons"] == Counter(reasons.values())
    assert stats["all"]["errors"] == len(reasons)


def test_decoded_bytes_bound_a_block(tmp_path: Path, uti_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large pictures are encoded a few at a time, with the same result."""
    manifest = write_speaking_pictures(tmp_path / "data", 30)
    tokenize(manifest, tmp_path / "a", uti_file)
    blocks: list[int] = []
    encode_block = tokenize_unit._encode_block
    monkeypatch.setattr(tokenize_unit, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(
        tokenize_unit,
        "_encode_block",
        lambda items, *rest: blocks.append(sum(item.num_bytes for item in items)) or encode_block(items, *rest),
    )
    tokenize(manifest, tmp_path / "b", uti_file)
    assert len(blocks) > 10
    assert max(blocks) < 3000 + 20 * 20 * 3 + 4 * 700
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@given(st.lists(st.integers(0, 9), max_size=20))
def test_one_bad_item_fails_alone(items: list[int]) -> None:
    def encode(values: list[int]) -> list[int]:
        if 3 in values:
            raise TokenError("three", "is_three")
        return [10 * value for value in values]

    found = encode_each(encode, items)
    assert [value if isinstance(value, int) else value.reason for value in found] == [
        "is_three" if item == 3 else 10 * item for item in items
    ]


def test_too_many_bad_records_stop_the_run_and_are_told(tmp_path: Path, uti_file: Path) -> None:
    data = tmp_path / "data"
    records = [line(f"r{n}", text="good") for n in range(6)] + [line(f"b{n}", image="none.png") for n in range(4)]
    manifest = write_manifest(data / "m.jsonl", records)
    with pytest.raises(DataError, match=r"4 of 10 records can't be used, more than max_bad_fraction allows \(0.3\)"):
        tokenize(manifest, tmp_path / "out", uti_file, max_bad_fraction=0.3)
    assert len(errors_of(tmp_path / "out")) == 4
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert tokenize(manifest, tmp_path / "out", uti_file, max_bad_fraction=0.4).finished
    only_bad = write_manifest(data / "bad.jsonl", records[6:])
    with pytest.raises(DataError, match=r"None of the 4 records could be tokenized \(4 × missing_image\)"):
        tokenize(only_bad, tmp_path / "bad", uti_file)
    assert len(errors_of(tmp_path / "bad")) == 4
    assert not (tmp_path / "bad" / "dataset.json").exists()


# Going on --------------------------------------------------------------------------------------------------


def test_units_that_are_done_are_not_done_again(
    finished: Path, manifest: Path, uti_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shards = out / "shards"
    (shards / "train-000000.report.json").unlink()
    tar = bytearray((shards / "train-000001.tar").read_bytes())
    tar[700] ^= 1
    (shards / "train-000001.tar").write_bytes(tar)
    (shards / "val-000000.index.npy").unlink()
    report = json.loads((shards / "test-000000.report.json").read_text())
    (shards / "test-000000.report.json").write_text(json.dumps(report | {"plan_sha256": "of another plan"}))
    (out / "dataset.json").unlink()
    (shards / ".train-000002.tar.123-ab.partial").write_bytes(b"half")
    done: list[str] = []
    original = tokenize_unit.tokenize_unit
    monkeypatch.setattr(
        tokenize_unit, "tokenize_unit", lambda plan, unit, *rest: done.append(unit.name) or original(plan, unit, *rest)
    )
    tokenize(manifest, out, uti_file)
    assert sorted(done) == ["test-000000", "train-000000", "train-000001", "val-000000"]
    assert contents(out) == contents(finished)


def test_other_settings_are_refused_line_by_line(
    finished: Path, manifest: Path, uti_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    with pytest.raises(
        DataError, match=r"begun with other settings(.|\n)*shard_records: 16 before, 8 now(.|\n)*restart"
    ):
        tokenize(manifest, out, uti_file, shard_records=8)
    with pytest.raises(DataError, match=r"fractions.val: 0.15 before, 0.2 now"):
        tokenize(manifest, out, uti_file, fractions={"val": 0.2})
    with pytest.raises(DataError, match=r"uti.yaml: audio.clip_seconds: 0.5 before, 0.25 now"):
        tokenize(manifest, out, uti_file, "audio.clip_seconds=0.25")
    other = write_manifest(manifest.parent / "other.jsonl", [line("a", text="t")])
    with pytest.raises(DataError, match="manifest_sha256: ") as error:
        tokenize(other, out, uti_file)
    assert "records: 60 before, 1 now" in str(error.value)
    assert contents(out) == contents(finished)  # nothing was touched
    assert tokenize(other, out, uti_file, restart=True).total.records == 1
    assert len(list((out / "shards").iterdir())) == 3
    assert tokenize(manifest, out, out, restart=True).total.records == 60  # with its own uti.yaml
    assert contents(out) == contents(finished)


def test_other_weights_are_refused(finished: Path, manifest: Path, uti_file: Path, tmp_path: Path) -> None:
    """The same uti.yaml, but the folder that it names holds another tokenizer now."""
    shutil.copytree(uti_file.parent, tmp_path / "uti")
    config = tmp_path / "uti" / "uti.yaml"
    config.write_text(config.read_text().replace(str(uti_file.parent), str(tmp_path / "uti")))
    tokenize(manifest, tmp_path / "out", config)
    (tmp_path / "out" / "shards" / "val-000000.report.json").unlink()
    from tests.tokenization.tiny_models import rewrite, weights_of

    _, tensors = weights_of(tmp_path / "uti" / "image")
    name = next(iter(tensors))
    rewrite(tmp_path / "uti" / "image", {**tensors, name: tensors[name] + 1})
    with pytest.raises(TokenSpaceError, match="weights_sha256"):
        tokenize(manifest, tmp_path / "out", config)


def test_foreign_folders_and_bad_numbers_are_refused(manifest: Path, uti_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "shards").mkdir(parents=True)
    (tmp_path / "out" / "shards" / "train-000000.tar").write_bytes(b"somebody's")
    with pytest.raises(DataError, match="holds shards"):
        tokenize(manifest, tmp_path / "out", uti_file)
    with pytest.raises(DataError, match="does not exist"):
        tokenize(tmp_path / "none.jsonl", tmp_path / "x", uti_file)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no records"):
        tokenize(tmp_path / "empty.jsonl", tmp_path / "x", uti_file)
    for settings in (
        {"workers": -1},
        {"engine": "magic"},
        {"engine": "ray", "workers": 0},
        {"max_bad_fraction": 2},
        {"shard_records": 0},
    ):
        with pytest.raises(ConfigError):
            tokenize(manifest, tmp_path / "y", uti_file, **settings)
    with pytest.raises(DataError, match="fractions"):
        tokenize(manifest, tmp_path / "y", uti_file, fractions={"val": 0.9, "test": 0.9})


def test_a_folder_with_another_uti_yaml_is_not_written_over(manifest: Path, uti_file: Path, tmp_path: Path) -> None:
    mine = yaml.safe_dump({**yaml.safe_load(uti_file.read_text()), "special": {"count": 32}})
    (tmp_path / "uti.yaml").write_text(mine)
    with pytest.raises(DataError, match=r"another uti\.yaml.*\n  special\.count: 32 before, 64 now"):
        tokenize(manifest, tmp_path, uti_file)
    assert (tmp_path / "uti.yaml").read_text() == mine


def test_out_may_not_be_a_file(manifest: Path, uti_file: Path) -> None:
    with pytest.raises(DataError, match="can't be used as a folder"):
        tokenize(manifest, manifest, uti_file)


def test_nothing_is_written_for_a_manifest_that_is_not_there(uti_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        tokenize(tmp_path / "none.jsonl", tmp_path / "out", uti_file)
    assert not (tmp_path / "out").exists()


def test_two_runs_cannot_write_one_folder(finished: Path, manifest: Path, uti_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom qwen3_vlm.folder_lock import FolderLock\n"
        "with FolderLock() as lock:\n    lock.acquire(Path(sys.argv[1]))\n"
        "    print('held', flush=True)\n    time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(StorageError, match="Another run is writing"):
            tokenize(manifest, out, uti_file, restart=True)
    finally:
        other.kill()
        other.communicate()
    assert contents(out) == contents(finished)
    with FolderLock() as lock:
        lock.acquire(out)


# Worker processes ------------------------------------------------------------------------------------------


def test_processes_write_the_same_bytes(
    finished: Path, manifest: Path, uti_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = {"shard_records": 16, "fractions": FRACTIONS, "download": False}
    assert run_tokenize(manifest, out, uti_file, workers=2, **settings)
    assert contents(out) == contents(finished)
    printed = capsys.readouterr()
    assert f"Next: qwen3-vlm data audit {out}" in printed.out
    assert "60/60" in printed.err


def crash(path: Path, times: int) -> Callable[[Any, Callable[[int], None]], Any]:
    """Work that dies over "bad" the first so many times, and is done otherwise."""

    def work(task: str, tell: Callable[[int], None]) -> str:
        tell(2)
        if task == "bad":
            count = len(list(path.iterdir()))
            if count < times:
                (path / str(count)).touch()
                tell(3)
                os.kill(os.getpid(), signal.SIGKILL)
        if task == "fails":
            raise StorageError("The disk is full.")
        if task == "odd":
            raise ZeroDivisionError("division by zero")
        return f"{task} done with {os.environ['OMP_NUM_THREADS']} thread"

    return work


class Start:
    """Picklable, for a worker."""

    def __init__(self, path: Path, times: int) -> None:
        self.path, self.times = path, times

    def __call__(self) -> Any:
        return crash(self.path, self.times)


def test_a_worker_that_dies_once_costs_nothing(tmp_path: Path) -> None:
    tasks = ["a", "bad", "b", "c"]
    with WorkerPool[str](2, Start(tmp_path, 1)) as pool:
        events = list(pool.run(tasks))
    assert sorted(event.result for event in events if event.done) == [f"{t} done with 1 thread" for t in sorted(tasks)]
    assert sum(event.count for event in events) == 2 * len(tasks)  # what the dead one told is taken back
    assert Event("bad", -5) in events


def test_a_worker_that_dies_twice_is_told_with_its_unit(tmp_path: Path) -> None:
    before = threading.active_count()
    with (
        pytest.raises(DataError, match=r"ended 2 times over bad \(killed by SIGKILL\)"),
        WorkerPool[str](2, Start(tmp_path, 5)) as pool,
    ):
        list(pool.run(["a", "bad", "b"]))
    assert threading.active_count() == before


def test_errors_of_workers_arrive(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"The disk is full\."), WorkerPool[str](1, Start(tmp_path, 0)) as pool:
        list(pool.run(["fails"]))
    with (
        pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"),
        WorkerPool[str](1, Start(tmp_path, 0)) as pool,
    ):
        list(pool.run(["odd"]))


COMMAND = """
import sys
from qwen3_vlm.cli import main
if __name__ == "__main__":
    main(sys.argv[1:])
"""


def running_in_group(group: int) -> list[str]:
    """Command lines of what still runs in a process group; a process that is dead and not yet reaped does not."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_with_a_sentence(number: signal.Signals, uti_file: Path, tmp_path: Path) -> None:
    """As Ctrl-C and schedulers send them: to the whole process group."""
    manifest = write_speaking_pictures(tmp_path / "data", 600)
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    out = tmp_path / "out"
    arguments = ["data", "tokenize", manifest, out, "--uti", uti_file, "--workers", "1", "--shard-records", "8"]
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell ignores it
    )
    deadline = time.monotonic() + 200
    while not list(out.glob("shards/*.report.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, number)
    printed, noise = process.communicate(timeout=100)
    assert "Traceback" not in noise
    assert "units done. Nothing is lost: the same command goes on from there." in printed
    assert process.returncode == 130
    assert not list(out.rglob("*.partial"))
    deadline = time.monotonic() + 20  # multiprocessing's own tracker ends by itself, a moment later
    while left := running_in_group(process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_uti_yaml_may_leave_out_what_a_manifest_has(uti_file: Path, manifest: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(uti_file.read_text())
    del config["audio"]
    (tmp_path / "uti.yaml").write_text(yaml.safe_dump(config))
    result = tokenize(manifest, tmp_path / "out", tmp_path / "uti.yaml")
    assert result.total.reasons == {"no_audio": 30}
    assert result.total.records == 30

"""Tokenized shards against plain tarfile and numpy, the webdataset package, and whatever can happen to a file."""

import gc
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3_vlm.data import shards as shards_module
from qwen3_vlm.data.shards import (
    Shards,
    TokenizedRecord,
    check_record,
    open_shards,
    read_dataset,
    read_report,
    shard_path,
    split_of,
    write_dataset,
    write_shard,
)
from qwen3_vlm.errors import DataError, RecordError, TokenSpaceError
from tests.data.tiny_shards import FRACTIONS, pass_audit, tiny_record, tiny_space, write_tiny

SPACE = tiny_space()


def same(first: TokenizedRecord, second: TokenizedRecord) -> bool:
    plain = [
        {**{name: getattr(record, name) for name in ("key", "id", "source", "task", "text", "meta", "metadata")}}
        for record in (first, second)
    ]
    ids = [{name: np.asarray(value).tolist() for name, value in record.ids.items()} for record in (first, second)]
    return plain[0] == plain[1] and ids[0] == ids[1]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("shards") / "data", SPACE)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "data"))


def tar_members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path, "r:") as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


# The format, read by others ---------------------------------------------------------------------------------


def test_plain_tarfile_and_numpy_read_what_was_written(original: Path) -> None:
    shards = open_shards(original)
    number = 0
    for entry in read_dataset(original).splits["train"]:
        members = tar_members(original / "shards" / f"{entry.name}.tar")
        index = np.load(original / "shards" / f"{entry.name}.index.npy", allow_pickle=False)
        assert index.dtype == np.int64
        assert index.shape == (entry.records, 7)
        for row, (first, second) in zip(index, zip(members[::2], members[1::2], strict=True), strict=True):
            tree, array = json.loads(first[1]), np.load(io.BytesIO(second[1]), allow_pickle=False)
            expected = tiny_record(int(first[0].name[:9]), SPACE)
            assert first[0].name == f"{expected.key}.json"
            assert second[0].name == f"{expected.key}.npy"
            assert (first[0].mode, first[0].uid, first[0].gid, first[0].mtime, first[0].uname) == (0o644, 0, 0, 0, "")
            assert row.tolist()[:4] == [first[0].offset_data, first[0].size, second[0].offset_data, second[0].size]
            assert array.dtype == np.int32
            assert array.tolist() == [id_ for name in ("text", "image", "audio") for id_ in expected.ids[name].tolist()]
            for column, (name, (start, stop)) in enumerate(
                (name, tree["segments"][name]) for name in ("text", "image", "audio")
            ):
                assert array[start:stop].tolist() == expected.ids[name].tolist()
                assert tree["ids_sha256"][name] == hashlib.sha256(array[start:stop].tobytes()).hexdigest()
                assert row[4 + column] == stop - start
            assert tree["token_space_sha256"] == SPACE.sha256
            assert tree["text"] == expected.text
            assert tree["audio"] == expected.metadata["audio"]
            assert same(shards[number], expected)
            number += 1
    assert number == len(shards) > 30


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_webdataset_package_reads_it(original: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    paths = sorted(str(path) for path in (original / "shards").glob("train-*.tar"))
    found = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).decode())
    shards = open_shards(original)
    assert [sample["__key__"] for sample in found] == [record.key for record in shards]
    assert [sample["json"]["text"] for sample in found] == [record.text for record in shards]
    assert all(
        sample["npy"].tolist() == np.concatenate(list(record.ids.values())).tolist()
        for sample, record in zip(found, shards, strict=True)
    )
    gc.collect()


def test_the_same_records_give_the_same_bytes(original: Path, tmp_path: Path) -> None:
    again = write_tiny(tmp_path / "elsewhere", SPACE)
    names = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((original / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_the_bytes_do_not_change_between_versions(tmp_path: Path) -> None:
    """Recorded once: a change of format is a decision, not an accident."""
    record = TokenizedRecord("000000007", "a", "b", None, "c", {"z": 1, "a": "ü"}, {"text": np.array([1, 2, 3])})
    write_shard(tmp_path, "train", 0, [record], SPACE)
    (head, text), (_, array) = tar_members(shard_path(tmp_path, "train", 0))
    assert head.pax_headers == {}
    assert text.decode() == (
        '{"audio": null, "id": "a", "ids_sha256": {"text": "'
        + hashlib.sha256(np.array([1, 2, 3], "<i4").tobytes()).hexdigest()
        + '"}, "image": null, "meta": {"a": "\\u00fc", "z": 1}, "segments": {"text": [0, 3]}, "source": "b", '
        f'"task": null, "text": "c", "token_space_sha256": "{SPACE.sha256}"}}'
    )
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (3,), }"
    assert array == b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(117) + b"\n" + np.array([1, 2, 3], "<i4").tobytes()


def test_reading_needs_no_torch(original: Path) -> None:
    code = (
        "import sys; from qwen3_vlm.data.shards import open_shards; import qwen3_vlm.data.shard_reader\n"
        f"import qwen3_vlm.data.shard_audit\nassert open_shards({str(original)!r})[0].id\n"
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr


# Properties -------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=5,
)


@st.composite
def records(draw: Any, number: int) -> TokenizedRecord:
    modalities = draw(st.sets(st.sampled_from(["text", "image", "audio"]), min_size=1))
    record = tiny_record(draw(st.integers(0, 1000)), SPACE, sorted(modalities))
    text = draw(st.text()) if "text" in modalities else None
    return replace(
        record,
        key=f"{number:09d}",
        id=draw(st.text(st.characters(), max_size=20)),  # lone surrogates too
        source=draw(st.text(max_size=5)),
        task=draw(st.none() | st.text(max_size=5)),
        text=text,
        meta=draw(st.dictionaries(st.text(max_size=5), json_values, max_size=3)),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), count=st.integers(0, 5))
def test_any_record_comes_back(tmp_path: Path, data: st.DataObject, count: int) -> None:
    written = [data.draw(records(number)) for number in range(count)]
    out = tmp_path / "any"
    shutil.rmtree(out, ignore_errors=True)
    shards_module.write_report(out, write_shard(out, "train", 0, written, SPACE))
    SPACE.save(out)
    for name in ("uti.yaml", "stats.json", "tokenize_errors.jsonl"):
        (out / name).write_text("")
    write_dataset(out, SPACE, settings={})
    read = list(open_shards(out, SPACE, allow_unaudited=("any",)))
    assert len(read) == count
    assert all(same(first, second) for first, second in zip(written, read, strict=True))


@given(st.text(), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_split_is_decided_by_the_id_alone(record_id: str, val: float, test: float) -> None:
    place = int(hashlib.sha256(record_id.encode()).hexdigest()[:16], 16) / 16**16
    expected = "val" if place < val else "test" if place < val + test else "train"
    assert split_of(record_id, {"val": val, "test": test}) == expected


def test_split_shares_come_out() -> None:
    found = [split_of(f"record {number}", {"train": 0.8, "val": 0.15, "test": 0.05}) for number in range(20_000)]
    for split, share in (("train", 0.8), ("val", 0.15), ("test", 0.05)):
        assert abs(found.count(split) / 20_000 - share) < 4 * (share * (1 - share) / 20_000) ** 0.5


@pytest.mark.parametrize(
    "fractions", [{"val": -0.1}, {"val": 0.9, "test": 0.2}, {"dev": 0.1}, {"train": 0.5}, {"val": float("nan")}]
)
def test_fractions_that_are_none(fractions: dict[str, float]) -> None:
    with pytest.raises(DataError, match="shares of 1"):
        split_of("a", fractions)


# Records that can't be stored -------------------------------------------------------------------------------

ROOT = tiny_record(4, SPACE)
BAD_RECORDS: list[tuple[dict[str, Any], str]] = [
    ({"ids": {"text": np.array([50])}}, "out_of_range"),
    ({"ids": {"text": np.array([-1])}}, "out_of_range"),
    ({"ids": {"text": np.array([1.5])}}, "wrong_dtype"),
    ({"ids": {"text": np.array([[1]])}}, "wrong_dtype"),
    ({"ids": {**ROOT.ids, "image": ROOT.ids["image"][:-1]}}, "wrong_grid"),
    ({"ids": {**ROOT.ids, "image": ROOT.ids["image"] + 16}}, "out_of_range"),
    ({"ids": {**ROOT.ids, "audio": ROOT.ids["audio"][:-1]}}, "short_frame"),
    ({"ids": {**ROOT.ids, "audio": np.roll(ROOT.ids["audio"], 1)}}, "out_of_range"),
    ({"ids": {**ROOT.ids, "audio": np.empty(0, int)}}, "empty_segment"),
    ({"ids": {}, "metadata": {}}, "empty_record"),
    ({"metadata": {"image": {}}}, "bad_metadata"),
    ({"meta": {"a": float("nan")}}, "bad_metadata"),
    ({"meta": {"a": {1, 2}}}, "bad_metadata"),
    ({"meta": {"a": "x" * 4_000_001}}, "record_too_large"),
    ({"ids": {**ROOT.ids, "text": np.zeros(4_000_001, int)}}, "record_too_large"),
    ({"ids": {**ROOT.ids, "video": np.array([1])}}, "unknown_modality"),
    ({"key": "7"}, "bad_key"),
    ({"key": "../../../a"}, "bad_key"),
    ({"id": 7}, "bad_json"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_RECORDS, ids=[f"{i}-{r}" for i, (_, r) in enumerate(BAD_RECORDS)])
def test_a_bad_record_is_refused_with_its_reason(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    if set(change) == {"ids"} and "image" not in change["ids"]:
        change = {**change, "metadata": {}}
    bad = replace(ROOT, **change)
    with pytest.raises(RecordError) as caught:
        check_record(bad, SPACE)
    assert caught.value.reason == reason
    with pytest.raises(RecordError):
        write_shard(tmp_path, "train", 0, [tiny_record(1, SPACE), bad], SPACE)
    assert not list(tmp_path.rglob("*.*"))  # neither a shard nor half of one
    told: list[tuple[str, str]] = []
    summary = write_shard(
        tmp_path,
        "train",
        0,
        [tiny_record(1, SPACE), bad, tiny_record(2, SPACE)],
        SPACE,
        on_error=lambda record, error: told.append((record.key, error.reason)),
    )
    assert summary.records == 2
    assert told == [(bad.key, reason)]


def test_an_interrupted_shard_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> Any:
        yield tiny_record(0, SPACE)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, "train", 0, interrupted(), SPACE)
    assert not list((tmp_path / "shards").iterdir())


def test_a_unit_is_done_when_its_report_fits(folder: Path) -> None:
    assert read_report(folder, "train", 0) is not None
    assert read_report(folder, "train", 99) is None
    tar = shard_path(folder, "train", 0)
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    assert read_report(folder, "train", 0) is None
    assert read_report(folder, "train", 0, verify=False) is not None
    tar.write_bytes(data[:-1])
    assert read_report(folder, "train", 0, verify=False) is None
    shard_path(folder, "train", 1, "index.npy").unlink()
    assert read_report(folder, "train", 1, verify=False) is None
    with pytest.raises(DataError, match="not done"):
        write_dataset(folder, SPACE, settings={})


# Reading in place -------------------------------------------------------------------------------------------


def test_lengths_and_slices(original: Path) -> None:
    shards = open_shards(original, SPACE)
    expected = [[len(record.ids[name]) for name in ("text", "image", "audio")] for record in shards]
    assert shards.lengths.tolist() == expected
    assert same(shards[-1], shards[len(shards) - 1])
    assert [record.key for record in shards[3:20:5]] == [shards[index].key for index in (3, 8, 13, 18)]
    for index in (len(shards), -len(shards) - 1):
        with pytest.raises(IndexError):
            shards[index]


def _keys(shards: Shards, queue: Any) -> None:
    queue.put([record.key for record in shards])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(original: Path, method: str) -> None:
    shards = open_shards(original)
    expected = [record.key for record in shards]  # files are open when the process forks
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    processes = [context.Process(target=_keys, args=(shards, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60), queue.get(timeout=60)] == [expected, expected]
    for process in processes:
        process.join()
    assert [record.key for record in shards] == expected


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "OPEN_FILES", 2)
    shards = open_shards(write_tiny(tmp_path / "data", SPACE, shard_records=3))
    before = len(os.listdir("/proc/self/fd"))
    assert len([record.id for record in shards]) == len(shards)
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    copy = pickle.loads(pickle.dumps(shards))
    assert same(copy[5], shards[5])
    del shards, copy
    assert len(os.listdir("/proc/self/fd")) <= before


# Data sets that are refused ---------------------------------------------------------------------------------


def test_another_token_space_is_refused_line_by_line(original: Path) -> None:
    other = tiny_space(text_size=60, codes=32)
    with pytest.raises(TokenSpaceError) as caught:
        open_shards(original, other)
    lines = str(caught.value).splitlines()
    assert str(original) in lines[0]
    assert any("text_vocab_size" in line for line in lines)
    assert any("codebook_size" in line for line in lines)


def test_a_token_space_that_was_exchanged_is_refused(folder: Path) -> None:
    tiny_space(codes=32).save(folder)
    with pytest.raises(DataError, match="not the token space"):
        open_shards(folder, allow_unaudited=("data",))


def unaudited(folder: Path) -> None:
    (folder / "audit.json").unlink()


def failed(folder: Path) -> None:
    pass_audit(folder, passed=False)


def other_dataset(folder: Path) -> None:
    tree = json.loads((folder / "dataset.json").read_text())
    tree["settings"]["note"] = "changed"
    (folder / "dataset.json").write_text(json.dumps(tree))


def changed_bytes(folder: Path) -> None:
    tar = shard_path(folder, "train", 1)
    data = bytearray(tar.read_bytes())
    place = data.index(b'"made up"')
    data[place + 1] ^= 1
    tar.write_bytes(data)


def changed_index(folder: Path) -> None:
    path = shard_path(folder, "train", 1, "index.npy")
    index = np.load(path)
    index[0, 4] += 1
    np.save(path, index)


def changed_stats(folder: Path) -> None:
    (folder / "stats.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (unaudited, "never audited"),
        (failed, "failed its audit"),
        (other_dataset, "another dataset.json"),
        (changed_bytes, "train-000001.tar is not the file"),
        (changed_index, "train-000001.index.npy is not the file"),
        (changed_stats, "stats.json is not the file"),
    ],
)
def test_only_what_passed_its_audit_is_opened(folder: Path, change: Callable[[Path], None], sentence: str) -> None:
    assert len(open_shards(folder, SPACE)) > 0
    change(folder)
    with pytest.raises(DataError, match=sentence):
        open_shards(folder, SPACE)
    with pytest.raises(DataError, match=sentence):
        open_shards(folder, SPACE, allow_unaudited=("another",))
    assert len(open_shards(folder, SPACE, allow_unaudited=("data",))) > 0


def test_val_is_open_where_a_train_shard_is_broken(folder: Path) -> None:
    changed_bytes(folder)
    assert len(open_shards(folder, split="val")) > 0
    assert len(open_shards(folder, verify=False)) > 0  # the records' own hashes are left


def remove_dataset(folder: Path) -> None:
    (folder / "dataset.json").unlink()


def other_format(folder: Path) -> None:
    (folder / "dataset.json").write_text('{"format": "2"}')


def climb(folder: Path) -> None:
    text = (folder / "dataset.json").read_text().replace("train-000000", "../../train-000000")
    (folder / "dataset.json").write_text(text)


def short_index(folder: Path) -> None:
    path = shard_path(folder, "train", 0, "index.npy")
    path.write_bytes(path.read_bytes()[:-8])


def float_index(folder: Path) -> None:
    path = shard_path(folder, "train", 0, "index.npy")
    np.save(path, np.load(path).astype(float))


def pickled_index(folder: Path) -> None:
    path = shard_path(folder, "train", 0, "index.npy")
    np.save(path, np.load(path).astype(object), allow_pickle=True)


def negative_index(folder: Path) -> None:
    path = shard_path(folder, "train", 0, "index.npy")
    index = np.load(path)
    index[2, 0] = -5
    np.save(path, index)


def no_index(folder: Path) -> None:
    shard_path(folder, "train", 0, "index.npy").unlink()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (remove_dataset, "no complete tokenized data set"),
        (other_format, "has the format '2'"),
        (climb, "is damaged"),
        (short_index, "train-000000.index.npy is no index"),
        (float_index, "float64"),
        (pickled_index, "train-000000.index.npy is no index"),
        (negative_index, "do not follow one another"),
        (no_index, "can't be read"),
    ],
)
def test_a_broken_data_set_is_a_sentence(folder: Path, change: Callable[[Path], None], sentence: str) -> None:
    change(folder)
    with pytest.raises(DataError, match=sentence):
        open_shards(folder, allow_unaudited=("data",))


def test_an_unknown_split(original: Path) -> None:
    with pytest.raises(DataError, match="it has train, val, test"):
        open_shards(original, split="dev")


# Records that are damaged -----------------------------------------------------------------------------------


def rewritten(folder: Path, change: Callable[[dict[str, Any], list[int]], bytes | None]) -> Shards:
    """Record 2 of train-000000 written anew, with a true index and (if wanted) other bytes for the array."""
    path = shard_path(folder, "train", 0)
    members = [(member.name, data) for member, data in tar_members(path)]
    tree, array = json.loads(members[4][1]), np.load(io.BytesIO(members[5][1])).tolist()
    npy = change(tree, array)
    members[4] = (members[4][0], json.dumps(tree).encode())
    members[5] = (members[5][0], npy if npy is not None else shards_module.npy_bytes(np.array(array, "<i4")))
    index = np.load(shard_path(folder, "train", 0, "index.npy"))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    with tarfile.open(path) as tar:
        places = [[member.offset_data, member.size] for member in tar]
    index[:, :4] = np.array(places).reshape(-1, 4)
    np.save(shard_path(folder, "train", 0, "index.npy"), index)
    return open_shards(folder, allow_unaudited=("data",))


def hashed(tree: dict[str, Any], array: list[int]) -> None:
    for name, (start, stop) in tree["segments"].items():
        digest = hashlib.sha256(np.array(array[start:stop], "<i4").tobytes()).hexdigest()
        tree["ids_sha256"][name] = digest


def change_id(tree: dict[str, Any], array: list[int]) -> None:
    array[-1] += 1


def wrong_range(tree: dict[str, Any], array: list[int]) -> None:
    start, _ = tree["segments"]["audio"]
    array[start], array[start + 1] = array[start + 1], array[start]
    hashed(tree, array)


def longer(tree: dict[str, Any], array: list[int]) -> None:
    array.append(3)


def other_space(tree: dict[str, Any], array: list[int]) -> None:
    tree["token_space_sha256"] = "0" * 64


def moved_segments(tree: dict[str, Any], array: list[int]) -> None:
    tree["segments"]["text"][1] -= 1
    tree["segments"]["image"][0] -= 1


def no_segments(tree: dict[str, Any], array: list[int]) -> None:
    del tree["segments"]["audio"]


def odd_segments(tree: dict[str, Any], array: list[int]) -> None:
    tree["segments"]["text"] = {"a": 1}


def bool_segments(tree: dict[str, Any], array: list[int]) -> None:
    tree["segments"]["text"][0] = False


def no_text_field(tree: dict[str, Any], array: list[int]) -> None:
    del tree["text"]


def new_field(tree: dict[str, Any], array: list[int]) -> None:
    tree["extra"] = 1


def no_metadata(tree: dict[str, Any], array: list[int]) -> None:
    tree["image"] = None


def int64(tree: dict[str, Any], array: list[int]) -> bytes:
    return shards_module.npy_bytes(np.array(array, "<i8"))


def matrix(tree: dict[str, Any], array: list[int]) -> bytes:
    return shards_module.npy_bytes(np.array([array], "<i4"))


def pickled(tree: dict[str, Any], array: list[int]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([print, None]), allow_pickle=True)
    return stream.getvalue()


def cut_array(tree: dict[str, Any], array: list[int]) -> bytes:
    return shards_module.npy_bytes(np.array(array, "<i4"))[:-4]


def no_array(tree: dict[str, Any], array: list[int]) -> bytes:
    return b"nothing of the kind"


def huge_header(tree: dict[str, Any], array: list[int]) -> bytes:
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (" + b"9" * 60_000 + b",), }"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_id, "ids_sha256"),
        (wrong_range, "out_of_range"),
        (longer, "segments"),
        (other_space, "token_space"),
        (moved_segments, "segments"),
        (no_segments, "index"),
        (odd_segments, "segments"),
        (bool_segments, "segments"),
        (no_text_field, "bad_json"),
        (new_field, "bad_json"),
        (no_metadata, "bad_metadata"),
        (int64, "wrong_dtype"),
        (matrix, "wrong_shape"),
        (pickled, "wrong_dtype"),
        (cut_array, "wrong_shape"),
        (no_array, "bad_npy"),
        (huge_header, "bad_npy"),
    ],
)
def test_a_damaged_record_is_one_record(folder: Path, change: Any, reason: str) -> None:
    shards = rewritten(folder, change)
    with pytest.raises(RecordError) as caught:
        shards[2]
    assert caught.value.reason == reason
    assert str(shards.tar_path(0)) in str(caught.value)
    good = [index for index in range(len(shards)) if index != 2]
    assert all(shards[index].id for index in good)


def test_a_tar_that_was_cut_off_loses_only_what_is_gone(folder: Path) -> None:
    tar = shard_path(folder, "train", 0)
    index = np.load(shard_path(folder, "train", 0, "index.npy"))
    os.truncate(tar, int(index[5, 2]) + 3)
    with pytest.raises(DataError, match=r"train-000000\.tar has"):
        open_shards(folder, verify=False)
    reasons = _reasons(open_shards(folder, allow_unaudited=("data",)))
    assert [index for index, reason in enumerate(reasons) if reason] == [5, 6, 7]
    assert {reason for reason in reasons if reason} == {"truncated"}


def test_a_tar_that_is_missing_loses_its_own_records(folder: Path) -> None:
    shard_path(folder, "train", 1).unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar can't be read"):
        open_shards(folder, verify=False)
    reasons = _reasons(open_shards(folder, allow_unaudited=("data",)))
    assert [index for index, reason in enumerate(reasons) if reason] == list(range(8, 16))
    assert set(reasons) == {None, "unreadable_shard"}


def test_members_in_another_order_are_found_out(folder: Path) -> None:
    """The index of one shard with the tar of another, of which sizes and places agree by chance or on purpose."""
    path = shard_path(folder, "train", 0)
    data = path.read_bytes()
    index = np.load(shard_path(folder, "train", 0, "index.npy"))
    name = data.index(b"000000", int(index[1, 2]) - 512)
    for changed, reason in (
        (data[:name] + b"9" + data[name + 1 :], "index"),  # the header's check sum
        (_renamed(data, int(index[1, 2]) - 512, "000000099.npy"), "missing_member"),
        (_renamed(data, int(index[1, 0]) - 512, "000000099.txt"), "missing_member"),
        (_renamed(data, int(index[1, 0]) - 512, "../00099.json"), "missing_member"),
    ):
        path.write_bytes(changed)
        assert _reasons(open_shards(folder, allow_unaudited=("data",)))[1] == reason


def _renamed(data: bytes, place: int, name: str) -> bytes:
    header = tarfile.TarInfo.frombuf(data[place : place + 512], "ascii", "strict")
    header.name = name
    return data[:place] + header.tobuf(tarfile.USTAR_FORMAT) + data[place + 512 :]


def _reasons(shards: Shards) -> list[str | None]:
    reasons: list[str | None] = []
    for index in range(len(shards)):
        try:
            shards[index]
            reasons.append(None)
        except RecordError as error:
            reasons.append(error.reason)
    return reasons


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_byte_is_taken_for_the_truth(original: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever byte changes: the audited folder is refused, and ids that are read are those that were written."""
    copy = tmp_path / "data"
    if not copy.exists():
        shutil.copytree(original, copy)
    tar = shard_path(copy, "train", 0)
    clean = shard_path(original, "train", 0).read_bytes()
    place, bit = data.draw(st.integers(0, len(clean) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(clean)
    flipped[place] ^= 1 << bit
    tar.write_bytes(flipped)
    with pytest.raises(DataError):
        open_shards(copy)
    shards, truth = open_shards(copy, allow_unaudited=("data",)), open_shards(original)
    for index in range(8):
        try:
            found = shards[index]
        except RecordError:
            continue
        assert {name: ids.tolist() for name, ids in found.ids.items()} == {
            name: ids.tolist() for name, ids in truth[index].ids.items()
        }


def test_settings_and_fractions_are_kept(original: Path) -> None:
    dataset = read_dataset(original)
    assert dataset.settings == {"fractions": FRACTIONS, "shard_records": 8}
    assert sum(entry.records for entries in dataset.splits.values() for entry in entries) == 60


def test_an_audit_lasts_as_long_as_what_it_is_of(folder: Path) -> None:
    dataset = read_dataset(folder)
    assert write_dataset(folder, SPACE, settings=dataset.settings) == dataset.sha256
    assert len(open_shards(folder)) > 0
    write_dataset(folder, SPACE, settings={**dataset.settings, "note": "another"})
    with pytest.raises(DataError, match="never audited"):
        open_shards(folder)

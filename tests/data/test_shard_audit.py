"""Audits of a data set that the real pipeline made from real files, whole and with every kind of damage.

Damage below the surface is sealed again (shards, reports and dataset.json rewritten to agree), so that the one check
that is meant to find it must.
"""

import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_vlm.checks import Check
from qwen3_vlm.data.shard_audit import ShardAudit, audit_shards, run_shard_audit
from qwen3_vlm.data.shards import (
    SPLITS,
    TokenizedRecord,
    open_shards,
    read_dataset,
    read_report,
    shard_path,
    write_dataset,
    write_report,
    write_shard,
)
from qwen3_vlm.data.tokenize import tokenize_manifest
from qwen3_vlm.errors import DataError
from qwen3_vlm.fingerprint import fingerprint_file
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from tests.data.speaking_pictures import line, save_tokenizers, write_manifest, write_speaking_pictures
from tests.data.tiny_shards import tiny_space, write_tiny

CHECKS = ["files", "token_space", "index", "tars", "splits", "ids", "records", "counts", "decode", "retokenize"]
Change = Callable[[list[TokenizedRecord]], Sequence[TokenizedRecord]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, UnifiedTokenizer]:
    """Manifest (one record of it can't be used), data set, tokenizers."""
    root = tmp_path_factory.mktemp("audit")
    manifest = write_speaking_pictures(root / "raw", 36)
    with open(manifest, "a") as stream:
        stream.write(json.dumps(line("gone", image="media/none.png")) + "\n")
    out = root / "data"
    uti_config = save_tokenizers(root / "uti")
    tokenize_manifest(manifest, out, uti_config, shard_records=8, fractions={"val": 0.2, "test": 0.2})
    return manifest, out, UnifiedTokenizer.open(out, download=False)


@pytest.fixture
def out(made: tuple[Path, Path, UnifiedTokenizer], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made[1], tmp_path / "data"))


@pytest.fixture
def uti(made: tuple[Path, Path, UnifiedTokenizer]) -> UnifiedTokenizer:
    return made[2]


@pytest.fixture
def manifest(made: tuple[Path, Path, UnifiedTokenizer]) -> Path:
    return made[0]


def failed(audit: ShardAudit) -> dict[str, str]:
    return {row.name: row.detail for row in audit.rows if row.passed is False}


def seal(out: Path) -> None:
    """dataset.json anew, out of the reports; shards whose bytes were changed by hand get a report that says so."""
    dataset = read_dataset(out)
    for entry in (entry for entries in dataset.splits.values() for entry in entries):
        path = out / "shards" / f"{entry.name}.report.json"
        report = json.loads(path.read_text())
        report["tar_sha256"] = fingerprint_file(out / "shards" / f"{entry.name}.tar")
        report["index_sha256"] = fingerprint_file(out / "shards" / f"{entry.name}.index.npy")
        report["tar_bytes"] = (out / "shards" / f"{entry.name}.tar").stat().st_size
        path.write_text(json.dumps(report))
    write_dataset(out, open_shards(out, allow_unaudited=("data",)).token_space, settings=dataset.settings)


def rewrite(out: Path, change: Change, split: str = "train", number: int = 0) -> None:
    """One shard written anew with other records, everything that is counted made to agree."""
    dataset, space = read_dataset(out), open_shards(out, allow_unaudited=("data",)).token_space
    shards = open_shards(out, split=split, allow_unaudited=("data",))
    records = [shards[index] for index in range(len(shards)) if shards.locate(index)[0] == number]
    before = read_report(out, split, number)
    assert before is not None
    summary = write_shard(out, split, number, change(records), space)
    write_report(out, summary, before["errors"], statistics=before["statistics"])
    stats = json.loads((out / "stats.json").read_text())
    part = stats["splits"][split]
    part["records"] += summary.records - before["records"]
    part["tokens"] = {name: n + summary.tokens[name] - before["tokens"][name] for name, n in part["tokens"].items()}
    (out / "stats.json").write_text(json.dumps(stats))
    settings = {**dataset.settings, "records": dataset.settings["records"] + summary.records - before["records"]}
    write_dataset(out, space, settings=settings)


# What is whole ----------------------------------------------------------------------------------------------


def test_a_fresh_data_set_passes_every_check(out: Path, uti: UnifiedTokenizer, manifest: Path) -> None:
    with pytest.raises(DataError, match="never audited"):
        open_shards(out)
    audit = audit_shards(out, uti, sample=None, decode=1000, manifest=manifest)
    assert [row.name for row in audit.rows] == CHECKS
    assert failed(audit) == {}
    assert all(row.passed for row in audit.rows)
    assert (audit.records, audit.sampled, audit.exit_status) == (36, 36, 0)
    assert sum(len(open_shards(out, split=split)) for split in SPLITS) == 36
    detail = {row.name: row.detail for row in audit.rows}
    assert detail["decode"] == "36 text, 18 image, 18 audio decoded"
    assert detail["retokenize"].startswith("36 records tokenized again")
    assert detail["counts"] == "36 records and 1 left out, everywhere the same"
    tree = json.loads((out / "audit.json").read_text())
    assert tree["dataset_sha256"] == fingerprint_file(out / "dataset.json")
    assert tree == audit.to_dict()
    first = (out / "audit.json").read_bytes()
    assert str(out.parent).encode() not in first
    audit_shards(out, uti, sample=None, decode=1000, manifest=manifest)
    assert (out / "audit.json").read_bytes() == first  # no times


def test_the_command(out: Path, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit = run_shard_audit(out, sample=10, manifest=manifest, download=False)
    printed = capsys.readouterr().out
    assert audit.passed
    assert printed == audit.table() + "\n"
    assert "36 records, 10 of them looked at" in printed
    assert printed.splitlines()[-1] == "passed"
    assert len(open_shards(out)) > 0


def test_without_tokenizers_and_sources_the_rest_is_checked(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "data", tiny_space(), audited=False)
    audit = audit_shards(folder, sample=7)
    assert [row.name for row in audit.rows if row.passed is None] == ["decode", "retokenize"]
    assert audit.passed
    assert audit.sampled == 7
    assert "–      decode" in audit.table()
    assert len(open_shards(folder)) > 0


def test_no_data_set_is_no_audit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no complete tokenized data set"):
        run_shard_audit(tmp_path)


# Damage that anyone can see ---------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_changed_tar(out: Path, uti: UnifiedTokenizer) -> None:
    flip(shard_path(out, "train", 0), 520)  # in the first record's .json
    audit = audit_shards(out, uti, sample=None)
    assert "shards/train-000000.tar is not the file that was written" in failed(audit)["files"]
    assert audit.exit_status == 1
    with pytest.raises(DataError, match="failed its audit"):
        open_shards(out)


def test_a_tar_that_was_cut_off(out: Path, uti: UnifiedTokenizer) -> None:
    rows = np.load(shard_path(out, "train", 0, "index.npy"))
    os.truncate(shard_path(out, "train", 0), int(rows[3, 2]) + 10)
    audit = failed(audit_shards(out, uti, sample=None))
    assert {"files", "tars", "records"} <= set(audit)
    assert f"{len(rows) - 3} truncated" in audit["records"]


def test_files_that_are_missing_or_too_many(out: Path, uti: UnifiedTokenizer) -> None:
    shutil.copy(shard_path(out, "val", 0), shard_path(out, "val", 77))
    (out / "stats.json").unlink()
    audit = failed(audit_shards(out, uti))
    assert "stats.json can't be read" in audit["files"]
    assert "shards/val-000077.tar belongs to no unit" in audit["files"]
    assert "stats.json can't be read" in audit["counts"]
    shard_path(out, "train", 0, "index.npy").unlink()
    assert "train-000000.index.npy can't be read" in failed(audit_shards(out, uti))["index"]


def test_tokenizers_of_another_token_space(tmp_path: Path, uti: UnifiedTokenizer) -> None:
    folder = write_tiny(tmp_path / "data", tiny_space())
    audit = failed(audit_shards(folder, uti))
    assert "text_vocab_size" in audit["token_space"]


# Damage that was sealed again -------------------------------------------------------------------------------


def test_other_ids_are_found_by_their_sources(out: Path, uti: UnifiedTokenizer, manifest: Path) -> None:
    def change(records: list[TokenizedRecord]) -> list[TokenizedRecord]:
        place = next(place for place, record in enumerate(records) if "image" in record.ids)
        ids = records[place].ids["image"].copy()
        span = uti.token_space.range_of("image")
        ids[0] = span.first + (ids[0] - span.first + 1) % span.size
        records[place] = replace(records[place], ids={**records[place].ids, "image": ids})
        return records

    rewrite(out, change)
    audit = failed(audit_shards(out, uti, sample=None, decode=1000, manifest=manifest))
    assert set(audit) == {"retokenize"}
    assert "image: 1 of" in audit["retokenize"]
    assert failed(audit_shards(out, uti, sample=None, decode=1000)) == {}


def test_another_text_is_found_by_decoding(out: Path, uti: UnifiedTokenizer) -> None:
    rewrite(out, lambda records: [replace(records[0], text="something else"), *records[1:]])
    audit = failed(audit_shards(out, uti, sample=None, decode=1000))
    assert set(audit) == {"decode"}
    assert "not those of the stored text" in audit["decode"]


def test_a_text_without_ids(out: Path, uti: UnifiedTokenizer) -> None:
    def change(records: list[TokenizedRecord]) -> list[TokenizedRecord]:
        place = next(place for place, record in enumerate(records) if "image" in record.ids)
        ids = {name: ids for name, ids in records[place].ids.items() if name != "text"}
        records[place] = replace(records[place], ids=ids)
        return records

    rewrite(out, change)
    assert "not both there" in failed(audit_shards(out, uti, sample=None))["records"]


def test_a_record_in_another_split(out: Path, uti: UnifiedTokenizer) -> None:
    moved = open_shards(out, split="val", allow_unaudited=("data",))[0]
    rewrite(out, lambda records: sorted([*records, moved], key=lambda record: record.key))
    audit = failed(audit_shards(out, uti, sample=None))
    assert set(audit) == {"splits", "ids"}  # it stands in both
    assert "is in train, its id says val" in audit["splits"]
    rewrite(out, lambda records: [record for record in records if record.key != moved.key], "val")
    audit = failed(audit_shards(out, uti, sample=None))
    assert set(audit) == {"splits"}


def test_an_id_that_stands_twice(out: Path, uti: UnifiedTokenizer) -> None:
    rewrite(out, lambda records: [*records, replace(records[0], key="000000099")])
    audit = failed(audit_shards(out, uti, sample=None))
    assert set(audit) == {"ids"}
    assert "train-000000[0] and train-000000[" in audit["ids"]


def test_records_out_of_order(out: Path, uti: UnifiedTokenizer) -> None:
    rewrite(out, lambda records: records[::-1])
    assert "out of order" in failed(audit_shards(out, uti, sample=None))["tars"]


def test_an_id_that_is_no_text(out: Path) -> None:
    path = shard_path(out, "train", 0)
    number = lambda found: b'"id": ' + b"1" * (len(found[1]) + 2)  # noqa: E731
    path.write_bytes(re.sub(rb'"id": "(r[0-9]+)"', number, path.read_bytes(), count=1))
    seal(out)
    assert "which is no text" in failed(audit_shards(out))["tars"]


def test_an_index_that_disagrees_with_its_tar(out: Path, uti: UnifiedTokenizer) -> None:
    path = shard_path(out, "train", 0, "index.npy")
    rows = np.load(path)
    rows[0, 1] -= 1  # the .json one byte shorter: everything is still in a row
    np.save(path, rows)
    seal(out)
    audit = failed(audit_shards(out, uti, sample=None))
    assert "is not where the index has a .json" in audit["tars"]
    assert "1 index" in audit["records"]
    rows[0, 1] += 1
    rows[0, 4:6] += (1, -1)
    np.save(path, rows)
    seal(out)
    audit = failed(audit_shards(out, uti, sample=None))
    assert "in the index" in audit["index"]
    assert "1 segments" in audit["records"] or "1 index" in audit["records"]


def test_an_extra_member(out: Path, uti: UnifiedTokenizer) -> None:
    path = shard_path(out, "train", 0)
    with tarfile.open(path, "a", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("999999999.json"))
    seal(out)
    assert "is not where the index has" in failed(audit_shards(out, uti, sample=None))["tars"]


def set_stats(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tree = json.loads((out / "stats.json").read_text())
    change(tree["splits"]["train"])
    (out / "stats.json").write_text(json.dumps(tree))
    seal(out)


def test_counts_that_disagree(out: Path, uti: UnifiedTokenizer) -> None:
    set_stats(out, lambda part: part.update(records=part["records"] + 1))
    audit = failed(audit_shards(out, uti))
    assert set(audit) == {"counts"}
    assert "in stats.json; the shards have" in audit["counts"]
    set_stats(out, lambda part: part.update(records=part["records"] - 1))
    assert failed(audit_shards(out, uti)) == {}
    (out / "tokenize_errors.jsonl").write_text("")
    seal(out)
    assert "lists 0 errors, the reports 1" in failed(audit_shards(out, uti))["counts"]


def test_a_record_that_vanished(out: Path, uti: UnifiedTokenizer) -> None:
    rewrite(out, lambda records: records[1:])
    settings = read_dataset(out).settings
    write_dataset(
        out,
        open_shards(out, allow_unaudited=("data",)).token_space,
        settings={**settings, "records": settings["records"] + 1},
    )
    audit = failed(audit_shards(out, uti))
    assert set(audit) == {"counts"}
    assert "the manifest had 37 records; 35 are here and 1 were left out" in audit["counts"]


def test_sources_that_changed(out: Path, uti: UnifiedTokenizer, manifest: Path, tmp_path: Path) -> None:
    raw = Path(shutil.copytree(manifest.parent, tmp_path / "raw"))
    (raw / "media" / "0.png").write_bytes((raw / "media" / "1.png").read_bytes())
    (raw / "media" / "2.wav").unlink(missing_ok=True)
    (raw / "media" / "3.wav").unlink()
    audit = failed(audit_shards(out, uti, sample=None, decode=1000, manifest=raw / "manifest.jsonl"))
    assert set(audit) == {"retokenize"}
    records = [json.loads(text) for text in (raw / "manifest.jsonl").read_text().splitlines()]
    other = write_manifest(raw / "other.jsonl", records[1:])
    detail = failed(audit_shards(out, uti, manifest=other))["retokenize"]
    assert "not the one that was tokenized" in detail
    assert "is another record" in detail


def test_a_failed_row_shows_a_few_and_counts_the_rest() -> None:
    audit = ShardAudit(
        Path("data"), "0" * 64, 9, 9, (Check("ids", False, "a\nb"), Check("tars", True, "c"))
    )  # fmt: skip
    assert audit.table().splitlines() == [
        "data: 9 records, 9 of them looked at",
        "  FAILED ids          a",
        " " * 22 + "b",
        "  ok     tars         c",
        "FAILED: this data set is refused by training",
    ]

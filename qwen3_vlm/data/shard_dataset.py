"""What is written beside the tars of a tokenized data set: a report per unit, and dataset.json over all of them.

dataset.json is written last and holds the hash of every other file, so where it is, the data set is complete,
and its own hash names the data set. The layout of the folder is described in `shards`.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen3_vlm.errors import DataError
from qwen3_vlm.fingerprint import fingerprint_file
from qwen3_vlm.storage import atomic_write_bytes, read_json
from qwen3_vlm.tokenization.token_space import FILE_NAME, HASH_NAME, MODALITIES, TokenSpace

SPLITS = ("train", "val", "test")
DATASET_FORMAT = "qwen3_vlm.shards.v1"
DATASET_NAME = "dataset.json"
AUDIT_NAME = "audit.json"
STATS_NAME = "stats.json"
SIDE_FILES = ("uti.yaml", FILE_NAME, HASH_NAME, STATS_NAME, "tokenize_errors.jsonl")
MAX_DATASET_BYTES = 500_000_000
_SHARD_NAME = re.compile(r"(train|val|test)-[0-9]{6}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def split_of(record_id: str, fractions: Mapping[str, float]) -> str:
    """The split that an id belongs to, whatever other records there are.

    Args:
        fractions: shares of "val" and "test"; the rest is "train".

    Raises:
        DataError: the fractions are no fractions.
    """
    shares = [fractions.get(split, 0.0) for split in ("val", "test")]
    unknown = set(fractions) - set(SPLITS)
    total = sum(shares) + fractions.get("train", 1 - sum(shares))
    if unknown or min(shares) < 0 or not sum(shares) <= 1 or abs(total - 1) > 1e-6:
        raise DataError(f"The fractions {dict(fractions)} can't be used: val, test and train are shares of 1.")
    digest = hashlib.sha256(record_id.encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < shares[0]:
        return "val"
    return "test" if place < shares[0] + shares[1] else "train"


def shard_path(out: str | Path, split: str, number: int, kind: str = "tar") -> Path:
    """Where a shard's "tar", "index.npy" or "report.json" stands."""
    return Path(out) / "shards" / f"{split}-{number:06d}.{kind}"


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """What was written: counts, and hashes of both files."""

    split: str
    number: int
    records: int
    tokens: dict[str, int]  # modality → ids
    tar_bytes: int
    tar_sha256: str
    index_sha256: str

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}"

    def to_dict(self) -> dict[str, Any]:
        """The head of the unit's report."""
        return {"name": self.name, **asdict(self)}


def write_report(
    out: str | Path, summary: ShardSummary, errors: Sequence[Mapping[str, Any]] = (), **more: Any
) -> dict[str, Any]:
    """Say that a unit is done. `more` is what the statistics want to know of it; no times, hosts or paths.

    Raises:
        StorageError: the disk can't be written.
    """
    report = {**summary.to_dict(), "errors": [dict(error) for error in errors], **more}
    _write_json(shard_path(out, summary.split, summary.number, "report.json"), report)
    return report


def read_report(out: str | Path, split: str, number: int, *, verify: bool = True) -> dict[str, Any] | None:
    """The report of a unit that is done, or None where there is work left to do.

    Args:
        verify: hash both files; false looks at the tar's size only.
    """
    try:
        report = read_json(shard_path(out, split, number, "report.json"), error=DataError, max_bytes=MAX_DATASET_BYTES)
        tar, index = (shard_path(out, split, number, kind) for kind in ("tar", "index.npy"))
        done = tar.stat().st_size == report["tar_bytes"] and index.is_file() and isinstance(report["errors"], list)
        if done and verify:
            hashes = [fingerprint_file(path) for path in (tar, index)]
            done = hashes == [report["tar_sha256"], report["index_sha256"]]
    except (DataError, KeyError, OSError):
        return None
    return report if done else None


def write_dataset(out: str | Path, token_space: TokenSpace, *, settings: Mapping[str, Any]) -> str:
    """Write dataset.json out of all reports and the hashes of the other files; returns its sha256.

    An audit of something else that was there before is removed.

    Args:
        settings: what decided the content: "fractions" and, for people, whatever else did.

    Raises:
        DataError: a unit is not done, or a file that belongs to the data set is missing.
    """
    out = Path(out)
    splits: dict[str, Any] = {}
    for path in sorted((out / "shards").glob("*.report.json")):
        entry = _entry(out, path)
        split = splits.setdefault(
            entry["name"].partition("-")[0],
            {"records": 0, "errors": 0, "tokens": dict.fromkeys(MODALITIES, 0), "shards": []},
        )
        split["records"] += entry["records"]
        split["errors"] += entry["errors"]
        split["tokens"] = {modality: split["tokens"][modality] + entry["tokens"][modality] for modality in MODALITIES}
        split["shards"].append(entry)
    try:
        files = {name: fingerprint_file(out / name) for name in SIDE_FILES}
    except OSError as error:
        raise DataError(f"{error.filename} belongs to the data set and can't be read: {error.strerror}.") from error
    tree = {
        "format": DATASET_FORMAT,
        "token_space_sha256": token_space.sha256,
        "settings": dict(settings),
        "files": files,
        "splits": {split: splits[split] for split in SPLITS if split in splits},
    }
    _write_json(out / DATASET_NAME, tree)
    sha256 = fingerprint_file(out / DATASET_NAME)
    if f'"{sha256}"'.encode() not in _read_bytes(out / AUDIT_NAME):
        (out / AUDIT_NAME).unlink(missing_ok=True)
    return sha256


def _entry(out: Path, path: Path) -> dict[str, Any]:
    """One unit's line in dataset.json."""
    name = path.name.removesuffix(".report.json")
    split, _, number = name.partition("-")
    report = read_report(out, split, int(number), verify=False) if _SHARD_NAME.fullmatch(name) else None
    if report is None:
        raise DataError(f"{path} does not fit its shard: the unit is not done. Run the tokenizing again.")
    kept = {key: report[key] for key in ("name", "records", "tokens", "tar_bytes", "tar_sha256", "index_sha256")}
    return {**kept, "errors": len(report["errors"]), "report_sha256": fingerprint_file(path)}


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """ASCII, so that a lone surrogate in somebody's id can't stop the work."""
    atomic_write_bytes(path, (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode("ascii"))


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard as dataset.json has it."""

    name: str
    records: int
    errors: int
    tokens: dict[str, int]
    tar_bytes: int
    tar_sha256: str
    index_sha256: str
    report_sha256: str


@dataclass(frozen=True, slots=True)
class DatasetFile:
    """dataset.json, checked."""

    folder: Path
    sha256: str  # of the file
    token_space_sha256: str
    settings: dict[str, Any]
    files: dict[str, str]
    splits: dict[str, list[ShardEntry]]

    def changed_files(self, *, splits: Collection[str] = SPLITS, tars: bool = True) -> list[str]:
        """One line per file that is missing or not the one that was written."""
        lines = [_changed(self.folder / name, sha256) for name, sha256 in self.files.items()]
        for entry in (entry for split in splits for entry in self.splits.get(split, ())):
            stem = self.folder / "shards" / entry.name
            lines.append(_changed(Path(f"{stem}.index.npy"), entry.index_sha256))
            lines.append(_changed(Path(f"{stem}.report.json"), entry.report_sha256))
            lines.append(_changed(Path(f"{stem}.tar"), entry.tar_sha256 if tars else None, entry.tar_bytes))
        return [line for line in lines if line]


def read_dataset(folder: str | Path) -> DatasetFile:
    """Read and check dataset.json.

    Raises:
        DataError: it is missing (the tokenizing did not end), damaged, or of another format.
    """
    path = Path(folder) / DATASET_NAME
    if not path.is_file():
        raise DataError(
            f"{folder} is no complete tokenized data set: it has no dataset.json. Run the tokenizing again."
        )
    tree = read_json(path, error=DataError, max_bytes=MAX_DATASET_BYTES)
    if tree.get("format") != DATASET_FORMAT:
        raise DataError(f"{path} has the format {str(tree.get('format'))[:80]!r}; {DATASET_FORMAT!r} is read.")
    try:
        splits = {
            split: [_parse_entry(split, entry) for entry in part["shards"]] for split, part in tree["splits"].items()
        }
        files = {name: _need(tree["files"][name], _SHA256) for name in SIDE_FILES}
        space = _need(tree["token_space_sha256"], _SHA256)
        settings = dict(tree["settings"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error} is missing or not what the format has there.") from error
    return DatasetFile(Path(folder), fingerprint_file(path), space, settings, files, splits)


def _parse_entry(split: str, tree: Mapping[str, Any]) -> ShardEntry:
    entry = ShardEntry(**tree)
    _need(entry.name, _SHARD_NAME)
    for value in (entry.tar_sha256, entry.index_sha256, entry.report_sha256):
        _need(value, _SHA256)
    counts = [entry.records, entry.errors, entry.tar_bytes, *entry.tokens.values()]
    if any(type(count) is not int or count < 0 for count in counts) or not entry.name.startswith(f"{split}-"):
        raise ValueError(f"the shard {entry.name} of {split}")
    return entry


def _need(value: Any, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(repr(value)[:80])
    return value


def _changed(path: Path, sha256: str | None, size: int | None = None) -> str:
    """A line that says what is wrong with a file, or nothing."""
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            return f"{path} has {found:,} bytes; {size:,} were written."
        if sha256 is not None and fingerprint_file(path) != sha256:
            return f"{path} is not the file that was written: its sha256 is another."
    except OSError as error:
        return f"{path} can't be read: {error.strerror or error}."
    return ""

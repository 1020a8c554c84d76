"""Can this tokenized data set be trusted? What is on disk is checked against itself, its sources and the tokenizers.

Every file is hashed and every tar is walked through with `tarfile`, independently of the index that training
reads by. A sample of the records (or all) is read as training reads them, some are decoded, and where the manifest is
at hand, their sources are tokenized again, one at a time, and must give the same ids. The result is written to
audit.json, bound to the sha256 of dataset.json; training refuses a data set without one that passed.
"""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qwen3_vlm.checks import Check
from qwen3_vlm.data.shard_dataset import AUDIT_NAME, DATASET_NAME, SIDE_FILES, SPLITS, STATS_NAME, DatasetFile
from qwen3_vlm.data.shard_format import MAX_JSON_BYTES
from qwen3_vlm.data.shards import Shards, TokenizedRecord, read_dataset, split_of
from qwen3_vlm.data.shuffle import Permutation
from qwen3_vlm.errors import DataError, RecordError, TokenError, TokenSpaceError
from qwen3_vlm.storage import atomic_write_json, read_json
from qwen3_vlm.tokenization.token_space import MODALITIES, TokenSpace

if TYPE_CHECKING:
    from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer

AUDIT_FORMAT = "qwen3_vlm.shard_audit.v1"
SAMPLE = 1000
DECODED = 16
SHOWN = 5  # problems per check that are written out


@dataclass(frozen=True, slots=True)
class ShardAudit:
    """The result over one data set."""

    folder: Path
    dataset_sha256: str
    records: int
    sampled: int
    rows: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """No check failed; one that was not made does not count."""
        return all(row.passed is not False for row in self.rows)

    @property
    def exit_status(self) -> int:
        return 0 if self.passed else 1

    def to_dict(self) -> dict[str, Any]:
        """What audit.json holds; neither times nor paths of the machine."""
        return {
            "format": AUDIT_FORMAT,
            "dataset_sha256": self.dataset_sha256,
            "passed": self.passed,
            "records": self.records,
            "sampled": self.sampled,
            "checks": [row.to_dict() for row in self.rows],
        }

    def table(self) -> str:
        """For people."""
        marks = {True: "ok    ", False: "FAILED", None: "–     "}
        lines = [f"{self.folder}: {self.records:,} records, {self.sampled:,} of them looked at"]
        for row in self.rows:
            first, *others = row.detail.splitlines()
            lines += [f"  {marks[row.passed]} {row.name:<12} {first}", *(f"{'':<22}{line}" for line in others)]
        lines.append("passed" if self.passed else "FAILED: this data set is refused by training")
        return "\n".join(lines)


def run_shard_audit(
    out: str | Path,
    *,
    sample: int | None = SAMPLE,
    manifest: str | Path | None = None,
    overrides: Sequence[str] = (),
    download: bool = True,
) -> ShardAudit:
    """`qwen3-vlm data audit`: open the tokenizers of the data set's own uti.yaml, audit, write audit.json, print.

    Raises:
        DataError: there is no complete data set.
        ConfigError, ModelError, TokenSpaceError: the tokenizers can't be opened, or are others.
    """
    read_dataset(out)  # before a tokenizer is loaded
    from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer

    uti = UnifiedTokenizer.open(out, overrides, download=download)
    audit = audit_shards(out, uti, sample=sample, manifest=manifest)
    print(audit.table())
    return audit


def audit_shards(
    out: str | Path,
    uti: "UnifiedTokenizer | None" = None,
    *,
    sample: int | None = SAMPLE,
    decode: int = DECODED,
    manifest: str | Path | None = None,
    write: bool = True,
) -> ShardAudit:
    """Check a tokenized data set.

    Args:
        uti: decodes, and tokenizes again; None leaves those checks out.
        sample: records that are read, the same ones each time; None reads all.
        decode: of those, so many are decoded.
        manifest: the data set's manifest, whose sources are then tokenized again for the decoded records.
        write: keep the result in audit.json.

    Raises:
        DataError: there is no complete data set.
        StorageError: audit.json can't be written.
    """
    dataset = read_dataset(out)
    rows = [_check_files(dataset)]
    space, row = _check_token_space(dataset, uti)
    rows.append(row)
    parts, row = _open_parts(dataset, space)
    rows.append(row)
    chosen = _sample(parts, sample, dataset.sha256)
    walk = _Walk(dataset)
    for part in parts:
        walk.through(part)
    records, row = _check_records(chosen, decode)
    rows += [*walk.rows(), row, _check_counts(dataset, walk.records, manifest)]
    rows += [_check_decoding(records, uti), _check_again(dataset, records, uti, manifest)]
    audit = ShardAudit(dataset.folder, dataset.sha256, sum(map(len, parts)), len(chosen), tuple(rows))
    if write:
        atomic_write_json(dataset.folder / AUDIT_NAME, audit.to_dict())
    return audit


# Files ------------------------------------------------------------------------------------------------------


def _check_files(dataset: DatasetFile) -> Check:
    """Everything that dataset.json names is what was written, and in shards/ is nothing else."""
    problems = [line.replace(f"{dataset.folder}{os.sep}", "") for line in dataset.changed_files()]
    entries = [entry for split in dataset.splits.values() for entry in split]
    known = {f"{entry.name}.{kind}" for entry in entries for kind in ("tar", "index.npy", "report.json")}
    found = {path.name for path in (dataset.folder / "shards").glob("*")}
    problems += [f"shards/{name} belongs to no unit of {DATASET_NAME}" for name in sorted(found - known)]
    size = sum(entry.tar_bytes for entry in entries)
    return _row("files", problems, f"{len(known) + len(SIDE_FILES)} files are as written, {size:,} bytes in tars")


def _check_token_space(dataset: DatasetFile, uti: "UnifiedTokenizer | None") -> tuple[TokenSpace | None, Check]:
    """One token space: in the folder, in dataset.json, and of the tokenizers that are here."""
    try:
        space = TokenSpace.load(dataset.folder)
        if uti is not None:
            uti.token_space.require_same(space, "The data set")
    except TokenSpaceError as error:
        return None, _row("token_space", str(error).replace(f"{dataset.folder}{os.sep}", "").splitlines(), "")
    problems = [] if space.sha256 == dataset.token_space_sha256 else [f"token_space.json is not {DATASET_NAME}'s"]
    return space, _row("token_space", problems, f"sha256 {space.sha256}")


def _open_parts(dataset: DatasetFile, space: TokenSpace | None) -> tuple[list[Shards], Check]:
    """Each split as training opens it; the index of each shard has as many ids as dataset.json says."""
    if space is None:
        return [], Check("index", False, "can't be read without the token space")
    parts, problems = [], []
    for split, entries in dataset.splits.items():
        try:
            part = Shards(dataset, space, split)
        except DataError as error:
            problems.append(str(error).replace(f"{dataset.folder}{os.sep}", ""))
            continue
        parts.append(part)
        ends = np.cumsum([entry.records for entry in entries])
        for entry, lengths in zip(entries, np.split(part.lengths, ends[:-1]), strict=True):
            tokens = dict(zip(MODALITIES, lengths.sum(axis=0).tolist(), strict=True))
            if tokens != entry.tokens:
                problems.append(f"{entry.name}: {tokens} in the index, {entry.tokens} in {DATASET_NAME}")
    count = sum(len(entries) for entries in dataset.splits.values())
    return parts, _row("index", problems, f"{count} indices fit their shards")


def _check_counts(dataset: DatasetFile, walked: Counter[str], manifest: str | Path | None) -> Check:
    """dataset.json, the tars, stats.json and tokenize_errors.jsonl speak of the same numbers."""
    folder, problems = dataset.folder, []
    try:
        stats = read_json(folder / STATS_NAME, error=DataError).get("splits")
        totals = read_json(folder / DATASET_NAME, error=DataError, max_bytes=500_000_000)["splits"]
        with open(folder / SIDE_FILES[-1], "rb") as stream:
            listed = sum(bool(line.strip()) for line in stream)
    except (DataError, OSError) as error:
        return _row("counts", [str(error).replace(f"{folder}{os.sep}", "")], "")
    stats = stats if isinstance(stats, dict) else {}
    errors = 0
    for split in SPLITS:
        entries = dataset.splits.get(split, [])
        summed = {"records": sum(entry.records for entry in entries), "errors": sum(entry.errors for entry in entries)}
        tokens = {name: sum(entry.tokens.get(name, 0) for entry in entries) for name in MODALITIES}
        errors += summed["errors"]
        for name, tree in ((STATS_NAME, stats.get(split)), (DATASET_NAME, totals.get(split))):
            told = {key: tree.get(key) for key in (*summed, "tokens")} if isinstance(tree, dict) else None
            nothing = not any(summed.values()) and tree is None
            if not nothing and told != {**summed, "tokens": tokens}:
                problems.append(f"{split}: {told} in {name}; the shards have {summed | {'tokens': tokens}}")
        if walked[split] != summed["records"]:
            problems.append(f"{split}: {walked[split]:,} records in the tars, {summed['records']:,} in {DATASET_NAME}")
    if listed != errors:
        problems.append(f"{SIDE_FILES[-1]} lists {listed:,} errors, the reports {errors:,}")
    stored, planned = walked.total(), dataset.settings.get("records")
    if isinstance(planned, int) and planned != stored + errors:
        problems.append(f"the manifest had {planned:,} records; {stored:,} are here and {errors:,} were left out")
    return _row("counts", problems, f"{stored:,} records and {errors:,} left out, everywhere the same")


# Tars -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Walk:
    """One pass over all tars, header by header, and over all ids."""

    dataset: DatasetFile
    records: Counter[str] = field(default_factory=Counter)  # split → in the tars
    damage: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)  # in another split than their id says
    _digests: bytearray = field(default_factory=bytearray)  # 16 bytes of each id's sha256
    _origins: list[tuple[int, Shards, int]] = field(default_factory=list)  # first record, part, shard

    def through(self, part: Shards) -> None:
        """Every shard of one split."""
        for number in range(len(part.entries)):
            path = part.tar_path(number)
            self._origins.append((len(self._digests) // 16, part, number))
            try:
                self._shard(path, part, number)
            except (tarfile.TarError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                self.damage.append(f"{path.name}: {' '.join(str(error).split())}")

    def _shard(self, path: Path, part: Shards, number: int) -> None:
        start = int(part.ends[number - 1]) if number else 0
        rows = part.index_rows(number)
        key, count = "", 0
        with open(path, "rb") as content, tarfile.open(path, "r:") as tar:
            for member in _members(tar):
                row, column = divmod(count, 2)
                suffix = (".json", ".npy")[column]
                expected = rows[row, 2 * column : 2 * column + 2].tolist() if row < len(rows) else None
                if [member.offset_data, member.size] != expected or not member.name.endswith(suffix):
                    raise ValueError(f"member {count}, {member.name!r}, is not where the index has a {suffix}")
                name = member.name.removesuffix(suffix)
                if name <= key if not column else name != key:
                    raise ValueError(f"member {count}, {member.name!r}, is out of order after {key!r}")
                key, count = name, count + 1
                if not column:
                    self._record(content, member, part, start + row)
        if count != 2 * len(rows):
            raise ValueError(f"{count} members for {len(rows)} records")

    def _record(self, content: Any, member: tarfile.TarInfo, part: Shards, index: int) -> None:
        if member.size > MAX_JSON_BYTES:
            raise ValueError(f"{member.name} has {member.size:,} bytes")
        content.seek(member.offset_data)
        record_id = json.loads(content.read(member.size))["id"]
        if not isinstance(record_id, str):
            raise TypeError(f"{member.name} has the id {str(record_id)[:80]}, which is no text")
        self._digests += hashlib.sha256(record_id.encode("utf-8", "surrogatepass")).digest()[:16]
        self.records[part.split] += 1
        fractions = self.dataset.settings.get("fractions", {})
        belongs = split_of(record_id, fractions)
        if belongs != part.split:
            self.strays.append(f"{record_id[:80]!r} is in {part.split}, its id says {belongs}")

    def rows(self) -> list[Check]:
        """What was found: structure, splits, ids that stand twice."""
        digests = np.frombuffer(bytes(self._digests), dtype="<u8").reshape(-1, 2)
        order = np.lexsort(digests.T)
        same = np.flatnonzero((digests[order][1:] == digests[order][:-1]).all(axis=1)) if len(order) else order
        pairs = [(int(order[place]), int(order[place + 1])) for place in same]
        twice = [f"{self._origin(first)} and {self._origin(second)} have the same id" for first, second in pairs]
        across = [line for line, pair in zip(twice, pairs, strict=True) if len({self._split(at) for at in pair}) > 1]
        total = f"{self.records.total():,}"
        return [
            _row("tars", self.damage, f"every header of {len(self._origins)} shards is where the index has it"),
            _row("splits", self.strays + across, f"{total} ids, each in the split of its hash and in no other"),
            _row("ids", twice, f"{total} ids, none twice"),
        ]

    def _at(self, record: int) -> tuple[int, Shards, int]:
        return next(origin for origin in reversed(self._origins) if origin[0] <= record)

    def _split(self, record: int) -> str:
        return self._at(record)[1].split

    def _origin(self, record: int) -> str:
        first, part, shard = self._at(record)
        return f"{part.entries[shard].name}[{record - first}]"


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        vars(tar)["members"].clear()  # tarfile would keep every header
        yield member


# Records ----------------------------------------------------------------------------------------------------


def _sample(parts: Sequence[Shards], sample: int | None, key: str) -> list[tuple[Shards, int]]:
    """Which records are read: all, or a shuffled choice over all splits that the data set itself decides."""
    total = sum(map(len, parts))
    numbers = np.arange(total)
    if sample is not None and sample < total:
        numbers = Permutation(total, f"audit/{key}")(numbers[:sample])
    ends = np.cumsum([len(part) for part in parts])
    owners = np.searchsorted(ends, numbers, side="right")
    return [
        (parts[owner], int(number) - int(ends[owner]) + len(parts[owner]))
        for owner, number in zip(owners.tolist(), numbers, strict=True)
    ]


def _check_records(chosen: Sequence[tuple[Shards, int]], keep: int) -> tuple[list[TokenizedRecord], Check]:
    """Read as training reads: headers, fields, segments, hashes, token space, ranges, grids, frames."""
    kept: list[TokenizedRecord] = []
    reasons: Counter[str] = Counter()
    problems: list[str] = []
    for part, index in chosen:
        try:
            record = part[index]
        except RecordError as error:
            reasons[error.reason] += 1
            problems.append(str(error).replace(f"{part.folder}{os.sep}", ""))
            continue
        if (record.text is None) != ("text" not in record.ids):
            problems.append(f"{part.split} {record.key}: its text and its ids of text are not both there")
        if len(kept) < keep:
            kept.append(record)
    counted = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    problems = [counted, *problems] if counted else problems
    return kept, _row("records", problems, f"{len(chosen):,} read: arrays, segments, hashes, ranges and shapes agree")


def _check_decoding(records: Sequence[TokenizedRecord], uti: "UnifiedTokenizer | None") -> Check:
    """Texts come back as they are stored; pictures and sounds come back at all."""
    if uti is None:
        return Check("decode", None, "not checked: no tokenizers are open")
    done: Counter[str] = Counter()
    problems: list[str] = []
    for record in records:
        for modality, check in _DECODERS.items():
            if modality not in record.ids:
                continue
            done[modality] += 1
            try:
                problem = check(uti, record)
            except TokenError as error:
                problem = str(error)
            if problem:
                problems.append(f"{record.key}, {modality}: {problem}")
    return _row("decode", problems, ", ".join(f"{done[name]} {name}" for name in MODALITIES) + " decoded")


def _decode_text(uti: "UnifiedTokenizer", record: TokenizedRecord) -> str:
    return "" if uti.decode_text(record.ids["text"]) == record.text else "its ids are not those of the stored text"


def _decode_image(uti: "UnifiedTokenizer", record: TokenizedRecord) -> str:
    picture = uti.decode_image(record.ids["image"], record.metadata["image"])
    return "" if picture.width and picture.height else "an empty picture"


def _decode_audio(uti: "UnifiedTokenizer", record: TokenizedRecord) -> str:
    waveform, _ = uti.decode_audio(record.ids["audio"], record.metadata["audio"])
    return "" if waveform.size and bool(np.isfinite(waveform).all()) else "an empty sound, or one that is not finite"


_DECODERS: dict[str, Callable[["UnifiedTokenizer", TokenizedRecord], str]] = {
    "text": _decode_text,
    "image": _decode_image,
    "audio": _decode_audio,
}


# Sources ----------------------------------------------------------------------------------------------------


def _check_again(
    dataset: DatasetFile,
    records: Sequence[TokenizedRecord],
    uti: "UnifiedTokenizer | None",
    manifest: str | Path | None,
) -> Check:
    """Read the sources once more, tokenize them one at a time, and compare."""
    if uti is None or manifest is None:
        missing = "no tokenizers are open" if uti is None else "the manifest was not given"
        return Check("retokenize", None, f"not checked: {missing}")
    from qwen3_vlm.data.manifest import ManifestRecord, read_manifest

    wanted = {int(record.key): record for record in records}
    problems: list[str] = []
    digest = hashlib.sha256()
    for line in read_manifest(manifest, digest):
        record = wanted.pop(line.entry.line - 1, None)
        if record is None:
            continue
        if not isinstance(line.entry, ManifestRecord) or line.entry.id != record.id:
            problems.append(f"{record.key}: line {line.entry.line} of the manifest is another record")
            continue
        try:
            problems += _differences(record, _tokenize(line.entry, Path(manifest), uti, dataset.settings))
        except (RecordError, TokenError) as error:
            problems.append(f"{record.key}: {str(error).replace(f'{Path(manifest).parent}{os.sep}', '')}")
    problems += [f"{record.key}: the manifest has no such line" for record in wanted.values()]
    written = dataset.settings.get("manifest_sha256")
    if written is not None and written != digest.hexdigest():
        problems.insert(0, "the manifest is not the one that was tokenized: its sha256 is another")
    return _row("retokenize", problems, f"{len(records)} records tokenized again, one at a time: the same ids")


def _tokenize(
    entry: Any, manifest: Path, uti: "UnifiedTokenizer", settings: dict[str, Any]
) -> dict[str, npt.NDArray[Any]]:
    from qwen3_vlm.config import DataConfig
    from qwen3_vlm.data.images import load_image
    from qwen3_vlm.data.manifest import resolve_media
    from qwen3_vlm.data.sounds import load_sound

    ids: dict[str, npt.NDArray[Any]] = {}
    if entry.text is not None:
        ids["text"] = np.asarray(uti.encode_text(entry.text), dtype=np.int64)
    if entry.image is not None:
        path = resolve_media(manifest.parent, entry.image, "image", manifest.name)
        limits = settings.get("limits")
        limit = limits.get("max_image_pixels") if isinstance(limits, dict) else None
        max_pixels = int(limit or DataConfig().max_image_pixels)
        ids["image"] = uti.encode_image(load_image(path, max_pixels=max_pixels, name=entry.image)).ids
    if entry.audio is not None and uti.config.audio is not None:
        path = resolve_media(manifest.parent, entry.audio, "audio", manifest.name)
        ids["audio"] = uti.encode_audio(
            *load_sound(path, max_seconds=uti.config.audio.max_seconds, name=entry.audio)
        ).ids
    return ids


def _differences(record: TokenizedRecord, again: dict[str, npt.NDArray[Any]]) -> list[str]:
    if set(record.ids) != set(again):
        return [f"{record.key}: {sorted(record.ids)} are stored, the manifest has {sorted(again)}"]
    lines = []
    for modality, ids in record.ids.items():
        if not np.array_equal(ids, again[modality]):
            same = len(ids) == len(again[modality]) and int((ids != again[modality]).sum())
            what = f"{same:,} of {len(ids):,} ids differ" if same else f"{len(ids):,} ids, {len(again[modality]):,} now"
            lines.append(f"{record.key}, {modality}: {what}")
    return lines


def _row(check: str, problems: Sequence[str], fine: str) -> Check:
    """A passed check says what was seen, a failed one what is wrong."""
    if not problems:
        return Check(check, True, fine)
    shown = [_printable(line) for line in problems[:SHOWN]]
    more = [f"… and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else []
    return Check(check, False, "\n".join([*shown, *more]))


def _printable(text: str) -> str:
    """A lone surrogate of somebody's id can't be written as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")

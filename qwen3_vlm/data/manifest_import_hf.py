"""Hugging Face data sets on disk to a raw manifest: what `save_to_disk` wrote (Arrow), or Parquet files.

Read with pyarrow alone, row by row. `Image` and `Audio` columns are structs of bytes and path; the bytes are
written beside the manifest under their hash, so that importing twice writes nothing twice.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_vlm.data.manifest import ManifestRecord
from qwen3_vlm.data.manifest_import import (
    ID_COLUMNS,
    MANIFEST_NAME,
    TEXT_COLUMNS,
    ImportReport,
    ManifestWriter,
    new_manifest,
)
from qwen3_vlm.errors import DataError, RecordError
from qwen3_vlm.storage import read_json

BATCH_ROWS = 16  # of Parquet, whose rows are copied; Arrow files are mapped
HASH_CHARACTERS = 24
MAGIC = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"fLaC": ".flac",
    b"OggS": ".ogg",
    b"ID3": ".mp3",
    b"\xff\xfb": ".mp3",
    b"\xff\xf3": ".mp3",
    b"FORM": ".aiff",
}


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column is what; None where there is none."""

    image: str | None = None
    audio: str | None = None
    text: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class _Table:
    """Some files with the same columns."""

    split: str  # of a DatasetDict, else ""
    files: tuple[Path, ...]


def import_hf_dataset(
    folder: str | Path,
    out: str | Path,
    *,
    columns: Columns | None = None,
    source: str | None = None,
    task: str | None = None,
) -> ImportReport:
    """Import a data set folder, a folder of Parquet files, or one such file.

    The id is that of the id column; without one, a hash of what the row holds. In a `DatasetDict` it begins
    with the split's name, which is also in `meta`. Simple values of other columns become `meta`.

    Args:
        out: the manifest, or a folder for it; media are written into `media/` beside it.
        columns: names where the usual ones do not do.

    Raises:
        DataError: pyarrow is missing, or nothing there can be read.
    """
    folder, out = Path(folder), Path(out)
    manifest = out if out.suffix == ".jsonl" else out / MANIFEST_NAME
    with new_manifest(manifest.absolute()) as writer:
        for table in _tables(folder):
            for file in table.files:
                _import_file(writer, file, table.split, columns or Columns(), source or folder.stem, task)
    return writer.report


def _import_file(writer: ManifestWriter, file: Path, split: str, asked: Columns, source: str, task: str | None) -> None:
    pyarrow = _pyarrow()
    try:
        schema, rows = _open(file)
        features = _features(schema)
        columns = _choose(schema, features, asked, file)
        labels = features.get(columns.text or "", {}).get("names")
        for number, row in enumerate(rows):
            try:
                writer.write(_record(writer, row, columns, labels, split, source, task))
            except RecordError as error:
                writer.skip(error.reason, f"{file.name}[{number}]: {error}")
    except (pyarrow.ArrowException, OSError) as error:
        why = " ".join(str(error).split())[:200]
        raise DataError(f"{file} can't be read as an Arrow stream or Parquet file: {why}.") from error


def _record(
    writer: ManifestWriter,
    row: Mapping[str, Any],
    columns: Columns,
    labels: Sequence[str] | None,
    split: str,
    source: str,
    task: str | None,
) -> ManifestRecord:
    digest = hashlib.sha256()
    paths = {}
    for kind, column in (("image", columns.image), ("audio", columns.audio)):
        if column is not None and row[column] is not None:
            data, suffix = _media(row[column], kind)
            digest.update(hashlib.sha256(data).digest())
            paths[kind] = writer.save_media(data, suffix)
    text = None if columns.text is None else _text(row[columns.text], labels)
    digest.update((text or "").encode("utf-8", "surrogatepass"))
    given = None if columns.id is None else row[columns.id]
    name = f"sha256-{digest.hexdigest()[:HASH_CHARACTERS]}" if given is None else str(given)
    used = {columns.image, columns.audio, columns.text, columns.id}
    meta = {key: value for key, value in row.items() if key not in used and _is_simple(value)}
    if split:
        name, meta["hf_split"] = f"{split}/{name}", split
    return ManifestRecord(name, source, paths.get("image"), paths.get("audio"), text, task, meta, 0)


def _media(value: Any, kind: str) -> tuple[bytes, str]:
    """Encoded bytes and the ending they should have."""
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if not data and isinstance(value, Mapping) and value.get("path"):
        raise RecordError(f"the {kind} {str(value['path'])[:200]} is only named, not in the data set.", f"no_{kind}")
    if not isinstance(data, bytes) or not data:
        raise RecordError(f"the {kind} is empty.", f"no_{kind}")
    if data[:4] == b"RIFF":
        return data, ".webp" if data[8:12] == b"WEBP" else ".wav"
    suffix = next((suffix for magic, suffix in MAGIC.items() if data.startswith(magic)), "")
    return data, suffix or f".{kind}"


def _text(value: Any, labels: Sequence[str] | None) -> str | None:
    if value is None:
        return None
    if labels is not None and isinstance(value, int):
        if not 0 <= value < len(labels):
            raise RecordError(f"the label {value} has no name.", "no_caption")
        return str(labels[value])
    return str(value)


def _is_simple(value: Any) -> bool:
    return isinstance(value, str | int | bool) or (isinstance(value, float) and math.isfinite(value))


def _tables(folder: Path) -> Iterator[_Table]:
    if folder.is_file():
        yield _Table("", (folder,))
        return
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; give a data set folder or a Parquet file.")
    if (folder / "dataset_dict.json").is_file():
        for split in read_json(folder / "dataset_dict.json", error=DataError).get("splits", []):
            yield _Table(str(split), _files(_inside(folder, str(split))))
        return
    yield _Table("", _files(folder))


def _files(folder: Path) -> tuple[Path, ...]:
    """In the order of state.json, which `save_to_disk` writes, else of their names."""
    if (folder / "state.json").is_file():
        listed = read_json(folder / "state.json", error=DataError).get("_data_files", [])
        names = [entry.get("filename") for entry in listed if isinstance(entry, dict)]
        return tuple(_inside(folder, str(name)) for name in names)
    found = sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".arrow"))
    if not found:
        raise DataError(f"{folder} holds neither what `save_to_disk` writes nor .parquet or .arrow files.")
    return tuple(found)


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder} names {name!r}, which leads out of it.")
    return path


def _open(file: Path) -> tuple[Any, Iterator[dict[str, Any]]]:
    """The schema, and the rows one by one."""
    pyarrow = _pyarrow()
    if file.suffix == ".parquet":
        from pyarrow import parquet

        table = parquet.ParquetFile(file)
        return table.schema_arrow, _rows(table.iter_batches(batch_size=BATCH_ROWS))
    from pyarrow import ipc

    reader = ipc.open_stream(pyarrow.memory_map(str(file)))
    return reader.schema, _rows(reader)


def _rows(batches: Any) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for number in range(batch.num_rows):
            yield batch.slice(number, 1).to_pylist()[0]


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What `datasets` says of the columns; empty for files that it did not write."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: about for name, about in found.items() if isinstance(about, dict)} if isinstance(found, dict) else {}


def _choose(schema: Any, features: Mapping[str, Mapping[str, Any]], asked: Columns, file: Path) -> Columns:
    """The asked-for columns, or the first of a fitting type and name."""
    for name in (asked.image, asked.audio, asked.text, asked.id):
        if name is not None and name not in schema.names:
            raise DataError(f"{file} has no column {name!r}; it has {', '.join(schema.names)[:500]}.")
    kinds = {name: features.get(name, {}).get("_type") or _kind_by_name(schema, name) for name in schema.names}

    def first(kind: str) -> str | None:
        return next((name for name in schema.names if kinds[name] == kind), None)

    text = next((name for name in TEXT_COLUMNS if name in kinds and kinds[name] in ("Value", "ClassLabel")), None)
    chosen = Columns(
        image=asked.image or first("Image"),
        audio=asked.audio or first("Audio"),
        text=asked.text or text or first("ClassLabel"),
        id=asked.id or next((name for name in ID_COLUMNS if name in schema.names), None),
    )
    if chosen.image is None and chosen.audio is None and chosen.text is None:
        raise DataError(
            f"None of the columns {', '.join(schema.names)[:500]} of {file} is known to hold pictures, sounds or text; "
            "name them."
        )
    return chosen


def _kind_by_name(schema: Any, name: str) -> str:
    """For files that `datasets` did not write: structs of bytes and path, or plain bytes, by their column's name."""
    kind = str(schema.field(name).type)
    if kind.startswith("struct<bytes: ") or kind in ("binary", "large_binary"):
        return "Audio" if any(word in name.lower() for word in ("audio", "sound", "speech", "wav")) else "Image"
    return "Value" if kind in ("string", "large_string") else kind


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError("Reading these files needs pyarrow: pip install 'qwen3-vlm[datasets]'.") from error
    return pyarrow

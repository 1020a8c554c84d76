"""From what people have to a raw manifest: folders of pairs, an audio folder with a CSV, LLaVA JSON.

Ids come from paths, given ids and content, never from the order of things, so that a data set that grows keeps
its splits. What is left out is counted with its reason. (`manifest_import_hf` reads Hugging Face data sets.)
"""

import contextlib
import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from qwen3_vlm.data.captions import IMAGE_MARK, Record, open_records
from qwen3_vlm.data.manifest import BadLine, ManifestRecord, parse_line, resolve_media
from qwen3_vlm.data.manifest_index import index_manifest
from qwen3_vlm.data.records import ImageRef
from qwen3_vlm.data.sounds import AUDIO_SUFFIXES
from qwen3_vlm.data.tar_files import IMAGE_EXTENSIONS
from qwen3_vlm.errors import DataError, RecordError
from qwen3_vlm.storage import atomic_file, atomic_write_bytes

MANIFEST_NAME = "manifest.jsonl"
MEDIA_FOLDER = "media"  # beside the manifest: files that were inside of others
SIDECARS = (".txt", ".caption", ".json")  # the first that a picture has is read
MAX_SIDECAR_BYTES = 8_000_000
PATH_COLUMNS = ("path", "file", "filename", "file_name", "audio", "audio_path", "wav", "clip", "audio_filepath")
TEXT_COLUMNS = ("text", "sentence", "transcript", "transcription", "caption", "normalized_text", "label")
ID_COLUMNS = ("id", "key", "uid", "uuid", "utterance_id")
MAX_FIELD_CHARACTERS = 2_000_000
HASH_CHARACTERS = 12

Turns = Literal["first", "all"]


@dataclass(slots=True)
class ImportReport:
    """What became of the source."""

    manifest: Path
    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # reason → the first message
    notes: list[str] = field(default_factory=list)

    def table(self) -> str:
        """What to tell the user."""
        lines = [f"{self.records:,} records in {self.manifest}"]
        for reason, count in sorted(self.skipped.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"  {count:,} left out: {reason}; first: {self.first[reason]}")
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join([*lines, f"Next: qwen3-vlm data manifest-audit {self.manifest}"])


class ManifestWriter:
    """Collects records of an import; what a manifest may not hold is counted instead of written."""

    def __init__(self, file: BinaryIO, report: ImportReport) -> None:
        self.report = report
        self.root = report.manifest.parent
        self._file = file
        self._lines = 0

    def write(self, record: ManifestRecord) -> None:
        """Add one record, checked as a reader would check it."""
        name = f"{record.id[:80]!r}"
        try:
            data = record.to_json().encode("utf-8")
        except (UnicodeEncodeError, ValueError):
            self.skip("bad_text", f"{name} holds text or a path that is not valid Unicode.")
            return
        entry = parse_line(data, self._lines + 1, name)
        if isinstance(entry, BadLine):
            self.skip(entry.reason, entry.message)
            return
        try:
            for kind, path in (("image", record.image), ("audio", record.audio)):
                if path is not None:
                    resolve_media(self.root, path, kind, name)
        except RecordError as error:
            self.skip(error.reason, str(error))
            return
        self._file.write(data + b"\n")
        self._lines += 1

    def skip(self, reason: str, message: str) -> None:
        """Count something that did not become a record."""
        self.report.skipped[reason] += 1
        self.report.first.setdefault(reason, message.rstrip("."))

    def relative(self, path: str | Path) -> str:
        """A path as the manifest has it.

        Raises:
            RecordError: it is not below the manifest's folder.
        """
        relative = os.path.relpath(os.path.abspath(path), self.root)
        if relative == ".." or relative.startswith(".." + os.sep) or os.path.isabs(relative):
            raise RecordError(f"{path} is not below {self.root}, where the manifest is.", "path_escapes")
        return Path(relative).as_posix()

    def save_media(self, data: bytes, suffix: str) -> str:
        """Write bytes beside the manifest, named by their hash, and return the path for the manifest."""
        digest = hashlib.sha256(data).hexdigest()
        relative = f"{MEDIA_FOLDER}/{digest[:2]}/{digest[:32]}{suffix}"
        path = self.root / relative
        if not (path.is_file() and path.stat().st_size == len(data)):
            atomic_write_bytes(path, data)
        return relative


@contextlib.contextmanager
def new_manifest(path: Path) -> Iterator[ManifestWriter]:
    """A writer whose records become a manifest all at once, each id once: a second one is counted and left out.

    Raises:
        DataError: nothing was left to write.
    """
    report = ImportReport(path.absolute())
    with atomic_file(path) as temporary:
        with open(temporary, "wb") as file:
            writer = ManifestWriter(file, report)
            yield writer
        report.records = _drop_duplicates(temporary, writer)
        if not report.records:
            found = ", ".join(f"{count:,} × {reason}" for reason, count in report.skipped.most_common(5))
            raise DataError(f"There is nothing to import: no record came out ({found or 'nothing was found'}).")


def import_pairs(
    folder: str | Path, out: str | Path | None = None, *, source: str | None = None, task: str | None = None
) -> ImportReport:
    """Pictures with a .txt, .caption or .json of the same name beside them, at any depth; the id is the path.

    A .json holds "caption" or "text"; what else it says becomes `meta`. `out` is a manifest in `folder` or above it.

    Raises:
        DataError: the folder is none, or holds no pairs.
        StorageError: the manifest can't be written.
    """
    folder = _folder(folder)
    with new_manifest(_manifest_path(folder, out)) as writer:
        for place, stem, names in _stems(folder):
            pictures = [name for name in names if _suffix(name) in IMAGE_EXTENSIONS]
            sidecar = next((stem + suffix for suffix in SIDECARS if stem + suffix in names), None)
            if pictures and sidecar is None:
                writer.skip("no_caption", f"{place / pictures[0]} has none of {', '.join(SIDECARS)} beside it.")
            elif sidecar is not None and not pictures and not sidecar.endswith(".json"):  # which may be anything
                writer.skip("no_picture", f"{place / sidecar} has no picture beside it.")
            for name in pictures if sidecar is not None else ():
                _write_pair(writer, folder, place / name, place / str(sidecar), source or folder.name, task)
    return writer.report


def import_audio_csv(
    folder: str | Path,
    table: str | Path,
    out: str | Path | None = None,
    *,
    path_column: str | None = None,
    text_column: str | None = None,
    source: str | None = None,
    task: str | None = None,
) -> ImportReport:
    """An audio folder with a CSV or TSV that says what is spoken; the id is the path inside the folder.

    Columns are found by their usual names, or given by name, or by number from 0 for a table without a header
    (LJSpeech: path_column="0", text_column="1"). Paths may leave out the ending and the folder `wavs` or `clips`.

    Raises:
        DataError: the folder or the table can't be used, or a column is not found.
    """
    folder, table = _folder(folder), Path(table)
    with new_manifest(_manifest_path(folder, out)) as writer:
        for number, row in _rows(table, path_column, text_column):
            name, text = row.pop("path"), row.pop("text")
            if not name or text is None:
                writer.skip("bad_row", f"{table.name}:{number} lacks a path or a text.")
                continue
            found = _find_sound(folder, name)
            if found is None:
                writer.skip("missing_audio", f"{table.name}:{number}: there is no {name[:200]} in {folder}.")
                continue
            with _counted(writer):
                record_id = found.relative_to(folder).as_posix()
                meta = {key: value for key, value in row.items() if value}
                audio = writer.relative(found)
                writer.write(ManifestRecord(record_id, source or folder.name, None, audio, text, task, meta, 0))
    return writer.report


def import_llava(
    paths: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    image_root: str | Path | None = None,
    turns: Turns = "first",
    source: str | None = None,
    task: str | None = None,
) -> ImportReport:
    """LLaVA JSON (or JSONL, or WebDataset tars) with pictures; the id is the record's, with a hash of its turns.

    LLaVA uses one id for several conversations of a picture, and a manifest needs one each. `turns="first"` takes the
    first answer as text and its question as meta; "all" takes the whole conversation as a transcript. `out` is
    a manifest in the image root or above it; by default in the image root.

    Raises:
        DataError: the files can't be used, or hold nothing.
    """
    names = [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    records = open_records(names, None if image_root is None else str(image_root))
    root = Path(image_root) if image_root is not None else records.files[0].path.parent
    with new_manifest(_manifest_path(root, out)) as writer:
        shortened = 0
        for index in range(len(records)):
            with _counted(writer):
                record = records[index]
                shortened += turns == "first" and len(record.turns) > 2
                _write_conversation(writer, record, turns, source or Path(names[0]).stem, task)
        if shortened:
            writer.report.notes.append(
                f"of {shortened:,} conversations with several answers only the first was taken; turns=all takes all."
            )
    return writer.report


# Pairs -----------------------------------------------------------------------------------------------------


def _stems(folder: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """Folder by folder in sorted order: place, stem, and the files that share it."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        groups: dict[str, list[str]] = {}
        for name in sorted(files):
            if not name.startswith("."):
                groups.setdefault(os.path.splitext(name)[0], []).append(name)
        for stem, names in groups.items():
            yield Path(place), stem, names


def _write_pair(
    writer: ManifestWriter, folder: Path, picture: Path, sidecar: Path, source: str, task: str | None
) -> None:
    with _counted(writer):
        text, meta = _read_sidecar(sidecar)
        record_id = picture.relative_to(folder).as_posix()
        writer.write(ManifestRecord(record_id, source, writer.relative(picture), None, text, task, meta, 0))


def _read_sidecar(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SIDECAR_BYTES + 1)
        if len(data) > MAX_SIDECAR_BYTES:
            raise RecordError(f"{path} is larger than {MAX_SIDECAR_BYTES:,} bytes.", "caption_too_long")
        text = data.decode("utf-8-sig")
        tree = json.loads(text) if path.suffix == ".json" else {"caption": text}
    except OSError as error:
        raise RecordError(f"{path} can't be read: {error.strerror or error}.", "unreadable_caption") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not valid text or JSON: {str(error)[:200]}.", "unreadable_caption") from error
    found = tree.get("caption", tree.get("text")) if isinstance(tree, dict) else None
    if not isinstance(found, str):
        raise RecordError(f'{path} has neither a "caption" nor a "text".', "no_caption")
    if not found.strip():
        raise RecordError(f"{path} is empty.", "empty_caption")
    return found.strip(), {key: value for key, value in tree.items() if key not in ("caption", "text")}


# Tables ----------------------------------------------------------------------------------------------------


def _rows(table: Path, path_column: str | None, text_column: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows; "path" and "text" are the columns asked for, the others have their own names."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    try:
        with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            head = file.read(65_536)
            file.seek(0)
            delimiter = _delimiter(head, table)
            unquoted = delimiter in "|\t"  # as in LJSpeech and Common Voice
            reader = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE if unquoted else csv.QUOTE_MINIMAL)
            first = next(reader, None)
            if first is None:
                raise DataError(f"The table {table} is empty.")
            by_number = all(column is not None and column.isdecimal() for column in (path_column, text_column))
            names = [str(number) for number in range(len(first))] if by_number else first
            path_name = _column(names, path_column, PATH_COLUMNS, table, "path")
            text_name = _column(names, text_column, TEXT_COLUMNS, table, "text")
            if by_number:
                yield 1, _row(names, first, path_name, text_name)
            for row in reader:
                if row:
                    yield reader.line_num, _row(names, row, path_name, text_name)
    except OSError as error:
        raise DataError(f"The table {table} can't be read: {error.strerror or error}.") from error
    except csv.Error as error:
        raise DataError(f"The table {table} can't be read as CSV: {error}.") from error


def _delimiter(head: str, table: Path) -> str:
    """The one of tab, |, ; and , that stands most often in the first line; a comma last, for text has commas too."""
    line = head.splitlines()[0] if head.strip() else ""
    if table.suffix.lower() == ".tsv":
        return "\t"
    return max("\t|;,", key=line.count)


def _column(names: Sequence[str], given: str | None, usual: Sequence[str], table: Path, what: str) -> str:
    if given is not None:
        if given not in names:
            raise DataError(f"{table} has no column {given!r}; it has {', '.join(names)[:500]}.")
        return given
    known = {name.strip().lower(): name for name in names}
    for name in usual:
        if name in known:
            return known[name]
    raise DataError(
        f"None of the columns {', '.join(names)[:500]} of {table} is known to hold the {what}; "
        f"name it with --{what}-column (a number from 0 where the table has no header)."
    )


def _row(names: Sequence[str], cells: Sequence[str], path_name: str, text_name: str) -> dict[str, Any]:
    pairs = zip(names, cells, strict=False)  # a ragged row lacks its last cells; surplus is nameless
    row: dict[str, Any] = dict(pairs)
    path, text = row.pop(path_name, ""), row.pop(text_name, None)
    return {**row, "path": path.strip(), "text": text}


def _find_sound(folder: Path, name: str) -> Path | None:
    """The file that a table names, which may leave out its ending or the usual folder."""
    if "\0" in name:
        return None
    for place in (folder, folder / "wavs", folder / "clips"):
        path = place / name
        if not Path(os.path.normpath(path)).is_relative_to(folder):
            continue
        path = Path(os.path.normpath(path))
        candidates = [path, *(path.with_name(path.name + suffix) for suffix in AUDIO_SUFFIXES)]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is not None:
            return found
    return None


# LLaVA -----------------------------------------------------------------------------------------------------


def _write_conversation(writer: ManifestWriter, record: Record, turns: Turns, source: str, task: str | None) -> None:
    if len(record.images) > 1:
        raise RecordError(f"{record.origin} has {len(record.images)} pictures.", "several_pictures")
    spoken = [(turn.role, turn.text.replace(IMAGE_MARK, "").strip()) for turn in record.turns]
    digest = hashlib.sha256(json.dumps(spoken).encode()).hexdigest()[:HASH_CHARACTERS]
    image = _picture_path(writer, record.images[0]) if record.images else None
    if turns == "first":
        text, meta = spoken[1][1], {"prompt": spoken[0][1]}
    else:
        text, meta = "\n".join(f"{role}: {words}" for role, words in spoken), {}
    about = ManifestRecord(f"{record.id}-{digest}", source, image, None, text, task, meta, 0)
    writer.write(replace(about, meta={key: value for key, value in meta.items() if value}))


def _picture_path(writer: ManifestWriter, ref: ImageRef) -> str:
    """A file as it is; what is inside a tar is written out beside the manifest."""
    if ref.size is None:
        ref.check_present()
        return writer.relative(ref.path)
    return writer.save_media(ref.read_bytes(), Path(ref.member).suffix.lower())


# Common ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _counted(writer: ManifestWriter) -> Iterator[None]:
    try:
        yield
    except RecordError as error:
        writer.skip(error.reason, str(error))


def _drop_duplicates(path: Path, writer: ManifestWriter) -> int:
    """Leave out records whose id stood before; returns how many stay."""
    index = index_manifest(path)
    places = set()
    for place, earlier, name in index.duplicates():
        places.add(place)
        writer.skip("duplicate_id", f"{name[:80]!r} is record {earlier} already.")
    if places:
        with path.open("rb") as before, atomic_file(path) as kept, kept.open("wb") as after:
            after.writelines(line for place, line in enumerate(before) if place not in places)
    return len(index) - len(places)


def _folder(folder: str | Path) -> Path:
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"{path} {'is not a folder' if path.exists() else 'does not exist'}; give a folder of data.")
    return Path(os.path.abspath(path))


def _manifest_path(folder: Path, out: str | Path | None) -> Path:
    path = Path(os.path.abspath(folder / MANIFEST_NAME if out is None else out))
    if path.is_dir():
        path = path / MANIFEST_NAME
    if not Path(os.path.abspath(folder)).is_relative_to(path.parent):
        raise DataError(
            f"The manifest {path} can't name files in {folder}: paths are relative to the manifest's folder and may "
            f"not leave it. Put it into {folder} or a folder above."
        )
    return path


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lstrip(".").lower()

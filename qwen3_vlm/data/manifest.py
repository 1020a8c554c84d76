"""The raw manifest of track B: which text, picture and sound belong together, one JSON object a line.

    {"id": "cats/1", "source": "my-cats", "modalities": {"image": "cats/1.png", "audio": "cats/1.wav"},
     "text": "a cat", "task": "i2t", "meta": {"licence": "CC0"}}

Only `id` must be there, with at least one of text, image and audio. Paths are relative to the
manifest's folder and may not leave it. A line that can't be used is a RecordError with a countable
reason; it never stops the others. A record's position is the number of its line, counted from 0.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn

from qwen3_vlm.errors import AudioError, DataError, ImageError, RecordError

MAX_LINE_BYTES = 8_000_000
MAX_TEXT_CHARACTERS = 1_000_000
MAX_META_BYTES = 100_000  # as compact JSON
MAX_NAME_CHARACTERS = 500  # of an id, a source, a task
MAX_PATH_CHARACTERS = 4_096
MAX_DEPTH = 64  # of JSON in JSON; Python's own limit depends on who calls, and records must not
MEDIA = ("image", "audio")
FIELDS = ("id", "source", "modalities", "text", "task", "meta")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ManifestRecord:
    """One checked line. The paths are as written: `resolve_media` finds the files."""

    id: str
    source: str
    image: str | None
    audio: str | None
    text: str | None
    task: str | None
    meta: dict[str, Any]
    line: int  # counted from 1

    @property
    def position(self) -> int:
        """Place in the manifest, counted from 0; blank lines count."""
        return self.line - 1

    def to_json(self) -> str:
        """The line that this record is written as."""
        paths = {"image": self.image, "audio": self.audio}
        tree = {
            "id": self.id,
            "source": self.source,
            "modalities": {name: path for name, path in paths.items() if path is not None},
            "text": self.text,
            "task": self.task,
            "meta": self.meta,
        }
        return json.dumps(tree, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no record; `id` is what it says it is, or ""."""

    line: int
    id: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class ManifestLine:
    """One line that is not blank, and where it begins in the file."""

    offset: int
    entry: ManifestRecord | BadLine


def read_manifest(path: str | Path, digest: "hashlib._Hash | None" = None) -> Iterator[ManifestLine]:
    """Stream a manifest, one line in memory at a time; `digest` is updated with every byte of the file.

    Raises:
        DataError: the file can't be read.
    """
    path = Path(path)
    try:
        with open_manifest(path) as file:
            number = offset = 0
            while piece := file.readline(MAX_LINE_BYTES + 2):
                number += 1
                start, data = offset, piece
                while piece:  # the rest of a line that is too long is passed over, not kept
                    offset += len(piece)
                    if digest is not None:
                        digest.update(piece)
                    piece = b"" if piece.endswith(b"\n") else file.readline(MAX_LINE_BYTES)
                if data.strip() not in (b"", BYTE_ORDER_MARK):
                    yield ManifestLine(start, parse_line(data, number, path.name))
    except OSError as problem:
        raise _unreadable(path, problem) from problem


def read_line(file: BinaryIO, offset: int, line: int, name: str) -> ManifestRecord | BadLine:
    """The one line that begins at `offset`; see `read_manifest`, which found it."""
    file.seek(offset)
    return parse_line(file.readline(MAX_LINE_BYTES + 2), line, name)


def open_manifest(path: Path) -> BinaryIO:
    """Open for reading bytes.

    Raises:
        DataError: it is missing, no regular file, or can't be read.
    """
    try:
        if not path.is_file():
            raise DataError(
                f"The manifest {path} {'is not a regular file' if path.exists() else 'does not exist'}; "
                "give a JSON Lines file, such as those that `qwen3-vlm data import` writes."
            )
        return path.open("rb")
    except OSError as problem:
        raise _unreadable(path, problem) from problem


def parse_line(data: bytes, line: int, name: str) -> ManifestRecord | BadLine:
    """Check one line; what is wrong with it becomes a BadLine, never an exception."""
    origin = f"{name}:{line}"
    tree: Any = None
    try:
        tree = _decode(data, origin)
        return _record(tree, line, origin)
    except RecordError as error:
        given = tree.get("id") if isinstance(tree, dict) else None
        known = isinstance(given, str) and _is_unicode(given) and len(given) <= MAX_NAME_CHARACTERS
        return BadLine(line, given if known and given is not None else "", error.reason, str(error))


def resolve_media(root: Path, path: str, kind: str, origin: str) -> Path:
    """The file that a record names, below `root` also after symbolic links are followed.

    Raises:
        ImageError, AudioError: `missing_image` or `missing_audio`; `path_escapes`.
    """
    error = ImageError if kind == "image" else AudioError
    found = Path(os.path.realpath(root / path))
    if not found.is_relative_to(os.path.realpath(root)):
        raise error(f"{origin}: the {kind} path {path!r} leads out of the manifest's folder by a link.", "path_escapes")
    if not os.path.exists(found):  # a name that is too long for the disk is no error here
        raise error(f"{origin}: the {kind} {path} does not exist.", f"missing_{kind}")
    return root / path


def _decode(data: bytes, origin: str) -> Any:
    if len(data.rstrip(b"\r\n")) > MAX_LINE_BYTES:
        raise RecordError(f"{origin} is longer than {MAX_LINE_BYTES:,} bytes.", "line_too_long")
    try:
        text = data.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
        tree = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_json, parse_float=_finite)
        if _is_nested(tree, MAX_DEPTH):
            raise RecursionError
        return tree
    except RecursionError:
        raise RecordError(f"{origin} is nested deeper than {MAX_DEPTH} levels.", "bad_json") from None
    except ValueError as error:
        why = " ".join(str(error).split())[:200]
        raise RecordError(f"{origin} is not valid JSON: {why}.", "bad_json") from error


def _is_nested(tree: Any, depth: int) -> bool:
    """Whether a JSON tree has more than `depth` containers inside one another; itself without recursion."""
    level = [tree]
    for _ in range(depth + 1):
        containers = [node for node in level if isinstance(node, dict | list)]
        level = [value for node in containers for value in (node.values() if isinstance(node, dict) else node)]
        if not containers:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("an object names a key twice")
    return tree


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _record(tree: Any, line: int, origin: str) -> ManifestRecord:
    if not isinstance(tree, dict):
        raise RecordError(f"{origin} is a JSON {type(tree).__name__}; a record is an object.")
    unknown = sorted(set(tree) - set(FIELDS))
    if unknown:
        raise RecordError(
            f"{origin} has the unknown field {unknown[0][:80]!r}; known are {', '.join(FIELDS)}.", "unknown_field"
        )
    name = _name(tree, "id", origin, "bad_id")
    if not name:
        raise RecordError(f"{origin} has no id; each record needs one of its own.", "bad_id")
    paths = _paths(tree.get("modalities"), origin)
    text = _text(tree.get("text"), origin)
    if text is None and not paths:
        raise RecordError(f"{origin} has neither a text nor an image nor an audio.", "empty_record")
    return ManifestRecord(
        id=name,
        source=_name(tree, "source", origin, "bad_record") or "",
        image=paths.get("image"),
        audio=paths.get("audio"),
        text=text,
        task=_name(tree, "task", origin, "bad_record"),
        meta=_meta(tree.get("meta"), origin),
        line=line,
    )


def _name(tree: Mapping[str, Any], field: str, origin: str, reason: str) -> str | None:
    value = tree.get(field)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_NAME_CHARACTERS:
        raise RecordError(f'{origin}: "{field}" must be a string of at most {MAX_NAME_CHARACTERS} characters.', reason)
    if not _is_unicode(value):
        raise RecordError(f'{origin}: "{field}" is not valid Unicode.', "bad_text")
    return value


def _text(value: Any, origin: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise RecordError(f'{origin}: "text" must be a string or null.')
    if len(value) > MAX_TEXT_CHARACTERS:
        raise RecordError(
            f"{origin}: the text has {len(value):,} characters; at most {MAX_TEXT_CHARACTERS:,}.", "text_too_long"
        )
    if not _is_unicode(value):
        raise RecordError(f"{origin}: the text is not valid Unicode: it holds a lone surrogate.", "bad_text")
    return value


def _meta(value: Any, origin: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecordError(f'{origin}: "meta" must be an object.')
    try:
        size = len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8"))
    except UnicodeEncodeError as error:
        raise RecordError(f'{origin}: "meta" is not valid Unicode: it holds a lone surrogate.', "bad_text") from error
    if size > MAX_META_BYTES:
        raise RecordError(f'{origin}: "meta" has {size:,} bytes; at most {MAX_META_BYTES:,}.', "meta_too_large")
    return value


def _paths(value: Any, origin: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecordError(f'{origin}: "modalities" must be an object such as {{"image": "a.png"}}.')
    unknown = sorted(set(value) - set(MEDIA))
    if unknown:
        raise RecordError(f"{origin}: the modality {unknown[0][:80]!r} is none of {', '.join(MEDIA)}.", "bad_modality")
    return {kind: _checked_path(path, kind, origin) for kind, path in value.items() if path is not None}


def _checked_path(path: Any, kind: str, origin: str) -> str:
    """Refuse by its letters alone what can't be a path inside the folder, on any system."""
    if not isinstance(path, str) or not path.strip() or len(path) > MAX_PATH_CHARACTERS or "\0" in path:
        raise RecordError(f"{origin}: the {kind} path is empty, too long or no path at all.", "bad_path")
    if not _is_unicode(path):
        raise RecordError(f"{origin}: the {kind} path is not valid Unicode.", "bad_path")
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if ".." in parts or path.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", path):
        raise RecordError(
            f"{origin}: the {kind} path {path[:200]!r} leads out of the manifest's folder; paths are relative to it.",
            "path_escapes",
        )
    return path


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _unreadable(path: Path, problem: OSError) -> DataError:
    return DataError(f"The manifest {path} can't be read: {problem.strerror or problem}.")

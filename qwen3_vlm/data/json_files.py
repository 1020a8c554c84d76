"""JSON arrays and JSON Lines as random-access sequences of records that stay on disk.

One pass finds where each record begins and ends; 16 bytes per record are kept, and a record is parsed
when it is asked for. 558,000 records take seconds to index and next to no memory, in each worker too.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from qwen3_vlm.data.records import MAX_RECORD_BYTES, Record, parse_record
from qwen3_vlm.errors import DataError, RecordError

CHUNK_BYTES = 8_000_000
MAX_FILE_BYTES = 64 * 1024**3
WHITESPACE = " \t\r\n"
BYTE_ORDER_MARK = codecs.BOM_UTF8

Spans = npt.NDArray[np.int64]  # (records, 2): first byte and number of bytes


class JsonFile:
    """The records of one .json or .jsonl file. Text that begins with "[" is an array, else one record a line."""

    def __init__(self, path: Path, image_root: str | None) -> None:
        self.path = path
        self.image_root = str(path.parent) if image_root is None else image_root
        try:
            with path.open("rb") as file:
                self._index(file)
        except OSError as error:
            raise DataError(f"The record file {path} can't be read: {error.strerror or error}.") from error

    def __len__(self) -> int:
        return len(self.spans)

    def origin(self, index: int) -> str:
        """Where a record stands: its line (blank ones not counted), or its place in the array."""
        return f"{self.path}:{index + 1}" if self.is_lines else f"{self.path}[{index}]"

    def record(self, index: int) -> Record:
        """Read and parse one record.

        Raises:
            RecordError: this one record can't be used.
        """
        return parse_record(self.tree(index), self.origin(index), image_root=self.image_root)

    def tree(self, index: int) -> Any:
        """What JSON a record is.

        Raises:
            RecordError: it is none, or too large.
        """
        start, size = (int(number) for number in self.spans[index])
        origin = self.origin(index)
        if size > MAX_RECORD_BYTES:
            raise RecordError(f"{origin} has {size:,} bytes; at most {MAX_RECORD_BYTES:,} are read.", "too_large")
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return decode_json(file.read(size), origin)
        except OSError as error:
            raise RecordError(f"{origin} can't be read: {error.strerror or error}.") from error

    def _index(self, file: BinaryIO) -> None:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise DataError(f"The record file {self.path} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read.")
        head = file.read(4096)
        begin = len(BYTE_ORDER_MARK) if head.startswith(BYTE_ORDER_MARK) else 0
        self.is_lines = not head[begin:].lstrip().startswith(b"[")
        file.seek(begin)
        digest = hashlib.sha256()
        finder = _line_spans if self.is_lines else _array_spans
        flat = np.fromiter((number for span in finder(file, begin, digest, self.path) for number in span), np.int64)
        self.spans: Spans = flat.reshape(-1, 2)
        self.fingerprint = digest.hexdigest()


def decode_json(data: bytes, origin: str) -> Any:
    """Parse one record's JSON.

    Raises:
        RecordError: it is no valid JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecordError(f"{origin} is not valid JSON: {reason}.", "bad_json") from error


def _line_spans(file: BinaryIO, begin: int, digest: Any, path: Path) -> Iterator[tuple[int, int]]:
    """Lines that are not blank. Files are read in chunks, so that a line of any length costs no memory."""
    start = position = begin
    blank = True
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
        offset = 0
        while (end := chunk.find(b"\n", offset)) >= 0:
            if not blank or chunk[offset:end].strip():
                yield start, position + end - start
            start, offset, blank = position + end + 1, end + 1, True
        blank = blank and not chunk[offset:].strip()
        position += len(chunk)
    if not blank:
        yield start, position - start


def _array_spans(file: BinaryIO, begin: int, digest: Any, path: Path) -> Iterator[tuple[int, int]]:
    """Elements of the top-level array, found by parsing each once and dropping it again.

    Raises:
        DataError: the text is no JSON array, is cut off, or an element is too large.
    """
    text = _Text(file, digest, path, begin)
    text.skip_whitespace()
    text.expect("[")
    if text.peek() == "]":
        text.expect("]")
        return text.finish()
    while True:
        yield text.element()
        if text.expect(",]") == "]":
            return text.finish()
        text.skip_whitespace()


class _Text:
    """A UTF-8 file read in chunks, with a cursor that knows its position in bytes."""

    def __init__(self, file: BinaryIO, digest: Any, path: Path, begin: int) -> None:
        self.file, self.digest, self.path = file, digest, path
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.raw_decode = json.JSONDecoder().raw_decode
        self.buffer, self.cursor, self.byte = "", 0, begin

    def more(self) -> bool:
        """Append the next chunk to what is left of the buffer; False, and nothing moved, at the end of the file."""
        chunk = self.file.read(CHUNK_BYTES)
        self.digest.update(chunk)
        try:
            text = self.decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not valid UTF-8 near byte {self.byte:,}.") from error
        if chunk:
            self.buffer, self.cursor = self.buffer[self.cursor :] + text, 0
        return bool(chunk)

    def advance(self, end: int) -> int:
        """Move the cursor to `end` and return how many bytes that was."""
        piece = self.buffer[self.cursor : end]
        size = len(piece) if piece.isascii() else len(piece.encode("utf-8"))
        self.cursor, self.byte = end, self.byte + size
        return size

    def skip_whitespace(self) -> None:
        while True:
            end = self.cursor
            while end < len(self.buffer) and self.buffer[end] in WHITESPACE:
                end += 1
            self.advance(end)
            if end < len(self.buffer) or not self.more():
                return

    def peek(self) -> str:
        self.skip_whitespace()
        return self.buffer[self.cursor : self.cursor + 1]

    def expect(self, choices: str) -> str:
        character = self.peek()
        if not character or character not in choices:
            found = repr(character) if character else "the end of the file"
            raise DataError(f"{self.path} is no valid JSON array: {found} at byte {self.byte:,}.")
        self.advance(self.cursor + 1)
        return character

    def element(self) -> tuple[int, int]:
        """Span of the JSON value at the cursor; the buffer grows until it is whole."""
        while True:
            try:
                end = self.raw_decode(self.buffer, self.cursor)[1]
                if end < len(self.buffer) or not self.more():  # a number may go on in the next chunk
                    start = self.byte
                    return start, self.advance(end)
            except (ValueError, RecursionError) as error:
                if len(self.buffer) - self.cursor > 2 * MAX_RECORD_BYTES or not self.more():
                    raise DataError(
                        f"{self.path} is no valid JSON array: {_why(error)} at byte {self.byte:,}."
                    ) from error

    def finish(self) -> None:
        if self.peek():
            raise DataError(f"{self.path} goes on after its JSON array ended at byte {self.byte:,}.")


def _why(error: BaseException) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else "a value that can't be parsed"

"""WebDataset tars read in place: one sequential pass over the headers, then random access by byte offset.

Members with the same stem make one sample: a picture (.jpg, .jpeg, .png, .webp, …; several are ordered by
name, as in 007.0.jpg, 007.1.jpg) and a .json (LLaVA schema or a caption) or .txt (a caption). Nothing
is unpacked to disk. Per sample a few numbers and its names are kept, and can be kept on disk too.
"""

import hashlib
import json
import posixpath
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from qwen3_vlm.data.images import IMAGE_SUFFIXES
from qwen3_vlm.data.json_files import decode_json
from qwen3_vlm.data.records import MAX_RECORD_BYTES, ImageRef, Record, parse_record
from qwen3_vlm.errors import DataError, RecordError
from qwen3_vlm.storage import atomic_file

IMAGE_EXTENSIONS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
TEXT_EXTENSIONS = ("json", "txt")  # the first that a sample has is read
BLOCK_BYTES = 512
INDEX_FORMAT = 3


@dataclass(slots=True)
class TarIndex:
    """Members of interest as flat arrays; sample s owns members `first[s]` to `first[s + 1]`."""

    spans: npt.NDArray[np.int64]  # (members, 2): offset and size
    first: npt.NDArray[np.int64]  # (samples + 1,)
    names: bytes  # UTF-8 member names, one after another
    name_ends: npt.NDArray[np.int64]  # (members,)
    texts: bytes  # sha256 of the content of all .json and .txt members, in the order of the file

    def name(self, member: int) -> str:
        start = int(self.name_ends[member - 1]) if member else 0
        return self.names[start : int(self.name_ends[member])].decode("utf-8")


class TarFile:
    """The records of one .tar file; `cache_dir` keeps its index for the next start."""

    def __init__(self, path: Path, cache_dir: Path | None = None) -> None:
        self.path = path
        try:
            self.index = self._load_or_build(cache_dir)
        except OSError as error:
            raise DataError(f"The tar {path} can't be read: {error.strerror or error}.") from error
        arrays = self.index.spans.tobytes() + self.index.first.tobytes()
        self.fingerprint = hashlib.sha256(arrays + self.index.names + self.index.texts).hexdigest()

    def __len__(self) -> int:
        return len(self.index.first) - 1

    def origin(self, index: int) -> str:
        """Where a sample stands: the tar and the stem of its members."""
        return f"{self.path}/{self._key(index)}"

    def record(self, index: int) -> Record:
        """Read and parse one sample; its pictures stay references into the tar.

        Raises:
            RecordError: this one sample can't be used.
        """
        members = range(int(self.index.first[index]), int(self.index.first[index + 1]))
        names = {member: self.index.name(member) for member in members}
        texts = {_kind(names[member]): member for member in members if _kind(names[member]) in TEXT_EXTENSIONS}
        images = [self._ref(member) for member in members if _kind(names[member]) in IMAGE_EXTENSIONS]
        key, origin = self._key(index), self.origin(index)
        extension = next((extension for extension in TEXT_EXTENSIONS if extension in texts), None)
        if extension is None:
            raise RecordError(f"{origin} has a picture but neither a .json nor a .txt beside it.")
        tree = self._tree(texts[extension], extension, origin)
        return parse_record(tree, origin, images=images, key=key)

    def _key(self, index: int) -> str:
        return _split(self.index.name(int(self.index.first[index])))[0]

    def _ref(self, member: int) -> ImageRef:
        offset, size = (int(number) for number in self.index.spans[member])
        return ImageRef(str(self.path), offset, size, self.index.name(member))

    def _tree(self, member: int, extension: str, origin: str) -> Any:
        size = int(self.index.spans[member, 1])
        if size > MAX_RECORD_BYTES:
            raise RecordError(f"{origin} has {size:,} bytes of text; at most {MAX_RECORD_BYTES:,}.", "too_large")
        data = self._ref(member).read_bytes()
        if extension == "json":
            return decode_json(data, origin)
        try:
            return {"caption": data.decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            raise RecordError(f"{origin}: the caption is not valid UTF-8.") from error

    def _load_or_build(self, cache_dir: Path | None) -> TarIndex:
        if cache_dir is None:
            return build_index(self.path)
        status = self.path.stat()
        identity = [INDEX_FORMAT, str(self.path.absolute()), status.st_size, status.st_mtime_ns]
        cached = cache_dir / f"tar-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]}.npz"
        index = _load_index(cached)
        if index is None:
            index = build_index(self.path)
            _save_index(cached, index)
        return index


def build_index(path: Path) -> TarIndex:
    """Read every header and text of an uncompressed tar once, in order; pictures are passed over.

    Raises:
        DataError: it is compressed, damaged or cut off.
    """
    found = _Found()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                vars(tar)["members"].clear()  # tarfile would keep every header
                if _is_wanted(member):
                    found.add(member.name, member.offset_data, member.size)
                    found.read_text(file, member)
            _check_end(file, tar.offset, path)
    except tarfile.TarError as error:
        raise DataError(
            f"{path} is no complete, uncompressed tar: {error}. Compressed tars can't be read in place."
        ) from error
    return found.index()


class _Found:
    """Members in the order of the file, with the sample that each belongs to."""

    def __init__(self) -> None:
        self.members: list[tuple[int, str, int, int]] = []  # sample, name, offset, size
        self.newest: dict[str, tuple[int, frozenset[str]]] = {}  # stem → its newest sample and that one's extensions
        self.samples = 0
        self.texts = hashlib.sha256()

    def add(self, name: str, offset: int, size: int) -> None:
        """A stem whose extension was seen before begins another sample: two samples of one name."""
        stem, extension = _split(name)
        sample, seen = self.newest.get(stem, (-1, frozenset()))
        if sample < 0 or extension in seen:
            sample, seen = self.samples, frozenset()
            self.samples += 1
        self.newest[stem] = (sample, seen | {extension})
        self.members.append((sample, name, offset, size))

    def read_text(self, file: BinaryIO, member: tarfile.TarInfo) -> None:
        """Add a text's content to the digest, or as much of it as a record may have."""
        if _kind(member.name) in TEXT_EXTENSIONS:
            file.seek(member.offset_data)
            self.texts.update(hashlib.sha256(file.read(min(member.size, MAX_RECORD_BYTES))).digest())

    def index(self) -> TarIndex:
        """All members found so far, sorted by record and name, with one digest of all text members."""
        self.members.sort(key=lambda member: member[:2])
        names = [member[1].encode("utf-8", "replace") for member in self.members]
        owners = np.array([member[0] for member in self.members], dtype=np.int64)
        return TarIndex(
            spans=np.array([member[2:] for member in self.members], dtype=np.int64).reshape(-1, 2),
            first=np.searchsorted(owners, np.arange(self.samples + 1)).astype(np.int64),
            names=b"".join(names),
            name_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
            texts=self.texts.digest(),
        )


def _is_wanted(member: tarfile.TarInfo) -> bool:
    known = _kind(member.name) in (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS)
    return known and member.isreg() and not member.issparse() and not posixpath.basename(member.name).startswith(".")


def _split(name: str) -> tuple[str, str]:
    """WebDataset's rule: the stem ends at the first dot of the file name, the rest is the extension."""
    folder, base = posixpath.split(name)
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension.lower()


def _kind(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _check_end(file: BinaryIO, offset: int, path: Path) -> None:
    """tarfile takes a damaged header for the end; the true end is a block of zeros or of the file."""
    file.seek(offset)
    block = file.read(BLOCK_BYTES)
    if block.strip(b"\0"):
        raise DataError(f"{path} is damaged: no tar header at byte {offset:,}.")


def _load_index(path: Path) -> TarIndex | None:
    """A cached index, or None where there is none that can be read."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names, texts = arrays["names"].tobytes(), arrays["texts"].tobytes()
            return TarIndex(arrays["spans"], arrays["first"], names, arrays["name_ends"], texts)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _save_index(path: Path, index: TarIndex) -> None:
    names, texts = (np.frombuffer(data, dtype=np.uint8) for data in (index.names, index.texts))
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, spans=index.spans, first=index.first, names=names, name_ends=index.name_ends, texts=texts)

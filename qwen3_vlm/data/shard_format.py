"""One tokenized record as bytes: two members of a WebDataset tar, and one row of the shard's index.

    {key}.json   id, source, task, text, meta, token_space_sha256, segments, ids_sha256, image, audio
    {key}.npy    int32 (n,), little-endian: the global ids of text, image and audio, one segment after another

`segments` gives each modality's [start, stop) in the array; `ids_sha256` the sha256 of the segment's bytes;
`image` and `audio` the metadata that the decoders want, or null. Keys are sorted, texts are ASCII with \\u
escapes, tar headers are USTAR with neither time nor owner: the same record gives the same bytes everywhere.

Nothing is unpickled. What is read is checked against the index, the hashes and the token space, and every
defect is a `RecordError` that names the place and has a countable reason.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen3_vlm.errors import RecordError, TokenError
from qwen3_vlm.tokenization.token_space import MODALITIES, Content, TokenSpace

INDEX_COLUMNS = ("json_offset", "json_size", "npy_offset", "npy_size", "n_text", "n_image", "n_audio")
BLOCK_BYTES = 512
MAX_JSON_BYTES = 4_000_000
MAX_IDS = 4_000_000  # of one record: more than a day of speech at 45 ids a second
MAX_NPY_BYTES = 4 * MAX_IDS + 1024
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "audio": (dict, type(None)),
    "id": (str,),
    "ids_sha256": (dict,),
    "image": (dict, type(None)),
    "meta": (dict,),
    "segments": (dict,),
    "source": (str,),
    "task": (str, type(None)),
    "text": (str, type(None)),
    "token_space_sha256": (str,),
}

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TokenizedRecord:
    """One record of a manifest as global ids. A modality that it does not have is in neither mapping."""

    key: str  # nine digits: the position in the manifest
    id: str
    source: str
    task: str | None
    text: str | None
    meta: Mapping[str, Any] = field(default_factory=dict)
    ids: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)  # modality → global ids (n,)
    metadata: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # "image", "audio" → what decoding wants

    def length(self, modality: str) -> int:
        """Number of ids of one modality, 0 where it is not there."""
        return len(self.ids[modality]) if modality in self.ids else 0


def padded(size: int) -> int:
    """Bytes that a member of `size` bytes takes in a tar."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def tar_member(name: str, data: bytes) -> bytes:
    """Header, content and padding of one member, equal for equal content."""
    header = tarfile.TarInfo(name)  # mode 0644, no owner, time 0
    header.size = len(data)
    block = header.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    return block + data + bytes(padded(len(data)) - len(data))


def check_record(record: TokenizedRecord, token_space: TokenSpace) -> None:
    """Refuse what could not be read back.

    Raises:
        RecordError: with its reason.
    """
    encode_record(record, token_space)


def encode_record(record: TokenizedRecord, token_space: TokenSpace) -> tuple[bytes, bytes]:
    """Content of the .json and of the .npy.

    Raises:
        RecordError: ids out of their range, metadata that is no JSON, or too much of either.
    """
    origin = f"Record {str(record.id)[:80]!r}"
    if not (len(record.key) == 9 and record.key.isascii() and record.key.isdecimal()):
        raise RecordError(f"{origin} has the key {record.key!r}; nine digits are needed.", "bad_key")
    unknown = sorted(set(record.ids) - set(MODALITIES) | set(record.metadata) - set(MODALITIES[1:]))
    if unknown:
        raise RecordError(f"{origin} has ids or metadata of {', '.join(unknown)}.", "unknown_modality")
    for modality in MODALITIES[1:]:
        if (modality in record.ids) != (modality in record.metadata):
            raise RecordError(f"{origin} has ids of its {modality} without metadata or the reverse.", "bad_metadata")
    segments, parts = _lay_out(record, token_space, origin)
    tree: dict[str, Any] = {
        "id": record.id,
        "source": record.source,
        "task": record.task,
        "text": record.text,
        "meta": dict(record.meta),
        "token_space_sha256": token_space.sha256,
        "segments": segments,
        "ids_sha256": {modality: _digest(part) for modality, part in parts.items()},
        **{modality: record.metadata.get(modality) for modality in MODALITIES[1:]},
    }
    _check_tree(tree, origin)
    return _json_bytes(tree, origin), npy_bytes(np.concatenate([np.empty(0, "<i4"), *parts.values()]))


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """An array in NumPy's own format, version 1.0."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def decode_record(block: bytes, row: npt.NDArray[np.int64], token_space: TokenSpace, shard: str) -> TokenizedRecord:
    """The record whose two members, headers included, are `block`.

    Args:
        row: its row of the index.
        shard: the tar's path, for messages.

    Raises:
        RecordError: it is not what was written, with its reason.
    """
    json_size, npy_size = int(row[1]), int(row[3])
    npy_start = BLOCK_BYTES + padded(json_size)
    if len(block) != npy_start + BLOCK_BYTES + npy_size:
        raise RecordError(f"{shard} ends inside the record at byte {int(row[0]):,}: it was cut off.", "truncated")
    key = _member_key(block[:BLOCK_BYTES], ".json", json_size, f"{shard} at byte {int(row[0]) - BLOCK_BYTES:,}")
    origin = f"{shard}/{key}"
    if _member_key(block[npy_start : npy_start + BLOCK_BYTES], ".npy", npy_size, origin) != key:
        raise RecordError(f"{origin}.json is not followed by {key}.npy.", "missing_member")
    tree = _parse_tree(block[BLOCK_BYTES : BLOCK_BYTES + json_size], origin)
    if tree["token_space_sha256"] != token_space.sha256:
        raise RecordError(
            f"{origin} was made with the token space {tree['token_space_sha256'][:64]}; its shard's is "
            f"{token_space.sha256}.",
            "token_space",
        )
    array = _parse_npy(block[npy_start + BLOCK_BYTES :], origin)
    ids = _segments(tree, array, row[4:7], origin)
    for modality in (name for name in MODALITIES if name in ids):
        part = ids[modality]
        if _digest(part) != tree["ids_sha256"].get(modality):
            raise RecordError(f"{origin}: the {modality} ids are not those that were hashed.", "ids_sha256")
        check_ids(part, modality, token_space, origin)
    metadata: dict[str, Any] = {modality: tree[modality] for modality in MODALITIES[1:] if tree[modality] is not None}
    if set(metadata) != set(ids) - {"text"}:
        raise RecordError(f"{origin}: segments and metadata name different modalities.", "bad_metadata")
    return TokenizedRecord(
        key, tree["id"], tree["source"], tree["task"], tree["text"], tree["meta"], ids, metadata
    )  # fmt: skip


def check_ids(ids: npt.NDArray[Any], modality: Content, token_space: TokenSpace, origin: str) -> None:
    """Refuse ids that are not whole content of `modality`: text ids, one grid, whole frames.

    Raises:
        RecordError: with the reason of the token space's own `TokenError`.
    """
    if modality != "text" and not len(ids):
        raise RecordError(f"{origin} has an empty {modality} segment.", "empty_segment")
    try:
        token_space.require_content(ids, modality)
    except TokenError as error:
        raise RecordError(f"{origin}, {modality}: {error}", error.reason) from error


def _lay_out(
    record: TokenizedRecord, token_space: TokenSpace, origin: str
) -> tuple[dict[str, list[int]], dict[str, Ids]]:
    segments: dict[str, list[int]] = {}
    parts: dict[str, Ids] = {}
    start = 0
    for modality in MODALITIES:
        if modality not in record.ids:
            continue
        ids = np.asarray(record.ids[modality])
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise RecordError(f"{origin}: {modality} ids are {ids.dtype} {ids.shape}; (n,) integers.", "wrong_dtype")
        check_ids(ids.astype(np.int64) if not ids.size else ids, modality, token_space, origin)
        parts[modality] = ids.astype("<i4")
        segments[modality] = [start, start + len(ids)]
        start += len(ids)
    if start > MAX_IDS:
        raise RecordError(f"{origin} has {start:,} ids; at most {MAX_IDS:,} are stored.", "record_too_large")
    if not parts:
        raise RecordError(f"{origin} has neither text nor image nor audio.", "empty_record")
    return segments, parts


def _json_bytes(tree: Mapping[str, Any], origin: str) -> bytes:
    try:
        data = json.dumps(tree, sort_keys=True, allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise RecordError(f"{origin}: its metadata is no JSON ({error}).", "bad_metadata") from error
    if len(data) > MAX_JSON_BYTES:
        raise RecordError(
            f"{origin} has {len(data):,} bytes of text and metadata; at most {MAX_JSON_BYTES:,}.", "record_too_large"
        )
    return data


def _check_tree(tree: Mapping[str, Any], origin: str) -> None:
    for name in sorted(_JSON_TYPES.keys() | tree.keys()):
        if name not in tree or name not in _JSON_TYPES or not isinstance(tree[name], _JSON_TYPES[name]):
            kind = type(tree[name]).__name__ if name in tree else "missing"
            raise RecordError(f"{origin}: the field {name!r} is {kind}, which is not the format's.", "bad_json")


def _member_key(header: bytes, suffix: str, size: int, origin: str) -> str:
    """The key in a member's name, where the header is the one that the index speaks of."""
    try:
        member = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    except (tarfile.TarError, UnicodeDecodeError) as error:
        raise RecordError(f"{origin}: there is no tar header where the index has one ({error}).", "index") from error
    key = member.name.removesuffix(suffix)
    if key == member.name or "/" in key or not member.isreg():
        raise RecordError(f"{origin}: the index has a {suffix} member here, the tar {member.name!r}.", "missing_member")
    if member.size != size:
        raise RecordError(
            f"{origin}: {member.name} has {member.size:,} bytes in the tar, {size:,} in the index.", "index"
        )
    return key


def _parse_tree(data: bytes, origin: str) -> dict[str, Any]:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{origin}.json is no valid JSON ({' '.join(str(error).split())}).", "bad_json") from error
    if not isinstance(tree, dict):
        raise RecordError(f"{origin}.json holds a JSON {type(tree).__name__}; an object is expected.", "bad_json")
    _check_tree(tree, f"{origin}.json")
    return tree


def _parse_npy(data: bytes, origin: str) -> Ids:
    """The array, without trusting its header: type, shape and length must be exactly those of the format."""
    stream = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("another version of the format")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # a hostile header makes numpy's parser raise nearly anything
        raise RecordError(f"{origin}.npy is no array ({' '.join(str(error).split())[:200]}).", "bad_npy") from error
    if dtype != np.dtype("<i4") or is_fortran:
        raise RecordError(f"{origin}.npy is {dtype}; int32 is needed.", "wrong_dtype")
    if len(shape) != 1 or shape[0] * 4 != len(data) - stream.tell():
        raise RecordError(f"{origin}.npy has the shape {shape} and {len(data):,} bytes.", "wrong_shape")
    return np.frombuffer(data, dtype="<i4", offset=stream.tell()).astype(np.int32)


def _segments(tree: Mapping[str, Any], array: Ids, counts: npt.NDArray[np.int64], origin: str) -> dict[str, Ids]:
    """Cut the array up; the segments must follow one another, fill it, and be as long as the index says."""
    bounds, position = tree["segments"], 0
    ids: dict[str, Ids] = {}
    for modality, count in zip(MODALITIES, counts.tolist(), strict=True):
        if modality not in bounds:
            if count:
                raise RecordError(f"{origin} has no {modality}; the index has {count:,} ids of it.", "index")
            continue
        if bounds[modality] != [position, position + count] or any(type(end) is not int for end in bounds[modality]):
            raise RecordError(
                f"{origin}: the segment {modality} is {str(bounds[modality])[:80]}; [{position}, {position + count}] "
                "follows from the index.",
                "segments",
            )
        ids[modality] = array[position : position + count]
        position += count
    unknown = sorted(bounds.keys() - ids.keys()) + sorted(tree["ids_sha256"].keys() ^ ids.keys())
    if position != len(array) or unknown or not ids:
        raise RecordError(
            f"{origin}: {position:,} ids in segments, {len(array):,} in the array, and {unknown} differ.", "segments"
        )
    return ids


def _digest(ids: Ids) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i4").tobytes()).hexdigest()

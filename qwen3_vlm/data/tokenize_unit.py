"""One unit of work: some lines of a manifest become one shard and its report.

The same function whoever calls it, a process of ours or a Ray actor, so the bytes are the same. In memory is one
block of records at a time, bounded in number and in decoded bytes. What is wrong with one record is counted with
its reason; whatever else goes wrong (a full disk, a failing device) stops the work, for it is no record's fault.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qwen3_vlm.data.images import load_image
from qwen3_vlm.data.manifest import BadLine, ManifestRecord, open_manifest, read_line, resolve_media
from qwen3_vlm.data.shards import TokenizedRecord, write_report, write_shard
from qwen3_vlm.data.sounds import load_sound
from qwen3_vlm.data.tokenize_plan import Plan, Unit
from qwen3_vlm.errors import RecordError, TokenError
from qwen3_vlm.tokenization.token_space import MODALITIES
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer

BLOCK_RECORDS = 64  # encoded together, and at least two calls of each codec
BLOCK_BYTES = 256_000_000  # of decoded pictures and sounds in a block
MAX_MESSAGE_CHARACTERS = 500
DEFAULT_MAX_SECONDS = 600.0  # where uti.yaml has no audio section, no sound is encoded anyway

Tell = Callable[[int], None]  # is told of so many more records that were dealt with
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Loaded:
    record: ManifestRecord
    picture: Any | None  # PIL image
    sound: tuple[Any, int] | None  # waveform (A, S), rate

    @property
    def num_bytes(self) -> int:
        pixels = 0 if self.picture is None else 3 * self.picture.width * self.picture.height
        return pixels + (0 if self.sound is None else self.sound[0].nbytes)


@dataclass(slots=True)
class _Tally:
    """What the report says beside the hashes."""

    errors: list[dict[str, Any]] = field(default_factory=list)
    lengths: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in MODALITIES})
    tasks: Counter[str] = field(default_factory=Counter)
    audio_samples: Counter[int] = field(default_factory=Counter)  # sampling rate → samples of the sources
    audio_notes: Counter[str] = field(default_factory=Counter)
    refused: set[str] = field(default_factory=set)  # keys that the shard would not take

    def fail(self, line: int, name: str, reason: str, message: str) -> None:
        about = {"id": name, "line": line, "reason": reason, "message": message[:MAX_MESSAGE_CHARACTERS]}
        self.errors.append(about)

    def fail_record(self, record: ManifestRecord, error: RecordError | TokenError) -> None:
        self.fail(record.line, record.id, error.reason, str(error))

    def refuse(self, record: TokenizedRecord, error: RecordError) -> None:
        self.refused.add(record.key)
        self.fail(int(record.key) + 1, record.id, error.reason, str(error))

    def count(self, record: TokenizedRecord) -> None:
        if record.key in self.refused:
            return
        self.tasks[record.task or ""] += 1
        for modality in record.ids:
            self.lengths[modality][record.length(modality)] += 1
        if "audio" in record.metadata:
            self._count_sound(record.metadata["audio"])

    def _count_sound(self, metadata: Mapping[str, Any]) -> None:
        source = metadata["source"]
        self.audio_samples[int(source["sampling_rate_hz"])] += int(source["samples"])
        self.audio_notes["clipped_samples"] += int(metadata["clipped_samples"])
        for name in ("clipped_samples", "cropped", "silent"):
            self.audio_notes[f"sounds_with_{name}" if name == "clipped_samples" else name] += bool(metadata[name])

    def to_dict(self) -> dict[str, Any]:
        lengths = {name: {str(n): counts[n] for n in sorted(counts)} for name, counts in self.lengths.items()}
        return {
            "lengths": lengths,
            "tasks": dict(sorted(self.tasks.items())),
            "audio_samples": {str(rate): self.audio_samples[rate] for rate in sorted(self.audio_samples)},
            "audio_notes": dict(sorted(self.audio_notes.items())),
        }


def tokenize_unit(plan: Plan, unit: Unit, uti: UnifiedTokenizer, tell: Tell = lambda count: None) -> dict[str, Any]:
    """Write one shard, its index and, last, its report, which is returned.

    Raises:
        StorageError: the disk can't be written.
        DataError: the manifest is not the one that was planned.
    """
    tally = _Tally()
    records = _tokenized(plan, unit, uti, tally, tell)
    summary = write_shard(plan.out, unit.split, unit.number, records, uti.token_space, on_error=tally.refuse)
    plan.require_manifest()
    errors = sorted(tally.errors, key=lambda error: error["line"])
    return write_report(plan.out, summary, errors, plan_sha256=plan.sha256, statistics=tally.to_dict())


def _tokenized(plan: Plan, unit: Unit, uti: UnifiedTokenizer, tally: _Tally, tell: Tell) -> Iterator[TokenizedRecord]:
    seen = told = 0
    for block in _blocks(_loaded(plan, unit, uti, tally), uti):
        for record in _encode_block(block.items, uti, tally):
            yield record
            tally.count(record)
        seen = block.lines
        tell(seen - told)
        told = seen
    tell(unit.records - told)


@dataclass(slots=True)
class _Block:
    items: list[_Loaded]
    lines: int  # of the unit that were read when the block was full


def _blocks(loaded: Iterator[tuple[int, _Loaded | None]], uti: UnifiedTokenizer) -> Iterator[_Block]:
    """Records in groups that fit in memory, large enough to fill a codec's calls."""
    sections = (uti.config.image, uti.config.audio)
    size = max([BLOCK_RECORDS, *(2 * section.batch_size for section in sections if section is not None)])
    items: list[_Loaded] = []
    held = lines = 0
    for lines, item in loaded:
        if item is None:
            continue
        items.append(item)
        held += item.num_bytes
        if len(items) == size or held >= BLOCK_BYTES:
            yield _Block(items, lines)
            items, held = [], 0
    if items:
        yield _Block(items, lines)


def _loaded(plan: Plan, unit: Unit, uti: UnifiedTokenizer, tally: _Tally) -> Iterator[tuple[int, _Loaded | None]]:
    """Each line's media, decoded, with the number of lines so far; None for one that can't be used."""
    max_seconds = DEFAULT_MAX_SECONDS if uti.config.audio is None else uti.config.audio.max_seconds
    with open_manifest(plan.manifest) as file:
        for count, (offset, line, earlier) in enumerate(plan.lines(unit).tolist(), start=1):
            entry = read_line(file, offset, line, plan.manifest.name)
            if isinstance(entry, BadLine):
                tally.fail(line, entry.id, entry.reason, entry.message)
                yield count, None
                continue
            try:
                if earlier:
                    raise RecordError(
                        f"{plan.manifest.name}:{line} has the id of line {earlier}, which is kept.", "duplicate_id"
                    )
                yield count, _load(entry, plan, max_seconds)
            except (RecordError, TokenError) as error:
                tally.fail_record(entry, error)
                yield count, None


def _load(record: ManifestRecord, plan: Plan, max_seconds: float) -> _Loaded:
    root, origin = plan.manifest.parent, f"{plan.manifest.name}:{record.line}"
    paths: dict[str, Path] = {}
    for kind, path in (("image", record.image), ("audio", record.audio)):  # look for all before any is decoded
        if path is not None:
            paths[kind] = resolve_media(root, path, kind, origin)
    picture = sound = None
    if "image" in paths:
        limit = int(plan.settings["limits"]["max_image_pixels"])
        picture = load_image(paths["image"], max_pixels=limit, name=str(record.image))
    if "audio" in paths:
        sound = load_sound(paths["audio"], max_seconds=max_seconds, name=str(record.audio))
    return _Loaded(record, picture, sound)


def _encode_block(items: Sequence[_Loaded], uti: UnifiedTokenizer, tally: _Tally) -> Iterator[TokenizedRecord]:
    """Text, pictures and sounds of a block; a record of which one part fails is left out whole."""
    failed: dict[int, RecordError | TokenError] = {}
    ids: list[dict[str, Any]] = [{} for _ in items]
    metadata: list[dict[str, Any]] = [{} for _ in items]

    def run(modality: str, encode: Callable[[list[Any]], Sequence[Any]], values: Sequence[Any | None]) -> None:
        """Encode the values of the records that have one and have not failed."""
        places = [place for place, value in enumerate(values) if value is not None and place not in failed]
        for place, result in zip(places, encode_each(encode, [values[p] for p in places]), strict=True):
            if isinstance(result, RecordError | TokenError):
                failed[place] = result
            elif modality == "text":
                ids[place]["text"] = np.asarray(result, dtype=np.int64)
            else:
                ids[place][modality], metadata[place][modality] = result.ids, result.metadata

    run("text", uti.encode_texts, [item.record.text for item in items])
    run("image", uti.encode_images, [item.picture for item in items])
    run("audio", uti.encode_audios, [item.sound for item in items])
    for place, item in enumerate(items):
        record = item.record
        if place in failed:
            error = failed[place]
            tally.fail(record.line, record.id, error.reason, f"Record {record.id[:80]!r}: {error}")
            continue
        key = f"{record.position:09d}"
        about = (record.id, record.source, record.task, record.text, record.meta)
        yield TokenizedRecord(key, *about, ids=ids[place], metadata=metadata[place])


def encode_each(
    encode: Callable[[list[Item]], Sequence[Result]], items: list[Item]
) -> list[Result | RecordError | TokenError]:
    """Encode a list, and where one item fails, the others none the less: halves are tried again.

    Inputs are checked before a codec runs, so that a bad one costs next to nothing.
    """
    if not items:
        return []
    try:
        return list(encode(items))
    except (RecordError, TokenError) as error:
        if len(items) == 1:
            return [error]
    middle = len(items) // 2
    return encode_each(encode, items[:middle]) + encode_each(encode, items[middle:])

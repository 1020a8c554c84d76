"""What is wrong with this data set, before training finds out.

Every record is read, encoded and its pictures decoded, just as training would; then the two sides of the
split are compared. Nothing is changed or written.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, Dataset

from qwen3_vlm.config import RunConfig
from qwen3_vlm.data.captions import Records, open_records
from qwen3_vlm.data.doctor_report import DoctorReport, Problem, SideReport
from qwen3_vlm.data.encode import ConversationProcessor, LengthTable, Sample, SampleEncoder, lengths
from qwen3_vlm.data.images import load_image
from qwen3_vlm.data.records import ImageRef, Record
from qwen3_vlm.data.splits import BUCKET_NAMES, Indices, bucket_of, split_table
from qwen3_vlm.errors import DataError, ImageError

WORK_RECORDS = 64  # per task of a worker process

__all__ = ["DoctorReport", "Problem", "SideReport", "examine"]


def examine(
    config: RunConfig,
    processor: ConversationProcessor | None = None,
    *,
    decode_images: bool = True,
    progress: bool = False,
) -> DoctorReport:
    """Look at all data of a run.

    Args:
        processor: counts tokens; None leaves out the checks that need them.
        decode_images: false only looks whether the files are there.

    Raises:
        DataError: a whole file or folder can't be used.
    """
    if not config.data.train:
        raise DataError("There is nothing to examine: set data.train to record files, a folder or a glob.")
    notes = [] if processor else ["Without a tokenizer, lengths are counted in words and nothing is too long."]
    sides = _sides(config, processor, progress, notes)
    examined = {name: _examine_side(name, side, config, decode_images, progress) for name, side in sides.items()}
    problems = [problem for side in examined.values() for problem in side.problems]
    if "eval" in examined:
        problems += _leaks(examined["train"], examined["eval"])
        notes += _shared_pictures(examined["train"], examined["eval"])
    if not decode_images:
        notes.append("Pictures were not decoded; only whether their files are there was looked at.")
    reports = {name: side.report for name, side in examined.items()}
    return DoctorReport(reports, problems, config.data.max_bad_fraction, tuple(notes))


@dataclass(frozen=True, slots=True)
class _Side:
    records: Records
    table: LengthTable
    indices: Indices  # usable ones that belong to this side
    unusable: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Content:
    """Digests of one usable record, or why its pictures fail."""

    index: int
    id: str
    origin: str
    pictures: tuple[bytes, ...]
    sample: bytes  # of pictures and text
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class _Examined:
    report: SideReport
    contents: Sequence[_Content]  # of records that turned out good
    problems: Sequence[Problem]


class _WordEncoder(SampleEncoder):
    """Stands in where there is no tokenizer: an answer's words are its length, and everything fits."""

    def __init__(self) -> None:
        pass

    def encode(self, record: Record) -> Sample:
        words = sum(len(turn.text.split()) for turn in record.turns if turn.role == "assistant")
        return Sample(record.id, [0], [0], record.images, words, record.origin)


def _sides(
    config: RunConfig, processor: ConversationProcessor | None, progress: bool, notes: list[str]
) -> dict[str, _Side]:
    data = config.data
    encoder = SampleEncoder(processor, data.max_seq_len) if processor else _WordEncoder()

    def measure(paths: Sequence[str]) -> tuple[Records, LengthTable]:
        records = open_records(paths, data.image_root)
        return records, lengths(records, encoder, num_workers=data.num_workers, progress=progress)

    records, table = measure(data.train)
    if data.eval:
        held_out = measure(data.eval)
        parts = {"train": (records, table), "eval": held_out}
        return {name: _Side(*part, part[1].usable, sorted(part[1].reasons)) for name, part in parts.items()}
    try:
        split = split_table(table, data.eval_fraction, data.eval_max, config.seed)
    except DataError as error:
        notes.append(str(error))
        return {"train": _Side(records, table, table.usable, sorted(table.reasons))}
    return {
        "train": _Side(records, table, split.train_indices, sorted(table.reasons)),
        "eval": _Side(records, table, split.eval_indices, ()),
    }


def _examine_side(name: str, side: _Side, config: RunConfig, decode_images: bool, progress: bool) -> _Examined:
    max_pixels = config.data.max_image_pixels if decode_images else None
    contents = list(_inspect(side, max_pixels, config.data.num_workers, progress, name))
    problems = [
        Problem(name, bad.index, bad.id, bad.origin, bad.reason, bad.message)
        for bad in (side.table.reasons[index] for index in side.unusable)
    ]
    problems += [
        Problem(name, item.index, item.id, item.origin, item.reason, item.message) for item in contents if item.reason
    ]
    good = [item for item in contents if not item.reason]
    return _Examined(_report(side, good, len(side.indices) + len(side.unusable)), good, problems)


def _report(side: _Side, good: Sequence[_Content], records: int) -> SideReport:
    indices = np.array([item.index for item in good], dtype=np.int64)
    tokens = side.table.tokens[indices]
    answers = dict.fromkeys(BUCKET_NAMES, 0)
    for length in side.table.answer_tokens[indices]:
        answers[BUCKET_NAMES[bucket_of(int(length))]] += 1
    counted = len(tokens) > 0 and int(tokens.max()) > 1  # one token each: there was no tokenizer
    figures = {"median": np.median(tokens), "95 %": np.percentile(tokens, 95), "max": tokens.max()} if counted else {}
    return SideReport(
        records=records,
        usable=len(good),
        pictures=int(side.table.images[indices].sum()),
        shortened=int((side.table.dropped_turns[indices] > 0).sum()),
        duplicates=len(good) - len({item.sample for item in good}),
        answers=answers,
        tokens={figure: int(value) for figure, value in figures.items()},
    )


def _leaks(train: _Examined, held_out: _Examined) -> list[Problem]:
    ids = {item.id: item.origin for item in train.contents}
    samples = {item.sample: item.origin for item in train.contents}
    problems = []
    for item in held_out.contents:
        if item.id in ids:
            problems.append(_leak(item, "duplicate_id", f"the id {item.id}", ids[item.id]))
        if item.sample in samples:
            problems.append(_leak(item, "duplicate_sample", "its content", samples[item.sample]))
    return problems


def _leak(item: _Content, reason: str, what: str, origin: str) -> Problem:
    message = f"{item.origin}: {what} is also in the training data, at {origin}."
    return Problem("eval", item.index, item.id, item.origin, reason, message)


def _shared_pictures(train: _Examined, held_out: _Examined) -> list[str]:
    seen = {digest for item in train.contents for digest in item.pictures}
    shared = sum(any(digest in seen for digest in item.pictures) for item in held_out.contents)
    return [f"{shared:,} held-out records show a picture that is also trained on."] if shared else []


def _inspect(side: _Side, max_pixels: int | None, num_workers: int, progress: bool, name: str) -> Iterable[_Content]:
    parts = _Parts(side.records, side.indices, max_pixels)
    workers = num_workers if len(parts) > 1 else 0
    loader: Iterable[list[_Content]] = DataLoader(parts, batch_size=None, collate_fn=list, num_workers=workers)
    if progress:
        from tqdm import tqdm

        loader = tqdm(loader, desc=f"examining {name}", unit_scale=WORK_RECORDS, unit="records", leave=False)
    for part in loader:
        yield from part


class _Parts(Dataset[list[_Content]]):
    def __init__(self, records: Records, indices: Indices, max_pixels: int | None) -> None:
        self.records, self.indices, self.max_pixels = records, indices, max_pixels

    def __len__(self) -> int:
        return -(-len(self.indices) // WORK_RECORDS)

    def __getitem__(self, part: int) -> list[_Content]:
        indices = self.indices[part * WORK_RECORDS : (part + 1) * WORK_RECORDS]
        return [_content(int(index), self.records, self.max_pixels) for index in indices]


def _content(index: int, records: Records, max_pixels: int | None) -> _Content:
    record = records[index]
    try:
        pictures = tuple(_picture_digest(ref, max_pixels) for ref in record.images)
    except ImageError as error:
        return _Content(index, record.id, record.origin, (), b"", error.reason, f"{record.origin}: {error}")
    sample = _digest(*pictures, *(f"{turn.role}\0{turn.text}".encode() for turn in (*record.preface, *record.turns)))
    return _Content(index, record.id, record.origin, pictures, sample)


def _picture_digest(ref: ImageRef, max_pixels: int | None) -> bytes:
    """Of the pixels, so that the same picture in another file format is found too; else of its place."""
    if max_pixels is None:
        ref.check_present()
        return _digest(*(str(part).encode() for part in ref.key))
    image = load_image(ref.read_bytes(), max_pixels=max_pixels, name=ref.name)
    return _digest(str(image.size).encode(), image.tobytes())


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()[:16]

"""Records to token ids and labels, and the table of lengths that planning and splitting work from.

Labels stand on the assistant's answers alone. What does not fit is never cut inside: whole exchanges are left
out from the end (with their pictures) while one answer remains, and else the record is refused and counted.
"""

import bisect
import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset

from qwen3_vlm.data.captions import Records
from qwen3_vlm.data.records import IMAGE_MARK, ImageRef, Record, Turn
from qwen3_vlm.errors import RecordError
from qwen3_vlm.storage import atomic_file

IGNORED = -100  # the label that no loss is computed at
TABLE_FORMAT = 2
WORK_RECORDS = 2_000  # per task of a worker process
PROBES = ("A red cat, 3 × 7!", "两只猫 und ein Bär\n", f"{IMAGE_MARK}\nWhat is this?")

Message = Mapping[str, str]


class ConversationProcessor(Protocol):
    """What this room needs of a Qwen3VLMProcessor; anything else with these names will do."""

    image_token: str
    image_token_id: int
    num_image_tokens: int
    tokenizer: Any

    def encode_conversation(self, messages: Any, /) -> tuple[list[int], list[int]]: ...

    def encode_prompt(self, messages: Any, /) -> list[int]: ...

    def pixel_values(self, images: Any, /) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded record."""

    id: str
    input_ids: list[int]  # (T,), each placeholder expanded
    labels: list[int]  # (T,), IGNORED off the answers
    images: tuple[ImageRef, ...]
    answer_length: int  # answer tokens, without the token that ends each answer
    origin: str
    dropped_turns: int = 0  # left out from the end to fit


@dataclass(frozen=True, slots=True)
class SkippedRecord:
    """One record that was not used, and why."""

    index: int
    id: str
    origin: str
    reason: str
    message: str

    def to_dict(self) -> dict[str, Any]:
        """A line of skipped.jsonl or problems.jsonl."""
        return asdict(self)


class SampleEncoder:
    """Encodes records with one processor for one maximum length."""

    def __init__(self, processor: ConversationProcessor, max_seq_len: int) -> None:
        self.processor = processor
        self.max_seq_len = max_seq_len
        self.control_tokens = tuple(getattr(processor.tokenizer, "all_special_tokens", ()))

    def encode(self, record: Record) -> Sample:
        """Token ids and labels of one record.

        Raises:
            RecordError: reasons truncates_image, truncates_answer, no_labels, placeholder_count, reserved_text.
        """
        exchanges = len(record.turns) // 2
        ids, mask = self._encode(record, exchanges)
        if len(ids) > self.max_seq_len:
            fitting = bisect.bisect_right(
                range(1, exchanges), self.max_seq_len, key=lambda count: len(self._encode(record, count)[0])
            )
            if fitting == 0:
                raise self._too_long(record)
            ids, mask = self._encode(record, fitting)
            exchanges = fitting
        return self._sample(record, exchanges, ids, mask)

    def encode_prompt(self, record: Record) -> tuple[list[int], str, tuple[ImageRef, ...]]:
        """The first question as a prompt to generate from, its reference answer, and the question's pictures."""
        question, answer = record.turns[0], record.turns[1]
        ids = list(self.processor.encode_prompt(self._messages([*record.preface, question])))
        return ids, answer.text, record.images[: question.text.count(IMAGE_MARK)]

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the same record could come out with other lengths."""
        probes = [self._messages([Turn("user", probe), Turn("assistant", probe[-15:])]) for probe in PROBES]
        content = [
            self.max_seq_len,
            self.processor.num_image_tokens,
            str(getattr(self.processor, "chat_template", "")),
            getattr(self.processor.tokenizer, "vocab_size", None),
            [self.processor.encode_conversation(probe) for probe in probes],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _sample(self, record: Record, exchanges: int, ids: list[int], mask: list[int]) -> Sample:
        marks = sum(turn.text.count(IMAGE_MARK) for turn in record.turns[: 2 * exchanges])
        images = record.images[:marks]
        expected = len(images) * self.processor.num_image_tokens
        found = ids.count(self.processor.image_token_id)
        if found != expected:
            message = f"{record.origin}: {found} image tokens for {len(images)} pictures; there should be {expected}."
            raise RecordError(message, "placeholder_count")
        supervised = sum(mask)
        if supervised <= exchanges:  # nothing, or no more than the tokens that end the answers
            raise RecordError(f"{record.origin} has no answer token to learn from.", "no_labels")
        labels = [token if graded else IGNORED for token, graded in zip(ids, mask, strict=True)]
        labels[0] = IGNORED  # nothing stands before it that could predict it
        dropped = len(record.turns) - 2 * exchanges
        return Sample(record.id, ids, labels, images, supervised - exchanges, record.origin, dropped)

    def _encode(self, record: Record, exchanges: int) -> tuple[list[int], list[int]]:
        turns = [*record.preface, *record.turns[: 2 * exchanges]]
        for token in self.control_tokens:
            if any(token in turn.text for turn in turns):
                raise RecordError(f"{record.origin}: the text holds {token}, a control token.", "reserved_text")
        ids, mask = self.processor.encode_conversation(self._messages(turns))
        end = len(mask) - mask[::-1].index(1) if 1 in mask else 0  # behind it stands but a line break of the template
        return (ids[:end], mask[:end]) if end <= self.max_seq_len < len(ids) else (ids, mask)

    def _messages(self, turns: Iterable[Turn]) -> list[Message]:
        token = self.processor.image_token
        return [{"role": turn.role, "content": turn.text.replace(IMAGE_MARK, token)} for turn in turns]

    def _too_long(self, record: Record) -> RecordError:
        ids, _ = self._encode(record, 1)
        limit = self.max_seq_len
        cuts_image = self.processor.image_token_id in ids[limit:]
        reason = "truncates_image" if cuts_image else "truncates_answer"
        what = "a picture" if cuts_image else "its answer"
        message = f"{record.origin} takes {len(ids):,} tokens; max_seq_len {limit:,} would cut {what}."
        return RecordError(message, reason)


@dataclass(frozen=True, slots=True)
class LengthTable:
    """What is known of each of R records without keeping any of them. Unusable ones have 0 tokens."""

    tokens: npt.NDArray[np.int32]  # (R,)
    answer_tokens: npt.NDArray[np.int32]  # (R,)
    images: npt.NDArray[np.int32]  # (R,)
    dropped_turns: npt.NDArray[np.int32]  # (R,)
    ids: list[str]  # "" where unusable
    reasons: dict[int, SkippedRecord]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def usable(self) -> npt.NDArray[np.int64]:
        """Indices of the records that became samples."""
        return np.flatnonzero(self.tokens > 0)

    def counts(self) -> dict[str, int]:
        """How many records were refused, by reason."""
        found: dict[str, int] = {}
        for skipped in self.reasons.values():
            found[skipped.reason] = found.get(skipped.reason, 0) + 1
        return dict(sorted(found.items()))


def lengths(
    records: Records,
    encoder: SampleEncoder,
    cache_dir: str | Path | None = None,
    num_workers: int = 0,
    progress: bool = False,
) -> LengthTable:
    """Encode every record once and keep its length; pictures are not opened.

    With `cache_dir` the table is kept there under a fingerprint of the records and the encoder.
    """
    if cache_dir is None:
        return _measure(records, encoder, num_workers, progress)
    identity = f"{TABLE_FORMAT} {records.fingerprint} {encoder.fingerprint}"
    path = Path(cache_dir) / f"lengths-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npz"
    table = _load_table(path, len(records))
    if table is None:
        table = _measure(records, encoder, num_workers, progress)
        _save_table(path, table)
    return table


_Measured = tuple[int, int, int, int, str, SkippedRecord | None]


class _Parts(Dataset[list[_Measured]]):
    """Spans of records as a data set, so that torch's workers inherit the tokenizer instead of receiving copies."""

    def __init__(self, records: Records, encoder: SampleEncoder) -> None:
        self.records, self.encoder = records, encoder
        self.starts = range(0, len(records), WORK_RECORDS)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, part: int) -> list[_Measured]:
        start = self.starts[part]
        stop = min(start + WORK_RECORDS, len(self.records))
        return [_measure_one(self.records, self.encoder, index) for index in range(start, stop)]


def _measure(records: Records, encoder: SampleEncoder, num_workers: int, progress: bool) -> LengthTable:
    parts = _Parts(records, encoder)
    workers = num_workers if len(parts) > 1 else 0
    loader: DataLoader[list[_Measured]] = DataLoader(parts, batch_size=None, num_workers=workers, collate_fn=list)
    measured: list[_Measured] = []
    for part in _progress(loader, len(parts), progress):
        measured.extend(part)
    numbers = np.array([row[:4] for row in measured], dtype=np.int32).reshape(-1, 4).T
    reasons = {row[5].index: row[5] for row in measured if row[5] is not None}
    return _table(numbers, [row[4] for row in measured], reasons)


def _table(numbers: npt.NDArray[np.int32], ids: list[str], reasons: dict[int, SkippedRecord]) -> LengthTable:
    tokens, answer_tokens, images, dropped_turns = (np.ascontiguousarray(column) for column in numbers)
    return LengthTable(tokens, answer_tokens, images, dropped_turns, ids, reasons)


def _measure_one(records: Records, encoder: SampleEncoder, index: int) -> _Measured:
    record = None
    try:
        record = records[index]
        sample = encoder.encode(record)
    except RecordError as error:
        origin = record.origin if record else records.origin(index)
        skipped = SkippedRecord(index, record.id if record else "", origin, error.reason, str(error))
        return 0, 0, 0, 0, "", skipped
    return len(sample.input_ids), sample.answer_length, len(sample.images), sample.dropped_turns, sample.id, None


def _progress(parts: Iterable[list[_Measured]], total: int, shown: bool) -> Iterable[list[_Measured]]:
    if not shown:
        return parts
    from tqdm import tqdm

    return tqdm(parts, total=total, desc="measuring lengths", unit_scale=WORK_RECORDS, unit="records", leave=False)


def _save_table(path: Path, table: LengthTable) -> None:
    words = json.dumps({"ids": table.ids, "reasons": [skipped.to_dict() for skipped in table.reasons.values()]})
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            numbers=np.stack([table.tokens, table.answer_tokens, table.images, table.dropped_turns]),
            words=np.frombuffer(words.encode(), dtype=np.uint8),
        )


def _load_table(path: Path, count: int) -> LengthTable | None:
    """The cached table, or None where there is none that can be read."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            numbers = np.asarray(arrays["numbers"], dtype=np.int32)
            words = json.loads(arrays["words"].tobytes())
        reasons = {item["index"]: SkippedRecord(**item) for item in words["reasons"]}
        if numbers.shape != (4, count) or len(words["ids"]) != count:
            return None
        return _table(numbers, words["ids"], reasons)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None

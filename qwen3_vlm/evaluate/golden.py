"""The golden set: the same few prompts, decoded the same way at every checkpoint.

Losses say how much a model improves; the golden set shows what it says. It is chosen once per run,
stratified by answer length, and its ids are kept in `golden/ids.json`. Each checkpoint adds
`golden/step-000200.jsonl`, one `GoldenItem` per line; the pictures' thumbnails are written once, to
`golden/thumbnails.json`. Decoding is greedy, so two dumps differ only where the model does.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from qwen3_vlm.data.images import load_image
from qwen3_vlm.data.records import IMAGE_MARK, Record
from qwen3_vlm.data.splits import bucket_of, pick_stratified
from qwen3_vlm.errors import DataError, ImageError
from qwen3_vlm.evaluate.captioning import Request, generate_answers
from qwen3_vlm.storage import atomic_write_json, atomic_write_text, read_json

GOLDEN_IDS_FILE = "ids.json"
THUMBNAILS_FILE = "thumbnails.json"
ITEMS_FILE = "items.jsonl"  # of a dump that is a folder
THUMBNAIL_PIXELS = 160  # longest side
MAX_GOLDEN_BYTES = 50_000_000
_VERDICTS = {(False, True): "  (now right)", (True, False): "  (no longer right)"}  # exact before, exact now
_PNG_PIXELS = 128 * 128  # small pictures stay exact; photographs become JPEG


@dataclass(frozen=True, slots=True)
class GoldenItem:
    """One prompt and what the model answered."""

    id: str
    step: int
    prompt: str  # the user's text, each picture as "<image>"
    reference: str
    prediction: str
    exact: bool  # equal but for blanks
    images: tuple[str, ...] = ()  # file names, without folders
    error: str = ""  # why there is no prediction, where a picture can't be read


Item = TypeVar("Item", bound=GoldenItem)


@dataclass(frozen=True)
class GoldenDiff:
    """What changed between two dumps, by id, in the order of the second."""

    changed: tuple[tuple[GoldenItem, GoldenItem], ...]
    unchanged: int
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    exact_a: int  # of the ids in both
    exact_b: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self)

    def to_text(self) -> str:
        """For a terminal: a summary line, then each change; control characters are spelled out."""
        common = len(self.changed) + self.unchanged
        lines = [
            f"{len(self.changed)} of {common} answers changed; exact matches {self.exact_a} → {self.exact_b}.",
            *(f"only in the first: {_printable(name)}" for name in self.only_in_a),
            *(f"only in the second: {_printable(name)}" for name in self.only_in_b),
        ]
        for old, new in self.changed:
            verdict = _VERDICTS.get((old.exact, new.exact), "")
            lines += ["", f"{_printable(new.id)}{verdict}", f"    reference  {_printable(new.reference)}"]
            lines += [f"  − step {old.step:<6} {_printable(old.prediction)}"]
            lines += [f"  + step {new.step:<6} {_printable(new.prediction)}"]
        return "\n".join(lines)


def choose_golden(
    sample_ids: Sequence[str],
    answer_lengths: Sequence[int],
    *,
    count: int = 64,
    seed: int = 0,
    path: str | Path | None = None,
) -> list[int]:
    """Positions of the golden set within `sample_ids`, shortest answers first.

    Every length bucket gives an equal share, as far as it has samples. The choice goes by a hash of
    the id, not by position, so it survives a reordered data set. Where `path` exists the ids in it
    are used; otherwise they are written to it.

    Raises:
        DataError: the file at `path` can't be read or names an id that is not there.
        ValueError: ids and lengths differ in number.
    """
    if len(sample_ids) != len(answer_lengths):
        raise ValueError(f"{len(sample_ids)} ids and {len(answer_lengths)} answer lengths were given")
    first = {name: position for position, name in reversed(list(enumerate(sample_ids)))}
    if path is not None and Path(path).exists():
        return _persisted_choice(Path(path), first)
    positions = pick_stratified(sorted(first.values()), sample_ids, answer_lengths, count, seed, balanced=True)
    positions.sort(key=lambda position: bucket_of(answer_lengths[position]))
    if path is not None:
        atomic_write_json(path, {"format": 1, "seed": seed, "ids": [sample_ids[position] for position in positions]})
    return positions


def dump_golden(
    model: Any,
    processor: Any,
    records: Sequence[Record],
    path: str | Path,
    *,
    step: int,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    max_image_pixels: int = 50_000_000,
) -> list[GoldenItem]:
    """Answer the first question of each record greedily and write the dump to `path`, atomically.

    A picture that can't be read gives an item with `error`, not an exception: a checkpoint must not
    fail for it.

    Raises:
        StorageError: the disk can't be written.
    """
    items: dict[str, GoldenItem] = {}
    thumbnails: dict[str, list[str]] = {}
    by_length = sorted(records, key=lambda record: len(record.turns[0].text))  # like lengths share a batch
    for start in range(0, len(by_length), batch_size):
        chunk = by_length[start : start + batch_size]
        requests, errors = _load_requests(chunk, processor.image_token, max_image_pixels)
        answers = generate_answers(
            model, processor, list(requests.values()), max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        predictions = dict(zip(requests, answers, strict=True))
        for record in chunk:
            items[record.id] = _item(record, step, predictions.get(record.id, ""), errors.get(record.id, ""))
        for name, request in requests.items():
            thumbnails[name] = [thumbnail_uri(image) for image in request.images]
    ordered = [items[record.id] for record in records]
    atomic_write_text(path, "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in ordered))
    if not (pictures := Path(path).parent / THUMBNAILS_FILE).exists():
        atomic_write_json(pictures, thumbnails, indent=None)
    return ordered


def read_golden(path: str | Path) -> list[GoldenItem]:
    """The items of a dump: a file, or a folder with an `items.jsonl` and what it names (`token_golden`).

    Raises:
        DataError: the file can't be read or is not a dump; names the line.
    """
    return read_items(path, GoldenItem)


def read_items(path: str | Path, kind: type[Item]) -> list[Item]:
    """The items of a dump, each line read as `kind`; what it does not know is passed over.

    Raises:
        DataError: the file can't be read or is not a dump; names the line.
    """
    path = Path(path) / ITEMS_FILE if Path(path).is_dir() else Path(path)
    try:
        if path.stat().st_size > MAX_GOLDEN_BYTES:
            raise DataError(f"{path} is larger than {MAX_GOLDEN_BYTES:,} bytes; that is no golden dump.")
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: an answer may hold U+2028
    except OSError as error:
        raise DataError(f"The golden dump {path} can't be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"The golden dump {path} is not UTF-8 text.") from error
    return [_parse_line(line, f"{path}:{number}", kind) for number, line in enumerate(lines, start=1) if line.strip()]


def diff_golden(a: str | Path, b: str | Path) -> GoldenDiff:
    """Compare two dumps by id.

    Raises:
        DataError: one of them can't be read.
    """
    old = {item.id: item for item in read_golden(a)}
    new = {item.id: item for item in read_golden(b)}
    common = [name for name in new if name in old]
    changed = tuple((old[name], new[name]) for name in common if old[name].prediction != new[name].prediction)
    return GoldenDiff(
        changed=changed,
        unchanged=len(common) - len(changed),
        only_in_a=tuple(name for name in old if name not in new),
        only_in_b=tuple(name for name in new if name not in old),
        exact_a=sum(old[name].exact for name in common),
        exact_b=sum(new[name].exact for name in common),
    )


def thumbnail_uri(image: Image.Image) -> str:
    """A picture of at most 160 pixels a side as a data URI; small ones as they are."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    kind = "png" if small.width * small.height <= _PNG_PIXELS else "jpeg"
    buffer = io.BytesIO()
    small.save(buffer, format=kind, **({"quality": 82} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _printable(text: str) -> str:
    """What a model says must not steer the terminal: ESC becomes \\x1b, a line feed \\n."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _persisted_choice(path: Path, first: dict[str, int]) -> list[int]:
    chosen = read_json(path, error=DataError).get("ids")
    if not isinstance(chosen, list) or not all(isinstance(name, str) for name in chosen):
        raise DataError(f'{path} has no list "ids"; remove the file to choose the golden set anew.')
    missing = [name for name in chosen if name not in first]
    if missing:
        raise DataError(
            f"{path} names {len(missing)} samples that the evaluation data does not have, such as {missing[0]!r}. "
            "Give the data that the run was started with, or remove the file to choose anew."
        )
    return [first[name] for name in chosen]


def _load_requests(
    records: Sequence[Record], image_token: str, max_pixels: int
) -> tuple[dict[str, Request], dict[str, str]]:
    """Requests of the records whose pictures can be read, and the reason why the others can't, by id."""
    requests, errors = {}, {}
    for record in records:
        question = record.turns[0].text
        refs = record.images[: question.count(IMAGE_MARK)]
        try:
            images = [load_image(ref.read_bytes(), max_pixels=max_pixels, name=ref.name) for ref in refs]
        except ImageError as error:
            errors[record.id] = error.reason
            continue
        turns = [*record.preface, record.turns[0]]
        messages = [{"role": turn.role, "content": turn.text.replace(IMAGE_MARK, image_token)} for turn in turns]
        requests[record.id] = Request(messages, images)
    return requests, errors


def _item(record: Record, step: int, prediction: str, error: str) -> GoldenItem:
    question, answer = record.turns[0].text, record.turns[1].text
    names = tuple(Path(ref.member or ref.path).name for ref in record.images[: question.count(IMAGE_MARK)])
    exact = not error and prediction.split() == answer.split()
    return GoldenItem(record.id, step, question, answer, prediction, exact, names, error)


def _parse_line(line: str, origin: str, kind: type[Item]) -> Item:
    try:
        tree = json.loads(line)
        values: dict[str, Any] = {item.name: tree[item.name] for item in fields(kind) if item.name in tree}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return kind(**values)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{origin} is not a line of a golden dump ({' '.join(str(error).split())}).") from error

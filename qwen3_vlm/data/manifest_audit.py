"""What is wrong with a raw manifest, before tokenizing finds out: counts by reason, task and modality.

One pass, a few numbers a line in memory. Files are looked for, and decoded where that is asked for.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qwen3_vlm.data.images import load_image
from qwen3_vlm.data.manifest import MEDIA, BadLine, ManifestLine, ManifestRecord, resolve_media
from qwen3_vlm.data.manifest_index import index_manifest
from qwen3_vlm.data.sounds import load_sound
from qwen3_vlm.errors import RecordError
from qwen3_vlm.storage import atomic_file

AUDIT_FORMAT = 1
MAX_KINDS = 1_000  # of tasks and sources that are counted apart
OTHERS = "(others)"

Media = Literal["none", "files", "decode"]
Problem = dict[str, Any]  # id, line, reason, message: as in tokenize_errors.jsonl


@dataclass(slots=True)
class ManifestReport:
    """Figures of one manifest."""

    path: Path
    records: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # reason → message of its first line
    modalities: Counter[str] = field(default_factory=Counter)  # such as "text + image"
    tasks: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    sha256: str = ""
    media: Media = "files"

    @property
    def bad_records(self) -> int:
        return sum(self.reasons.values())

    @property
    def exit_status(self) -> int:
        """1 where a record can't be used or there is none; else 0."""
        return int(bool(self.reasons) or not self.records)

    def table(self) -> str:
        """The report as text."""
        lines = [f"{self.path}: {self.records:,} records, {self.records - self.bad_records:,} of them usable"]
        for title, counts in (("modalities", self.modalities), ("tasks", self.tasks), ("sources", self.sources)):
            shown = [f"{name or '(none)'} {count:,}" for name, count in counts.most_common(12)]
            lines.append(f"{title:<12}{', '.join(shown) or '-'}")
        lines += [
            f"{reason:<20}{count:>10,}   first: {self.first[reason]}"
            for reason, count in sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        ]
        notes = {
            "none": "Files were not looked for.",
            "files": "Files were not decoded; --decode looks whether they can be.",
            "decode": "Every file was decoded.",
        }
        return "\n".join([*lines, notes[self.media], self.verdict])

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.records:
            return "NOT FINE: there is no record."
        if not self.reasons:
            return "Fine: every record can be used."
        share = 100 * self.bad_records / self.records
        return f"NOT FINE: {self.bad_records:,} of {self.records:,} records ({share:.2f} %) can't be used."

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable summary."""
        return {
            "format": AUDIT_FORMAT,
            "manifest_sha256": self.sha256,
            "media": self.media,
            "exit_status": self.exit_status,
            "records": self.records,
            "bad_records": self.bad_records,
            "reasons": dict(sorted(self.reasons.items())),
            "modalities": dict(sorted(self.modalities.items())),
            "tasks": dict(sorted(self.tasks.items())),
            "sources": dict(sorted(self.sources.items())),
        }


def audit_manifest(
    path: str | Path,
    *,
    media: Media = "files",
    max_image_pixels: int = 50_000_000,
    max_audio_seconds: float = 600.0,
    problems: str | Path | None = None,
    progress: bool = False,
) -> ManifestReport:
    """Examine every line of a manifest.

    Args:
        media: "files" looks whether they are there and inside the folder, "decode" reads each one too.
        problems: a JSON Lines file for one line per problem; duplicate ids come last.

    Raises:
        DataError: the manifest can't be read.
        StorageError: `problems` can't be written.
    """
    path = Path(path)
    report = ManifestReport(path, media=media)
    limits = (max_image_pixels, max_audio_seconds)
    with _problem_file(problems) as tell, _bar(path, progress) as advance:

        def fail(problem: Problem) -> None:
            """Count a problem and tell of it."""
            report.reasons[problem["reason"]] += 1
            report.first.setdefault(problem["reason"], problem["message"])
            tell(problem)

        failed = bytearray()  # one byte a line: a record counts once, also when its id stands twice

        def visit(line: ManifestLine) -> None:
            """Examine one line, in the order of the file."""
            problem = _examine(line.entry, path.parent, media, *limits)
            failed.append(problem is not None)
            report.records += 1
            if problem is not None:
                fail(problem)
            if isinstance(line.entry, ManifestRecord):
                _count(report, line.entry)
            advance(line.offset)

        index = index_manifest(path, visit)
        report.sha256 = index.sha256
        for place, earlier, name in index.duplicates():
            if not failed[place]:
                line = int(index.lines[place])
                message = f"{path.name}:{line} has the id of line {earlier}."
                fail({"id": name, "line": line, "reason": "duplicate_id", "message": message})
    return report


def _examine(
    entry: ManifestRecord | BadLine, root: Path, media: Media, max_pixels: int, max_seconds: float
) -> Problem | None:
    if isinstance(entry, BadLine):
        return {"id": entry.id, "line": entry.line, "reason": entry.reason, "message": entry.message}
    try:
        _look_at_media(entry, root, media, max_pixels, max_seconds)
    except RecordError as error:
        return {"id": entry.id, "line": entry.line, "reason": error.reason, "message": str(error)}
    return None


def _look_at_media(entry: ManifestRecord, root: Path, media: Media, max_pixels: int, max_seconds: float) -> None:
    if media == "none":
        return
    for kind, path in zip(MEDIA, (entry.image, entry.audio), strict=True):
        if path is None:
            continue
        file = resolve_media(root, path, kind, f"line {entry.line}")
        if media == "decode" and kind == "image":
            load_image(file, max_pixels=max_pixels, name=path)
        elif media == "decode":
            load_sound(file, max_seconds=max_seconds, name=path)


def _count(report: ManifestReport, entry: ManifestRecord) -> None:
    has = {"text": entry.text, "image": entry.image, "audio": entry.audio}
    report.modalities[" + ".join(name for name, value in has.items() if value is not None)] += 1
    for counts, name in ((report.tasks, entry.task or ""), (report.sources, entry.source)):
        counts[name if name in counts or len(counts) < MAX_KINDS else OTHERS] += 1


@contextmanager
def _problem_file(path: str | Path | None) -> Iterator[Callable[[Problem], None]]:
    if path is None:
        yield lambda problem: None
        return
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yield lambda problem: print(json.dumps(problem), file=file)


@contextmanager
def _bar(path: Path, progress: bool) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    size = path.stat().st_size if path.is_file() else None
    with tqdm(desc="examining", total=size, unit="B", unit_scale=True, leave=False, disable=not progress) as bar:
        yield lambda offset: bar.update(offset - bar.n) and None

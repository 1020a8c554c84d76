"""What the data doctor found: counts, a verdict with an exit status, a table to read, files to keep."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen3_vlm.storage import atomic_write_json, atomic_write_text

REPORT_FORMAT = 1
LEAKS = {
    "duplicate_id": "an id stands on both sides of the split",
    "duplicate_sample": "the same pictures with the same text stand on both sides of the split",
}
# Always listed, also when none was found; whatever else is wrong with a record is listed too.
CHECKS = {
    "no_labels": "nothing to learn from: no answer, or an empty one",
    "placeholder_count": "<image> marks and pictures differ in number",
    "truncates_image": "max_seq_len would cut a picture",
    "truncates_answer": "max_seq_len would cut the only answer",
    "missing_image": "the picture file is not there",
    "unreadable_image": "the picture can't be decoded",
    "image_too_large": "the picture has more pixels than are read",
    **LEAKS,
}
OTHER_CHECKS = {
    "bad_json": "not valid JSON",
    "bad_record": "not a record",
    "bad_conversation": "turns of a wrong form or order",
    "bad_image_path": "a picture path of a wrong form, or out of the image root",
    "reserved_text": "a control token in the text",
    "too_large": "larger than is read",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One record with one thing wrong."""

    side: str  # "train" or "eval"
    index: int
    id: str
    origin: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class SideReport:
    """Figures of one side of the split."""

    records: int
    usable: int
    pictures: int
    shortened: int  # conversations whose last exchanges do not fit
    duplicates: int  # samples that stand here more than once, counted without their first
    answers: Mapping[str, int]  # records per answer-length bucket
    tokens: Mapping[str, int]  # median, 95th percentile and maximum; empty without a tokenizer


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """Everything that was found."""

    sides: Mapping[str, SideReport]
    problems: Sequence[Problem]
    max_bad_fraction: float
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def records(self) -> int:
        return sum(side.records for side in self.sides.values())

    @property
    def counts(self) -> dict[str, int]:
        """Problems by reason, the checks of CHECKS first."""
        found = Counter(problem.reason for problem in self.problems)
        others = {reason: found[reason] for reason in sorted(found) if reason not in CHECKS}
        return {reason: found[reason] for reason in CHECKS} | others

    @property
    def bad_records(self) -> int:
        """Records that training would skip. A leak is a problem of the split, not of the record."""
        return len({(problem.side, problem.index) for problem in self.problems if problem.reason not in LEAKS})

    @property
    def leaks(self) -> int:
        """Held-out records that are also trained on."""
        return len({(problem.side, problem.index) for problem in self.problems if problem.reason in LEAKS})

    @property
    def exit_status(self) -> int:
        """1 where training would stop or its evaluation would be worth nothing; else 0."""
        too_many = self.bad_records > self.max_bad_fraction * self.records
        held_out = self.sides["eval"].records if "eval" in self.sides else 0
        leaking = self.leaks > self.max_bad_fraction * held_out
        nothing = any(not side.usable for side in self.sides.values())
        return int(too_many or leaking or nothing)

    @property
    def verdict(self) -> str:
        """One or two sentences."""
        share = f"{100 * self.bad_records / max(1, self.records):.2f} %"
        limit = f"data.max_bad_fraction allows {100 * self.max_bad_fraction:g} %"
        parts = [f"{self.bad_records:,} of {self.records:,} records ({share}) can't be used; {limit}."]
        if self.leaks:
            parts.append(f"{self.leaks:,} held-out records are also trained on.")
        return " ".join(parts)

    def table(self) -> str:
        """The report as text."""
        lines = [*self._side_lines(), "", *self._problem_lines(), ""]
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join([*lines, ("Fine: " if self.exit_status == 0 else "NOT FINE: ") + self.verdict])

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable summary; the single problems are in problems.jsonl."""
        return {
            "format": REPORT_FORMAT,
            "exit_status": self.exit_status,
            "verdict": self.verdict,
            "bad_records": self.bad_records,
            "leaks": self.leaks,
            "counts": self.counts,
            "sides": {name: asdict(side) for name, side in self.sides.items()},
            "notes": list(self.notes),
        }

    def export(self, folder: str | Path) -> None:
        """Write report.json, report.txt and problems.jsonl (one line per problem) into a folder.

        Raises:
            StorageError: the folder can't be written.
        """
        target = Path(folder)
        lines = [json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in self.problems]
        atomic_write_text(target / "problems.jsonl", "".join(lines))
        atomic_write_text(target / "report.txt", self.table() + "\n")
        atomic_write_json(target / "report.json", self.to_dict())

    def _side_lines(self) -> list[str]:
        rows: dict[str, list[str]] = {"": list(self.sides)}
        for side in self.sides.values():
            for name in ("records", "usable", "pictures", "shortened", "duplicates"):
                rows.setdefault(name, []).append(f"{getattr(side, name):,}")
            for name, number in side.answers.items():
                rows.setdefault(f"answers {name}", []).append(f"{number:,}")
            for name, number in side.tokens.items():
                rows.setdefault(f"tokens {name}", []).append(f"{number:,}")
        return [f"{name:<20}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows.items()]

    def _problem_lines(self) -> list[str]:
        meanings = CHECKS | OTHER_CHECKS
        first: dict[str, str] = {}
        for problem in self.problems:
            first.setdefault(problem.reason, f"first: {problem.message}")
        return [
            f"{reason:<20}{count:>12,}   {first.get(reason, meanings.get(reason, ''))}"
            for reason, count in self.counts.items()
        ]

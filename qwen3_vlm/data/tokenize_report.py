"""What a tokenizing run found, gathered from its units: stats.json, tokenize_errors.jsonl, a summary to read.

Percentiles are exact, from histograms of lengths, so that nothing grows with the number of records. Units are
read in their order; no file holds a time or a path of the machine.
"""

import heapq
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3_vlm.data.shards import SPLITS, read_report
from qwen3_vlm.data.tokenize_plan import Plan, Unit
from qwen3_vlm.errors import DataError
from qwen3_vlm.storage import atomic_file, atomic_write_json
from qwen3_vlm.tokenization.token_space import MODALITIES

STATS_FORMAT = "qwen3_vlm.stats.v1"
STATS_NAME = "stats.json"
ERRORS_NAME = "tokenize_errors.jsonl"
PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Statistics:
    """Sums over units. Addition in any order gives the same."""

    records: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in MODALITIES})
    tasks: Counter[str] = field(default_factory=Counter)
    audio_samples: Counter[int] = field(default_factory=Counter)
    audio_notes: Counter[str] = field(default_factory=Counter)

    @property
    def errors(self) -> int:
        return sum(self.reasons.values())

    def add(self, report: Mapping[str, Any]) -> None:
        """Add one unit."""
        found = report["statistics"]
        self.records += report["records"]
        self.reasons.update(error["reason"] for error in report["errors"])
        self.tokens.update(report["tokens"])
        self.tasks.update(found["tasks"])
        self.audio_notes.update(found["audio_notes"])
        self.audio_samples.update({int(rate): samples for rate, samples in found["audio_samples"].items()})
        for name, counts in found["lengths"].items():
            self.lengths[name].update({int(length): count for length, count in counts.items()})

    def merge(self, other: "Statistics") -> None:
        """Add the sums of another split."""
        self.records += other.records
        for name in ("reasons", "tokens", "tasks", "audio_samples", "audio_notes"):
            getattr(self, name).update(getattr(other, name))
        for name, counts in other.lengths.items():
            self.lengths[name].update(counts)

    @property
    def audio_hours(self) -> float:
        """Of the sources, before they were cropped."""
        seconds = sum(self.audio_samples[rate] / rate for rate in sorted(self.audio_samples))
        return round(seconds / 3600, 6)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable, sorted."""
        return {
            "records": self.records,
            "errors": self.errors,
            "reasons": dict(sorted(self.reasons.items())),
            "tokens": {name: self.tokens[name] for name in MODALITIES},
            "tasks": dict(sorted(self.tasks.items())),
            "images": sum(self.lengths["image"].values()),
            "sounds": sum(self.lengths["audio"].values()),
            "audio_hours": self.audio_hours,
            "audio_notes": dict(sorted(self.audio_notes.items())),
            "lengths": {name: describe_lengths(self.lengths[name]) for name in MODALITIES},
        }


def describe_lengths(counts: Mapping[int, int]) -> dict[str, int]:
    """Number, percentiles and maximum of lengths, exactly; empty where there are none."""
    total = sum(counts.values())
    if not total:
        return {}
    found = {f"p{percent}": percentile(counts, percent) for percent in PERCENTILES}
    return {"records": total, "min": min(counts), **found, "max": max(counts)}


def percentile(counts: Mapping[int, int], percent: int) -> int:
    """The smallest length that at least `percent` in a hundred do not exceed (nearest rank)."""
    wanted, seen = -(-percent * sum(counts.values()) // 100), 0
    for length in sorted(counts):
        seen += counts[length]
        if seen >= wanted:
            return length
    raise ValueError("there are no lengths")


def gather(plan: Plan) -> dict[str, Statistics]:
    """Statistics of each split that has units."""
    found: dict[str, Statistics] = {}
    for unit in plan.units():
        found.setdefault(unit.split, Statistics()).add(_report(plan, unit))
    return found


def write_stats(plan: Plan, splits: Mapping[str, Statistics]) -> Statistics:
    """Write stats.json and return the sums over all splits."""
    total = Statistics()
    for statistics in splits.values():
        total.merge(statistics)
    tree = {
        "format": STATS_FORMAT,
        "all": total.to_dict(),
        "splits": {split: splits[split].to_dict() for split in SPLITS if split in splits},
    }
    atomic_write_json(plan.out / STATS_NAME, tree)
    return total


def write_errors(plan: Plan) -> Path:
    """Write one line per record that was left out, in the order of the manifest; one unit per split in memory."""
    path = plan.out / ERRORS_NAME
    by_split = [_errors(plan, split) for split in plan.counts]
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for error in heapq.merge(*by_split, key=lambda error: int(error["line"])):
            file.write(json.dumps(error) + "\n")
    return path


def _errors(plan: Plan, split: str) -> Iterator[dict[str, Any]]:
    for unit in plan.units():
        if unit.split == split:
            report = read_report(plan.out, unit.split, unit.number, verify=False)
            yield from () if report is None else report["errors"]  # a run that is stopped has units to do


def _report(plan: Plan, unit: Unit) -> dict[str, Any]:
    report = read_report(plan.out, unit.split, unit.number, verify=False)
    if report is None:
        raise DataError(f"The shard {unit.name} in {plan.out} was changed while the run went on. Start it again.")
    return report

"""What a run folder holds at any moment, read for the report: nothing has to be there yet.

A run may be in its first minute, killed in the middle of a line, or done. So a missing file is an
empty answer, a torn line is left out, and after a resume the later line of a step counts.

`results/*.json` are extra tables, which any command may add:

    {"title": "Held-out captions", "order": 1, "note": "one sentence below the table",
     "rows": [{"split": "unseen pairs", "exact": {"percent": 0.62, "low": 0.58, "high": 0.66}}, …],
     "headline": {"label": "exact captions, unseen pairs", "text": "62 %"}}

`title` and `rows` are needed. A cell is text, a number, a truth value, {"value", "low", "high"},
{"percent", "low", "high"} (shares of 1) or {"image": data URI}. A `headline` also stands at the top.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from qwen3_vlm.errors import ConfigError, DataError
from qwen3_vlm.evaluate.golden import ITEMS_FILE, THUMBNAILS_FILE, GoldenItem, Item, read_items
from qwen3_vlm.evaluate.golden_media import Media, read_media
from qwen3_vlm.evaluate.token_golden import ENDINGS, REFERENCE_FOLDER, TokenGoldenItem

MAX_FILE_BYTES = 200_000_000
ADD_ON_FOLDERS = ("connector", "rows")  # of which a run has one
_DATA_URI = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]+")

Line = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """Everything the report shows."""

    name: str
    config_text: str = ""
    lines: dict[str, list[Line]] = field(default_factory=dict)  # kind → lines of metrics.jsonl by step
    evidence: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)  # reason → records
    golden: dict[int, list[GoldenItem]] = field(default_factory=dict)  # step → items
    thumbnails: dict[str, list[str]] = field(default_factory=dict)  # id → data URIs
    token_golden: dict[int, list[TokenGoldenItem]] = field(default_factory=dict)  # the same of a token LM
    media: dict[str, Media] = field(default_factory=dict)  # name below golden/ → its pictures and sounds
    tables: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step that any line tells of."""
        return max((int(line["step"]) for lines in self.lines.values() for line in lines), default=0)

    def of_kind(self, *kinds: str) -> list[Line]:
        """The lines of these kinds, by step."""
        return sorted((line for kind in kinds for line in self.lines.get(kind, [])), key=lambda line: int(line["step"]))

    def last(self, *kinds: str) -> Line:
        """The newest line of these kinds, or an empty one."""
        return (self.of_kind(*kinds) or [{}])[-1]


def read_run(folder: str | Path) -> RunFiles:
    """Read a run folder.

    Raises:
        ConfigError: it is not a folder, or holds neither a config.yaml nor a metrics.jsonl.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; a report is written of the output_dir of a run.")
    if not (folder / "config.yaml").exists() and not (folder / "metrics.jsonl").exists():
        raise ConfigError(f"{folder} has neither config.yaml nor metrics.jsonl; give the output_dir of a run.")
    evidence = next((tree for name in ADD_ON_FOLDERS if (tree := _object(folder / name / "evidence.json"))), {})
    token_golden = _golden(folder / "golden", f"step-*/{ITEMS_FILE}", TokenGoldenItem)
    return RunFiles(
        name=folder.resolve().name,
        config_text=_text(folder / "config.yaml"),
        lines=_metric_lines(folder / "metrics.jsonl"),
        evidence=evidence,
        environment=_object(folder / "environment.json") or mapping_of(evidence.get("environment")),
        skipped=dict(Counter(str(line.get("reason", "unknown")) for line in _json_lines(folder / "skipped.jsonl"))),
        golden=_golden(folder / "golden", "step-*.jsonl", GoldenItem),
        thumbnails=_thumbnails(folder / "golden" / THUMBNAILS_FILE),
        token_golden=token_golden,
        media=read_media(folder / "golden", _media_names(token_golden)),
        tables=_tables(folder / "results"),
    )


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number (truth values are none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_picture(value: Any) -> bool:
    """A picture as a data URI: the only address that the report gives a browser."""
    return isinstance(value, str) and _DATA_URI.fullmatch(value) is not None


def _metric_lines(path: Path) -> dict[str, list[Line]]:
    newest: dict[tuple[str, int], Line] = {}
    for line in _json_lines(path):
        if is_number(line.get("step")) and isinstance(line.get("kind"), str):
            newest[line["kind"], int(line["step"])] = line
    kinds: dict[str, list[Line]] = {}
    for (kind, _), line in sorted(newest.items()):
        kinds.setdefault(kind, []).append(line)
    return kinds


def _golden(folder: Path, pattern: str, kind: type[Item]) -> dict[int, list[Item]]:
    """Step → items of the dumps that the pattern finds; "step-000123" is part of each path."""
    dumps = {}
    for path in folder.glob(pattern):
        number = path.relative_to(folder).parts[0].removeprefix("step-").removesuffix(".jsonl")
        try:
            if number.isdecimal() and (items := read_items(path, kind)):
                dumps[int(number)] = items
        except DataError:
            continue  # a damaged dump must not hide the rest of the run
    return dict(sorted(dumps.items()))


def _media_names(dumps: Mapping[int, list[TokenGoldenItem]]) -> Iterator[str]:
    """What can be shown, the newest first: later steps matter more, if not all fits a page."""
    for number, (step, items) in enumerate(reversed(list(dumps.items()))):
        for item in items:
            if item.prediction_file and (not number or item.prediction_file.endswith(ENDINGS["image"])):
                yield media_name(step, item.prediction_file)
            if not number:
                yield from (f"{REFERENCE_FOLDER}/{name}" for name in (item.source_file, item.reference_file) if name)


def media_name(step: int, name: str) -> str:
    """The key in `RunFiles.media` of what was generated at a step."""
    return f"step-{step:06d}/{name}"


def _thumbnails(path: Path) -> dict[str, list[str]]:
    return {
        name: [uri for uri in uris if is_picture(uri)] for name, uris in _object(path).items() if isinstance(uris, list)
    }


def _tables(folder: Path) -> list[dict[str, Any]]:
    tables = []
    for path in sorted(folder.glob("*.json")):
        table = _object(path)
        rows = table.get("rows")
        if "title" in table and isinstance(rows, list):
            tables.append({**table, "rows": [row for row in rows if isinstance(row, dict)]})
    return sorted(tables, key=lambda table: table["order"] if is_number(table.get("order")) else math.inf)


def _json_lines(path: Path) -> Iterator[Line]:
    for text in _text(path).split("\n"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue  # blank, or torn by a kill
        if isinstance(value, dict):
            yield value


def _object(path: Path) -> dict[str, Any]:
    try:
        return mapping_of(json.loads(_text(path)))
    except (ValueError, RecursionError):
        return {}


def mapping_of(value: Any) -> dict[str, Any]:
    """The value, or an empty mapping for anything else."""
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

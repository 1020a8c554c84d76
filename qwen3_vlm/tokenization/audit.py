"""The audit of a `UnifiedTokenizer`: is it deterministic, does everything come back, and how well?

Checks must all hold. Figures (PSNR, SSIM, SNR, log-mel distance) are reported, and gated against an earlier
audit of the same items in the same token space where one is given: that finds what a new library, device or
number format has changed. The report holds no times and no paths, so the same audit gives the same bytes.

`audit_page` writes what is found here as files.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_vlm.errors import GateError, TokenSpaceError
from qwen3_vlm.tokenization.audit_checks import (
    Check,
    Findings,
    Item,
    examine,
    examine_text,
    picture_side,
    runtime_sizes,
    sound_side,
)
from qwen3_vlm.tokenization.token_space import TokenSpace
from qwen3_vlm.tokenization.unified_tokenizer import Sound, UnifiedTokenizer

__all__ = ["GATES", "Gate", "UTIAudit", "audit_uti"]

FORMAT = 1
PACKAGES = ("qwen3-vlm", "numpy", "pillow", "soxr", "tokenizers", "torch", "transformers", "diffusers")


@dataclass(frozen=True, slots=True)
class Gate:
    """How far the mean of a figure may fall behind the baseline's: by `offset`, or by the factor `factor`."""

    modality: str
    figure: str
    title: str
    unit: str
    higher_is_better: bool
    offset: float = 0.0
    factor: float = 1.0

    def limit(self, baseline: float) -> float:
        """The worst mean that passes."""
        return baseline * self.factor + self.offset


GATES = (
    Gate("image", "psnr_db", "PSNR", "dB", higher_is_better=True, offset=-0.5),
    Gate("image", "ssim", "SSIM", "", higher_is_better=True, offset=-0.02),
    Gate("audio", "snr_db", "SNR", "dB", higher_is_better=True, offset=-1.0),
    Gate("audio", "log_mel_l1", "log-mel L1", "", higher_is_better=False, factor=1.05),
)


@dataclass(frozen=True)
class UTIAudit:
    """What an audit found. `report` is plain JSON; `items` have the pictures and sounds themselves."""

    report: dict[str, Any]
    items: tuple[Item, ...]
    token_space: TokenSpace

    @property
    def passed(self) -> bool:
        """Every check and every gate."""
        return bool(self.report["passed"])

    @property
    def failures(self) -> list[str]:
        """What does not hold, a sentence each."""
        checks = [f"{c['modality']}: {c['name']}: {c['detail']}." for c in self.report["checks"] if not c["passed"]]
        return checks + [f"{gate['name']}: {gate['reason']}" for gate in self.report["gates"] if not gate["passed"]]


def audit_uti(
    uti: UnifiedTokenizer,
    *,
    images: Mapping[str, Any] | None = None,
    sounds: Mapping[str, Sound] | None = None,
    texts: Sequence[str] = (),
    baseline: Mapping[str, Any] | None = None,
    reopen: Callable[[], UnifiedTokenizer] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> UTIAudit:
    """Check everything that a token space promises, on the given items.

    Args:
        images: name → PIL image or uint8 (H, W, 3); not read where the space has no images.
        sounds: name → (waveform, sampling rate in Hz); not read where the space has no audio.
        texts: in addition to the awkward ones that are always tried.
        baseline: the report of an earlier audit.
        reopen: gives a second tokenizer from the same files; without it the same one is asked again.
        progress: called with what is being done.

    Raises:
        GateError: the baseline is no report, or of other items.
        TokenSpaceError: the baseline or the second tokenizer has another token space; one line per difference.
    """
    second = reopen() if reopen is not None else uti
    uti.token_space.require_same(second.token_space, "The tokenizer opened anew")
    given: dict[str, Mapping[str, Any]] = {"image": images or {}} if uti.image_tokenizer is not None else {}
    if uti.audio_codec is not None:
        given["audio"] = sounds or {}
    items_sha256 = _items_sha256(given, texts)
    if baseline is not None:
        _require_comparable(baseline, uti.token_space, items_sha256)
    progress("text")
    text_checks, text_ids = examine_text(uti, second, texts)
    findings = {
        modality: examine(uti, SIDES[modality](uti), items, SIDES[modality](second), progress)
        for modality, items in given.items()
    }
    checks = [*runtime_sizes(uti), *text_checks, *(check for found in findings.values() for check in found.checks)]
    figures = {"text": {"characters": sum(map(len, texts)), "ids": text_ids}}
    figures |= {modality: _figures(uti, modality, found.items) for modality, found in findings.items()}
    gates = _gates(figures, baseline["figures"]) if baseline is not None else []
    report = _report(uti, checks, figures, gates, findings, items_sha256, baseline)
    return UTIAudit(report, tuple(item for found in findings.values() for item in found.items), uti.token_space)


SIDES = {"image": picture_side, "audio": sound_side}


def _report(
    uti: UnifiedTokenizer,
    checks: Sequence[Check],
    figures: Mapping[str, Any],
    gates: list[dict[str, Any]],
    findings: Mapping[str, Findings],
    items_sha256: dict[str, str],
    baseline: Mapping[str, Any] | None,
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "passed": all(check.passed for check in checks) and all(gate["passed"] for gate in gates),
        "token_space_sha256": uti.sha256,
        "token_space": uti.token_space.to_dict(),
        "figures": figures,
        "checks": [asdict(check) for check in checks],
        "gates": gates,
        "baseline_sha256": None if baseline is None else _sha256_of_json(baseline),
        "items_sha256": items_sha256,
        "ids_sha256": {modality: _ids_sha256(found.items) for modality, found in findings.items()},
        "items": [_item_entry(item) for found in findings.values() for item in found.items],
        "refused": {modality: found.refused for modality, found in findings.items()},
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _item_entry(item: Item) -> dict[str, Any]:
    ids = {"ids": len(item.ids), "ids_sha256": hashlib.sha256(item.ids.astype("<i8").tobytes()).hexdigest()}
    return {"modality": item.modality, "name": item.name, **ids, **item.figures}


def _figures(uti: UnifiedTokenizer, modality: str, items: Sequence[Item]) -> dict[str, Any]:
    """Mean, p10 and p50 of each figure, and how much of each codebook the items use."""
    names = list(items[0].figures) if items else [gate.figure for gate in GATES if gate.modality == modality]
    figures: dict[str, Any] = {name: _summary([item.figures[name] for item in items]) for name in names}
    return {**figures, "ids": sum(len(item.ids) for item in items), "codes_used": _codes_used(uti, modality, items)}


def _summary(values: Sequence[float | None]) -> dict[str, Any]:
    measured = [value for value in values if value is not None]
    if not measured:
        return {"mean": None, "p10": None, "p50": None, "items": 0}
    p10, p50 = np.percentile(measured, [10, 50])
    return {"mean": float(np.mean(measured)), "p10": float(p10), "p50": float(p50), "items": len(measured)}


def _codes_used(uti: UnifiedTokenizer, modality: str, items: Sequence[Item]) -> list[dict[str, int]]:
    spans = [span for name, span in uti.token_space.ranges.items() if name.startswith(modality.upper())]
    ids = np.concatenate([item.ids for item in items]) if items else np.zeros(0, dtype=np.int64)
    counts = [len(np.unique(ids[(ids >= span.first) & (ids <= span.last)])) for span in spans]
    return [{"used": used, "size": span.size} for used, span in zip(counts, spans, strict=True)]


def _gates(figures: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        _judge(gate, figures[gate.modality][gate.figure]["mean"], baseline[gate.modality][gate.figure]["mean"])
        for gate in GATES
        if gate.modality in figures
    ]


def _judge(gate: Gate, value: float | None, baseline: float | None) -> dict[str, Any]:
    """One gate's entry in the report. What neither audit could measure passes, what one of them could fails."""
    entry: dict[str, Any] = {"name": gate.title, "modality": gate.modality, "figure": gate.figure, "unit": gate.unit}
    if value is None or baseline is None:
        passed = value is None and baseline is None
        which = "in neither audit" if passed else "here" if value is None else "in the baseline"
        reason = f"it could not be measured {which}."
        return {**entry, "value": value, "baseline": baseline, "limit": None, "passed": passed, "reason": reason}
    limit = gate.limit(baseline)
    passed = value >= limit if gate.higher_is_better else value <= limit
    side = "at least" if gate.higher_is_better else "at most"
    unit = f" {gate.unit}" if gate.unit else ""
    reason = f"{value:.4g}{unit}; {side} {limit:.4g}{unit} is asked for (baseline {baseline:.4g}{unit})."
    return {**entry, "value": value, "baseline": baseline, "limit": limit, "passed": passed, "reason": reason}


def _require_comparable(baseline: Mapping[str, Any], space: TokenSpace, items_sha256: Mapping[str, str]) -> None:
    """Refuse a baseline that says nothing about this audit."""
    if baseline.get("format") != FORMAT or not _has_means(baseline):
        raise GateError(
            f"The baseline is no audit report of format {FORMAT}; give the report.json of an earlier audit."
        )
    try:
        theirs = TokenSpace.from_dict(baseline.get("token_space"))
    except TokenSpaceError as error:
        raise GateError(f"The baseline has no valid token space: {error}") from error
    space.require_same(theirs, "The baseline")
    found = baseline.get("items_sha256")
    other = [
        name for name, digest in items_sha256.items() if not isinstance(found, Mapping) or found.get(name) != digest
    ]
    if other:
        raise GateError(
            f"The baseline was made with other items ({', '.join(other)}), so its figures can't be compared. Give the "
            "same files in the same order, or make a new baseline."
        )


def _has_means(report: Mapping[str, Any]) -> bool:
    """Whether every gated figure of the report's modalities is there, as a number or null."""
    figures = report.get("figures")
    if not isinstance(figures, Mapping):
        return False
    for gate in GATES:
        if gate.modality in figures:
            summary = figures[gate.modality].get(gate.figure) if isinstance(figures[gate.modality], Mapping) else None
            if not isinstance(summary, Mapping) or not isinstance(summary.get("mean"), (float, int, type(None))):
                return False
    return True


def _items_sha256(given: Mapping[str, Mapping[str, Any]], texts: Sequence[str]) -> dict[str, str]:
    """What was audited, by content and order; names do not count."""
    digests = {"text": _sha256_of_json(list(texts))}
    for modality, items in given.items():
        sha = hashlib.sha256()
        for item in items.values():
            sha.update(_item_bytes(modality, item))
        digests[modality] = sha.hexdigest()
    return digests


def _item_bytes(modality: str, item: Any) -> bytes:
    """A digest of one item, of any kind that the tokenizer takes."""
    if modality == "audio":
        return _array_digest(np.asarray(item[0]), item[1])
    if isinstance(item, np.ndarray):
        return _array_digest(item, "RGB")
    return _array_digest(np.asarray(item), item.mode)


def _array_digest(array: NDArray[Any], note: Any) -> bytes:
    head = json.dumps([str(array.dtype), list(array.shape), note])
    return hashlib.sha256(head.encode("utf-8") + np.ascontiguousarray(array).tobytes()).digest()


def _ids_sha256(items: Sequence[Item]) -> str:
    sha = hashlib.sha256()
    for item in items:
        sha.update(len(item.ids).to_bytes(8, "little") + item.ids.astype("<i8").tobytes())
    return sha.hexdigest()


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode("utf-8")).hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

"""Is a connector directory what it says? Files, tensors, bases, and the gates of its evidence."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_vlm.checks import Check
from qwen3_vlm.errors import AddOnError, GateError, ModelError
from qwen3_vlm.evaluate.gates import gate_failure, gate_figures
from qwen3_vlm.models.add_on_files import EVIDENCE, base_folder, refuse_differences, tensor_findings
from qwen3_vlm.storage import read_json
from qwen3_vlm.train.connector_files import (
    INFO,
    TENSORS,
    check_template,
    expected_tensors,
    find_connector,
    read_info,
    read_tensors,
)
from qwen3_vlm.train.identity import file_differences


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `qwen3-vlm verify` prints."""

    directory: Path
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Nothing failed; what could not be checked does not count."""
        return all(check.passed is not False for check in self.checks)

    def __str__(self) -> str:
        marks = {True: "ok     ", False: "FAILED ", None: "–      "}
        return "\n".join(f"{marks[check.passed]}{check.name}: {check.detail}" for check in self.checks)


def verify_connector(
    directory: str | Path,
    llm: str | Path | None = None,
    vision_tower: str | Path | None = None,
    *,
    gates: bool = False,
    trust_remote_code: bool = False,
) -> VerifyReport:
    """Check a connector directory's files, tensors and bases; no base is loaded.

    Bases that connector.json names but that are not on this machine are reported as not checked; bases that
    are given must be found, or are downloaded. With `gates`, every gate of evidence.json must have passed.

    Raises:
        AddOnError, TamperedFileError: its files or tensors are not what they should be.
        BaseMismatchError: a base is not the one it was trained on.
        GateError: `gates` are asked for, and one failed or none was run.
    """
    folder = find_connector(directory)
    info = read_info(folder)
    check_template(folder, info)
    tensors = read_tensors(folder, info)
    findings = tensor_findings(tensors, expected_tensors(folder, info), "connectors")
    if findings:
        raise AddOnError(f"{folder / TENSORS} is not the connector that {INFO} describes:\n  " + "\n  ".join(findings))
    count = sum(tensor.numel() for tensor in tensors.values())
    checks = [
        Check("files", True, f"{TENSORS} has the {info['files'][TENSORS]['bytes']:,} bytes that were written"),
        _evidence_check(info),
        Check("tensors", True, f"{len(tensors)} tensors, {count:,} parameters, all finite"),
    ]
    for section, given in (("llm", llm), ("vision_tower", vision_tower)):
        checks.append(_verify_base(section, given, info, folder, trust_remote_code))
    found = _recorded_gates(folder)
    bad = [f"{check.name} ({check.detail})" for check in found if not check.passed]
    if gates and bad:
        raise GateError(f"{folder / EVIDENCE} does not show that every gate passed: {'; '.join(bad)}.")
    return VerifyReport(folder, (*checks, *found))


def _verify_base(section: str, given: str | Path | None, info: Mapping[str, Any], folder: Path, trust: bool) -> Check:
    name = section.replace("_", " ")
    source = given or info[section]["id"]
    try:
        found = base_folder(source, section, folder, download=given is not None)
    except ModelError as problem:
        if given is not None:
            raise
        return Check(name, None, str(problem))
    refuse_differences(folder, file_differences(info, {section: found}, trust))
    return Check(name, True, f"{source} is the one it was trained on")


def _evidence_check(info: Mapping[str, Any]) -> Check:
    written = info["files"].get(EVIDENCE)  # compared by read_info
    if written is None:
        return Check("evidence", None, f"{INFO} holds no checksum of {EVIDENCE}, so it can't be checked")
    return Check("evidence", True, f"{EVIDENCE} has the {written['bytes']:,} bytes that were written")


def _recorded_gates(folder: Path) -> list[Check]:
    """The gates of evidence.json, judged by their figures; one open line where there are none."""
    gates = read_json(folder / EVIDENCE, error=AddOnError).get("gates")
    try:
        lines = [_recorded_gate(gate) for gate in gates or []]
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise AddOnError(f"{folder / EVIDENCE} does not hold a list of gates; run the evaluation again.") from problem
    return lines or [Check("gates", None, "none was run on this checkpoint")]


def _recorded_gate(gate: Mapping[str, Any]) -> Check:
    """One gate; that it is marked as passed is not enough."""
    figures = gate_figures(gate)
    if gate["value"] is None:
        return Check(f"gate {gate['name']}", False, figures)
    value, low, threshold, samples = (_number(gate.get(key)) for key in ("value", "low", "threshold", "samples"))
    reason = gate_failure(value, low, threshold, int(samples) if math.isfinite(samples) else 0)
    if not reason and gate["passed"] is not True:
        reason = "It is marked as failed."
    return Check(f"gate {gate['name']}", not reason, f"{figures}. {reason}" if reason else figures)


def _number(value: Any) -> float:
    """A figure of a gate; NaN, with which no gate passes, for what is missing or not finite."""
    if not isinstance(value, (int, float, type(None))):
        raise TypeError(f"{value!r} is no number")
    return float(value) if value is not None and math.isfinite(value) else math.nan

"""Is an add-on what it says? Files, tensors, bases, and the gates of its evidence."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from qwen3_vlm.checks import Check
from qwen3_vlm.errors import AddOnError, ConfigError, GateError, ModelError, TamperedFileError
from qwen3_vlm.evaluate.gates import gate_figures, recorded_failure
from qwen3_vlm.models.add_on_files import EVIDENCE, base_folder, check_bytes, refuse_differences, tensor_findings
from qwen3_vlm.models.lora import ADAPTER, ADAPTER_FILES
from qwen3_vlm.models.row_base import require_base_files
from qwen3_vlm.models.row_files import (
    ROWS_TENSORS,
    find_rows,
    has_rows,
    read_rows,
    read_rows_info,
)
from qwen3_vlm.models.trunk import TRUNK, check_trunk
from qwen3_vlm.storage import read_json
from qwen3_vlm.tokenization.token_space import TokenSpace
from qwen3_vlm.tokenization.uti_config import CONFIG_NAME, load_uti_config
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

ROW_GATES = ("parameter integrity", "text identity")  # what every run measures, whatever its tasks
DRIFT_GATES = ("parameter integrity", "text drift")  # the same where the language model learned


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


def verify_add_on(
    directory: str | Path,
    llm: str | Path | None = None,
    vision_tower: str | Path | None = None,
    *,
    gates: bool = False,
    trust_remote_code: bool = False,
) -> VerifyReport:
    """`verify_rows` or `verify_connector`, by what the folder or hub id holds.

    Raises:
        ConfigError: a vision tower is given for trainable rows.
        AddOnError: it is neither; and what the two raise.
    """
    options: Any = {"gates": gates, "trust_remote_code": trust_remote_code}
    if holds_rows(directory, vision_tower):
        return verify_rows(directory, llm, **options)
    return verify_connector(directory, llm, vision_tower, **options)


def holds_rows(directory: str | Path, vision_tower: str | Path | None = None) -> bool:
    """Whether a folder or hub id is one of trainable rows; else it is taken for a connector.

    Raises:
        ConfigError: it is, and a vision tower is given.
    """
    found = has_rows(directory)
    if found and vision_tower is not None:
        raise ConfigError(f"{directory} holds trainable rows, which have no vision tower; leave --vision-tower out.")
    return found


def verify_rows(
    directory: str | Path,
    llm: str | Path | None = None,
    *,
    gates: bool = False,
    trust_remote_code: bool = False,
) -> VerifyReport:
    """Check a trainable-rows folder's files, token space, rows, adapter or trunk, and base; no base is loaded.

    A base that trainable_rows.json names but that is not on this machine is reported as not checked. With `gates`,
    the gates that every run has must be there, and all must have passed.

    Raises:
        AddOnError, TamperedFileError, TokenSpaceError, ConfigError: its files or rows are not what they should be.
        BaseMismatchError: the base is not the one it was trained on.
        GateError: `gates` are asked for, and one failed or was not run.
    """
    folder = find_rows(directory)
    info = read_rows_info(folder)
    rows = read_rows(folder, info)
    space = TokenSpace.load(folder)
    count = sum(tensor.numel() for tensor in rows.values())
    checks = [
        Check(
            "files", True, f"{ROWS_TENSORS} has the {info['files'][ROWS_TENSORS]['bytes']:,} bytes that were written"
        ),
        _evidence_check(info),
        Check("token space", True, f"{space.vocab_size_total:,} ids, sha256 {space.sha256}"),
        _uti_check(folder, info),
        Check("rows", True, f"{' and '.join(rows)} of ids {_ids(info)}, {count:,} parameters, all finite"),
        *_adapter_check(folder, info),
        *_trunk_check(folder, info),
        _verify_llm(llm, info, folder, trust_remote_code),
    ]
    found = recorded_gates(folder)
    if gates:
        _require_gates(folder, found, DRIFT_GATES if {ADAPTER, TRUNK} & {*info["files"]} else ROW_GATES)
    return VerifyReport(folder, (*checks, *found))


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
        *_adapter_check(folder, info),
    ]
    for section, given in (("llm", llm), ("vision_tower", vision_tower)):
        checks.append(_verify_base(section, given, info, folder, trust_remote_code))
    found = recorded_gates(folder)
    if gates:
        _require_gates(folder, found)
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


def _verify_llm(given: str | Path | None, info: Mapping[str, Any], folder: Path, trust: bool) -> Check:
    try:
        require_base_files(folder, info, given, download=given is not None, trust_remote_code=trust)
    except ModelError as problem:
        if given is not None:
            raise
        return Check("llm", None, str(problem))
    return Check("llm", True, f"{given or info['base_llm']} is the one it was trained on")


def _uti_check(folder: Path, info: Mapping[str, Any]) -> Check:
    if CONFIG_NAME not in info["files"]:
        return Check("uti", None, f"there is no {CONFIG_NAME}, so nothing says how to open the tokenizers")
    config = load_uti_config(folder)
    sources = [part.source for part in (config.image, config.audio) if part is not None]
    return Check("uti", True, f"{CONFIG_NAME} names {', '.join([config.text.tokenizer, *sources])}")


def _adapter_check(folder: Path, info: Mapping[str, Any]) -> list[Check]:
    """One line if there is an adapter; whether it fits is known with the base."""
    if ADAPTER not in info["files"]:
        return []
    for name in ADAPTER_FILES:
        check_bytes(folder / name, info["files"].get(name, {}))
    try:
        tensors = safetensors.torch.load_file(folder / ADAPTER)
    except (safetensors.SafetensorError, OSError, ValueError) as problem:
        raise TamperedFileError(f"{folder / ADAPTER} is no readable safetensors file ({problem}).") from problem
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise AddOnError(f"{folder / ADAPTER} holds values that are not finite, in {bad[0]}.")
    count = sum(tensor.numel() for tensor in tensors.values())
    return [Check("adapter", True, f"{len(tensors)} tensors, {count:,} parameters, all finite")]


def _trunk_check(folder: Path, info: Mapping[str, Any]) -> list[Check]:
    """One line if there is a trunk; whether it fits is known with the base."""
    if TRUNK not in info["files"]:
        return []
    tensors, count, dtype = check_trunk(folder, info["files"][TRUNK])
    return [Check("trunk", True, f"{tensors} tensors, {count:,} parameters in {dtype}, all finite")]


def _ids(info: Mapping[str, Any]) -> str:
    return f"{info['row_start']:,}–{info['row_end'] - 1:,}"


def _require_gates(folder: Path, found: list[Check], wanted: tuple[str, ...] = ()) -> None:
    """Refuse gates of which one failed, or one that is `wanted`, by the start of its name, was not run."""
    bad = [f"{check.name} ({check.detail})" for check in found if not check.passed]
    names = [check.name.removeprefix("gate ") for check in found]
    bad += [f"{name} (it was not run)" for name in wanted if not any(each.startswith(name) for each in names)]
    if bad:
        raise GateError(f"{folder / EVIDENCE} does not show that every gate passed: {'; '.join(bad)}.")


def _evidence_check(info: Mapping[str, Any]) -> Check:
    written = info["files"].get(EVIDENCE)  # compared by read_info
    if written is None:
        return Check("evidence", None, f"{INFO} holds no checksum of {EVIDENCE}, so it can't be checked")
    return Check("evidence", True, f"{EVIDENCE} has the {written['bytes']:,} bytes that were written")


def recorded_gates(folder: Path) -> list[Check]:
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
    reason = recorded_failure(gate)
    if gate["value"] is None:
        return Check(f"gate {gate['name']}", False, figures)
    if not reason and gate["passed"] is not True:
        reason = "It is marked as failed."
    return Check(f"gate {gate['name']}", not reason, f"{figures}. {reason}" if reason else figures)

"""The connector directory: write it, verify it, load it.

    connector.safetensors   `resampler.*`, `projector.*`, `vision_ln.*` when on; fp32
    connector.json          sizes, identity of both bases, tokenizer and chat template, stage, step, checksums
    evidence.json           gates, ablation and evaluation figures

Loading is strict: other bases than those it was trained on, a changed file, a missing, unexpected,
misshapen or non-finite tensor are each refused with a line per finding. Nothing is ever unpickled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from qwen3_vlm.errors import AddOnError, BaseMismatchError, ModelError, Qwen3VLMError, TamperedFileError
from qwen3_vlm.fingerprint import fingerprint_file, fingerprint_text, resolve_folder
from qwen3_vlm.models.bases import load_bases
from qwen3_vlm.models.configuration import CONNECTOR_FIELDS
from qwen3_vlm.models.processing import Qwen3VLMProcessor
from qwen3_vlm.models.vlm import Qwen3VLMForConditionalGeneration
from qwen3_vlm.storage import atomic_directory, atomic_file, atomic_write_json, read_json
from qwen3_vlm.train.identity import base_differences, base_folder, describe_bases, file_differences

FORMAT = 1
TENSORS, INFO, EVIDENCE = "connector.safetensors", "connector.json", "evidence.json"
MAX_INFO_BYTES = 10_000_000
_SECTIONS = ("connector", "llm", "vision_tower", "tokenizer", "chat_template", "image_processor", "files")
_ID_SECTIONS = ("llm", "vision_tower")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a verification. `passed` is None where it could not be checked."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `qwen3-vlm verify` prints; it passes when nothing failed."""

    directory: Path
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def to_text(self) -> str:
        marks = {True: "ok    ", False: "FAILED", None: "—     "}
        return "\n".join(f"{marks[check.passed]} {check.name}: {check.detail}" for check in self.checks)


def save_connector(
    directory: str | Path,
    model: Qwen3VLMForConditionalGeneration,
    bases: Mapping[str, Any],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    evidence: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Write a whole connector directory, or nothing.

    Args:
        bases: from `describe_bases`.
        tensors: the connector's tensors where `model` holds but a shard of them; else the model's own.
        evidence: content of evidence.json.
        details: further keys of connector.json, such as stage, step, data and package versions.

    Raises:
        StorageError: the disk is full or can't be written; a directory that was there is unchanged.
    """
    with atomic_directory(directory) as folder:
        write_connector(folder, model, bases, tensors=tensors, evidence=evidence, details=details)
    return Path(directory)


def write_connector(
    folder: Path,
    model: Qwen3VLMForConditionalGeneration,
    bases: Mapping[str, Any],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    evidence: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """The files of `save_connector` in a folder whose atomicity is the caller's."""
    state = dict(tensors if tensors is not None else model.connector_state_dict())
    path = folder / TENSORS
    with atomic_file(path) as temporary:
        safetensors.torch.save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, temporary)
    info = {
        "format": FORMAT,
        **(details or {}),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "connector": {name: getattr(model.config, name) for name in CONNECTOR_FIELDS} | _widths(model),
        **bases,
        "files": {TENSORS: {"sha256": fingerprint_file(path), "bytes": path.stat().st_size}},
    }
    atomic_write_json(folder / INFO, info)
    atomic_write_json(folder / EVIDENCE, dict(evidence or {"format": 1, "gates": []}))


def read_info(directory: str | Path) -> dict[str, Any]:
    """connector.json, checked for its format and sections.

    Raises:
        AddOnError: this is no connector directory, or one of another format.
    """
    folder = Path(directory)
    if not (folder / INFO).is_file():
        raise AddOnError(f"{folder} is no connector directory: it has no {INFO}.")
    info = read_json(folder / INFO, error=AddOnError, max_bytes=MAX_INFO_BYTES)
    if info.get("format") != FORMAT:
        raise AddOnError(f"{folder / INFO} has format {info.get('format')!r}; this version reads format {FORMAT}.")
    bad = [name for name in _SECTIONS if not isinstance(info.get(name), dict)]
    bad += [f"{name}.id" for name in _ID_SECTIONS if name not in bad and not isinstance(info[name].get("id"), str)]
    if not bad and not isinstance(info["files"].get(TENSORS), dict):
        bad.append(f"files.{TENSORS}")
    if bad:
        raise AddOnError(f"{folder / INFO} lacks {', '.join(bad)}; it was not written by this package or was changed.")
    if fingerprint_text(str(info["chat_template"].get("text"))) != info["chat_template"].get("sha256"):
        raise TamperedFileError(
            f"The chat template in {folder / INFO} is not the one that was written; fetch it again."
        )
    return info


def read_tensors(directory: str | Path, info: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of connector.safetensors, after its size and checksum have been compared.

    Raises:
        AddOnError: the file is missing.
        TamperedFileError: its bytes are not those that connector.json was written with.
    """
    path = Path(directory) / TENSORS
    _check_bytes(path, info["files"][TENSORS])
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as problem:
        raise TamperedFileError(f"{path} is no readable safetensors file ({problem}); fetch it again.") from problem


def load_connector(
    directory: str | Path, model: Qwen3VLMForConditionalGeneration, bases: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Put a saved connector into `model`, strictly, and return its connector.json.

    Args:
        bases: `describe_bases` of the bases in `model`; None compares sizes alone.

    Raises:
        AddOnError: tensors are missing, unexpected, of another shape or dtype, or not finite.
        BaseMismatchError: it was made for other bases; a line per difference.
        TamperedFileError: a file is not what was written.
    """
    info = read_info(directory)
    expected = {name: getattr(model.config, name) for name in CONNECTOR_FIELDS} | _widths(model)
    lines = [
        f"connector {name}: {info['connector'].get(name)!r} in the add-on, {value!r} here"
        for name, value in expected.items()
        if info["connector"].get(name) != value
    ]
    _refuse(directory, lines + (base_differences(info, bases) if bases is not None else []))
    tensors = read_tensors(directory, info)
    parameters = model.connector_parameters()
    findings = _tensor_findings(tensors, parameters)
    if findings:
        raise AddOnError(f"{Path(directory) / TENSORS} does not fit the model:\n  " + "\n  ".join(findings))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return info


def load_vlm(
    directory: str | Path,
    llm: str | Path | None = None,
    vision_tower: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
) -> tuple[Qwen3VLMForConditionalGeneration, Qwen3VLMProcessor]:
    """A connector directory (or hub id) and its two bases → the model in eval mode, and its processor.

    Args:
        llm, vision_tower: hub id or folder; None takes what connector.json names.
        dtype: of the bases ("bfloat16", "float32"); None takes the one of the training.

    Raises:
        AddOnError, BaseMismatchError, TamperedFileError: see `load_connector`.
        ModelError: a base can't be loaded.
    """
    folder = resolve_folder(directory, what="connector", patterns=("connector.*", EVIDENCE))
    info = read_info(folder)
    _check_bytes(folder / TENSORS, info["files"][TENSORS])
    sources = {"llm": llm or info["llm"]["id"], "vision_tower": vision_tower or info["vision_tower"]["id"]}
    for name, source in sources.items():
        sources[name] = base_folder(source, name, folder)
    _refuse(folder, file_differences(info, sources, trust_remote_code))
    model, processor = load_bases(
        sources["llm"],
        sources["vision_tower"],
        dtype=_dtype(dtype or info.get("dtype") or "bfloat16"),
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        **{name: info["connector"][name] for name in CONNECTOR_FIELDS if name in info["connector"]},
    )
    processor.chat_template = str(info["chat_template"]["text"])
    bases = describe_bases(
        sources["llm"], sources["vision_tower"], processor, model=model, trust_remote_code=trust_remote_code
    )
    load_connector(folder, model, bases)
    model.eval().requires_grad_(False)
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    return model, processor


def verify_connector(
    directory: str | Path,
    llm: str | Path | None = None,
    vision_tower: str | Path | None = None,
    *,
    trust_remote_code: bool = False,
) -> VerifyReport:
    """Check a connector directory's files, tensors, bases and recorded gates; nothing is loaded into a model.

    Bases that connector.json names but that are not at hand are reported as not checked; bases that
    are given must be found.
    """
    folder = Path(directory)
    try:
        info = read_info(folder)
        tensors = read_tensors(folder, info)
    except Qwen3VLMError as problem:
        return VerifyReport(folder, (Check("files", False, str(problem)),))
    checks = [Check("files", True, f"{TENSORS} has the {info['files'][TENSORS]['bytes']:,} bytes that were written")]
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    count = sum(tensor.numel() for tensor in tensors.values())
    checks.append(
        Check("tensors", not bad, f"{count:,} parameters" + (f"; not finite: {', '.join(bad)}" if bad else ""))
    )
    for section, given in (("llm", llm), ("vision_tower", vision_tower)):
        checks.append(_verify_base(section, given, info, folder, trust_remote_code))
    return VerifyReport(folder, (*checks, *_gate_checks(folder)))


def _verify_base(section: str, given: str | Path | None, info: Mapping[str, Any], folder: Path, trust: bool) -> Check:
    name = section.replace("_", " ")
    source = given or info[section]["id"]
    try:
        lines = file_differences(info, {section: base_folder(source, section, folder)}, trust)
    except Qwen3VLMError as problem:
        return Check(name, None if given is None else False, str(problem))
    return Check(name, not lines, f"{source} is the one it was trained on" if not lines else "; ".join(lines))


def _gate_checks(folder: Path) -> list[Check]:
    try:
        gates = read_json(folder / EVIDENCE, error=AddOnError).get("gates") or []
        lines = [
            Check(f"gate {gate['name']}", bool(gate["passed"]), f"{gate['value']} (at least {gate['threshold']})")
            for gate in gates
        ]
    except AddOnError as problem:
        return [Check("gates", False, str(problem))]
    except (KeyError, TypeError, AttributeError):
        return [Check("gates", False, f"{folder / EVIDENCE} does not hold a list of gates")]
    return lines or [Check("gates", None, "no gate was run on this checkpoint")]


def _check_bytes(path: Path, written: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
        digest = fingerprint_file(path) if size == written.get("bytes") else None
    except OSError as problem:
        raise AddOnError(f"{path} can't be read: {problem.strerror or problem}.") from problem
    if digest is None:
        raise TamperedFileError(
            f"{path} has {size:,} bytes, but {written.get('bytes')} were written; it was cut short or changed. "
            "Fetch it again."
        )
    if digest != written.get("sha256"):
        raise TamperedFileError(f"{path} was changed after it was written (its checksum differs). Fetch it again.")


def _tensor_findings(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> list[str]:
    lines = [f"{name} is missing" for name in parameters if name not in tensors]
    lines += [f"{name} is unexpected" for name in tensors if name not in parameters]
    for name, parameter in parameters.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tensor.shape != parameter.shape:
            lines.append(f"{name} has shape {tuple(tensor.shape)}; the model has {tuple(parameter.shape)}")
        elif tensor.dtype != torch.float32:
            lines.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; connectors are float32")
        elif not bool(torch.isfinite(tensor).all()):
            lines.append(f"{name} holds values that are not finite")
    return lines


def _refuse(directory: str | Path, lines: list[str]) -> None:
    if lines:
        raise BaseMismatchError(f"The connector {directory} was made for other bases:\n  " + "\n  ".join(lines))


def _widths(model: Qwen3VLMForConditionalGeneration) -> dict[str, Any]:
    config: Any = model.config
    return {"vision_width": config.vision_config.hidden_size, "llm_width": config.text_config.hidden_size}


def _dtype(name: str | torch.dtype) -> torch.dtype:
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"{name!r} is no dtype of model weights; use bfloat16 or float32.")
    return dtype

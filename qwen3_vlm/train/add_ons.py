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

from qwen3_vlm.errors import AddOnError, GateError, ModelError, StorageError, TamperedFileError
from qwen3_vlm.fingerprint import fingerprint_file, fingerprint_text, resolve_folder
from qwen3_vlm.models.bases import load_bases
from qwen3_vlm.models.configuration import CONNECTOR_FIELDS
from qwen3_vlm.models.processing import Qwen3VLMProcessor
from qwen3_vlm.models.projector import MLPProjector
from qwen3_vlm.models.resampler import PerceiverResampler
from qwen3_vlm.models.vlm import Qwen3VLMForConditionalGeneration
from qwen3_vlm.storage import atomic_directory, atomic_file, atomic_write_json, read_json
from qwen3_vlm.train.identity import base_differences, base_folder, describe_bases, file_differences, refuse_differences

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
    refuse_differences(directory, lines + (base_differences(info, bases) if bases is not None else []))
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
    refuse_differences(folder, file_differences(info, sources, trust_remote_code))
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
    gates: bool = False,
    trust_remote_code: bool = False,
) -> VerifyReport:
    """Check a connector directory's files, tensors and bases; no base is loaded.

    Bases that connector.json names but that are not at hand are reported as not checked; bases that
    are given must be found. With `gates`, every gate of evidence.json must have passed.

    Raises:
        AddOnError, TamperedFileError: its files or tensors are not what they should be.
        BaseMismatchError: a base is not the one it was trained on.
        GateError: `gates` are asked for, and one failed or none was run.
    """
    folder = resolve_folder(directory, what="connector", patterns=("connector.*", EVIDENCE))
    info = read_info(folder)
    tensors = read_tensors(folder, info)
    findings = _tensor_findings(tensors, _expected_tensors(folder, info))
    if findings:
        raise AddOnError(f"{folder / TENSORS} is not the connector that {INFO} describes:\n  " + "\n  ".join(findings))
    count = sum(tensor.numel() for tensor in tensors.values())
    checks = [
        Check("files", True, f"{TENSORS} has the {info['files'][TENSORS]['bytes']:,} bytes that were written"),
        Check("tensors", True, f"{len(tensors)} tensors, {count:,} parameters, all finite"),
    ]
    for section, given in (("llm", llm), ("vision_tower", vision_tower)):
        checks.append(_verify_base(section, given, info, folder, trust_remote_code))
    found = _recorded_gates(folder)
    bad = [f"{check.name} ({check.detail})" for check in found if not check.passed]
    if gates and bad:
        raise GateError(f"{folder / EVIDENCE} does not show that every gate passed: {'; '.join(bad)}.")
    return VerifyReport(folder, (*checks, *found))


def export_vlm(
    directory: str | Path,
    out: str | Path,
    *,
    llm: str | Path | None = None,
    vision_tower: str | Path | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write bases and connector as one Hugging Face folder, and return a sentence that says so.

    Raises:
        StorageError: the disk is full or can't be written, or `out` is a folder with other files in it.
        AddOnError, ModelError: see `load_vlm`.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StorageError(f"{target} already exists and is not empty; choose another name for the export.")
    model, processor = load_vlm(directory, llm, vision_tower, trust_remote_code=trust_remote_code)
    with atomic_directory(target) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    size = sum(path.stat().st_size for path in target.rglob("*"))
    return (
        f"Wrote {target} ({size / 1e6:,.0f} MB). Load it with AutoModelForImageTextToText.from_pretrained and "
        "AutoProcessor.from_pretrained, trust_remote_code=True where qwen3-vlm is not installed."
    )


def _verify_base(section: str, given: str | Path | None, info: Mapping[str, Any], folder: Path, trust: bool) -> Check:
    name = section.replace("_", " ")
    source = given or info[section]["id"]
    try:
        found = base_folder(source, section, folder)
    except ModelError as problem:
        if given is not None:
            raise
        return Check(name, None, str(problem))
    refuse_differences(folder, file_differences(info, {section: found}, trust))
    return Check(name, True, f"{source} is the one it was trained on")


def _recorded_gates(folder: Path) -> list[Check]:
    """The gates of evidence.json as they came out; one unpassed line where there are none."""
    gates = read_json(folder / EVIDENCE, error=AddOnError).get("gates")
    try:
        lines = [
            Check(f"gate {gate['name']}", bool(gate["passed"]), f"{gate['value']}, needed {gate['threshold']}")
            for gate in gates or []
        ]
    except (KeyError, TypeError) as problem:
        raise AddOnError(f"{folder / EVIDENCE} does not hold a list of gates; run the evaluation again.") from problem
    return lines or [Check("gates", None, "none was run on this checkpoint")]


def _expected_tensors(folder: Path, info: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes that the sizes in connector.json call for, on the meta device."""
    sizes = info["connector"]
    try:
        with torch.device("meta"):
            resampler = PerceiverResampler(
                sizes["vision_width"],
                **{name: sizes[name] for name in CONNECTOR_FIELDS[:6]},
            )
            projector = MLPProjector(
                sizes["latent_dim"],
                sizes["projector_hidden_size"],
                sizes["llm_width"],
                activation=sizes["projector_hidden_act"],
            )
            parts = {"resampler": resampler, "projector": projector}
            if sizes["vision_ln"]:
                parts["vision_ln"] = torch.nn.LayerNorm(sizes["vision_width"])
    except (KeyError, TypeError, ValueError, RuntimeError) as problem:
        raise AddOnError(f"The sizes in {folder / INFO} do not describe a connector ({problem}).") from problem
    return dict(torch.nn.ModuleDict(parts).named_parameters())


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


def _widths(model: Qwen3VLMForConditionalGeneration) -> dict[str, Any]:
    config: Any = model.config
    return {"vision_width": config.vision_config.hidden_size, "llm_width": config.text_config.hidden_size}


def _dtype(name: str | torch.dtype) -> torch.dtype:
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"{name!r} is no dtype of model weights; use bfloat16 or float32.")
    return dtype

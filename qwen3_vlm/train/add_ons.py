"""The connector directory: write it, load it, export it with its bases. `verify` checks one.

    connector.safetensors   `resampler.*`, `projector.*`, `vision_ln.*` when on; fp32
    adapter_model.safetensors, adapter_config.json   LoRA on the language model, where a stage trained it; PEFT's format
    connector.json          sizes, identity of both bases, tokenizer and chat template, stage, step, checksums
    evidence.json           gates, ablation and evaluation figures

Loading is strict: other bases than those it was trained on, a changed file, a missing, unexpected,
misshapen or non-finite tensor are each refused with a line per finding. Nothing is ever unpickled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from qwen3_vlm.errors import AddOnError
from qwen3_vlm.models.add_on_files import (
    EVIDENCE,
    base_folder,
    check_bytes,
    describe_files,
    named_dtype,
    refuse_differences,
    require_new_folder,
    tensor_findings,
)
from qwen3_vlm.models.bases import add_tower, load_strictly
from qwen3_vlm.models.configuration import CONNECTOR_FIELDS
from qwen3_vlm.models.lora import (
    ADAPTER,
    ADAPTER_FILES,
    has_lora,
    lora_parameters,
    marked,
    merge_lora,
    read_adapter,
    unmarked,
    write_adapter,
)
from qwen3_vlm.models.processing import Qwen3VLMProcessor
from qwen3_vlm.models.vlm import Qwen3VLMForConditionalGeneration
from qwen3_vlm.storage import atomic_directory, atomic_file, atomic_write_json
from qwen3_vlm.train.connector_files import (
    FORMAT,
    INFO,
    TENSORS,
    check_shapes,
    check_template,
    find_connector,
    read_info,
    read_tensors,
)
from qwen3_vlm.train.identity import base_differences, describe_bases, file_differences


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
    trunk: Any = model.model.language_model
    found = tensors if tensors is not None else model.connector_state_dict() | marked(lora_parameters(trunk))
    state, adapter = unmarked(found)
    if adapter:
        write_adapter(folder, trunk, adapter_prefix(model), str(bases["llm"]["id"]), adapter)
    atomic_write_json(folder / EVIDENCE, dict(evidence or {"format": 1, "gates": []}))
    with atomic_file(folder / TENSORS) as temporary:
        safetensors.torch.save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, temporary)
    info = {
        "format": FORMAT,
        **(details or {}),
        "parameters": sum(tensor.numel() for tensor in found.values()),
        "connector": {name: getattr(model.config, name) for name in CONNECTOR_FIELDS} | _widths(model),
        **bases,
        "files": describe_files(folder, (TENSORS, EVIDENCE, *(ADAPTER_FILES if adapter else ()))),
    }
    atomic_write_json(folder / INFO, info)


def adapter_prefix(model: Qwen3VLMForConditionalGeneration) -> str:
    """The name that the decoder has inside the causal LM that it came from, such as "model"."""
    config: Any = model.config
    causal_lm: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)]
    return str(causal_lm.base_model_prefix)


def load_connector(
    directory: str | Path,
    model: Qwen3VLMForConditionalGeneration,
    bases: Mapping[str, Any] | None = None,
    *,
    with_adapter: bool = True,
) -> dict[str, Any]:
    """Put a saved connector into `model`, strictly, and return its connector.json.

    Args:
        bases: `describe_bases` of the bases in `model`; None compares sizes alone.
        with_adapter: false leaves an adapter that the directory has where it is.

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
    findings = tensor_findings(tensors, parameters, "connectors")
    if findings:
        raise AddOnError(f"{Path(directory) / TENSORS} does not fit the model:\n  " + "\n  ".join(findings))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    if with_adapter and ADAPTER in info["files"]:
        check_adapter(directory, info)
        read_adapter(Path(directory), model.model.language_model, adapter_prefix(model))
    return info


def check_adapter(directory: str | Path, info: Mapping[str, Any]) -> None:
    """Compare the files of a connector's adapter with their checksums in connector.json.

    Raises:
        AddOnError, TamperedFileError: see `check_bytes`.
    """
    for name in ADAPTER_FILES:
        check_bytes(Path(directory) / name, info["files"].get(name, {}))


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
    opened = open_connector(directory, llm, vision_tower, trust_remote_code=trust_remote_code)
    base_dtype = named_dtype(dtype or opened.info.get("dtype") or "bfloat16")
    text_model = load_strictly(AutoModelForCausalLM, opened.llm, base_dtype, attn_implementation, trust_remote_code)
    options: Any = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    model, processor = connect(opened, text_model, dtype=base_dtype, **options)
    model.eval().requires_grad_(False)
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    return model, processor


class OpenedConnector(NamedTuple):
    """A connector directory whose files were checked, and where its two bases lie."""

    folder: Path
    info: dict[str, Any]
    llm: Path
    vision_tower: Path


def open_connector(
    directory: str | Path,
    llm: str | Path | None = None,
    vision_tower: str | Path | None = None,
    *,
    trust_remote_code: bool = False,
) -> OpenedConnector:
    """Check a connector directory (or hub id) and its bases' files; no weights of a base are loaded.

    Raises:
        AddOnError, BaseMismatchError, TamperedFileError, ModelError: see `load_vlm`.
    """
    folder = find_connector(directory)
    info = read_info(folder)
    check_template(folder, info)
    check_bytes(folder / TENSORS, info["files"][TENSORS])
    check_shapes(folder, info)
    sources = {
        name: base_folder(source or info[name]["id"], name, folder)
        for name, source in (("llm", llm), ("vision_tower", vision_tower))
    }
    refuse_differences(folder, file_differences(info, sources, trust_remote_code))
    return OpenedConnector(folder, info, **sources)


def connect(
    opened: OpenedConnector,
    text_model: Any,
    *,
    dtype: torch.dtype,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    with_adapter: bool = True,
) -> tuple[Qwen3VLMForConditionalGeneration, Qwen3VLMProcessor]:
    """Tower and trained connector around a language model that was loaded from `opened.llm`, which is not copied.

    Args:
        dtype: of the tower.
        with_adapter: see `load_connector`.

    Raises:
        AddOnError, BaseMismatchError, TamperedFileError, ModelError: see `load_vlm`.
    """
    folder, info, llm, vision_tower = opened
    model, processor = add_tower(
        text_model,
        llm,
        vision_tower,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        **{name: info["connector"][name] for name in CONNECTOR_FIELDS if name in info["connector"]},
    )
    processor.chat_template = str(info["chat_template"]["text"])
    bases = describe_bases(llm, vision_tower, processor, model=model, trust_remote_code=trust_remote_code)
    load_connector(folder, model, bases, with_adapter=with_adapter)
    return model, processor


def export_vlm(
    directory: str | Path,
    out: str | Path,
    *,
    llm: str | Path | None = None,
    vision_tower: str | Path | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write bases and connector (an adapter merged) as one Hugging Face folder, and return a sentence that says so.

    Raises:
        StorageError: the disk is full or can't be written, or `out` is a folder with other files in it.
        AddOnError, ModelError: see `load_vlm`.
    """
    target = require_new_folder(out)
    model, processor = load_vlm(directory, llm, vision_tower, trust_remote_code=trust_remote_code)
    with atomic_directory(target) as folder:
        if has_lora(model):
            merge_lora(model.model.language_model)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    size = sum(path.stat().st_size for path in target.rglob("*"))
    return (
        f"Wrote {target} ({size / 1e6:,.0f} MB). Load it with AutoModelForImageTextToText.from_pretrained and "
        "AutoProcessor.from_pretrained, trust_remote_code=True where qwen3-vlm is not installed."
    )


def _widths(model: Qwen3VLMForConditionalGeneration) -> dict[str, Any]:
    config: Any = model.config
    return {"vision_width": config.vision_config.hidden_size, "llm_width": config.text_config.hidden_size}

"""What a connector belongs to: two bases, a tokenizer, a chat template, a way to prepare pictures.

`describe_bases` makes that part of connector.json, the other functions compare it, one line per
difference.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qwen3_vlm.errors import ModelError
from qwen3_vlm.fingerprint import (
    Fingerprint,
    differences,
    fingerprint_folder,
    fingerprint_module,
    fingerprint_text,
    fingerprint_tokenizer,
    resolve_folder,
)
from qwen3_vlm.models.add_on_files import folder_differences
from qwen3_vlm.models.processing import Qwen3VLMProcessor
from qwen3_vlm.models.vlm import Qwen3VLMForConditionalGeneration

_IMAGE_SETTINGS = (
    "size",
    "do_resize",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "resample",
    "patch_size",
    "max_num_patches",
)


def describe_bases(
    llm: str | Path,
    vision_tower: str | Path,
    processor: Qwen3VLMProcessor,
    *,
    model: Qwen3VLMForConditionalGeneration | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The part of connector.json that says what the connector belongs to.

    Fingerprints come from the bases' files; from `model` in memory where a base has no safetensors.
    """
    template = processor.chat_template
    return {
        "llm": {"id": str(llm), "fingerprint": _fingerprint(llm, "llm", model, trust_remote_code)},
        "vision_tower": {"id": str(vision_tower), "fingerprint": _fingerprint(vision_tower, "vision_tower", model)},
        "tokenizer": {
            "fingerprint": fingerprint_tokenizer(processor.tokenizer),
            "image_token": processor.image_token,
            "image_token_id": processor.image_token_id,
        },
        "chat_template": {"text": template, "sha256": fingerprint_text(str(template))},
        "image_processor": _image_settings(processor),
    }


def base_differences(info: Mapping[str, Any], bases: Mapping[str, Any]) -> list[str]:
    """One line per way in which `bases` are not those that a connector was trained on."""
    labels = {"llm": "LLM", "vision_tower": "vision tower", "tokenizer": "tokenizer"}
    lines = []
    for section, label in labels.items():
        lines += differences(info[section].get("fingerprint") or {}, bases[section]["fingerprint"], label)
    for name in ("image_token", "image_token_id"):
        if info["tokenizer"].get(name) != bases["tokenizer"][name]:
            lines.append(f"{name}: {info['tokenizer'].get(name)} in the add-on, {bases['tokenizer'][name]} here")
    if info["chat_template"]["sha256"] != bases["chat_template"]["sha256"]:
        lines.append("chat template: another text than the one the connector was trained with")
    for name in sorted(info["image_processor"].keys() | bases["image_processor"].keys()):
        was, now = info["image_processor"].get(name), bases["image_processor"].get(name)
        if was != now:
            lines.append(f"image processor {name}: {was} in the add-on, {now} here")
    return lines


def file_differences(info: Mapping[str, Any], sources: Mapping[str, Path | str], trust_remote_code: bool) -> list[str]:
    """Differences of the bases' own files, found before anything large is loaded; a base without files is passed."""
    lines = []
    for section, source in sources.items():
        role: Any = section
        expected = info[section].get("fingerprint") or {}
        lines += folder_differences(expected, source, role, trust_remote_code=trust_remote_code)
    return lines


def _fingerprint(
    source: str | Path, role: Any, model: Qwen3VLMForConditionalGeneration | None, trust_remote_code: bool = False
) -> Fingerprint:
    try:
        return fingerprint_folder(resolve_folder(source, what=role), role, trust_remote_code=trust_remote_code)
    except ModelError:
        if model is None:
            raise
    config: Any = model.config
    if role == "vision_tower":
        return fingerprint_module(model.model.vision_tower, role)
    tensors = torch.nn.ModuleDict({"model": model.model.language_model, "lm_head": model.lm_head})
    return fingerprint_module(tensors, role, config.text_config.to_dict())


def _image_settings(processor: Qwen3VLMProcessor) -> dict[str, Any]:
    """What the image processor does to pixels; its class name and file layout vary between library versions."""
    values = processor.image_processor.to_dict()
    return {name: _plain(values[name]) for name in _IMAGE_SETTINGS if values.get(name) is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, float, str)) or value is None else int(value)

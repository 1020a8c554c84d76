"""The files of a connector directory, read with suspicion: they may come from anywhere.

What connector.json says is checked for type and size before anything is built from it, files are compared
with the checksums in it, and the shapes in the header of the tensors with what it describes.
"""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.utils.chat_template_utils import render_jinja_template

from qwen3_vlm.errors import AddOnError, TamperedFileError
from qwen3_vlm.fingerprint import fingerprint_text, resolve_folder
from qwen3_vlm.models.add_on_files import EVIDENCE, MAX_INFO_BYTES, check_bytes, is_text, name_findings
from qwen3_vlm.models.configuration import CONNECTOR_FIELDS
from qwen3_vlm.models.projector import MLPProjector
from qwen3_vlm.models.resampler import PerceiverResampler
from qwen3_vlm.storage import read_json

FORMAT = 1
TENSORS, INFO = "connector.safetensors", "connector.json"
MAX_TEMPLATE_CHARACTERS = 100_000
_SECTIONS = ("connector", "llm", "vision_tower", "tokenizer", "chat_template", "image_processor", "files")
_ID_SECTIONS = ("llm", "vision_tower")
_FINGERPRINT_SECTIONS = (*_ID_SECTIONS, "tokenizer")
_LARGEST = {  # of each size, far beyond any real one
    "num_latents": 65_536,
    "latent_dim": 65_536,
    "depth": 256,
    "num_heads": 4_096,
    "head_dim": 8_192,
    "ff_mult": 256,
    "projector_hidden_size": 1_048_576,
    "vision_width": 65_536,
    "llm_width": 262_144,
}
_PROBE = [{"role": "user", "content": "What is in the picture?"}]
_SPECIAL_TOKENS: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")


def find_connector(source: str | Path) -> Path:
    """The folder of a connector: a local one, or the files of a hub id.

    Raises:
        ModelError: it can't be had.
    """
    return resolve_folder(
        source, what="connector", patterns=("connector.*", "adapter_*", EVIDENCE), required=(INFO, TENSORS)
    )


def read_info(directory: str | Path) -> dict[str, Any]:
    """connector.json, checked for its format and the type of what it holds; evidence.json is what it says.

    Raises:
        AddOnError: this is no connector directory, or one of another format.
        TamperedFileError: evidence.json or the chat template is not the one that was written.
    """
    folder = Path(directory)
    if not (folder / INFO).is_file():
        raise AddOnError(f"{folder} is no connector directory: it has no {INFO}.")
    info = read_json(folder / INFO, error=AddOnError, max_bytes=MAX_INFO_BYTES)
    if info.get("format") != FORMAT:
        raise AddOnError(f"{folder / INFO} has format {info.get('format')!r}; this version reads format {FORMAT}.")
    bad = _wrong_fields(info)
    if bad:
        raise AddOnError(
            f"{folder / INFO} has no usable {', '.join(bad)}; it was not written by this package or was changed."
        )
    bad = _wrong_sizes(info["connector"])
    if bad:
        raise AddOnError(f"The sizes in {folder / INFO} do not describe a connector ({'; '.join(bad)}).")
    if fingerprint_text(info["chat_template"]["text"]) != info["chat_template"].get("sha256"):
        raise TamperedFileError(
            f"The chat template in {folder / INFO} is not the one that was written; fetch it again."
        )
    if EVIDENCE in info["files"]:
        check_bytes(folder / EVIDENCE, info["files"][EVIDENCE])
    return info


def _wrong_fields(info: Mapping[str, Any]) -> list[str]:
    """Names of what is missing or of another type than was written."""
    bad = [name for name in _SECTIONS if not isinstance(info.get(name), dict)]
    if bad:
        return bad
    bad += [f"{name}.id" for name in _ID_SECTIONS if not is_text(info[name].get("id"))]
    bad += [
        f"{name}.fingerprint" for name in _FINGERPRINT_SECTIONS if not isinstance(info[name].get("fingerprint"), dict)
    ]
    if not is_text(info["chat_template"].get("text")):
        bad.append("chat_template.text")
    if not isinstance(info.get("dtype", ""), str):
        bad.append("dtype")
    return bad + [
        f"files.{name}" for name in {TENSORS, *info["files"]} if not isinstance(info["files"].get(name), dict)
    ]


def _wrong_sizes(sizes: Mapping[str, Any]) -> list[str]:
    """One phrase for each size of the connector that can't be one."""
    bad = []
    for name, largest in _LARGEST.items():
        value = sizes.get(name)
        if type(value) is not int or not 1 <= value <= largest:
            bad.append(f"{name} is {str(value)[:40]}, not a whole number from 1 to {largest:,}")
    activation = sizes.get("projector_hidden_act")
    if not isinstance(activation, str) or activation not in ACT2FN:
        bad.append(f"projector_hidden_act is {str(activation)[:40]}, no known activation")
    if not isinstance(sizes.get("vision_ln"), bool):
        bad.append(f"vision_ln is {str(sizes.get('vision_ln'))[:40]}, not true or false")
    return bad


def check_template(directory: str | Path, info: Mapping[str, Any]) -> None:
    """Render the chat template once, in the library's sandbox.

    Raises:
        AddOnError: it is no template, or fails.
    """
    text = info["chat_template"]["text"]
    try:
        if len(text) > MAX_TEMPLATE_CHARACTERS:
            raise ValueError(f"it has {len(text):,} characters, more than {MAX_TEMPLATE_CHARACTERS:,}")
        render_jinja_template([_PROBE], chat_template=text, add_generation_prompt=True, **_SPECIAL_TOKENS)
    except Exception as problem:  # a template can fail in any way that a program can
        reason = textwrap.shorten(str(problem), 200, placeholder=" …")
        raise AddOnError(f"The chat template in {Path(directory) / INFO} can't be used ({reason}).") from problem


def check_shapes(directory: str | Path, info: Mapping[str, Any]) -> None:
    """Compare the names and shapes in the header of the tensors with the sizes in connector.json; reads no tensor.

    Raises:
        AddOnError: they differ; a line per finding.
        TamperedFileError: the file has no readable header.
    """
    path = Path(directory) / TENSORS
    try:
        with safetensors.safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as problem:
        raise TamperedFileError(f"{path} is no readable safetensors file ({problem}); fetch it again.") from problem
    expected = {name: tuple(tensor.shape) for name, tensor in expected_tensors(directory, info).items()}
    findings = name_findings(shapes, expected) + [
        f"{name} has shape {shapes[name]}; the model has {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    if findings:
        raise AddOnError(f"{path} is not the connector that {INFO} describes:\n  " + "\n  ".join(findings))


def read_tensors(directory: str | Path, info: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of connector.safetensors, after its size and checksum have been compared.

    Raises:
        AddOnError: the file is missing.
        TamperedFileError: its bytes are not those that connector.json was written with.
    """
    path = Path(directory) / TENSORS
    check_bytes(path, info["files"][TENSORS])
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as problem:
        raise TamperedFileError(f"{path} is no readable safetensors file ({problem}); fetch it again.") from problem


def expected_tensors(directory: str | Path, info: Mapping[str, Any]) -> dict[str, Tensor]:
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
        raise AddOnError(f"The sizes in {Path(directory) / INFO} do not describe a connector ({problem}).") from problem
    return dict(torch.nn.ModuleDict(parts).named_parameters())

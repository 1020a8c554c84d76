"""What identifies a base model, a tokenizer, a chat template, a data set.

A fingerprint is a plain JSON mapping with a `sha256` over the rest of it, so that it can be stored
in an add-on and compared later, one line per difference. A base is identified by the part of its
config that decides the computation, and by every tensor's name, shape, dtype and samples of its
bytes: 16 blocks of 64 elements at even strides, first and last element included. That reads a
16 GB model in seconds, whatever files it is cut into, and finds any retraining, since retraining
moves nearly every element. It does not find a change made on purpose between the samples: for
that, compare checksums of whole files.
"""

import hashlib
import json
import math
import os
import struct
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen3_vlm.errors import ModelError, Qwen3VLMError
from qwen3_vlm.storage import read_json

if TYPE_CHECKING:
    import torch

Role = Literal["llm", "vision_tower"]
Fingerprint = dict[str, Any]

BLOCKS, BLOCK_ELEMENTS = 16, 64
MAX_HEADER_BYTES = 100_000_000
# What decides the computation. A declared list: defaults that a newer library adds must not change a fingerprint.
_CONFIG_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "attention_bias",
    "tie_word_embeddings",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "hidden_activation",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "logit_scale",
    "num_experts_per_tok",
    "norm_topk_prob",
    "image_size",
    "patch_size",
    "num_channels",
    "num_patches",
)
# Values that change nothing: the same as not having the key, as a config has it from an older library.
_NEUTRAL: dict[str, Any] = {"use_sliding_window": False}
_NEUTRAL |= dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0)
_WINDOW_KEYS = ("sliding_window", "max_window_layers")  # without effect where use_sliding_window is false
_BITS = {"BF16": 16, "F16": 16, "F32": 32, "F64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "BOOL": 8}
_BITS |= {f"{kind}{bits}": bits for kind in "IU" for bits in (8, 16, 32, 64)}
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_DTYPE_NAMES = {torch_name: name for name, torch_name in _TORCH_NAMES.items()} | {
    "float32": "F32",
    "float64": "F64",
    "bool": "BOOL",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.py")
_PROBE = "The 3 cats' café:\n\n  1234567 kg, naïve?! 图片 — “ok”\tEND_of\r\n🙂🙂 def f(x): return x**2"


@dataclass(frozen=True, slots=True)
class TensorSample:
    """Identity of one tensor: safetensors dtype name, shape, and the sampled bytes."""

    dtype: str
    shape: tuple[int, ...]
    sample: bytes


def fingerprint_folder(folder: str | Path, role: Role, *, trust_remote_code: bool = False) -> Fingerprint:
    """The fingerprint of a base from its files: `config.json` and safetensors, sharded or not.

    The files are preferred over a loaded model since they stay the same when they are loaded in
    another dtype.

    Raises:
        ModelError: there are no safetensors files, or one of them is damaged.
    """
    folder = Path(folder)
    config = _folder_config(folder, trust_remote_code)
    tensors: dict[str, TensorSample] = {}
    for path in safetensors_files(folder):
        tensors.update(_read_file(path))
    return _base_fingerprint(config, tensors, role)


def fingerprint_module(module: "torch.nn.Module", role: Role, config: Mapping[str, Any] | None = None) -> Fingerprint:
    """The fingerprint of a base in memory: equal to that of its files if the dtype is the same.

    `config` is the module's own `config.to_dict()` unless given.
    """
    values = config if config is not None else module.config.to_dict()  # type: ignore[union-attr,operator]
    return fingerprint_tensors(module.state_dict(), role, values)


def fingerprint_tensors(tensors: Mapping[str, "torch.Tensor"], role: Role, config: Mapping[str, Any]) -> Fingerprint:
    """`fingerprint_module` of tensors by the names that they have in a base's files."""
    return _base_fingerprint(config, {name: _sample_tensor(tensor) for name, tensor in tensors.items()}, role)


def fingerprint_tokenizer(tokenizer: Any) -> Fingerprint:
    """Vocabulary, merges, added tokens, and the ids that a fixed text gets (splitting rules).

    `tokenizer` is a Hugging Face tokenizer, slow or fast.
    """
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = json.loads(backend.to_str())["model"].get("merges", []) if backend is not None else []
    pairs = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]
    return _sealed(
        {
            "size": len(vocabulary),
            "vocabulary": _digest(vocabulary),
            "merges": _digest(pairs),
            "added_tokens": dict(sorted(tokenizer.get_added_vocab().items())),
            "splitting": _digest(list(tokenizer.encode(_PROBE, add_special_tokens=False))),
        }
    )


def fingerprint_text(text: str) -> str:
    """sha256 of a text, such as a chat template."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def fingerprint_file(path: str | Path) -> str:
    """sha256 of a whole file.

    Raises:
        OSError: it can't be read.
    """
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint_dataset(parts: Iterable[tuple[str, str]]) -> str:
    """One sha256 for a data set out of (name, fingerprint) pairs, in order."""
    return _digest([list(part) for part in parts])


def differences(expected: Mapping[str, Any], found: Mapping[str, Any], label: str) -> list[str]:
    """One line per field in which two fingerprints differ; no line when they agree."""
    if expected.get("sha256") == found.get("sha256"):
        return []
    lines: list[str] = []
    for key in sorted((expected.keys() | found.keys()) - {"sha256"}):
        lines += _field_differences(expected.get(key), found.get(key), f"{label} {key}")
    return lines or [f"{label}: sha256 {expected.get('sha256')} in the add-on, {found.get('sha256')} here"]


def resolve_folder(
    source: str | Path,
    *,
    what: str = "model",
    patterns: tuple[str, ...] = _MODEL_FILES,
    required: tuple[str, ...] = (),
    download: bool = True,
) -> Path:
    """The local folder of a base: the folder itself, or the snapshot of a hub id in the cache, downloaded if need be.

    Args:
        patterns: of the files to download.
        required: names that a snapshot must have; none means config.json and the weights of a model.
        download: false looks on this machine only.

    Raises:
        ModelError: it is neither a folder nor a hub id that can be had, or its snapshot lacks files.
    """
    name = str(source)
    if os.path.isdir(name):  # false also for what can't be a name
        return Path(name)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelError(f"The {what} {name} can't be read: there is no such folder.")
    from huggingface_hub import snapshot_download

    lacking: list[str] = []
    for local in (True, False) if download else (True,):
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=local))
        except Exception as problem:
            if local and download and isinstance(problem, OSError):  # not in the cache
                continue
            reason = textwrap.shorten(str(problem), 200, placeholder=" …")
            raise ModelError(
                f"The {what} {name} is neither a local folder nor a hub repository that can be loaded ({reason})."
            ) from problem
        lacking = [file for file in required if not (folder / file).is_file()] if required else _lacking(folder)
        if not lacking:
            return folder
    raise ModelError(
        f"The {what} {name} is incomplete in the hub's cache on this machine: it lacks {', '.join(lacking[:3])}"
        f"{f' and {len(lacking) - 3} more files' if len(lacking) > 3 else ''}. Download it again."
    )


def _lacking(folder: Path) -> list[str]:
    """What a snapshot needs to be a whole model and does not have: config.json, weights that its index names."""
    lacking = [] if (folder / "config.json").is_file() else ["config.json"]
    try:
        return lacking + [file.name for file in safetensors_files(folder) if not file.is_file()]
    except ModelError:  # unless it has pickled weights, which transformers alone reads
        return lacking if any(folder.glob("*.bin")) else [*lacking, "model.safetensors"]


def safetensors_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights: those its index names, else its single file.

    Raises:
        ModelError: there are none.
    """
    for index in sorted(folder.glob("model*.safetensors.index.json")):
        names = sorted(set(read_json(index, error=ModelError)["weight_map"].values()))
        return [folder / Path(name).name for name in names]
    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder} holds no safetensors weights, so what it is can't be established; convert it first."
        )
    return files


def _base_fingerprint(config: Mapping[str, Any], tensors: Mapping[str, TensorSample], role: Role) -> Fingerprint:
    tied = role == "llm" and bool(config.get("tie_word_embeddings"))
    named = {name: tensor for key, tensor in tensors.items() if (name := _canonical_name(key, tensors, role, tied))}
    parts: dict[str, list[tuple[str, str, list[int], str]]] = {}
    for name, tensor in sorted(named.items()):
        sample = hashlib.sha256(tensor.sample).hexdigest()
        parts.setdefault(_part(name), []).append((name, tensor.dtype, list(tensor.shape), sample))
    return _sealed(
        {
            "config": _normal_config(config),
            "parameters": sum(math.prod(tensor.shape) for tensor in named.values()),
            "tensors": len(named),
            "dtypes": sorted({tensor.dtype for tensor in named.values()}),
            "weights": {part: _digest(entries)[:16] for part, entries in parts.items()},
        }
    )


def _canonical_name(key: str, tensors: Mapping[str, TensorSample], role: Role, tied: bool) -> str | None:
    """A tensor's name without the wrapper's prefix; None for what does not belong to the base.

    A SigLIP checkpoint may hold the text half too, and the tower's pooling head is not used. A tied
    head may or may not be in the file.
    """
    if key.endswith((".position_ids", "rotary_emb.inv_freq")):
        return None
    if role == "vision_tower":
        prefix = "vision_model."
        if any(name.startswith(prefix) for name in tensors):
            key = key.removeprefix(prefix) if key.startswith(prefix) else "head."
        return None if key.startswith("head.") else key
    key = key.removeprefix("model.")
    return None if tied and key.startswith("lm_head.") else key


def _part(name: str) -> str:
    """The component a tensor belongs to: "layers.7", "embed_tokens", "norm", …"""
    words = name.split(".")
    if "layers" in words[:-1]:
        index = words.index("layers")
        return ".".join(words[index : index + 2])
    return ".".join(words[: max(1, len(words) - 1)][:2])


def _normal_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that decide the computation; rope settings in one spelling, what changes nothing left out."""
    normal = {key: config[key] for key in _CONFIG_KEYS if config.get(key) not in (None, _NEUTRAL.get(key))}
    if config.get("use_sliding_window") is False:
        normal = {key: value for key, value in normal.items() if key not in _WINDOW_KEYS}
    if set(normal.get("layer_types", ())) == {"full_attention"}:
        del normal["layer_types"]
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if config.get("rope_theta") is not None:
        rope.setdefault("rope_theta", config["rope_theta"])
    rope = {key: value for key, value in sorted(rope.items()) if value is not None and key != "type"}
    if rope:
        normal["rope"] = {"rope_type": "default", **rope}
    return normal


def _folder_config(folder: Path, trust_remote_code: bool) -> Mapping[str, Any]:
    """The config with the library's defaults filled in, and of the tower alone for a two-tower model."""
    raw = read_json(folder / "config.json", error=ModelError)
    try:
        from transformers import AutoConfig

        values = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).to_dict()
    except (ImportError, ValueError, OSError):
        values = raw
    return values.get("vision_config", values) if isinstance(values.get("vision_config"), dict) else values


def _read_file(path: Path) -> Iterator[tuple[str, TensorSample]]:
    """Read names, shapes, dtypes and samples of a safetensors file, without torch."""
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                yield name, _read_tensor(stream.fileno(), entry, 8 + length, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as problem:
        raise ModelError(f"{path} is not a readable safetensors file ({problem}); fetch it again.") from problem


def _read_tensor(descriptor: int, entry: Mapping[str, Any], start: int, size: int) -> TensorSample:
    dtype, shape = str(entry["dtype"]), tuple(int(number) for number in entry["shape"])
    begin, end = (int(number) for number in entry["data_offsets"])
    width = _BITS[dtype] // 8
    count = math.prod(shape)
    if not 0 <= begin <= end <= size - start or end - begin != count * width:
        raise ValueError("a tensor lies outside the file, so the file is cut short or damaged")
    blocks = [
        os.pread(descriptor, (stop - first) * width, start + begin + first * width) for first, stop in _blocks(count)
    ]
    return TensorSample(dtype, shape, b"".join(blocks))


def _sample_tensor(tensor: "torch.Tensor") -> TensorSample:
    import torch

    flat = tensor.detach().reshape(-1)
    pieces = [
        flat[first:stop].cpu().contiguous().view(torch.uint8).numpy().tobytes() for first, stop in _blocks(len(flat))
    ]
    return TensorSample(_DTYPE_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), b"".join(pieces))


def _blocks(count: int) -> list[tuple[int, int]]:
    """Element ranges to sample: everything of a small tensor, else even blocks, first and last included."""
    if count <= BLOCKS * BLOCK_ELEMENTS:
        return [(0, count)]
    last = count - BLOCK_ELEMENTS
    return [(first, first + BLOCK_ELEMENTS) for first in (last * index // (BLOCKS - 1) for index in range(BLOCKS))]


def _field_differences(expected: Any, found: Any, label: str) -> list[str]:
    if expected == found:
        return []
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        keys = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
        if label.endswith(" weights"):
            named = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more parts" if len(keys) > 5 else "")
            return [f"{label} differ in {named}"]
        return [
            line for key in keys for line in _field_differences(expected.get(key), found.get(key), f"{label} {key}")
        ]
    return [f"{label}: {_short(expected)} in the add-on, {_short(found)} here"]


def _short(value: Any) -> str:
    return "none" if value is None else str(value)[:60]


def _sealed(values: dict[str, Any]) -> Fingerprint:
    return {**values, "sha256": _digest(values)}


def _digest(value: Any) -> str:
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    except (TypeError, ValueError) as problem:
        raise Qwen3VLMError(f"A fingerprint can't be made of {type(value).__name__} ({problem}).") from problem
    return hashlib.sha256(text.encode("ascii")).hexdigest()

"""The trainable-rows folder: write it, read it with suspicion, load it with its base.

    trainable_rows.pt                       the rows: a plain dict of tensors and numbers (`row_tensors`)
    trainable_rows.json                     which rows of what they are; identity of the base; checksums
    token_space.json, token_space.sha256    what the ids mean
    uti.yaml                                the tokenizers behind them
    evidence.json                           gates and figures
    adapter_model.safetensors, adapter_config.json   LoRA on the base, where a stage trained it; PEFT's format
    trunk.safetensors                       or the base's decoder, where a stage trained all of it (`trunk`)

`row_start` is the base's number of embedding rows, `row_end` the size of the whole vocabulary: one beyond the last row.
Rows of another base, another token space or another range, changed files, pickles with anything but such rows in
them, and missing, misshapen or non-finite tensors are each refused with a line per finding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qwen3_vlm.errors import AddOnError, ConfigError, ModelError, TamperedFileError
from qwen3_vlm.fingerprint import differences, resolve_folder
from qwen3_vlm.models.add_on_files import (
    EVIDENCE,
    MAX_INFO_BYTES,
    check_bytes,
    describe_files,
    is_text,
    named_dtype,
    refuse_differences,
    tensor_findings,
)
from qwen3_vlm.models.bases import load_strictly
from qwen3_vlm.models.lora import ADAPTER, ADAPTER_FILES, lora_parameters, marked, read_adapter, unmarked, write_adapter
from qwen3_vlm.models.row_base import (
    base_differences,
    describe_base,
    fingerprint_base,
    require_base_files,
    require_tokenizer,
)
from qwen3_vlm.models.row_tensors import DTYPE, ROW_NAMES, read_layout, read_row_tensors, write_row_tensors
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.models.trunk import TRUNK, TRUNK_MARK, read_trunk, trunk_parameters, write_trunk
from qwen3_vlm.storage import atomic_directory, atomic_write_bytes, atomic_write_json, read_bytes, read_json
from qwen3_vlm.tokenization.strict_json import tree_differences
from qwen3_vlm.tokenization.token_space import FILE_NAME, HASH_NAME, MAX_IDS, TokenSpace
from qwen3_vlm.tokenization.uti_config import CONFIG_NAME

__all__ = [
    "ROWS_INFO",
    "ROWS_TENSORS",
    "check_layout",
    "describe_base",
    "find_rows",
    "grow_rows",
    "has_rows",
    "load_rows",
    "load_token_lm",
    "read_rows",
    "read_rows_info",
    "save_rows",
    "write_rows",
]

ROWS_FORMAT, TRUNK_FORMAT = 1, 2  # the second may hold a trunk; without one the first is still written
ROWS_TENSORS, ROWS_INFO = "trainable_rows.pt", "trainable_rows.json"
MAX_UTI_BYTES = 1_000_000
MAX_WIDTH = 262_144
_REQUIRED_FILES = (ROWS_TENSORS, EVIDENCE, FILE_NAME, HASH_NAME)
_FILES = (*_REQUIRED_FILES, CONFIG_NAME, *ADAPTER_FILES, TRUNK)
_CHECKED_LATER = (ROWS_TENSORS, TRUNK)  # where they are read: they are large
_NUMBERS = {"row_start": MAX_IDS, "row_end": MAX_IDS + 1, "width": MAX_WIDTH}


def save_rows(
    directory: str | Path,
    model: TokenLM,
    base: Mapping[str, Any],
    *,
    uti: str | Path | None,
    tensors: Mapping[str, Tensor] | None = None,
    evidence: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Write a whole trainable-rows folder, or nothing.

    Args:
        base: from `describe_base`.
        uti: the uti.yaml behind the token space, or a folder with it; copied as it is. None: there is none.
        tensors: the rows, named as in `TokenLM.row_parameters`, with a marked adapter or trunk, where `model` holds but
            shards of them.
        evidence: content of evidence.json.
        details: further keys of trainable_rows.json, such as stage, step, seed and package versions.

    Raises:
        StorageError: the disk is full or can't be written; a folder that was there is unchanged.
        ModelError: `base` has another tokenizer than the token space.
    """
    with atomic_directory(directory) as folder:
        write_rows(folder, model, base, uti=uti, tensors=tensors, evidence=evidence, details=details)
    return Path(directory)


def write_rows(
    folder: Path,
    model: TokenLM,
    base: Mapping[str, Any],
    *,
    uti: str | Path | None,
    tensors: Mapping[str, Tensor] | None = None,
    evidence: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """The files of `save_rows` in a folder whose atomicity is the caller's."""
    space = model.token_space
    require_tokenizer(base["base_llm"], base["tokenizer_fingerprint"], space)
    rows, adapter = unmarked(tensors if tensors is not None else _tensors_of(model))
    rows, trunk = unmarked(rows, TRUNK_MARK)
    if adapter:
        write_adapter(folder, model.language_model, model.trunk_prefix, base["base_llm"], adapter)
    if trunk:
        write_trunk(folder, trunk, model.trunk_prefix, model.dtype)
    first, end = space.text.vocab_size, space.vocab_size_total
    write_row_tensors(folder / ROWS_TENSORS, rows, first, end, base["base_llm"])
    atomic_write_json(folder / EVIDENCE, dict(evidence or {"format": 1, "gates": []}))
    space.save(folder)
    if uti is not None:
        atomic_write_bytes(folder / CONFIG_NAME, _uti_bytes(Path(uti)))
    info = {
        "format": TRUNK_FORMAT if trunk else ROWS_FORMAT,
        **(details or {}),
        "row_start": first,
        "row_end": end,
        "width": rows["embeddings"].shape[1],
        "has_lm_head": "lm_head" in rows,
        "parameters": sum(tensor.numel() for part in (rows, adapter, trunk) for tensor in part.values()),
        "dtype": DTYPE,
        "base_dtype": str(model.dtype).removeprefix("torch."),
        **base,
        "token_space_sha256": space.sha256,
        "files": describe_files(folder, [name for name in _FILES if (folder / name).is_file()]),
    }
    atomic_write_json(folder / ROWS_INFO, info)


def _tensors_of(model: TokenLM) -> dict[str, Tensor]:
    """All that is no longer the base's, marked."""
    found = model.row_parameters() | marked(lora_parameters(model.language_model))
    return found | (marked(trunk_parameters(model.language_model), TRUNK_MARK) if model.owns_trunk else {})


def find_rows(source: str | Path) -> Path:
    """A trainable-rows folder: a local one, or the files of a hub id.

    Raises:
        AddOnError: it is a folder of something else.
        ModelError: it can't be had.
    """
    if Path(source).is_dir() and not (Path(source) / ROWS_INFO).is_file():
        inside = Path(source) / "rows"
        hint = f" Of this run they are in {inside}." if (inside / ROWS_INFO).is_file() else ""
        raise AddOnError(f"{source} is no trainable-rows folder: it has no {ROWS_INFO}.{hint}")
    return resolve_folder(
        source,
        what="add-on",
        patterns=("trainable_rows.*", "token_space.*", "adapter_*", TRUNK, CONFIG_NAME, EVIDENCE),
        required=(ROWS_INFO, *_REQUIRED_FILES),
    )


def has_rows(source: str | Path) -> bool:
    """Whether a folder or hub id is a trainable-rows folder."""
    if Path(source).is_dir():
        return (Path(source) / ROWS_INFO).is_file()
    try:
        find_rows(source)
    except ModelError:
        return False
    return True


def read_rows_info(directory: str | Path) -> dict[str, Any]:
    """trainable_rows.json, checked for its format and the type of what it holds.

    The token space, uti.yaml and evidence.json beside it are those it was written with; rows and a trunk are left to
    what reads them.

    Raises:
        AddOnError: this is no trainable-rows folder, one of another format, or it contradicts itself.
        TamperedFileError: a file is not the one that was written.
        TokenSpaceError: token_space.json is not valid.
    """
    folder = Path(directory)
    if not (folder / ROWS_INFO).is_file():
        raise AddOnError(f"{folder} is no trainable-rows folder: it has no {ROWS_INFO}.")
    info = read_json(folder / ROWS_INFO, error=AddOnError, max_bytes=MAX_INFO_BYTES)
    if info.get("format") not in (ROWS_FORMAT, TRUNK_FORMAT):
        raise AddOnError(
            f"{folder / ROWS_INFO} has format {info.get('format')!r}; this version reads the formats {ROWS_FORMAT} and "
            f"{TRUNK_FORMAT}."
        )
    bad = _wrong_fields(info)
    if bad:
        raise AddOnError(
            f"{folder / ROWS_INFO} has no usable {', '.join(bad)}; it was not written by this package or was changed."
        )
    for name, written in info["files"].items():
        if name not in _CHECKED_LATER:
            check_bytes(folder / name, written)
    space = TokenSpace.load(folder)
    if space.sha256 != info["token_space_sha256"]:
        raise TamperedFileError(f"{folder / FILE_NAME} is not the token space that {ROWS_INFO} was written with.")
    lines = _contradictions(info, space)
    if lines:
        raise AddOnError(f"{folder / ROWS_INFO} contradicts {FILE_NAME} beside it:\n  " + "\n  ".join(lines))
    return info


def check_layout(directory: str | Path, info: Mapping[str, Any]) -> None:
    """Compare the file of rows with its checksum, and what it says it holds with trainable_rows.json; reads no tensor.

    Raises:
        AddOnError: it is missing, holds something else than rows, or other rows; a line per finding.
        TamperedFileError: its bytes are not those that were written.
    """
    path = Path(directory) / ROWS_TENSORS
    check_bytes(path, info["files"][ROWS_TENSORS])
    layout = read_layout(path)
    shape = (info["row_end"] - info["row_start"], info["width"])
    expected = dict.fromkeys(ROW_NAMES if info["has_lm_head"] else ROW_NAMES[:1], shape)
    lines = [f"{name} is missing" for name in expected if name not in layout.shapes]
    lines += [f"{name} is unexpected" for name in layout.shapes if name not in expected]
    lines += [
        f"{name} has shape {found}; {ROWS_INFO} describes {shape}"
        for name, found in layout.shapes.items()
        if name in expected and found != shape
    ]
    lines += [
        f"{key}: {getattr(layout, key)!r} in {ROWS_TENSORS}, {info[key]!r} in {ROWS_INFO}"
        for key in ("row_start", "row_end", "base_llm", "dtype")
        if getattr(layout, key) != info[key]
    ]
    if lines:
        raise AddOnError(f"{path} does not hold the rows that {ROWS_INFO} describes:\n  " + "\n  ".join(lines))


def read_rows(directory: str | Path, info: Mapping[str, Any]) -> dict[str, Tensor]:
    """The rows by name, (N, D) fp32 each and all finite.

    Args:
        info: from `read_rows_info`.

    Raises:
        AddOnError, TamperedFileError: see `check_layout`.
    """
    check_layout(directory, info)
    path = Path(directory) / ROWS_TENSORS
    tensors = read_row_tensors(path)
    findings = tensor_findings(tensors, tensors, "rows")
    if findings:
        raise AddOnError(f"{path} can't be used:\n  " + "\n  ".join(findings))
    return tensors


def load_rows(
    directory: str | Path, model: TokenLM, base: Mapping[str, Any] | None = None, *, with_adapter: bool = True
) -> dict[str, Any]:
    """Put saved rows into `model`, strictly, and return their trainable_rows.json.

    Args:
        base: `describe_base` of the base in `model`; None compares token space and sizes alone.
        with_adapter: false leaves an adapter that the folder has where it is. A trunk is always loaded.

    Raises:
        AddOnError: the rows are missing, of another shape or dtype, or not finite.
        BaseMismatchError: they were made for another base or token space; a line per difference.
        TamperedFileError: a file is not what was written.
    """
    info = read_rows_info(directory)
    lines = [
        f"token space {line}"
        for line in tree_differences(TokenSpace.load(directory).to_dict(), model.token_space.to_dict())
    ]
    here = {"width": model.embedding.embedding_dim, "has_lm_head": not model.tied}
    lines += [
        f"{key}: {info[key]!r} in the add-on, {value!r} here" for key, value in here.items() if info[key] != value
    ]
    if base is not None:
        lines += base_differences(info, base)
    refuse_differences(directory, lines)
    tensors = read_rows(directory, info)
    with torch.no_grad():
        for name, parameter in model.row_parameters().items():
            parameter.copy_(tensors[name])
    if with_adapter and ADAPTER in info["files"]:
        read_adapter(Path(directory), model.language_model, model.trunk_prefix)
    if TRUNK in info["files"]:
        read_trunk(Path(directory), model.language_model, model.trunk_prefix, info["files"][TRUNK])
        model.owns_trunk = True
    return info


def load_token_lm(
    source: str | Path,
    llm: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
) -> TokenLM:
    """A trainable-rows folder (or hub id) and its base → the model in eval mode; nothing in it is trainable.

    Args:
        llm: hub id or folder of the base; None takes what trainable_rows.json names.
        dtype: of the base ("bfloat16", "float32"); None takes the one of the training.

    Raises:
        AddOnError, BaseMismatchError, TamperedFileError: see `load_rows`.
        ModelError: the base can't be loaded.
    """
    folder = find_rows(source)
    info = read_rows_info(folder)
    check_layout(folder, info)
    where = require_base_files(folder, info, llm, trust_remote_code=trust_remote_code)
    base_dtype = named_dtype(dtype or info["base_dtype"])
    text_model = load_strictly(AutoModelForCausalLM, where, base_dtype, attn_implementation, trust_remote_code)
    model = grow_rows(folder, where, text_model, trust_remote_code=trust_remote_code)
    model.eval().requires_grad_(False)
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    return model


def grow_rows(
    folder: Path, llm: Path, text_model: Any, *, with_adapter: bool = True, trust_remote_code: bool = False
) -> TokenLM:
    """Trained rows behind a language model that was loaded from `llm`, in place; it is not copied.

    Args:
        folder: from `find_rows`; its info and layout were checked.
        with_adapter: see `load_rows`.

    Raises:
        AddOnError, BaseMismatchError, TamperedFileError, ModelError: see `load_token_lm`.
    """
    model = TokenLM.grow(text_model, TokenSpace.load(folder), init="normal")
    found = fingerprint_base(llm, model, trust_remote_code)  # a base of pickled weights is first known here
    refuse_differences(folder, differences(read_rows_info(folder)["base_fingerprint"], found, "LLM"))
    load_rows(folder, model, with_adapter=with_adapter)
    return model


def _wrong_fields(info: Mapping[str, Any]) -> list[str]:
    """Names of what is missing or of another type or size than was written."""
    bad = [name for name, most in _NUMBERS.items() if type(info.get(name)) is not int or not 1 <= info[name] <= most]
    bad += [name for name in ("base_llm", "base_dtype", "dtype", "token_space_sha256") if not is_text(info.get(name))]
    bad += [name for name in ("base_fingerprint", "tokenizer_fingerprint") if not isinstance(info.get(name), dict)]
    if not isinstance(info.get("has_lm_head"), bool):
        bad.append("has_lm_head")
    files = info.get("files")
    if not isinstance(files, dict):
        return [*bad, "files"]
    bad += [f"files.{name}" for name in _REQUIRED_FILES if name not in files]
    if TRUNK in files and (info["format"] != TRUNK_FORMAT or ADAPTER in files):  # an adapter's base is the base
        bad.append(f"files.{TRUNK}")
    return bad + [f"files.{name}" for name in files if name not in _FILES or not isinstance(files[name], dict)]


def _contradictions(info: Mapping[str, Any], space: TokenSpace) -> list[str]:
    expected = {"row_start": space.text.vocab_size, "row_end": space.vocab_size_total, "dtype": DTYPE}
    lines = [f"{key}: {info[key]!r}, and {value!r} is right" for key, value in expected.items() if info[key] != value]
    if info["tokenizer_fingerprint"].get("sha256") != space.text.tokenizer_sha256:
        lines.append("tokenizer_fingerprint: it is not the tokenizer of the token space")
    return lines


def _uti_bytes(source: Path) -> bytes:
    file = source / CONFIG_NAME if source.is_dir() else source
    return read_bytes(file, MAX_UTI_BYTES, error=ConfigError)

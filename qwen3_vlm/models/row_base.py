"""What trainable rows belong to: a base and its tokenizer, described when written and compared when read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from qwen3_vlm.errors import ModelError
from qwen3_vlm.fingerprint import (
    Fingerprint,
    differences,
    fingerprint_folder,
    fingerprint_tensors,
    fingerprint_tokenizer,
    resolve_folder,
)
from qwen3_vlm.models.add_on_files import base_folder, folder_differences, refuse_differences
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.models.vocabulary_rows import SplitEmbedding
from qwen3_vlm.tokenization.token_space import TokenSpace

__all__ = [
    "base_differences",
    "describe_base",
    "fingerprint_base",
    "load_tokenizer",
    "require_base_files",
    "require_tokenizer",
]


def describe_base(
    llm: str | Path, tokenizer: Any = None, *, model: TokenLM | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The part of trainable_rows.json that says what the rows belong to.

    Args:
        llm: hub id or folder of the base.
        tokenizer: the base's; None loads it from `llm`.
        model: the base with its rows, fingerprinted in memory if the base's folder has no safetensors.

    Raises:
        ModelError: the base or its tokenizer can't be read.
    """
    folder = resolve_folder(llm, what="llm")
    tokenizer = load_tokenizer(folder, trust_remote_code) if tokenizer is None else tokenizer
    return {
        "base_llm": str(llm),
        "base_fingerprint": fingerprint_base(folder, model, trust_remote_code),
        "tokenizer_fingerprint": fingerprint_tokenizer(tokenizer),
    }


def base_differences(info: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """One line per way in which `base` is not the one that trainable_rows.json describes."""
    lines = differences(info["base_fingerprint"], base["base_fingerprint"], "LLM")
    return lines + differences(info["tokenizer_fingerprint"], base["tokenizer_fingerprint"], "tokenizer")


def require_base_files(
    folder: Path,
    info: Mapping[str, Any],
    llm: str | Path | None = None,
    *,
    download: bool = True,
    trust_remote_code: bool = False,
) -> Path:
    """Where the base lies, whose files and tokenizer are those that the rows were trained on; no weights are loaded.

    Raises:
        ModelError: it can't be had; without `download`, is not on this machine.
        BaseMismatchError: it is another base; a line per difference.
    """
    where = base_folder(llm or info["base_llm"], "llm", folder, download=download)
    lines = folder_differences(info["base_fingerprint"], where, "llm", trust_remote_code=trust_remote_code)
    tokenizer = fingerprint_tokenizer(load_tokenizer(where, trust_remote_code))
    refuse_differences(folder, lines + differences(info["tokenizer_fingerprint"], tokenizer, "tokenizer"))
    return where


def require_tokenizer(llm: str | Path, found: Mapping[str, Any], space: TokenSpace) -> None:
    """Refuse a base whose tokenizer is not the token space's.

    Args:
        found: from `fingerprint_tokenizer`.

    Raises:
        ModelError: both are told.
    """
    if found["sha256"] != space.text.tokenizer_sha256:
        raise ModelError(
            f"The tokenizer of {llm} is not the one that the token space was built with (sha256 "
            f"{found['sha256'][:12]}…, {space.text.tokenizer_sha256[:12]}… is needed), so text ids would mean "
            "something else."
        )


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer in a base's folder.

    Raises:
        ModelError: there is none that can be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise ModelError(f"The tokenizer of {folder} can't be loaded: {reason}") from problem


def fingerprint_base(folder: Path, model: TokenLM | None = None, trust_remote_code: bool = False) -> Fingerprint:
    """The fingerprint of a base's files; from `model` in memory if there are no safetensors.

    Raises:
        ModelError: there are none, and no model is given.
    """
    try:
        return fingerprint_folder(folder, "llm", trust_remote_code=trust_remote_code)
    except ModelError:
        if model is None:
            raise
    return fingerprint_tensors(_base_tensors(model), "llm", model.language_model.config.to_dict())


def _base_tensors(model: TokenLM) -> dict[str, Tensor]:
    """The base's tensors by the names that they have in its files."""
    trunk = model.language_model
    tables = [name for name, module in trunk.named_modules() if isinstance(module, SplitEmbedding)]
    tensors = dict(trunk.state_dict())
    for name in tables:
        del tensors[f"{name}.rows"]
        tensors[f"{name}.weight"] = tensors.pop(f"{name}.base.weight")
    return {f"{trunk.base_model_prefix}.{name}": tensor for name, tensor in tensors.items()} | {
        "lm_head.weight": model.lm_head.weight
    }

"""A base, its trained rows and any adapter or trunk as one ordinary Hugging Face folder; it needs nothing else.

Here, and here alone, the two blocks of rows are joined. The base's class stays what it is, and a tied base stays tied.
Its tokenizer gets a name for every id beyond its own, so that ids and strings line up.

What a plain model can't say: that the base's padding rows are never predicted. They keep the base's weights; the
generation config suppresses them.
"""

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoModelForCausalLM

from qwen3_vlm.errors import ConfigError, ModelError
from qwen3_vlm.models.add_on_files import EVIDENCE, named_dtype, require_new_folder
from qwen3_vlm.models.bases import load_strictly
from qwen3_vlm.models.lora import ADAPTER, merge_lora, read_adapter
from qwen3_vlm.models.row_base import load_tokenizer, require_base_files
from qwen3_vlm.models.row_files import check_layout, find_rows, load_token_lm, read_rows, read_rows_info
from qwen3_vlm.models.trunk import TRUNK, read_trunk
from qwen3_vlm.models.vocabulary_rows import is_tied
from qwen3_vlm.storage import atomic_directory, atomic_write_text
from qwen3_vlm.tokenization.sequences import BOUNDARIES
from qwen3_vlm.tokenization.token_names import token_names
from qwen3_vlm.tokenization.token_space import FILE_NAME, HASH_NAME, TokenSpace
from qwen3_vlm.tokenization.uti_config import CONFIG_NAME
from qwen3_vlm.train.add_ons import export_vlm
from qwen3_vlm.train.model_card import model_card
from qwen3_vlm.train.verify import holds_rows, recorded_gates

__all__ = ["export_add_on", "export_rows", "join_rows", "name_tokens"]


def export_add_on(
    directory: str | Path,
    out: str | Path,
    *,
    llm: str | Path | None = None,
    vision_tower: str | Path | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """`export_rows` or `export_vlm`, by what the folder or hub id holds.

    Raises:
        ConfigError: an option is given that the other kind of add-on has.
    """
    if holds_rows(directory, vision_tower):
        return export_rows(directory, out, llm=llm, dtype=dtype, trust_remote_code=trust_remote_code)
    if dtype is not None:
        raise ConfigError("A connector is exported in the dtype of its training; leave --dtype out.")
    return export_vlm(directory, out, llm=llm, vision_tower=vision_tower, trust_remote_code=trust_remote_code)


def export_rows(
    directory: str | Path,
    out: str | Path,
    *,
    llm: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write base and rows as one folder for `AutoModelForCausalLM` and `AutoTokenizer`; return a sentence that says so.

    An adapter is merged into the base's weights; a trunk takes the place of the base's decoder.

    Args:
        directory: trainable-rows folder or hub id.
        llm: hub id or folder of the base; None takes what trainable_rows.json names.
        dtype: of all weights; None takes the one that the base had in training. What was trained in fp32 is rounded to
            it.

    Raises:
        StorageError: the disk is full or can't be written, or `out` is a folder with other files in it.
        AddOnError, BaseMismatchError, ModelError: see `load_token_lm`.
    """
    target = require_new_folder(out)
    folder = find_rows(directory)
    info = read_rows_info(folder)
    check_layout(folder, info)
    space = TokenSpace.load(folder)
    where = require_base_files(folder, info, llm, trust_remote_code=trust_remote_code)
    gates = recorded_gates(folder)
    tokenizer = load_tokenizer(where, trust_remote_code)
    names = name_tokens(tokenizer, space)
    weights = named_dtype(dtype or info["base_dtype"])
    if not any(where.glob("*.safetensors")):  # a base of pickled weights is first known in memory
        load_token_lm(folder, where, attn_implementation="eager", trust_remote_code=trust_remote_code)
    model = load_strictly(AutoModelForCausalLM, where, weights, "eager", trust_remote_code)
    if ADAPTER in info["files"]:
        read_adapter(folder, model.base_model, model.base_model_prefix)
        merge_lora(model.base_model)
    if TRUNK in info["files"]:
        read_trunk(folder, model.base_model, model.base_model_prefix, info["files"][TRUNK])
    join_rows(model, read_rows(folder, info), space.vocab_size_total)
    model.config.token_space_sha256 = space.sha256
    model.generation_config = _generation_config(model, space)
    with atomic_directory(target) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        for name in (FILE_NAME, HASH_NAME, CONFIG_NAME, EVIDENCE):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, part / name)
        card = model_card(info, space, gates, names, type(model).__name__, weights)
        atomic_write_text(part / "README.md", card)
    size = sum(path.stat().st_size for path in target.rglob("*"))
    return (
        f"Wrote {target} ({size / 1e6:,.0f} MB). Load it with AutoModelForCausalLM.from_pretrained and "
        "AutoTokenizer.from_pretrained; it needs nothing of qwen3-vlm."
    )


@torch.no_grad()
def join_rows(model: Any, rows: Mapping[str, Tensor], total: int) -> None:
    """Grow a causal LM to `total` rows, in place: its own first, then `rows` (N, D), rounded to its dtype.

    Raises:
        ModelError: the rows do not fit the model, or it does not keep its head tied.
    """
    first, tied = model.get_input_embeddings().weight.shape[0], is_tied(model)
    if tied != ("lm_head" not in rows) or any(len(block) != total - first for block in rows.values()):
        raise ModelError(f"The rows {', '.join(rows)} do not fit behind the {first:,} rows of {type(model).__name__}.")
    model.resize_token_embeddings(total, mean_resizing=False)
    if is_tied(model) != tied:
        raise ModelError(f"{type(model).__name__} does not keep its head tied to its embedding when it grows.")
    model.get_input_embeddings().weight[first:] = rows["embeddings"]
    if not tied:
        model.get_output_embeddings().weight[first:] = rows["lm_head"]


def name_tokens(tokenizer: Any, space: TokenSpace) -> list[str]:
    """Give a Hugging Face tokenizer a special token for every id that it has none for, in place, and return them.

    Raises:
        ModelError: it can't have them at exactly their ids.
    """
    names = token_names(space, tokenizer.get_vocab())
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    ids = list(range(space.text.tokenizer_size, space.vocab_size_total))
    if tokenizer.convert_tokens_to_ids(names) != ids:
        raise ModelError(f"{type(tokenizer).__name__} does not give added tokens the ids that follow its own.")
    return names


def _generation_config(model: Any, space: TokenSpace) -> Any:
    """The base's own; it stops at the end of a segment too, and never gives one of the base's padding ids."""
    config = copy.deepcopy(model.generation_config)
    config._from_model_config = False
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [space.special(boundary.end) for boundary in BOUNDARIES.values()]
    config.eos_token_id = [stop for stop in stops if stop is not None] + ends
    if config.pad_token_id is None:
        config.pad_token_id = space.special("<|pad_mm|>")
    unused = range(space.text.tokenizer_size, space.text.vocab_size)
    config.suppress_tokens = sorted({*(config.suppress_tokens or ()), *unused}) or None
    return config

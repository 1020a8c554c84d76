"""A connector directory and a trainable-rows folder of one base, loaded around it together.

Both were written with fingerprints of their base. They are compared with each other before anything large is read,
and each with the base that is loaded, as when it is loaded alone. An adapter beside either becomes a named one,
"connector" and "rows"; others can be added under names of their own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qwen3_vlm.errors import AddOnError, BaseMismatchError, ConfigError
from qwen3_vlm.fingerprint import differences
from qwen3_vlm.models.add_on_files import named_dtype, refuse_differences
from qwen3_vlm.models.bases import load_strictly
from qwen3_vlm.models.lora import ADAPTER, read_adapter
from qwen3_vlm.models.omni import OmniModel
from qwen3_vlm.models.row_base import require_base_files
from qwen3_vlm.models.row_files import ROWS_INFO, check_layout, find_rows, grow_rows, read_rows_info
from qwen3_vlm.models.trunk import TRUNK
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from qwen3_vlm.train.add_ons import OpenedConnector, check_adapter, connect, open_connector
from qwen3_vlm.train.connector_files import INFO, read_info

__all__ = ["load_omni"]

CONNECTOR, ROWS = "connector", "rows"  # names of the adapters beside the two add-ons


def load_omni(
    connector: str | Path,
    rows: str | Path,
    *,
    adapters: Mapping[str, str | Path] | None = None,
    llm: str | Path | None = None,
    vision_tower: str | Path | None = None,
    uti: UnifiedTokenizer | str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
) -> OmniModel:
    """One base with a connector and new rows, in eval mode; nothing in it is trainable.

    Args:
        connector, rows: the two add-ons: folders or hub ids.
        adapters: name → folder of further adapters, in PEFT's format or beside another add-on of the same base.
        llm, vision_tower: hub id or folder; None takes what connector.json names.
        uti: the tokenizers, or a uti.yaml with them; None takes the one beside the rows.
        dtype: of the bases ("bfloat16", "float32"); None takes the one of both trainings.

    Raises:
        AddOnError, BaseMismatchError, TamperedFileError: see `load_vlm` and `load_token_lm`; or the two add-ons are of
            different bases, with a line per difference; or the rows have a trunk of their own.
        TokenSpaceError: the tokenizers are not those of the rows.
        ConfigError: the add-ons were trained in different dtypes and none is given, or a name is given twice.
        ModelError: a base or a tokenizer can't be loaded.
    """
    folder = find_rows(rows)
    info = read_rows_info(folder)
    check_layout(folder, info)
    _refuse_trunk(folder, info)
    opened = open_connector(connector, llm, vision_tower, trust_remote_code=trust_remote_code)
    _require_one_base(opened, folder, info)
    require_base_files(folder, info, opened.llm, trust_remote_code=trust_remote_code)
    found = _adapters(opened, folder, info, adapters or {})
    base_dtype = _common_dtype(dtype, opened.info, info)
    tokenizer = uti if isinstance(uti, UnifiedTokenizer) else UnifiedTokenizer.open(uti or folder)

    text_model = load_strictly(AutoModelForCausalLM, opened.llm, base_dtype, attn_implementation, trust_remote_code)
    options: Any = {"trust_remote_code": trust_remote_code, "with_adapter": False}
    vlm, processor = connect(opened, text_model, dtype=base_dtype, attn_implementation=attn_implementation, **options)
    token_lm = grow_rows(folder, opened.llm, text_model, **options)
    for name, source in found.items():
        read_adapter(source, token_lm.language_model, token_lm.trunk_prefix, name=name)
    own = {name: name if name in found else None for name in (CONNECTOR, ROWS)}
    omni = OmniModel(vlm, token_lm, processor, tokenizer, sees_with=own[CONNECTOR], speaks_with=own[ROWS])
    for model in (vlm, token_lm):
        model.requires_grad_(False)
    return omni if device is None else omni.to(device)


def _refuse_trunk(rows: Path, info: Mapping[str, Any]) -> None:
    if TRUNK in info["files"]:
        raise AddOnError(
            f"The rows {rows} have a decoder of their own ({TRUNK}); over it a connector would not see as it learned "
            "to, and text would not be the base's. Load them alone with TokenLM.from_add_on, or take rows that were "
            "trained with trunk.training: lora."
        )


def _require_one_base(opened: OpenedConnector, rows: Path, info: Mapping[str, Any]) -> None:
    lines = differences(info["base_fingerprint"], opened.info["llm"]["fingerprint"], "LLM")
    if lines:
        raise BaseMismatchError(
            f"The rows {rows} were made for another base than the connector {opened.folder}, which is the one here:\n  "
            + "\n  ".join(lines)
        )


def _common_dtype(
    given: str | torch.dtype | None, connector: Mapping[str, Any], rows: Mapping[str, Any]
) -> torch.dtype:
    """What the base is loaded in: what is asked for, or what both add-ons were trained in."""
    recorded = {str(connector.get("dtype") or "bfloat16"), str(rows["base_dtype"])}
    if given is None and len(recorded) > 1:
        raise ConfigError(
            f"The connector was trained on a base in {connector.get('dtype')}, the rows on one in "
            f"{rows['base_dtype']}; there is one base now, so say in which dtype."
        )
    return named_dtype(given or recorded.pop())


def _adapters(
    opened: OpenedConnector, rows: Path, info: Mapping[str, Any], more: Mapping[str, str | Path]
) -> dict[str, Path]:
    """Name → folder of every adapter, its files checked where a checksum of them is known."""
    found: dict[str, Path] = {}
    if ADAPTER in opened.info["files"]:
        check_adapter(opened.folder, opened.info)
        found[CONNECTOR] = opened.folder
    if ADAPTER in info["files"]:
        found[ROWS] = rows
    for name, source in more.items():
        if name in (CONNECTOR, ROWS):
            raise ConfigError(f"An adapter can't be called {name!r}: that is the name of the one beside the {name}.")
        _check_base(Path(source), info["base_fingerprint"])
        found[name] = Path(source)
    return found


def _check_base(folder: Path, base: Mapping[str, Any]) -> None:
    """Refuse an adapter beside an add-on of another base; one that stands alone does not say which it is of."""
    if not (folder / ADAPTER).is_file():
        raise AddOnError(f"{folder} has no adapter: there is no {ADAPTER} in it.")
    lines: list[str] = []
    if (folder / INFO).is_file():
        described = read_info(folder)
        check_adapter(folder, described)
        lines = differences(described["llm"]["fingerprint"], base, "LLM")
    elif (folder / ROWS_INFO).is_file():
        lines = differences(read_rows_info(folder)["base_fingerprint"], base, "LLM")
    refuse_differences(folder, lines)

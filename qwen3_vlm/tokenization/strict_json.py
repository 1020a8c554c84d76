"""JSON read so that what is accepted is exactly what was written, and compared leaf by leaf."""

import json
from collections.abc import Mapping
from typing import Any

from qwen3_vlm.errors import TokenSpaceError
from qwen3_vlm.tokenization.token_space_schema import shown

__all__ = ["parse_strict", "tree_differences"]


def parse_strict(data: bytes | str) -> Any:
    """The JSON tree; keys may not repeat, NaN and infinity are refused.

    Raises:
        TokenSpaceError: it is not valid JSON.
    """
    try:
        return json.loads(data, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise TokenSpaceError(f"It is not valid JSON ({shown(' '.join(str(error).split()))}).") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise TokenSpaceError(f"The key {shown(key)} stands there twice.")
        tree[key] = value
    return tree


def _no_constant(text: str) -> Any:
    raise TokenSpaceError(f"It holds {text}, which is not JSON.")


def tree_differences(first: Any, second: Any, key: str = "") -> list[str]:
    """One line per leaf in which two JSON trees differ; types count, so 1, 1.0 and true are three values."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        names = list(dict.fromkeys([*first, *second]))
        return [
            line
            for name in names
            for line in tree_differences(
                first.get(name), second.get(name), f"{key}.{shown(name)}" if key else shown(name)
            )
        ]
    if type(first) is type(second) and first == second:
        return []
    return [f"{key}: {_short(first)} ≠ {_short(second)}"]


def _short(value: Any) -> str:
    return "none" if value is None else shown(str(value)[:80])

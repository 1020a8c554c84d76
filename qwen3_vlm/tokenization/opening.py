"""From `type:` in uti.yaml to the factory of a tokenizer: the built-in ones, else a third party's entry point.

A third party declares, in its own pyproject.toml, a callable that takes the config and returns the tokenizer:

    [project.entry-points."qwen3_vlm.image_tokenizers"]
    my_tokenizer = "my_package.tokenizer:open_it"
"""

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from qwen3_vlm.errors import ConfigError, ModelError, Qwen3VLMError

__all__ = ["check_agreement", "check_attributes", "known_types", "open_third_party"]


def known_types(built_in: Mapping[str, Any], group: str) -> list[str]:
    """Every name that `type:` may have on this machine, the built-in ones first."""
    return [*sorted(built_in), *sorted({point.name for point in entry_points(group=group)} - built_in.keys())]


def open_third_party(config: Any, group: str, built_in: Mapping[str, Any]) -> Any:
    """What the entry point named `config.type` makes of the config.

    Raises:
        ConfigError: no such type is installed, or two distributions offer it.
        ModelError: the distribution's factory fails; it is named.
    """
    points = list(entry_points(group=group, name=config.type))
    if not points:
        names = ", ".join(known_types(built_in, group))
        raise ConfigError(f"The type {config.type!r} is not known; there are: {names}. (Entry points: {group}.)")
    if len(points) > 1:
        owners = " and ".join(sorted(map(_owner, points)))
        raise ConfigError(f"The type {config.type!r} is offered by {owners}; uninstall one of them.")
    try:
        factory: Callable[[Any], Any] = points[0].load()
        return factory(config)
    except Qwen3VLMError:
        raise
    except Exception as problem:  # any error of a third party's code is to be told as theirs
        reason = str(problem).strip().split("\n", 1)[0]
        raise ModelError(
            f"The type {config.type!r} of {_owner(points[0])} can't be opened ({type(problem).__name__}: {reason}); "
            "that package, not this one, can say why."
        ) from problem


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else f"the module {point.module}"


def check_attributes(tokenizer: Any, names: tuple[str, ...], type_name: str) -> None:
    """Refuse what does not have the protocol's attributes and methods at all; `conformance` looks closer.

    Raises:
        ModelError: names them.
    """
    missing = [name for name in names if not hasattr(tokenizer, name)]
    if missing:
        raise ModelError(
            f"The tokenizer of type {type_name!r} ({type(tokenizer).__name__}) has no {', '.join(missing)}; "
            "see `qwen3-vlm uti conformance`."
        )


def check_agreement(config_values: Mapping[str, Any], found_values: Mapping[str, Any], what: str) -> None:
    """Values that uti.yaml gives must be the tokenizer's own; None leaves the value to the tokenizer.

    Raises:
        ConfigError: names the key with both values.
    """
    for key, wanted in config_values.items():
        found = found_values[key]
        if wanted is not None and wanted != found:
            raise ConfigError(f"{key} is {wanted} in the configuration, but {what} has {found}; set it to {found}.")

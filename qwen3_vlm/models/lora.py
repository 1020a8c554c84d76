"""LoRA on a language model's own projections, in PEFT's layers and PEFT's file format.

The adapter goes into the module that it is given and nowhere else: a tower, a connector or new vocabulary rows beside
that module can't be reached. Which linear layers get one is a rule, every linear layer of the decoder's blocks, so
that families with other names need no list; its outcome is written out in adapter_config.json, and PEFT alone loads it:

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)

A trunk can carry several adapters under names of their own, of which one acts at a time, or none (`use_lora`). Their
files do not hold the name, and the base's weights are there once.

Shapes: r rank, D widths.
"""

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from qwen3_vlm.errors import AddOnError, ModelError
from qwen3_vlm.storage import atomic_file, atomic_write_json, read_json

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER_FILES = (ADAPTER, ADAPTER_CONFIG)
LORA = "lora/"  # before the names of an adapter's tensors, where they stand beside those of another add-on
NAME = "default"  # PEFT's name of an adapter that stands alone
MAX_CONFIG_BYTES = 1_000_000
STARTS_OF_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave the base as it is
MAX_RANK = 8_192  # memory is set aside for it before the tensors are seen
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_LORA = re.compile(r"\.(lora_\w+)\.([A-Za-z0-9_-]+)")  # kind and adapter in a parameter's name


def add_lora(
    trunk: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    dora: bool = False,
    seed: int = 0,
    name: str = NAME,
) -> list[str]:
    """Put fresh adapters on every linear layer of the trunk, in place; the names of those layers.

    A fresh adapter changes nothing: its second factor is zero. The trunk's own weights are frozen by it. Of several
    adapters the one that was added last acts.

    Args:
        trunk: a decoder without its head, such as `Qwen3Model`.
        alpha: the update is scaled by alpha ÷ rank.
        dora: with a magnitude of its own per row (Liu et al., arXiv:2402.09353).
        name: what `use_lora` knows it by: letters, digits, - and _.

    Raises:
        ModelError: it has no linear layer, or already has an adapter of that name, or the name can't be one.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = _linear_layers(trunk)
    if not targets:
        raise ModelError("The language model has no linear layers.")
    if not _NAME.fullmatch(name):
        raise ModelError(f"{name!r} is no name of an adapter; use letters, digits, - and _.")
    if name in lora_names(trunk):
        raise ModelError("The language model already has an adapter" + f" {name!r}" * (name != NAME) + ".")
    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_dora": dora}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # several are meant
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(target_modules=targets, **settings), trunk, adapter_name=name)
    for parameter in lora_parameters(trunk, name).values():
        parameter.data = parameter.data.float()
    return targets


def marked(adapter: Mapping[str, Any], mark: str = LORA) -> dict[str, Any]:
    """An adapter's names, marked as such; with another mark those of another part."""
    return {f"{mark}{name}": value for name, value in adapter.items()}


def unmarked(found: Mapping[str, Tensor], mark: str = LORA) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What stands without the mark, and the adapter under its own names."""
    others = {name: value for name, value in found.items() if not name.startswith(mark)}
    return others, {name.removeprefix(mark): value for name, value in found.items() if name.startswith(mark)}


def has_lora(module: nn.Module) -> bool:
    """Whether there is an adapter anywhere in it."""
    return any(_is_lora(name) for name, _ in module.named_parameters())


def lora_names(trunk: nn.Module) -> list[str]:
    """The adapters that a trunk carries, in the order in which they were added."""
    return list(getattr(trunk, "peft_config", {}))


def lora_parameters(trunk: nn.Module, name: str = NAME) -> dict[str, nn.Parameter]:
    """One adapter: name as in PEFT's files, but for the prefix → parameter."""
    return {_file_name(key): parameter for key, parameter in trunk.named_parameters() if _adapter_of(key) == name}


def use_lora(trunk: nn.Module, name: str | None) -> None:
    """Let one adapter act, or none: then the trunk is the base's, to the bit. For answering; all of them are frozen.

    Raises:
        ModelError: there is no adapter of that name.
    """
    require_lora(trunk, name)
    switch_lora(lora_layers(trunk), name)


def lora_layers(module: nn.Module) -> list[Any]:
    """The layers that have adapters, PEFT's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def require_lora(trunk: nn.Module, name: str | None) -> None:
    """Refuse a name that no adapter has; None is none.

    Raises:
        ModelError: tells the names that there are.
    """
    if name is not None and name not in lora_names(trunk):
        raise ModelError(f"There is no adapter {name!r}; there are {', '.join(lora_names(trunk)) or 'none'}.")


def switch_lora(layers: Sequence[Any], name: str | None) -> None:
    """`use_lora` for the layers of a trunk, found once with `lora_layers`; those that stand so are not touched."""
    for layer in layers:
        if name is None:
            if not layer.disable_adapters:
                layer.enable_adapters(False)
        elif layer.disable_adapters or layer.active_adapters != [name]:
            if layer.disable_adapters:
                layer.enable_adapters(True)
            layer.set_adapter(name, inference_mode=True)


@contextmanager
def without_lora(module: nn.Module) -> Iterator[None]:
    """The model as it is without its adapters, to the bit; what is trainable stays as it is."""
    layers = [layer for layer in lora_layers(module) if not layer.disable_adapters]
    for layer in layers:  # PEFT's own switch would thaw frozen adapters on the way back
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merge_lora(trunk: Any) -> None:
    """Add the adapter to the weights that it belongs to, in place, and take it off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(trunk.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, own = name.rpartition(".")
            setattr(trunk.get_submodule(parent), own, layer.get_base_layer())
    del trunk.peft_config


def write_adapter(
    folder: Path,
    trunk: Any,
    prefix: str,
    base: str,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    name: str = NAME,
) -> None:
    """adapter_model.safetensors and adapter_config.json, as PEFT writes them; atomicity is the caller's.

    Args:
        prefix: the trunk's name inside the causal LM (`base_model_prefix`), such as "model".
        base: hub id or folder of the causal LM.
        tensors: by the names of `lora_parameters`, where the trunk holds but shards of them.
    """
    state = {key: tensor.detach() for key, tensor in (tensors or lora_parameters(trunk, name)).items()}
    with atomic_file(folder / ADAPTER) as temporary:
        whole = {f"base_model.model.{prefix}.{key}": tensor.cpu().contiguous() for key, tensor in state.items()}
        safetensors.torch.save_file(whole, temporary, metadata={"format": "pt"})
    config = trunk.peft_config[name].to_dict()
    config |= {
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "target_modules": sorted(f"{prefix}.{target}" for target in config["target_modules"]),
    }
    atomic_write_json(folder / ADAPTER_CONFIG, json.loads(json.dumps(config, default=_plain)))


def read_adapter(folder: Path, trunk: Any, prefix: str, *, name: str = NAME) -> None:
    """Put a saved adapter into a trunk; one without that adapter gets it as adapter_config.json says.

    Raises:
        AddOnError: the files are missing, no LoRA of this kind, or do not fit; a line per tensor.
    """
    config = read_json(folder / ADAPTER_CONFIG, error=AddOnError, max_bytes=MAX_CONFIG_BYTES)
    try:
        settings = {
            "rank": int(config["r"]),
            "alpha": float(config["lora_alpha"]),
            "dropout": float(config["lora_dropout"]),
            "dora": bool(config["use_dora"]),
        }
        if not 1 <= settings["rank"] <= MAX_RANK:
            raise ValueError(f"its rank is {settings['rank']}")
        _refuse_other_kinds(config)
    except (KeyError, TypeError, ValueError) as problem:
        raise AddOnError(
            f"{folder / ADAPTER_CONFIG} describes no LoRA that this package writes ({problem})."
        ) from problem
    if name not in lora_names(trunk):
        add_lora(trunk, **settings, name=name)  # type: ignore[arg-type]
    try:
        found = safetensors.torch.load_file(folder / ADAPTER)
    except (safetensors.SafetensorError, OSError, ValueError) as problem:
        raise AddOnError(f"{folder / ADAPTER} can't be read ({problem}).") from problem
    start = f"base_model.model.{prefix}."
    tensors = {key.removeprefix(start): tensor for key, tensor in found.items()}
    parameters = lora_parameters(trunk, name)
    lines = _differences(tensors, parameters)
    scale, here = settings["alpha"] / settings["rank"], _scale(trunk, name)
    if scale != here:
        lines.append(
            f"alpha ÷ rank is {scale:g} in {ADAPTER_CONFIG}, and {here:g} here: the same weights would do another thing"
        )
    if lines:
        raise AddOnError(f"{folder / ADAPTER} does not fit the model:\n  " + "\n  ".join(lines[:20]))
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])


def _refuse_other_kinds(config: Mapping[str, Any]) -> None:
    """Settings of PEFT by which the same tensors do something else.

    Raises:
        ValueError: names one.
    """
    for name in ("use_rslora", "alpha_pattern", "rank_pattern", "fan_in_fan_out", "layer_replication"):
        if config.get(name):
            raise ValueError(f"{name} is set")
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"its peft_type is {config['peft_type']}")
    if (bias := config.get("bias", "none")) != "none":
        raise ValueError(f"bias is {bias!r}: the base's own biases were trained with it; train it with 'none'")
    if (start := config.get("init_lora_weights", True)) not in STARTS_OF_THE_BASE:
        raise ValueError(
            f"init_lora_weights is {start!r}: it adds to a base that this start changed, not to the base itself; save "
            "it with PEFT's path_initial_model_for_weight_conversion"
        )


def _linear_layers(trunk: nn.Module) -> list[str]:
    """Names of the trunk's own linear layers; those that have an adapter already stand for what is inside them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = {name for name, module in trunk.named_modules() if isinstance(module, BaseTunerLayer)}
    inside = tuple(f"{name}." for name in wrapped)
    return [
        name
        for name, module in trunk.named_modules()
        if name in wrapped or (isinstance(module, nn.Linear) and not name.startswith(inside))
    ]


def _scale(trunk: Any, name: str) -> float:
    config = trunk.peft_config[name]
    return float(config.lora_alpha / config.r)


def _differences(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> list[str]:
    lines = [f"{name} is missing" for name in sorted(parameters.keys() - tensors.keys())]
    lines += [f"{name} is unexpected" for name in sorted(tensors.keys() - parameters.keys())]
    for name in sorted(parameters.keys() & tensors.keys()):
        tensor, wanted = tensors[name], tuple(parameters[name].shape)
        if tuple(tensor.shape) != wanted:
            lines.append(f"{name} has the shape {tuple(tensor.shape)}; {wanted} is needed")
        elif not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            lines.append(f"{name} is not finite")
    return lines


def _is_lora(name: str) -> bool:
    return _adapter_of(name) is not None


def _adapter_of(name: str) -> str | None:
    """Which adapter a parameter belongs to, by its name; None: to the base."""
    found = _LORA.search(name)
    return found[2] if found else None


def _file_name(name: str) -> str:
    """`….lora_A.default.weight` → `….lora_A.weight`; a DoRA magnitude has no `.weight` in files."""
    if ".lora_magnitude_vector." in name:
        return _LORA.split(name, maxsplit=1)[0] + ".lora_magnitude_vector"
    return _LORA.sub(r".\1", name, count=1)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)

"""LoRA on a language model's own projections, in PEFT's layers and PEFT's file format.

The adapter goes into the module that it is given and nowhere else: a tower, a connector or new vocabulary rows beside
that module can't be reached. Which linear layers get one is a rule, every linear layer of the decoder's blocks, so
that families with other names need no list; its outcome is written out in adapter_config.json, and PEFT alone loads it:

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)

Shapes: r rank, D widths.
"""

import json
from collections.abc import Iterator, Mapping
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
NAME = "default"  # PEFT's name of the one adapter
MAX_CONFIG_BYTES = 1_000_000
MAX_RANK = 8_192  # memory is set aside for it before the tensors are seen


def add_lora(
    trunk: Any, *, rank: int, alpha: float, dropout: float = 0.0, dora: bool = False, seed: int = 0
) -> list[str]:
    """Put fresh adapters on every linear layer of the trunk, in place; the names of those layers.

    A fresh adapter changes nothing: its second factor is zero. The trunk's own weights are frozen by it.

    Args:
        trunk: a decoder without its head, such as `Qwen3Model`.
        alpha: the update is scaled by alpha ÷ rank.
        dora: with a magnitude of its own per row (Liu et al., arXiv:2402.09353).

    Raises:
        ModelError: it has no linear layer, or already has an adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = [name for name, module in trunk.named_modules() if isinstance(module, nn.Linear)]
    if not targets or has_lora(trunk):
        raise ModelError(
            "The language model already has an adapter." if targets else "The language model has no linear layers."
        )
    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_dora": dora}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(target_modules=targets, **settings), trunk)
    for parameter in lora_parameters(trunk).values():
        parameter.data = parameter.data.float()
    return targets


def marked(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's names, marked as such."""
    return {f"{LORA}{name}": value for name, value in adapter.items()}


def unmarked(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What stands without the mark, and the adapter under its own names."""
    others = {name: value for name, value in found.items() if not name.startswith(LORA)}
    return others, {name.removeprefix(LORA): value for name, value in found.items() if name.startswith(LORA)}


def has_lora(module: nn.Module) -> bool:
    """Whether there is an adapter anywhere in it."""
    return any(_is_lora(name) for name, _ in module.named_parameters())


def lora_parameters(trunk: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter: name as in PEFT's files, but for the prefix → parameter."""
    return {_file_name(name): parameter for name, parameter in trunk.named_parameters() if _is_lora(name)}


@contextmanager
def without_lora(module: nn.Module) -> Iterator[None]:
    """The model as it is without its adapters, to the bit."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


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
    folder: Path, trunk: Any, prefix: str, base: str, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """adapter_model.safetensors and adapter_config.json, as PEFT writes them; atomicity is the caller's.

    Args:
        prefix: the trunk's name inside the causal LM (`base_model_prefix`), such as "model".
        base: hub id or folder of the causal LM.
        tensors: by the names of `lora_parameters`, where the trunk holds but shards of them.
    """
    state = {name: tensor.detach() for name, tensor in (tensors or lora_parameters(trunk)).items()}
    with atomic_file(folder / ADAPTER) as temporary:
        whole = {f"base_model.model.{prefix}.{name}": tensor.cpu().contiguous() for name, tensor in state.items()}
        safetensors.torch.save_file(whole, temporary, metadata={"format": "pt"})
    config = trunk.peft_config[NAME].to_dict()
    config |= {
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "target_modules": sorted(f"{prefix}.{name}" for name in config["target_modules"]),
    }
    atomic_write_json(folder / ADAPTER_CONFIG, json.loads(json.dumps(config, default=_plain)))


def read_adapter(folder: Path, trunk: Any, prefix: str) -> None:
    """Put a saved adapter into a trunk; one without adapters gets them as adapter_config.json says.

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
    except (KeyError, TypeError, ValueError) as problem:
        raise AddOnError(
            f"{folder / ADAPTER_CONFIG} describes no LoRA that this package writes ({problem})."
        ) from problem
    if not has_lora(trunk):
        add_lora(trunk, **settings)  # type: ignore[arg-type]
    try:
        found = safetensors.torch.load_file(folder / ADAPTER)
    except (safetensors.SafetensorError, OSError, ValueError) as problem:
        raise AddOnError(f"{folder / ADAPTER} can't be read ({problem}).") from problem
    start = f"base_model.model.{prefix}."
    tensors = {name.removeprefix(start): tensor for name, tensor in found.items()}
    parameters = lora_parameters(trunk)
    lines = _differences(tensors, parameters)
    scale, here = settings["alpha"] / settings["rank"], _scale(trunk)
    if scale != here:
        lines.append(
            f"alpha ÷ rank is {scale:g} in {ADAPTER_CONFIG}, and {here:g} here: the same weights would do another thing"
        )
    if lines:
        raise AddOnError(f"{folder / ADAPTER} does not fit the model:\n  " + "\n  ".join(lines[:20]))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _scale(trunk: Any) -> float:
    config = trunk.peft_config[NAME]
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
    return ".lora_" in name


def _file_name(name: str) -> str:
    """`….lora_A.default.weight` → `….lora_A.weight`; a DoRA magnitude has no `.weight` in files."""
    if ".lora_magnitude_vector." in name:
        return name.split(f".{NAME}", 1)[0]
    return name.replace(f".{NAME}.", ".")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)

"""What each stage trains, declared in one table, and the audits that it is so.

`apply_stage` freezes and thaws, `check_trainable` compares the result with the declaration, and
`audit_gradients` looks after the first backward pass at what gradients really reached. Names are
those of `model.named_parameters()` without the wrappers' prefixes; a component is the part of the
model that a parameter lives in: vision_tower, vision_ln, resampler, projector, language_model, lm_head; new
vocabulary rows and adapters (lora) are components of their own wherever they live.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qwen3_vlm.config import RunConfig
from qwen3_vlm.errors import ConfigError, TrainabilityError
from qwen3_vlm.models.quantization import parameter_count

_WRAPPERS = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True, slots=True)
class Stage:
    """A training stage: the components whose parameters move, all of them but what it `keeps`, and no others.

    A component may be absent from a model (`vision_ln`), except those in `required`.
    """

    trains: tuple[str, ...]
    required: tuple[str, ...]
    purpose: str
    keeps: tuple[str, ...] = ()  # ends of names that stay frozen in a component that trains

    def moves(self, component: str, name: str) -> bool:
        """Whether a parameter trains."""
        return component in self.trains and not name.endswith(self.keeps)


STAGES: dict[str, Stage] = {
    "stage1_align": Stage(
        trains=("vision_ln", "resampler", "projector"),
        required=("resampler", "projector"),
        purpose="align the tower's patches with the language model's input space",
    ),
    "stage2_sft": Stage(
        trains=("vision_ln", "resampler", "projector", "lora"),
        required=("resampler", "projector", "lora"),
        purpose="follow instructions about pictures: connector and an adapter on the language model's projections",
    ),
    "stage3_rows": Stage(
        trains=("vocabulary_rows",),
        required=("vocabulary_rows",),
        purpose="learn what the new ids mean and when to say them; every row of the base stays as it is",
    ),
    "stage4_mmpt": Stage(
        trains=("vocabulary_rows", "lora"),
        required=("vocabulary_rows", "lora"),
        purpose="read and write pictures and sounds: new rows, and an adapter on the language model's projections",
    ),
}
# Stage 4 with `trunk.training: full`. The base's own vocabulary rows stay as they are, in the embedding and in a head.
FULL_TRUNK = Stage(
    trains=("vocabulary_rows", "language_model"),
    required=("vocabulary_rows", "language_model"),
    purpose="read and write pictures and sounds: new rows, and every weight of the language model's decoder",
    keeps=(".base.weight",),  # of a SplitEmbedding
)


@dataclass(frozen=True, slots=True)
class ComponentRow:
    """One line of the trainability table; counts are parameters."""

    component: str
    trainable: int
    frozen: int
    dtype: str


def get_stage(name: str) -> Stage:
    """The declaration of a stage.

    Raises:
        ConfigError: there is no such stage.
    """
    if name not in STAGES:
        raise ConfigError(f"There is no stage {name!r}; the stages are {', '.join(STAGES)}.")
    return STAGES[name]


def stage_of(config: RunConfig) -> Stage:
    """The declaration of a run's stage."""
    return FULL_TRUNK if config.trunk.training == "full" else get_stage(config.stage)


def apply_stage(model: nn.Module, stage: Stage) -> list[ComponentRow]:
    """Thaw what the stage trains, in fp32, freeze the rest, set the modes, and return the checked table.

    Raises:
        TrainabilityError: the model does not come out as the stage declares.
    """
    for component, name, parameter in components(model):
        trains = stage.moves(component, name)
        parameter.requires_grad_(trains)
        if trains and parameter.dtype != torch.float32:
            _owner(model, name).float()
    set_modes(model, stage)
    check_trainable(model, stage)
    return trainability_table(model)


def set_modes(model: nn.Module, stage: Stage) -> None:
    """Train mode for the model and what moves, eval mode (no dropout) for every frozen component.

    Gradient checkpointing asks each layer whether it is training, so that flag alone stays on there.
    """
    model.train()
    for component, module in _component_modules(model):
        module.train(component in stage.trains)
        for layer in module.modules():
            if isinstance(layer, GradientCheckpointingLayer) and getattr(layer, "gradient_checkpointing", False):
                layer.training = True
    if "lora" in stage.trains:
        for name, module in model.named_modules():
            if ".lora_" in name:
                module.training = True  # the adapter's own dropout, inside a frozen component


def check_trainable(model: nn.Module, stage: Stage) -> None:
    """Compare `requires_grad` of every parameter with the declaration.

    Raises:
        TrainabilityError: names what is trainable but should not be, or the other way round, and adapters that are not
            in the language model.
    """
    present: set[str] = set()
    wrong: list[str] = []
    for component, name, parameter in components(model):
        present.add(component)
        if component == "lora" and not name.startswith("language_model."):
            wrong.append(f"{name} is an adapter outside the language model")
        elif parameter.requires_grad != stage.moves(component, name):
            wrong.append(f"{name} is {'trainable' if parameter.requires_grad else 'frozen'}")
        elif parameter.requires_grad and parameter.dtype != torch.float32:
            wrong.append(f"{name} is trainable in {str(parameter.dtype).removeprefix('torch.')}, not float32")
    wrong += [f"the component {component} is missing" for component in stage.required if component not in present]
    if wrong:
        raise TrainabilityError(f"The model is not as the stage declares it: {_listed(wrong)}.")


def audit_gradients(model: nn.Module, stage: Stage) -> None:
    """After a backward pass: each declared parameter has a finite gradient, each component some that is not zero.

    No other parameter may have one. (A single parameter may get zero: softmax ignores the key bias.)

    Raises:
        TrainabilityError: names the parameters.
    """
    wrong: list[str] = []
    largest: dict[str, float] = {}
    for component, name, parameter in components(model):
        gradient = parameter.grad
        if not stage.moves(component, name):
            if gradient is not None:
                wrong.append(f"{name} is frozen but has a gradient")
        elif gradient is None:
            wrong.append(f"{name} got no gradient")
        else:
            norm = _norm(gradient)
            if not math.isfinite(norm):
                wrong.append(f"the gradient of {name} is not finite")
            largest[component] = max(largest.get(component, 0.0), norm)
    wrong += [f"every gradient of {component} is zero" for component, norm in largest.items() if norm == 0.0]
    if wrong:
        raise TrainabilityError(f"Gradients did not reach exactly what the stage trains: {_listed(wrong)}.")


def trainability_table(model: nn.Module) -> list[ComponentRow]:
    """Trainable and frozen parameters of each component, in the model's order."""
    counts: dict[str, tuple[int, int, set[str]]] = {}
    for component, _, parameter in components(model):
        trainable, frozen, dtypes = counts.get(component, (0, 0, set()))
        size = parameter_count(parameter)
        dtypes.add(str(parameter.dtype).removeprefix("torch."))
        moves = parameter.requires_grad
        counts[component] = (trainable + size * moves, frozen + size * (not moves), dtypes)
    return [ComponentRow(name, on, off, "/".join(sorted(kinds))) for name, (on, off, kinds) in counts.items()]


def format_table(rows: Iterable[ComponentRow]) -> str:
    """The table as text, with a total."""
    rows = list(rows)
    total = ComponentRow("total", sum(row.trainable for row in rows), sum(row.frozen for row in rows), "")
    lines = [f"{'component':<16}{'trainable':>16}{'frozen':>16}  dtype"]
    lines += [f"{row.component:<16}{row.trainable:>16,}{row.frozen:>16,}  {row.dtype}" for row in [*rows, total]]
    return "\n".join(line.rstrip() for line in lines)


def components(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(component, name without wrappers, parameter) of every parameter; a tied one comes once."""
    for name, parameter in model.named_parameters():
        bare = strip_wrappers(name)
        yield _component(bare), bare, parameter


def _component(name: str) -> str:
    if name.endswith(".rows"):
        return "vocabulary_rows"
    return "lora" if ".lora_" in name else name.split(".", 1)[0]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name without wrappers → parameter, for those that move."""
    return {name: parameter for _, name, parameter in components(model) if parameter.requires_grad}


def strip_wrappers(name: str) -> str:
    """A parameter's name without what DDP, compilation and the outer class put before it."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in _WRAPPERS:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    return name


def _component_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if name in ("module", "_orig_mod", "model"):
            yield from _component_modules(child)
        else:
            yield name, child


def _owner(model: nn.Module, component_name: str) -> nn.Module:
    """The module that holds a parameter, by the parameter's bare name."""
    for name, module in model.named_modules():
        if strip_wrappers(name + ".").removesuffix(".") == component_name.rpartition(".")[0]:
            return module
    raise TrainabilityError(f"The module of the parameter {component_name} can't be found.")


def _norm(gradient: Tensor) -> float:
    norm = gradient.detach().float().norm()
    full = getattr(norm, "full_tensor", None)  # a sharded gradient (FSDP2) sums over its ranks
    return float(full() if full is not None else norm)


def _listed(items: list[str]) -> str:
    return "; ".join(items[:8]) + (f"; and {len(items) - 8} more" if len(items) > 8 else "")

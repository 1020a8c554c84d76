"""What a run is about: the model it builds, the add-on it writes, its data, its plan, what it measures.

`train_utils` knows how to train: steps, ranks, checkpoints, signals. A recipe knows what: there is one for the
connector (`connector_recipe`) and one for the vocabulary rows (`rows_recipe`); `RECIPES` says which stage has which.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from qwen3_vlm.config import RunConfig
from qwen3_vlm.data.collate import Batch
from qwen3_vlm.data.encode import SkippedRecord
from qwen3_vlm.train.checkpoint import whole
from qwen3_vlm.train.step_plan import RankStep

if TYPE_CHECKING:
    from qwen3_vlm.train.text_anchor import TextAnchor


class RunData(Protocol):
    """The data of a run, opened."""

    fingerprint: str

    @property
    def num_train(self) -> int:
        """Samples that an epoch has."""

    def counts(self) -> dict[str, Any]:
        """What the add-on's description says of the data; `train_samples` and `eval_samples` among it."""

    def unusable(self) -> list[SkippedRecord]:
        """Records that were found bad before training."""

    def train_batches(self, micro_batches: Sequence[Any]) -> Iterator[Batch]:
        """These micro-batches of the plan, in order."""


class Plan(Protocol):
    """The optimizer steps of a run."""

    total: int

    def epochs_from(self, step: int) -> Iterator[list[RankStep]]:
        """The steps that follow the first `step` ones, some at a time."""


class RunEvaluations(Protocol):
    """What is measured; each is collective over the ranks."""

    def quick(self) -> dict[str, Any]:
        """Loss on a fixed small sample; empty where nothing is held out."""

    def full(self) -> dict[str, Any]:
        """Loss on everything held out."""

    def gates(self) -> dict[str, Any]:
        """Sections of evidence.json, "gates" among them, and "summary" for metrics.jsonl; empty on an idle rank."""

    def golden(self, step: int) -> dict[str, Any]:
        """Decode the golden set, keep the dump of this step, and return its scores."""


class Recipe(ABC):
    """See the module.

    Args:
        folder: of the run.
    """

    add_on: ClassVar[str]  # what the add-on is called, and its folder in the run
    data_section: ClassVar[str]  # of the config: where the data is described
    start_from: str | None  # the add-on that the run begins with

    def __init__(self, config: RunConfig, accelerator: Accelerator, folder: Path) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, folder

    @abstractmethod
    def check(self) -> None:
        """Refuse what can be refused before anything large is loaded."""

    @abstractmethod
    def build(self) -> Any:
        """The model with a fresh add-on; the same on every rank."""

    @abstractmethod
    def describe(self, model: Any) -> None:
        """Take down what the add-on belongs to; once, before training."""

    @abstractmethod
    def open_data(self, model: Any, cache_dir: Path) -> Any:
        """Open the data; the main process comes here first."""

    @abstractmethod
    def plan(self, data: Any, *, ranks: int, rank: int) -> Plan:
        """The steps of this rank."""

    @abstractmethod
    def check_model(self, model: Any) -> None:
        """Refuse a model that can't be trained as the config says."""

    @abstractmethod
    def evaluations(self, model: Any, data: Any) -> RunEvaluations:
        """What is measured on this model; `model` is without DDP's wrapper."""

    @abstractmethod
    def parameters(self, model: Any) -> Mapping[str, nn.Parameter]:
        """The add-on: name in its file → parameter."""

    @abstractmethod
    def load(self, directory: Path, model: Any) -> None:
        """Put a saved add-on into the model, strictly."""

    @abstractmethod
    def write(
        self,
        folder: Path,
        model: Any,
        tensors: Mapping[str, Tensor],
        evidence: Mapping[str, Any],
        details: Mapping[str, Any],
    ) -> None:
        """The add-on's files, in a folder whose atomicity is the caller's."""

    def tensors(self, model: Any) -> dict[str, Tensor]:
        """The add-on's tensors, whole and on the CPU; collective under FSDP."""
        return {name: whole(parameter) for name, parameter in self.parameters(model).items()}

    def settle(self, model: Any) -> None:
        """After the last step, before it is measured and saved: make of the model what will be shipped."""
        return

    def parameter_groups(self, model: Any) -> list[dict[str, Any]]:
        """For the optimizer; `scale` is what a group's learning rate is multiplied with."""
        return [{"params": list(self.parameters(model).values()), "scale": 1.0}]

    def loss_options(self) -> dict[str, float]:
        """What the model's forward pass is told of the loss, beside the batch."""
        return {}

    def text_anchor(self, model: Any) -> "TextAnchor | None":
        """What holds text at the base in the loss, where the stage has that; `model` is without DDP's wrapper."""
        return None

    def figures(self, model: Any) -> dict[str, float]:
        """More figures for a line of metrics.jsonl; collective under FSDP."""
        return {}


RECIPES = {
    "stage1_align": ("qwen3_vlm.train.connector_recipe", "ConnectorRecipe"),
    "stage2_sft": ("qwen3_vlm.train.sft_recipe", "InstructionRecipe"),
    "stage3_rows": ("qwen3_vlm.train.rows_recipe", "RowsRecipe"),
    "stage4_mmpt": ("qwen3_vlm.train.mmpt_recipe", "PretrainingRecipe"),
}
FULL_TRUNK = ("qwen3_vlm.train.trunk_recipe", "TrunkRecipe")


def make_recipe(config: RunConfig, accelerator: Accelerator, folder: Path) -> Recipe:
    """The recipe of the config's stage; there is another one where the whole decoder trains."""
    module, name = FULL_TRUNK if config.trunk.training == "full" else RECIPES[config.stage]
    made: Recipe = getattr(importlib.import_module(module), name)(config, accelerator, folder)
    return made

"""The sweep: one folder per point, ranked by loss minus weighted gaps, finished runs kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_vlm.config import RunConfig, parse_config, to_dict
from qwen3_vlm.errors import DivergenceError, ModelError
from qwen3_vlm.storage import atomic_write_json
from qwen3_vlm.train import sweep as module
from qwen3_vlm.train.train_utils import TrainResult

# learning rate, vision_ln → eval loss, Δshuffle, Δzero
FIGURES = {(1e-4, False): (1.0, 0.5, 0.5), (1e-4, True): (0.95, 0.1, 0.1), (1e-3, False): (1.2, 0.9, 0.9)}


class Trainer:
    """Stands in for train(): writes result.json as it does; diverges where FIGURES has nothing."""

    def __init__(self) -> None:
        self.trained: list[tuple[float, bool]] = []
        self.stop_after: int | None = None

    def __call__(self, config: RunConfig, *, cache_dir: Path | None = None) -> TrainResult:
        point = (config.optim.learning_rate, config.model.vision_ln)
        folder = Path(config.output_dir)
        if self.stop_after is not None and len(self.trained) >= self.stop_after:
            return TrainResult(folder, 1)
        self.trained.append(point)
        if point not in FIGURES:
            raise DivergenceError("At step 3 nothing was finite.")
        loss, shuffled, zero = FIGURES[point]
        values = {"correct": loss, "shuffled": loss + shuffled, "zero": loss + zero, "noise": loss + 1}
        ablation = {"losses": {name: {"value": value} for name, value in values.items()}, "passed": True}
        evidence: dict[str, Any] = {"eval": {"loss": loss}, "ablation": ablation}
        atomic_write_json(folder / "result.json", {"config": to_dict(config), "evidence": evidence})
        return TrainResult(folder, 10, evidence=evidence, add_on_dir=folder)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    trainer = Trainer()
    monkeypatch.setattr(module, "train", trainer)
    return trainer


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    sweep = {"learning_rates": [1e-4, 1e-3], "vision_ln": [False, True]}
    return parse_config({"output_dir": str(tmp_path), "sweep": sweep, "optim": {"min_learning_rate": 5e-5}})


def test_ranks_by_loss_minus_weighted_gaps(trainer: Trainer, config: RunConfig, tmp_path: Path) -> None:
    result = module.sweep(config)
    assert [(run.learning_rate, run.vision_ln) for run in result.runs] == [
        (1e-4, False),  # 1.0 − 0.1 · 1.0 = 0.9
        (1e-4, True),  # 0.95 − 0.1 · 0.2 = 0.93
        (1e-3, False),  # 1.2 − 0.1 · 1.8 = 1.02
        (1e-3, True),  # diverged
    ]
    assert [run.score for run in result.runs[:3]] == pytest.approx([0.9, 0.93, 1.02])
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert [run["name"] for run in written["runs"]] == [run.name for run in result.runs]
    assert written["finished"]
    table = str(result).splitlines()
    assert len(table) == 5
    assert "diverged" in table[-1]
    assert len({run.name for run in result.runs}) == 4


def test_finished_runs_are_not_repeated(trainer: Trainer, config: RunConfig) -> None:
    trainer.stop_after = 2
    first = module.sweep(config)
    assert not first.finished
    assert "goes on" in str(first)
    trainer.stop_after = None
    second = module.sweep(config)
    assert second.finished
    assert len(trainer.trained) == 4
    assert len(set(trainer.trained)) == 4


def test_another_config_is_another_run(trainer: Trainer, config: RunConfig) -> None:
    module.sweep(config)
    count = len(trainer.trained)
    module.sweep(parse_config(to_dict(config), ["seed=1"]))
    assert len(trainer.trained) == 2 * count


def test_other_errors_end_the_sweep(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> TrainResult:
        raise ModelError("The gradient norm layer of model x lacks tensors.")

    monkeypatch.setattr(module, "train", fail)
    with pytest.raises(ModelError, match="lacks tensors"):
        module.sweep(config)

"""Checkpoints are whole, newest first, exact, and refused when they belong to another run."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_vlm.config import RunConfig, parse_config, to_dict
from qwen3_vlm.errors import CheckpointError
from qwen3_vlm.train.add_ons import write_connector
from qwen3_vlm.train.checkpoint import (
    Checkpoints,
    SavedState,
    optimizer_tensors,
    require_same_run,
    restore_optimizer,
    restore_rng,
    rng_state,
    run_identity,
)
from qwen3_vlm.train.identity import describe_bases
from qwen3_vlm.train.stages import STAGES, apply_stage, trainable_parameters


class Fixture:
    """A tiny model, its optimizer after two steps, and a folder for checkpoints."""

    def __init__(self, vlm: tuple[Any, Any], llm: Path, tower: Path, folder: Path) -> None:
        self.model, processor = vlm
        apply_stage(self.model, STAGES["stage1_align"])
        self.bases = describe_bases(llm, tower, processor)
        self.optimizer = self.make_optimizer(self.model)
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=2)
        self.update()
        self.update()

    @staticmethod
    def make_optimizer(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(trainable_parameters(model).values()), lr=0.1, fused=True)

    def update(self) -> None:
        generator = torch.Generator().manual_seed(1)
        for parameter in trainable_parameters(self.model).values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()

    def save(self, step: int) -> Path:
        values = {"identity": {"seed": 0}}
        tensors = optimizer_tensors(self.model, self.optimizer)
        return self.checkpoints.save(
            step, values, tensors, lambda folder: write_connector(folder, self.model, self.bases)
        )


@pytest.fixture
def saved(tiny_vlm: tuple[Any, Any], tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path: Path) -> Fixture:
    return Fixture(tiny_vlm, tiny_llm_dir, tiny_tower_dir, tmp_path)


def test_newest_and_old_ones_removed(saved: Fixture) -> None:
    assert saved.checkpoints.newest() is None
    for step in (5, 10, 1_000_000):
        saved.save(step)
    newest = saved.checkpoints.newest()
    assert newest is not None
    assert newest.step == 1_000_000
    assert sorted(path.name for path in saved.checkpoints.folder.iterdir()) == ["step-000010", "step-1000000"]


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "connector.safetensors", "connector.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_torn_checkpoints_are_passed_over(saved: Fixture, name: str, damage: str) -> None:
    saved.save(1)
    path = saved.save(2) / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else content[:-9] + b"#" + content[-8:])
    warnings: list[str] = []
    newest = saved.checkpoints.newest(warnings.append)
    assert newest is not None
    assert newest.step == 1
    assert len(warnings) == 1


def test_all_torn_is_an_error_not_a_fresh_start(saved: Fixture) -> None:
    (saved.save(1) / "state.json").unlink()
    with pytest.raises(CheckpointError, match="resume=false"):
        saved.checkpoints.newest()


def test_leftovers_are_no_checkpoints(saved: Fixture) -> None:
    saved.checkpoints.folder.mkdir()
    (saved.checkpoints.folder / ".step-000009.1-ab.partial").mkdir()
    assert saved.checkpoints.newest() is None
    assert list(saved.checkpoints.folder.iterdir()) == []


def test_optimizer_goes_on_to_the_bit(saved: Fixture) -> None:
    saved.save(2)
    twin = copy.deepcopy(saved.model)
    newest = saved.checkpoints.newest()
    assert newest is not None
    other = Fixture.make_optimizer(twin)
    restore_optimizer(twin, other, newest)
    saved.update()
    saved.model, saved.optimizer, first = twin, other, saved.model
    saved.update()
    pairs = zip(first.connector_parameters().values(), twin.connector_parameters().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_optimizer_of_another_model_is_refused(saved: Fixture) -> None:
    saved.save(2)
    newest = saved.checkpoints.newest()
    assert newest is not None
    saved.model.model.projector.requires_grad_(False)
    with pytest.raises(CheckpointError, match="not the state of this model"):
        restore_optimizer(saved.model, Fixture.make_optimizer(saved.model), newest)


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


def test_random_states_survive_json() -> None:
    draws()
    random.gauss(0, 1)
    state = json.loads(json.dumps(rng_state()))
    expected = [draws(), random.gauss(0, 1)]
    draws()
    restore_rng(state)
    assert [draws(), random.gauss(0, 1)] == expected


@pytest.mark.parametrize("broken", [{}, {"python": [3, [1], None]}, {"python": 1}])
def test_broken_random_states_are_a_sentence(broken: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="random states"):
        restore_rng(broken)


def test_run_identity_ignores_what_does_not_matter() -> None:
    def identity(*overrides: str, ranks: int = 1, data: str = "d") -> dict[str, Any]:
        return run_identity(to_dict(parse_config({}, overrides)), ranks, data)

    base = identity()
    for free in ("output_dir=elsewhere", "data.num_workers=7", "eval.quick_every=9", "model.llm=moved", "save_every=5"):
        assert identity(free) == base
    assert identity("optim.accumulation=2", ranks=2) == base
    for fixed in ("seed=3", "optim.epochs=2", "data.packing=false", "model.vision_ln=true", "optim.accumulation=8"):
        assert identity(fixed) != base
    assert identity(data="e") != base


def test_token_folders_may_move_and_tasks_may_not_change_theirs() -> None:
    def identity(folders: list[str], own: list[str]) -> dict[str, Any]:
        tasks = {"i2t": {"folders": own}, "a2t": {}}
        tree = {"stage": "stage3_rows", "tokens": {"folders": folders, "tasks": tasks}}
        return run_identity(to_dict(parse_config(tree)), 1, "d")

    base = identity(["one", "two"], ["two"])
    assert identity(["moved/one", "moved/two"], ["moved/two"]) == base
    assert identity(["one", "two"], ["one"]) != base
    assert identity(["one", "two"], []) != base


@pytest.mark.parametrize("stage", ["stage1_align", "stage2_sft", "stage3_rows", "stage4_mmpt"])
def test_a_checkpoint_from_before_a_setting_was_there(stage: str, tmp_path: Path) -> None:
    now = json.loads(json.dumps(run_identity(to_dict(parse_config({"stage": stage})), 1, "d")))
    later = ("model.quantization", "lora.kl_weight", "text.share", "text.loss_weight")
    then = json.loads(json.dumps({key: value for key, value in now.items() if key not in later}))
    for task in then.get("tokens.tasks", {}).values():
        del task["folders"]
    saved = SavedState(tmp_path, 1, {"identity": then})
    require_same_run(saved, now)
    with pytest.raises(CheckpointError, match=r"model\.quantization: None in the checkpoint, 'nf4' now"):
        require_same_run(saved, {**now, "model.quantization": "nf4"})


def test_each_difference_has_a_line(tmp_path: Path) -> None:
    config = to_dict(RunConfig())
    then = run_identity(config, 1, "d")
    now = run_identity({**config, "seed": 5}, 2, "d")
    with pytest.raises(CheckpointError) as caught:
        require_same_run(SavedState(tmp_path, 1, {"identity": then}), now)
    assert len(str(caught.value).splitlines()) == 4  # what, two differences, advice

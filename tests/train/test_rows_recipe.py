"""What a recipe of rows refuses before anything is trained, and what it tells the trainer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from qwen3_vlm.data.token_batches import TokenRecords
from qwen3_vlm.errors import AddOnError, CheckpointError, ConfigError, DataError, ModelError, RecordError
from qwen3_vlm.folder_lock import FolderLock
from qwen3_vlm.generate.generation import fitting_grammar
from qwen3_vlm.generate.generation import run as generate_by
from qwen3_vlm.models.lora import add_lora, read_adapter, write_adapter
from qwen3_vlm.models.modes import evaluation_mode
from qwen3_vlm.models.row_files import find_rows
from qwen3_vlm.train import train_utils
from qwen3_vlm.train.checkpoint import SavedState, require_same_run, rng_state
from qwen3_vlm.train.lora_stage import refuse_adapter
from qwen3_vlm.train.recipe import make_recipe
from qwen3_vlm.train.run import make_accelerator
from qwen3_vlm.train.token_evaluations import GOLDEN
from qwen3_vlm.train.train_utils import start_run, train
from tests.models.grown import grow, make_base
from tests.tiny import save_tiny_llm
from tests.train.tiny_token_run import save_dataset, token_config


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("tokens"), count=20)


def test_smoothing_and_z_loss_reach_the_loss(dataset: Path, tmp_path: Path) -> None:
    """The first step's loss with them is that of the model asked by hand, and not the loss without them."""
    once: dict[str, Any] = {"optim__max_steps": 1, "save_every": 9, "optim__accumulation": 1}
    losses = {}
    for z_loss, smoothing in ((0.0, 0.0), (0.01, 0.0), (0.0, 0.2)):
        with FolderLock() as lock:
            run = start_run(
                token_config(
                    tmp_path / f"{z_loss}-{smoothing}",
                    dataset,
                    **once,
                    rows__z_loss=z_loss,
                    rows__label_smoothing=smoothing,
                ),
                lock,
            )
            (step,) = next(run.plan.epochs_from(0))
            (batch,) = run.data.train_batches(step.micro_batches)
            given = run.model(**batch.inputs, label_smoothing=smoothing, z_loss=z_loss).loss.detach()
            total, _ = train_utils._accumulate(run, [batch.inputs], batch.num_label_tokens)
            run.log.close()
        assert total == pytest.approx(float(given), abs=1e-5)
        losses[z_loss, smoothing] = total
    assert len({round(loss, 3) for loss in losses.values()}) == 3, losses


def test_terms_that_a_family_can_not_have_are_refused(dataset: Path, tmp_path: Path) -> None:
    config = token_config(tmp_path / "run", dataset, rows__z_loss=0.1)
    recipe = make_recipe(config, make_accelerator(config)[0], tmp_path)
    recipe.check_model(grow(make_base("qwen3")))
    with pytest.raises(ConfigError, match=r"final_logit_softcapping.*rows\.z_loss can't be used"):
        recipe.check_model(grow(make_base("gemma2")))


@pytest.mark.parametrize("stage", ["stage3_rows", "stage4_mmpt"])
def test_answers_are_generated_without_dropout(dataset: Path, tmp_path: Path, stage: str) -> None:
    """Dropout and checkpointing are on in training: the answers are those of eval mode, no random number is drawn."""
    settings: dict[str, Any] = {"stage": stage, "model__gradient_checkpointing": True}
    if stage == "stage4_mmpt":
        settings["lora__dropout"] = 0.5
    with FolderLock() as lock:
        run = start_run(token_config(tmp_path / "run", dataset, **settings), lock)
        run.log.close()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.recipe.parameters(run.model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    evaluations: Any = run.evaluations
    prompts = [("t2i", {"text": np.arange(5, 9 + number)}) for number in range(3)]
    modes, before = [module.training for module in run.model.modules()], rng_state()
    found = evaluations.generator(GOLDEN)(prompts)
    assert rng_state() == before
    assert [module.training for module in run.model.modules()] == modes
    with evaluation_mode(run.model):
        grammar = fitting_grammar(run.model, prompts)
        assert torch.equal(found, generate_by(run.model, prompts, grammar, GOLDEN, [0, 1, 2]))


def test_refused_before_anything_is_loaded(dataset: Path, tmp_path: Path) -> None:
    """Another tokenizer of the same size; the same data under two names; sequences beyond the base's positions."""
    llm = save_tiny_llm(tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    tokenizer.save_pretrained(llm)
    with pytest.raises(ModelError, match="not the one that the token space was built with"):
        train(token_config(tmp_path / "run", dataset, model__llm=str(llm)))
    (tmp_path / "again").symlink_to(dataset)
    for second in (dataset, tmp_path / "again"):
        with pytest.raises(DataError, match="the same data twice"):
            train(token_config(tmp_path / "run", dataset, tokens__folders=[str(dataset), str(second)]))
    short = save_tiny_llm(tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 20}
    (short / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"short reads 20\. Set tokens\.max_seq_len"):
        train(token_config(tmp_path / "run", dataset, model__llm=str(short)))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_too_many_bad_records_go_by_the_section_of_tokens(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(self: Any, index: int) -> Any:
        raise RecordError("damaged", "damaged")

    config = token_config(tmp_path / "run", dataset, tokens__max_bad_fraction=0.3, optim__max_steps=50)
    monkeypatch.setattr(TokenRecords, "__getitem__", damaged)
    with pytest.raises(DataError, match=r"tokens\.max_bad_fraction allows 0\.3"):
        train(config)


def test_an_adapter_is_not_lost_on_the_way(tmp_path: Path) -> None:
    """A stage without an adapter refuses one; another alpha ÷ rank makes other updates of the same weights."""
    model, other = grow(make_base()), grow(make_base())
    add_lora(model.language_model, rank=2, alpha=4)
    write_adapter(tmp_path, model.language_model, "model", "base")
    with pytest.raises(AddOnError, match="go on from it with stage4_mmpt"):
        refuse_adapter(tmp_path, other, "stage3_rows", instead="stage4_mmpt")
    refuse_adapter(tmp_path, model, "stage4_mmpt", instead="stage4_mmpt")
    add_lora(other.language_model, rank=2, alpha=8)
    with pytest.raises(AddOnError, match=r"alpha ÷ rank is 2 in adapter_config\.json, and 4 here"):
        read_adapter(tmp_path, other.language_model, "model")


def test_the_order_of_tasks_is_part_of_a_run(tmp_path: Path) -> None:
    """It decides which task a step's odd sample goes to; state.json keeps it."""
    then = {"tokens.tasks": {"i2t": {"weight": 1.0, "folders": []}, "a2t": {"weight": 1.0, "folders": []}}}
    saved = SavedState(tmp_path, 3, {"identity": json.loads(json.dumps(then))})
    require_same_run(saved, then)
    with pytest.raises(CheckpointError, match=r"tokens\.tasks"):
        require_same_run(saved, {"tokens.tasks": dict(reversed(then["tokens.tasks"].items()))})


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    """A run's folder given for the rows in it, or a connector's."""
    (tmp_path / "rows").mkdir()
    with pytest.raises(AddOnError, match=r"no trainable-rows folder: it has no trainable_rows\.json\.$"):
        find_rows(tmp_path)
    (tmp_path / "rows" / "trainable_rows.json").write_text("{}")
    with pytest.raises(AddOnError, match=r"Of this run they are in .*rows"):
        find_rows(tmp_path)

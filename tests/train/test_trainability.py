"""What each of the four stages trains, counted by hand, and what gradients reach in its first step."""

from pathlib import Path
from typing import Any

import pytest

from qwen3_vlm.errors import TrainabilityError
from qwen3_vlm.folder_lock import FolderLock
from qwen3_vlm.models.lora import add_lora
from qwen3_vlm.train import train_utils
from qwen3_vlm.train.stages import STAGES, apply_stage, components, trainability_table
from tests.train.tiny_run import tiny_config, write_records
from tests.train.tiny_talks import write_conversations
from tests.train.tiny_token_run import save_dataset, token_config

# Width 32, 4 heads of 8, 2 of them for keys and values, 64 inside the MLP, two layers, 384 tied rows of vocabulary.
LLM = 384 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 8 + 3 * 32 * 64 + 2 * 32) + 32
# Rank 4 on q, k, v, o, gate, up, down: 4 × (inputs + outputs) each.
LORA = 2 * 4 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32) + 3 * (32 + 64))
DORA = LORA + 2 * (32 + 16 + 16 + 32 + 64 + 64 + 32)  # and a number for every output
# Width 24, 16 patches of 4 × 4 × 3, 48 inside the MLP, two layers.
TOWER = (48 * 24 + 24) + 16 * 24 + 2 * (4 * (24 * 24 + 24) + (24 * 48 + 48) + (48 * 24 + 24) + 4 * 24) + 2 * 24
# 4 latents of 16, two layers: attention with four biased products, feed-forward 16 → 64 → 16, two norms.
RESAMPLER = (24 * 16 + 16) + 4 * 16 + 2 * (4 * (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16) + 4 * 16)
PROJECTOR = (16 * 32 + 32) + (32 * 32 + 32)
ROWS = 192 * 32  # new ids, tied

FROZEN = {"language_model": (0, LLM), "vision_tower": (0, TOWER)}
CONNECTOR = {"resampler": (RESAMPLER, 0), "projector": (PROJECTOR, 0)}
TABLES = {
    "stage1_align": FROZEN | CONNECTOR,
    "stage1_align with vision_ln": FROZEN | CONNECTOR | {"vision_ln": (48, 0)},
    "stage2_sft": FROZEN | CONNECTOR | {"lora": (LORA, 0)},
    "stage2_sft with dora": FROZEN | CONNECTOR | {"lora": (DORA, 0)},
    "stage3_rows": {"language_model": (0, LLM), "vocabulary_rows": (ROWS, 0)},
    "stage4_mmpt": {"language_model": (0, LLM), "vocabulary_rows": (ROWS, 0), "lora": (LORA, 0)},
    "stage4_mmpt with full": {"language_model": (LLM - 384 * 32, 384 * 32), "vocabulary_rows": (ROWS, 0)},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By stage."""
    folder = tmp_path_factory.mktemp("data")
    tokens = save_dataset(folder / "tokens", 30)
    captions, talks = write_records(folder / "captions", 12), write_conversations(folder / "talks", 12)
    return {"stage1_align": captions, "stage2_sft": talks, "stage3_rows": tokens, "stage4_mmpt": tokens}


@pytest.mark.parametrize("name", TABLES)
def test_what_trains_and_what_gradients_reach(
    name: str, data: dict[str, Path], tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path: Path
) -> None:
    stage, _, extra = name.partition(" with ")
    changes: dict[str, Any] = {"stage": stage}
    if extra == "full":
        changes["trunk__training"] = "full"
    elif stage in ("stage2_sft", "stage4_mmpt"):
        changes |= {"lora__rank": 4, "lora__dora": extra == "dora"}
    if stage in ("stage1_align", "stage2_sft"):
        changes |= {"model__vision_ln": extra == "vision_ln", "optim__accumulation": 8}
        config = tiny_config(tmp_path / "run", tiny_llm_dir, tiny_tower_dir, data[stage], **changes)
    else:
        config = token_config(tmp_path / "run", data[stage], **changes)
    with FolderLock() as lock:
        run = train_utils.start_run(config, lock)
        found = {row.component: (row.trainable, row.frozen) for row in trainability_table(run.model)}
        assert found == TABLES[name]
        trainable = {id(parameter) for parameter in run.model.parameters() if parameter.requires_grad}
        moved = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
        assert moved == trainable
        adapted = [name for component, name, _ in components(run.model) if component == "lora"]
        assert all(name.startswith("language_model.layers.") for name in adapted)
        (first, *_) = next(run.plan.epochs_from(0))
        assert not run.audited
        run.log.progress.start(0, run.plan.total)
        train_utils._train_step(run, first, list(run.data.train_batches(first.micro_batches)), stop=False)
        assert run.audited
        run.log.close()


def test_an_adapter_on_the_tower_is_refused(tiny_vlm: Any) -> None:
    model, _ = tiny_vlm
    add_lora(model.model.language_model, rank=4, alpha=8)
    add_lora(model.model.vision_tower, rank=4, alpha=8)
    with pytest.raises(TrainabilityError, match=r"vision_tower\..*lora_A.* is an adapter outside the language model"):
        apply_stage(model, STAGES["stage2_sft"])

"""Text that is mixed in, and the KL to the base in the loss: exact shares, any split, and less drift."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from qwen3_vlm.data.collate import Batch, Collator
from qwen3_vlm.data.encode import SampleEncoder
from qwen3_vlm.data.loader import BatchDataset
from qwen3_vlm.data.task_mixture import TaskSample
from qwen3_vlm.data.token_batches import TokenCollator
from qwen3_vlm.errors import ConfigError, DataError
from qwen3_vlm.models.lora import add_lora, lora_parameters
from qwen3_vlm.tokenization.sequences import TEXT, TokenSequence
from qwen3_vlm.train import train_utils
from qwen3_vlm.train.data_source import DataSource, open_data
from qwen3_vlm.train.lora_stage import anchor_text
from qwen3_vlm.train.stages import apply_stage, get_stage
from qwen3_vlm.train.step_plan import plan_steps
from qwen3_vlm.train.train_utils import train
from tests.models.grown import SPACE, grow, make_base, sequences
from tests.train.tiny_run import metrics, write_records
from tests.train.tiny_talks import Setting, write_texts
from tests.train.tiny_token_run import save_dataset, token_config


@pytest.fixture(scope="module")
def setting(tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_llm_dir, tiny_tower_dir, tmp_path_factory.mktemp("mix"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def mixed(setting: Setting, processor: Any, texts: Path, folder: Path, **changes: Any) -> tuple[Any, DataSource]:
    changes = {
        "text__files": [str(texts)],
        "text__share": 0.3,
        "lora__kl_weight": 1.0,
        "data__packing": True,
        **changes,
    }
    config = setting.config(folder, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    return config, open_data(config, processor, folder)


def test_each_epoch_has_the_share_and_each_text_comes_once_before_any_twice(
    setting: Setting, tiny_vlm: Any, texts: Path, tmp_path: Path
) -> None:
    config, data = mixed(setting, tiny_vlm[1], texts, tmp_path, optim__max_steps=None, optim__epochs=3)
    assert data.texts is not None
    seen: list[Counter[str]] = []
    plan = plan_steps(
        config, data.train.tokens(), data.train.indices, more=lambda epoch: data.texts.epoch(epoch, len(data.train))
    )
    for steps in plan.epochs_from(0):
        batches = data.train_batches([batch for step in steps for batch in step.micro_batches])
        seen.append(Counter(name for batch in batches for name in batch.sample_ids))
    pictures = [sum(count for name, count in epoch.items() if name.startswith("talk-")) for epoch in seen]
    mine = [sum(count for name, count in epoch.items() if name.startswith("text-")) for epoch in seen]
    assert pictures == [18] * 3
    assert mine == [8] * 3
    total = sum(seen, Counter())
    assert {total[f"text-{number}"] for number in range(6)} == {4}  # 24 draws of 6
    assert {total[name] for name in total if name.startswith("talk-")} == {3}
    assert data.counts() == {"train_samples": 18, "eval_samples": 6, "text_samples": 6}


def test_text_has_no_pictures_and_the_files_are_part_of_the_run(
    setting: Setting, tiny_vlm: Any, texts: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"16 of the records .* have pictures.*text.files is for text alone"):
        mixed(setting, tiny_vlm[1], setting.talks, tmp_path / "a")
    other = write_texts(tmp_path / "other", count=7)
    prints = {mixed(setting, tiny_vlm[1], path, tmp_path / "a")[1].fingerprint for path in (texts, other)}
    assert len(prints) == 2
    seen = {"data__train": [str(write_records(tmp_path / "seen"))], "text__files": [], "text__share": 0.1}
    with pytest.raises(DataError, match=r"lora\.kl_weight has no text to hold: each conversation has a picture"):
        mixed(setting, tiny_vlm[1], texts, tmp_path / "b", **seen)
    with pytest.raises(ConfigError, match="does not read the section text"):
        setting.config(tmp_path, stage="stage1_align", model__connector=None, text__share=0.5, lora__rank=16)


def micro_batches(data: DataSource, processor: Any, rows: list[Any], packing: bool) -> list[Batch]:
    """The records of `rows`; from 24 on they are texts."""
    from qwen3_vlm.data.captions import Records

    assert data.texts is not None
    records = Records(data.train.records.files + data.texts.part.records.files)
    collator = Collator(processor, packing=packing, max_image_pixels=10**6, mark_text=True)
    dataset = BatchDataset(records, SampleEncoder(processor, 200), collator, rows)
    return [dataset[number] for number in range(len(dataset))]


SPLITS: list[tuple[list[Any], bool]] = [
    ([((0,), (1,), (2,), (24,), (25,))], False),
    ([((0,), (2,)), ((1,),), ((24,),), ((25,),)], False),
    ([((0, 24, 1), (2, 25))], True),
    ([((25, 0), (2, 1)), ((24,),)], True),
]


def test_the_gradient_does_not_depend_on_the_split(
    setting: Setting, tiny_vlm: Any, texts: Path, tmp_path: Path
) -> None:
    model, processor = tiny_vlm
    config, data = mixed(setting, processor, texts, tmp_path, lora__kl_weight=3.0)
    trunk = model.model.language_model
    add_lora(trunk, rank=4, alpha=8, seed=1)
    for parameter in lora_parameters(trunk).values():
        parameter.data += 0.1
    apply_stage(model, get_stage("stage2_sft"))
    anchor = anchor_text(config, trunk, model.lm_head, model.config.text_config)
    found: list[tuple[dict[str, Tensor], float, float]] = []
    for rows, packing in SPLITS:
        model.zero_grad(set_to_none=True)
        batches = micro_batches(data, processor, rows, packing)
        labels, count = (
            sum(getattr(batch, name) for batch in batches) for name in ("num_label_tokens", "num_text_predictions")
        )
        recipe = SimpleNamespace(loss_options=dict)
        run: Any = SimpleNamespace(accelerator=Accelerator(cpu=True), wrapped=model, recipe=recipe, anchor=anchor)
        loss, sums = train_utils._accumulate(run, [batch.inputs for batch in batches], labels, count)
        gradients = {name: parameter.grad.clone() for name, parameter in lora_parameters(trunk).items()}
        found.append((gradients, loss, float(sums.text[0] / sums.text[1])))
    for gradients, loss, kl in found[1:]:
        assert loss == pytest.approx(found[0][1], rel=1e-5)
        assert kl == pytest.approx(found[0][2], rel=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][0][name], rtol=1e-4, atol=2e-6)
    assert found[0][2] > 0.01


def test_it_holds_text_at_the_base(setting: Setting, texts: Path, tmp_path: Path) -> None:
    """The same steps at a high rate, with and without the KL in the loss."""
    changes: dict[str, Any] = {"text__files": [str(texts)], "text__share": 0.5, "optim__learning_rate": 1e-2}
    changes |= {"eval__quick_every": 20, "save_every": 20, "eval__golden_samples": 1, "optim__accumulation": 2}
    drift = {}
    for weight in (0.0, 5.0):
        folder = tmp_path / str(weight)
        train(setting.config(folder, **changes, optim__max_steps=8, lora__kl_weight=weight))
        evidence = json.loads((folder / "connector" / "evidence.json").read_text())
        drift[weight] = evidence["text_drift"]["kl"]["value"]
        lines = [line for line in metrics(folder) if line["kind"] == "train"]
        assert [line.get("text_kl", -1.0) > 0 for line in lines] == [bool(weight)] * len(lines)
    assert drift[5.0] < 0.6 * drift[0.0]


def tokens_and_texts(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Shards, and the settings of stage 4 with half of its samples texts."""
    texts = folder / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"a small dog below {number} green trees"}) for number in range(5)))
    changes: dict[str, Any] = {"stage": "stage4_mmpt", "lora__rank": 4, "text__files": [str(texts)], "text__share": 0.5}
    return save_dataset(folder / "data", 30), changes | {"tokens__tasks": {"i2t": {}}}


def test_stage_4_reads_texts_beside_its_tasks(tmp_path: Path) -> None:
    """Texts are graded by themselves, and with the KL in the loss the adapter moves them less."""
    dataset, changes = tokens_and_texts(tmp_path)
    changes |= {"eval__quick_every": 20, "save_every": 20, "log_every": 6}
    drift = {}
    for weight in (0.0, 5.0):
        config = token_config(tmp_path / str(weight), dataset, **changes, lora__kl_weight=weight, optim__max_steps=6)
        assert train(config).evidence is not None
        folder = tmp_path / str(weight)
        drift[weight] = json.loads((folder / "rows" / "evidence.json").read_text())["text_drift"]["kl"]["value"]
        (line,) = [line for line in metrics(folder) if line["kind"] == "train"]
        assert line["loss_text"] > 0
        assert line["tokens_text"] > line["tokens_i2t"] > 0
        assert ("text_kl" in line) == bool(weight)
        info = json.loads((folder / "rows" / "trainable_rows.json").read_text())
        assert info["data"]["text_samples"] == 5
    assert drift[5.0] < 0.6 * drift[0.0]


def test_texts_of_no_weight_are_read_but_teach_nothing(tmp_path: Path) -> None:
    """The loss of a step is then the mean over its other tokens alone."""
    dataset, changes = tokens_and_texts(tmp_path)
    changes |= {"log_every": 1, "optim__max_steps": 1, "text__loss_weight": 0}
    train(token_config(tmp_path / "run", dataset, **changes))
    (line,) = [line for line in metrics(tmp_path / "run") if line["kind"] == "train"]
    assert line["supervised_tokens"] == line["tokens_i2t"]
    assert line["loss"] == pytest.approx(line["loss_i2t"], rel=1e-5)
    assert line["loss_text"] > 0


@pytest.mark.parametrize("weights", [{"i2t": 2.0, TEXT: 0.0}, {"i2t": 0.5, TEXT: 0.25}, {"i2t": 1.0, TEXT: 0.0}])
def test_the_loss_of_a_step_is_a_mean_of_the_tokens_that_count(weights: dict[str, float]) -> None:
    """Σ weight · −log p ÷ how many tokens have a weight above 0, in float64 from the scores; however it is split."""
    model = grow(make_base(tied=True)).train()
    texts = [TokenSequence.of_text(np.arange(start, start + 9, dtype=np.int32)) for start in (3, 20)]
    made = [*sequences(["i2t", "i2t"]), *texts]
    wanted, count = 0.0, 0
    with torch.no_grad():
        for sequence in made:
            ids, labels = (torch.from_numpy(part).long()[None] for part in (sequence.input_ids, sequence.labels))
            scores = model.eval()(ids).logits[0, :-1].double().log_softmax(-1)
            graded = labels[0, 1:] != -100
            weight = weights[sequence.task]
            wanted -= weight * float(scores[graded].gather(1, ids[0, 1:][graded, None]).sum())
            count += int(graded.sum()) * (weight > 0)
    collate = TokenCollator(SPACE, weights)
    run: Any = SimpleNamespace(
        accelerator=Accelerator(cpu=True), wrapped=model.train(), recipe=SimpleNamespace(loss_options=dict), anchor=None
    )
    for size in (1, 2, len(made)):
        parts = [made[start : start + size] for start in range(0, len(made), size)]
        batches = [collate(part, [TaskSample(part[0].task, 0, 0)] * len(part), [""] * len(part)) for part in parts]
        assert sum(batch.num_label_tokens for batch in batches) == count
        loss, _ = train_utils._accumulate(run, [batch.inputs for batch in batches], count)
        assert loss == pytest.approx(wanted / count, rel=1e-5)


def test_a_step_of_texts_without_weight_still_holds_them(tmp_path: Path) -> None:
    """There is nothing to take the mean of, and the KL is in the loss all the same."""
    dataset, changes = tokens_and_texts(tmp_path)
    changes |= {"log_every": 1, "optim__max_steps": 3, "optim__learning_rate": 1e-2, "lora__kl_weight": 5.0}
    changes |= {"text__loss_weight": 0, "text__share": 0.8, "optim__batch_size": 1, "optim__accumulation": 2}
    train(token_config(tmp_path / "run", dataset, **changes))
    lines = [line for line in metrics(tmp_path / "run") if line["kind"] == "train"]
    assert [line["supervised_tokens"] > 0 for line in lines] == [False, True, False]
    assert min(lines[2]["text_kl"], lines[2]["grad_norm"]) > 0

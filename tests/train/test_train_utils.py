"""The training step against a formula written out, and whole runs on tiny bases."""

import copy
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from qwen3_vlm.config import OptimConfig
from qwen3_vlm.data.captions import open_records
from qwen3_vlm.data.collate import Collator
from qwen3_vlm.data.encode import SampleEncoder
from qwen3_vlm.data.loader import BatchDataset
from qwen3_vlm.errors import CheckpointError, DataError, DivergenceError, StorageError
from qwen3_vlm.train import train_utils
from qwen3_vlm.train.stages import apply_stage, audit_gradients, get_stage
from qwen3_vlm.train.train_utils import learning_rate, train
from tests.train.tiny_run import final_bytes, metrics, tiny_config, write_records

SAMPLES = 6


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"))


class Bases:
    """The arguments of `tiny_config` that stay the same."""

    def __init__(self, llm: Path, tower: Path, records: Path) -> None:
        self.arguments = (llm, tower, records)

    def config(self, folder: Path, **overrides: Any) -> Any:
        return tiny_config(folder, *self.arguments, **overrides)


@pytest.fixture
def bases(tiny_llm_dir: Path, tiny_tower_dir: Path, records: Path) -> Bases:
    return Bases(tiny_llm_dir, tiny_tower_dir, records)


def batches(processor: Any, records: Path, rows: Sequence[tuple[tuple[int, ...], ...]], packing: bool) -> list[Any]:
    opened = open_records([str(records)])
    collator = Collator(processor, packing=packing, max_image_pixels=10**6)
    dataset = BatchDataset(opened, SampleEncoder(processor, 96), collator, rows)
    return [dataset[number] for number in range(len(dataset))]


def gradients(vlm: tuple[Any, Any], records: Path, rows: Sequence[Any], packing: bool) -> dict[str, Tensor]:
    """What `_accumulate` leaves in `.grad`, for one way to split the samples into micro-batches."""
    model, processor = vlm
    apply_stage(model, get_stage("stage1_align"))
    model.zero_grad(set_to_none=True)
    micro_batches = batches(processor, records, rows, packing)
    labels = sum(batch.num_label_tokens for batch in micro_batches)
    recipe = SimpleNamespace(loss_options=dict)
    run: Any = SimpleNamespace(accelerator=Accelerator(cpu=True), wrapped=model, recipe=recipe, anchor=None)
    train_utils._accumulate(run, [batch.inputs for batch in micro_batches], labels)
    return {name: parameter.grad.clone() for name, parameter in model.connector_parameters().items()}


def reference_gradients(vlm: tuple[Any, Any], records: Path) -> dict[str, Tensor]:
    """In float64, sample by sample: summed cross entropy of shifted logits ÷ all graded tokens."""
    model, processor = vlm
    model = copy.deepcopy(model).double().eval()
    samples = batches(processor, records, [((index,),) for index in range(SAMPLES)], packing=False)
    losses, count = [], 0
    for sample in samples:
        inputs = dict(sample.inputs)
        labels = inputs.pop("labels")[:, 1:]
        inputs["pixel_values"] = inputs["pixel_values"].double()
        logits = model(**inputs).logits[:, :-1]
        losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    (torch.stack(losses).sum() / count).backward()
    return {name: parameter.grad for name, parameter in model.connector_parameters().items()}


SPLITS: dict[str, tuple[list[Any], bool]] = {
    "one padded batch": ([tuple((index,) for index in range(SAMPLES))], False),
    "one sample at a time": ([((index,),) for index in range(SAMPLES)], False),
    "uneven": ([((0,), (1,), (2,), (3,)), ((4,), (5,))], False),
    "packed in one row": ([((0, 1),), ((2, 3), (4, 5))], True),
    "packed, another way": ([((5, 0), (1,)), ((3, 2),), ((4,),)], True),
}


@pytest.mark.parametrize("split", SPLITS)
def test_gradient_does_not_depend_on_the_split(tiny_vlm: tuple[Any, Any], records: Path, split: str) -> None:
    expected = reference_gradients(tiny_vlm, records)
    found = gradients(tiny_vlm, records, *SPLITS[split])
    for name, gradient in found.items():
        scale = float(expected[name].abs().max()) + 1e-3
        assert float((gradient - expected[name]).abs().max()) / scale < 1e-5, name  # float32 against float64


def test_splits_agree_to_1e_6(tiny_vlm: tuple[Any, Any], records: Path) -> None:
    found = [gradients(tiny_vlm, records, *split) for split in SPLITS.values()]
    scale = max(float(gradient.abs().max()) for gradient in found[0].values())
    for other in found[1:]:
        for name, gradient in other.items():
            assert float((gradient - found[0][name]).abs().max()) / scale < 1e-6, name


def sample_losses(vlm: tuple[Any, Any], records: Path, rows: Sequence[Any], packing: bool) -> dict[str, float]:
    """Sample id → summed loss of its tokens."""
    model, processor = vlm
    found: dict[str, float] = {}
    for batch in batches(processor, records, rows, packing):
        losses = model.eval().token_losses(**batch.inputs)
        for name, (row, start, stop) in zip(batch.sample_ids, batch.spans, strict=True):
            inside = (losses.row == row) & (losses.position >= start) & (losses.position < stop - 1)
            found[name] = float(losses.loss[inside].sum())
    return found


@pytest.mark.parametrize("split", [name for name in SPLITS if "one sample" not in name])
def test_a_sample_loses_the_same_wherever_it_stands(tiny_vlm: tuple[Any, Any], records: Path, split: str) -> None:
    """Packed or padded, beside whichever others: as if it stood alone, to 1e-5 per token."""
    alone = sample_losses(tiny_vlm, records, *SPLITS["one sample at a time"])
    found = sample_losses(tiny_vlm, records, *SPLITS[split])
    assert found.keys() == alone.keys()
    assert all(found[name] == pytest.approx(alone[name], rel=1e-5) for name in alone)


def test_audit_after_a_real_backward(tiny_vlm: tuple[Any, Any], records: Path) -> None:
    model, _ = tiny_vlm
    gradients(tiny_vlm, records, *SPLITS["packed in one row"])
    audit_gradients(model, get_stage("stage1_align"))


def test_learning_rate_is_warm_up_and_cosine() -> None:
    optim = OptimConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_ratio=0.1)
    rates = [learning_rate(step, 100, optim) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[55] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2)
    assert rates[99] == pytest.approx(0.1, abs=1e-3)
    assert learning_rate(0, 1, OptimConfig(learning_rate=1.0, warmup_ratio=0.0)) == 1.0


@pytest.fixture(scope="module")
def whole_run(
    tiny_llm_dir: Path, tiny_tower_dir: Path, records: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An uninterrupted run, for all tests that only look at it."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(tiny_config(folder, tiny_llm_dir, tiny_tower_dir, records, tensorboard=True))
    return folder


def test_run_folder(whole_run: Path) -> None:
    expected = "config.yaml environment.json split.json metrics.jsonl report.html result.json".split()  # noqa: SIM905
    assert all((whole_run / name).is_file() for name in expected)
    assert sorted(path.name for path in (whole_run / "connector").iterdir()) == [
        "connector.json",
        "connector.safetensors",
        "evidence.json",
    ]
    assert [path.name for path in sorted((whole_run / "checkpoints").iterdir())] == ["step-000006", "step-000008"]
    assert sorted(path.stem for path in (whole_run / "golden").glob("step-*")) == [
        "step-000003",
        "step-000006",
        "step-000008",
    ]
    assert any((whole_run / "tensorboard").iterdir())


def test_metrics_lines(whole_run: Path) -> None:
    lines = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    kinds = [(line["kind"], line["step"]) for line in lines]
    assert kinds == [
        ("train", 2),
        ("train", 4),
        ("quick_eval", 4),
        ("train", 6),
        ("train", 8),
        ("quick_eval", 8),
        ("eval", 8),
        ("ablation", 8),
        ("final", 8),
    ]
    first = lines[0]
    assert first["tokens"] > first["supervised_tokens"] > 0
    assert lines[3]["loss"] < lines[0]["loss"]
    assert lines[-1]["trainable_parameters"] == 8_624


def test_evidence_names_gates_and_figures(whole_run: Path) -> None:
    evidence = json.loads((whole_run / "connector" / "evidence.json").read_text())
    assert evidence["format"] == 1
    assert {gate["name"].split()[0] for gate in evidence["gates"]} == {"shuffled", "zero", "noise"}
    assert evidence["eval"]["samples"] == 8
    assert evidence["golden"]["n"] == 2


class Killed(BaseException):
    """Nothing in the package may catch this, like a power cut."""


@pytest.mark.parametrize("step", [1, 4, 7])
def test_resume_is_exact(
    bases: Bases, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config = bases.config(tmp_path / "run")
    original = train_utils._update

    def killed_at(run: Any, *args: Any, **kwargs: Any) -> float:
        if run.step == step:
            raise Killed
        return original(run, *args, **kwargs)

    monkeypatch.setattr(train_utils, "_update", killed_at)
    with pytest.raises(Killed):
        train(config)
    monkeypatch.setattr(train_utils, "_update", original)
    train(config)
    assert final_bytes(tmp_path / "run") == final_bytes(whole_run)
    assert metrics(tmp_path / "run") == metrics(whole_run)


def test_a_finished_run_is_finished(bases: Bases, whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    train(bases.config(tmp_path / "run", tensorboard=True))
    assert final_bytes(tmp_path / "run") == final_bytes(whole_run)
    assert metrics(tmp_path / "run") == metrics(whole_run)


def test_changed_settings_are_refused(bases: Bases, whole_run: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        train(bases.config(whole_run, seed=1, optim__learning_rate=1e-3, data__packing=False, data__num_workers=1))
    lines = str(caught.value).splitlines()[1:-1]
    assert [line.split(":")[0].strip() for line in lines] == ["data.packing", "optim.learning_rate", "seed"]


def test_changed_data_is_refused(tiny_llm_dir: Path, tiny_tower_dir: Path, whole_run: Path, tmp_path: Path) -> None:
    other = write_records(tmp_path / "other", 39)
    shutil.copytree(whole_run, tmp_path / "run")
    (tmp_path / "run" / "split.json").unlink()
    with pytest.raises(CheckpointError, match="data fingerprint"):
        train(tiny_config(tmp_path / "run", tiny_llm_dir, tiny_tower_dir, other))


def test_starting_over_moves_the_old_run_aside(bases: Bases, whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    train(bases.config(tmp_path / "run", resume=False, optim__max_steps=1))
    assert (tmp_path / "run.1" / "report.html").exists()
    assert [line["step"] for line in metrics(tmp_path / "run") if line["kind"] == "train"] == [1]


def test_bad_records_are_listed(bases: Bases, tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path: Path) -> None:
    some_missing = write_records(tmp_path / "records", missing=(3, 11))
    config = tiny_config(
        tmp_path / "run", tiny_llm_dir, tiny_tower_dir, some_missing, data__max_bad_fraction=0.5, optim__max_steps=24
    )
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert lines
    assert {line["reason"] for line in lines} == {"missing_image"}
    assert {line["id"] for line in lines} <= {"sample-3", "sample-11"}
    assert all("records.json" in line["origin"] and line["message"] for line in lines)


def test_too_many_bad_records_stop_the_run_after_saving(
    tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path: Path
) -> None:
    missing = write_records(tmp_path / "records", missing=tuple(range(0, 40, 2)))
    config = tiny_config(tmp_path / "run", tiny_llm_dir, tiny_tower_dir, missing, data__max_bad_fraction=0.1)
    with pytest.raises(DataError, match=r"could not be used; data\.max_bad_fraction allows 0\.1") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_text_only_data_trains(tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path: Path) -> None:
    """No gradient reaches the connector, which is no error; the ablation says that it has nothing to measure."""
    text = write_records(tmp_path / "records", pictures=False)
    result = train(tiny_config(tmp_path / "run", tiny_llm_dir, tiny_tower_dir, text, optim__max_steps=2))
    assert result.evidence is not None
    assert [gate["passed"] for gate in result.evidence["gates"]] == [False]


def test_full_disk_leaves_the_last_checkpoint(
    bases: Bases, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    config = bases.config(tmp_path / "run")
    fsync = os.fsync

    def fail_at_second_checkpoint(descriptor: int) -> None:
        if "step-000006" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_at_second_checkpoint)
    with pytest.raises(StorageError, match=r"step-000006.* could not be written because the disk is full"):
        train(config)
    monkeypatch.setattr(os, "fsync", fsync)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    train(config)
    assert final_bytes(tmp_path / "run") == final_bytes(whole_run)


def test_divergence_is_a_sentence(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(parameters: Sequence[Tensor], norm: float) -> Tensor:
        return torch.tensor(float("nan"))

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda self, *args: explode(*args))
    with pytest.raises(DivergenceError, match="gradient norm is nan at step 1"):
        train(bases.config(tmp_path / "run"))


def test_feature_cache_gives_the_same_run(bases: Bases, whole_run: Path, tmp_path: Path) -> None:
    result = train(bases.config(tmp_path / "run", data__feature_cache=str(tmp_path / "features")))
    assert result.step == 8
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(metrics(whole_run)[0]["loss"], abs=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_half_precision_bases_under_autocast(
    bases: Bases, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """What a GPU does: bases in bf16, connector in fp32, bf16 autocast; losses agree to bf16's rounding."""
    for place in ("qwen3_vlm.train.run", "qwen3_vlm.models.precision"):
        monkeypatch.setattr(f"{place}.bf16_is_fast", lambda device: True)
    half: dict[str, Any] = {"model__dtype": "bfloat16", "optim__mixed_precision": "bf16", "optim__max_steps": 2}
    result = train(bases.config(tmp_path / "run", **half, model__gradient_checkpointing=checkpointing))
    assert result.evidence is not None
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(metrics(whole_run)[0]["loss"], rel=0.02)
    tensors = safetensors.torch.load_file(tmp_path / "run" / "connector" / "connector.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_slow_half_precision_is_left_out_and_said(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qwen3_vlm.train.run.bf16_is_fast", lambda device: False)
    train(bases.config(tmp_path / "run", optim__mixed_precision="bf16", optim__max_steps=1))
    assert "No bf16 autocast" in capsys.readouterr().out


def test_no_training_data_is_a_sentence(bases: Bases, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train"):
        train(bases.config(tmp_path / "run", data__train=[]))

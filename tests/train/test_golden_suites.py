"""The golden suites of the shipped stage 4: 64 prompts of each of six tasks at each checkpoint: ids, files, texts."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from PIL import Image

from qwen3_vlm.config import load_config
from qwen3_vlm.data.tokenize import tokenize_manifest
from qwen3_vlm.folder_lock import FolderLock
from qwen3_vlm.tokenization.sequences import BOUNDARIES, sequence_format
from qwen3_vlm.train import train_utils
from qwen3_vlm.train.token_evaluations import TokenEvaluations
from tests.data.speaking_pictures import line, png, save_tokenizers, wav, write_manifest
from tests.data.tiny_shards import pass_audit

CONFIG = Path(__file__).parents[2] / "configs" / "stage4_mmpt.yaml"
TASKS = ("i2t", "a2t", "t2i", "t2a", "a2i", "i2a")


def replay(evaluations: TokenEvaluations, sampling: Any) -> Any:
    """In the place of a model, which would take minutes: a held-out record's own picture, sound or text."""
    space, ids = evaluations._data.token_space, evaluations._data.eval[0].ids

    def generate(prompts: Sequence[Any]) -> torch.Tensor:
        name = sequence_format(prompts[0][0]).target
        answer = [*ids[name].tolist(), space.special(BOUNDARIES[name].end)]
        return torch.tensor([answer] * len(prompts))

    return generate


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped config over a tiny base, from its start to its first two checkpoints."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "tokenizers").mkdir()
    uti = save_tokenizers(folder / "tokenizers", clip_seconds=0.1)
    (folder / "raw").mkdir()
    for number in range(3):
        (folder / "raw" / f"{number}.png").write_bytes(png(number))
        (folder / "raw" / f"{number}.wav").write_bytes(wav(number, 40))
    records = [
        line(f"r{number}", image=f"{number % 3}.png", audio=f"{number % 3}.wav", text=f"record {number}")
        for number in range(76)
    ]
    manifest = write_manifest(folder / "raw" / "manifest.jsonl", records)
    tokenize_manifest(manifest, folder / "tokens", uti, workers=0, fractions={"val": 0.94, "test": 0.0})
    pass_audit(folder / "tokens")
    changes: dict[str, Any] = {"output_dir": folder / "run", "model.llm": folder / "tokenizers" / "llm"}
    changes |= {"model.dtype": "float32", "model.gradient_checkpointing": False, "rows.add_on": None}
    changes |= {"tokens.folders": [str(folder / "tokens")], "tokens.max_seq_len": 400, "tokens.num_workers": 0}
    changes |= {
        "tensorboard": False,
        "optim.max_steps": 1,
        "eval.golden_max_new_tokens": 2,
        "save_every": 1,
        "eval.quick_samples": 6,
    }
    config = load_config(CONFIG, [f"{key}={json.dumps(value, default=str)}" for key, value in changes.items()])
    assert config.eval.golden_samples == 64
    assert tuple(config.tokens.tasks) == TASKS
    with FolderLock() as lock, pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenEvaluations, "generator", replay)
        run = train_utils.start_run(config, lock)
        for step in (0, 1):
            run.step, run.evaluated = step, False
            train_utils._evaluate_if_due(run)
        run.log.close()
    return folder / "run" / "golden"


def items(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


def test_64_of_each_task_at_each_checkpoint_and_the_same_ones(run_folder: Path) -> None:
    first, second = (items(run_folder / f"step-00000{step}") for step in (0, 1))
    assert Counter(item["task"] for item in first) == dict.fromkeys(TASKS, 64)
    assert len({item["id"] for item in first}) == 6 * 64
    assert [item["id"] for item in first] == [item["id"] for item in second]


def test_ids_files_and_texts_are_there_for_each(run_folder: Path) -> None:
    folder = run_folder / "step-000001"
    for item in items(folder):
        assert item["error"] == ""
        source, target = item["task"][0], item["task"][2]
        if target == "t":
            assert item["prediction_file"] == ""
            assert item["reference"]
        else:
            assert item["ids"]
            assert read(folder / item["prediction_file"], target)
            assert read(run_folder / "reference" / item["reference_file"], target)
        if source == "t":
            assert item["prompt"]
        else:
            assert read(run_folder / "reference" / item["source_file"], source)
    made = {path.name for path in folder.iterdir()} - {"items.jsonl"}
    assert len(made) == 4 * 64  # t2i, t2a, a2i, i2a


def read(path: Path, kind: str) -> int:
    """The size of what a picture or a sound decodes to."""
    if kind == "i":
        with Image.open(path) as picture:
            return picture.width * picture.height
    return len(soundfile.read(path)[0])

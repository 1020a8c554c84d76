"""A run over tokens small enough for a test: random pictures and sounds through tiny codecs, a handful of steps."""

import json
from pathlib import Path
from typing import Any

import torch

from qwen3_vlm.config import RunConfig, parse_config
from qwen3_vlm.data.tokenize import tokenize_manifest
from tests.data.speaking_pictures import save_tokenizers, write_speaking_pictures
from tests.data.tiny_shards import pass_audit


def save_dataset(folder: Path, count: int = 60) -> Path:
    """A tokenized and audited data set over the tiny base in `folder/tokenizers/llm`."""
    (folder / "tokenizers").mkdir(parents=True)
    uti = save_tokenizers(folder / "tokenizers", clip_seconds=0.2)
    manifest = write_speaking_pictures(folder / "raw", count)
    out = folder / "tokens"
    tokenize_manifest(manifest, out, uti, workers=0, fractions={"val": 0.3, "test": 0.0})
    pass_audit(out)
    return out


def token_config(output_dir: Path, dataset: Path, **overrides: Any) -> RunConfig:
    """Eight steps of 2 × 3 sequences with a checkpoint every third; dotted overrides with "__" for the dot."""
    tree: dict[str, Any] = {
        "stage": "stage3_rows",
        "output_dir": str(output_dir),
        "save_every": 3,
        "log_every": 2,
        "tensorboard": False,
        "model": {"llm": str(dataset.parent / "tokenizers" / "llm"), "dtype": "float32"},
        "tokens": {
            "folders": [str(dataset)],
            "num_workers": 0,
            "max_seq_len": 400,
            "tasks": {"i2t": {}, "a2t": {}, "t2i": {"weight": 0.5, "ramp_from": 0.25, "ramp_until": 0.5}},
        },
        "optim": {
            "batch_size": 2,
            "accumulation": 3,
            "learning_rate": 1e-2,
            "max_steps": 8,
            "mixed_precision": "no",
        },
        "eval": {
            "quick_every": 4,
            "quick_samples": 6,
            "ablation_samples": 6,
            "bootstrap_samples": 20,
            "golden_samples": 2,
            "golden_max_new_tokens": 2,
            "decode_samples": 2,
        },
    }
    return parse_config(tree, [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()])


def final_bytes(run: Path) -> dict[str, Any]:
    """What two equal runs must have in common to the bit."""
    newest = max((run / "checkpoints").iterdir())
    rows = torch.load(run / "rows" / "trainable_rows.pt", weights_only=True)
    return {
        "rows": {name: value.numpy().tobytes() for name, value in rows.items() if isinstance(value, torch.Tensor)},
        "optimizer": (newest / "optimizer.safetensors").read_bytes(),
    }

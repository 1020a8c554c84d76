"""What a cached feature depends on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qwen3_vlm.config import parse_config
from qwen3_vlm.train.connector_recipe import feature_cache


def test_features_of_another_precision_are_other_features(tiny_vlm: tuple[Any, Any], tmp_path: Path) -> None:
    """They are encoded under the run's autocast, so a run in fp32 must not read those of one in bf16."""
    model, processor = tiny_vlm
    config = parse_config({"data": {"feature_cache": str(tmp_path)}})
    bases: dict[str, Any] = {"vision_tower": {"fingerprint": {"sha256": "x"}}, "image_processor": {}}
    found = []
    for precision in ("no", "bf16", "no"):
        accelerator: Any = SimpleNamespace(device=torch.device("cpu"), mixed_precision=precision, is_main_process=False)
        found.append(feature_cache(config, accelerator, model, processor, bases, []).fingerprint)
    assert found[0] == found[2] != found[1]

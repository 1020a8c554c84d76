"""Whether a run should cache its tower's outputs on disk: `qwen3-vlm data cache-benchmark`.

It reads the first pictures of the run's data and measures with the run's own tower, which is all that it
loads of the model.
"""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3_vlm.config import RunConfig
from qwen3_vlm.data.cache_benchmark import cache_benchmark
from qwen3_vlm.data.captions import Records, open_records
from qwen3_vlm.data.records import ImageRef
from qwen3_vlm.errors import DataError, ModelError, RecordError
from qwen3_vlm.models.bases import load_tower
from qwen3_vlm.models.precision import compute_in_fp32, must_widen
from qwen3_vlm.models.processing import Qwen3VLMProcessor


def measure_feature_cache(config: RunConfig, *, images: int) -> str:
    """One sentence: whether the cache pays for this run on this machine, with the figures.

    Raises:
        DataError: there is no data, or none of its pictures can be read.
        ModelError: the tower or its image processor can't be loaded.
    """
    if not config.data.train:
        raise DataError("The config names no training data: set data.train to a file, folder or glob.")
    records = open_records(config.data.train, config.data.image_root)
    refs, read = _first_pictures(records, images)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tower = _tower(config, device)
    processor = _processor(config)

    def encode(pixel_values: Tensor, **variable: Tensor) -> Tensor:
        inputs = {name: value.to(device) for name, value in variable.items()}
        with torch.no_grad():
            patches: Tensor = tower(pixel_values.to(device, tower.dtype), **inputs).last_hidden_state
        return patches

    result = cache_benchmark(
        refs,
        processor.pixel_values,
        encode,
        Path(config.data.feature_cache or config.output_dir),
        total_images=round(len(records) * len(refs) / read),
        passes=config.optim.epochs,
        max_pixels=config.data.max_image_pixels,
    )
    return result.sentence


def _first_pictures(records: Records, count: int) -> tuple[list[ImageRef], int]:
    """The first `count` pictures, and how many records were read for them; bad records count without pictures."""
    refs: list[ImageRef] = []
    read = 0
    for index in range(len(records)):
        read += 1
        try:
            refs.extend(islice(records[index].images, count - len(refs)))
        except RecordError:
            continue
        if len(refs) >= count:
            break
    if not refs:
        raise DataError("The training data has no picture that could be cached.")
    return refs, read


def _tower(config: RunConfig, device: torch.device) -> Any:
    model = config.model
    tower: Any = load_tower(
        model.vision_tower, dtype=getattr(torch, model.dtype), attn_implementation=model.attn_implementation
    ).to(device)
    if must_widen(next(tower.parameters())):
        compute_in_fp32(tower)
    return tower.eval()


def _processor(config: RunConfig) -> Qwen3VLMProcessor:
    model = config.model
    try:
        return Qwen3VLMProcessor.from_bases(model.llm, model.vision_tower, model.num_latents, model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"No tokenizer or image processor in {model.llm} or {model.vision_tower}: {error}") from error

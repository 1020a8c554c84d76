"""Training the demo's tiny SigLIP tower: pictures alone, no language model near it.

SigLIP2 is itself trained with contrastive, captioning and dense localisation losses. This tower gets the
dense kind: at each patch, small linear heads say which object covers it, how big that object is, in
which column and row it stands, and what the background is. The heads are thrown away afterwards. It
never sees a held-out pair.

Shapes: B images, P patches.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from qwen3_vlm.demo.drawings import compose, sprite
from qwen3_vlm.demo.world import (
    BACKGROUND_WORDS,
    CANVAS,
    COLUMNS,
    NAMES,
    ROWS,
    SIZE_WORDS,
    Scene,
)

PATCH = 8
GRID = CANVAS // PATCH
COVERED = 0.08  # a patch belongs to an object when that much of it is drawn on
TOWER_SIZES = (*SIZE_WORDS, "whole")
HEADS = {
    "object": len(NAMES) + 1,  # 0 = nothing here, as in the next three
    "size": len(TOWER_SIZES) + 1,
    "column": len(COLUMNS) + 1,
    "row": len(ROWS) + 1,
    "background": len(BACKGROUND_WORDS),
}


def tower_config() -> SiglipVisionConfig:
    """4 layers, 128 wide, 64 patches: 0.7 M parameters."""
    return SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=CANVAS,
        patch_size=PATCH,
        vision_use_head=False,
    )


@dataclass
class SceneBatch:
    """Pictures with, for each patch, the class of each head."""

    pixels: NDArray[np.uint8]  # (B, H, W, 3)
    targets: dict[str, NDArray[np.int64]]  # head → (B, P)


def patch_targets(scene: Scene, boxes: list[tuple[int, int, int]]) -> dict[str, NDArray[np.int64]]:
    """Head → (P,) classes, from the description and the drawings' own alpha."""
    cover = np.zeros((len(scene.things), CANVAS, CANVAS), dtype=np.float32)
    for index, (thing, (left, top, size)) in enumerate(zip(scene.things, boxes, strict=True)):
        cover[index, top : top + size, left : left + size] = sprite(thing.name, size)[..., 3] / 255
    share = cover.reshape(-1, GRID, PATCH, GRID, PATCH).mean((2, 4)).reshape(len(scene.things), -1)
    owner = np.where(share.max(0) > COVERED, share.argmax(0), len(scene.things))
    classes = {
        "object": [NAMES.index(thing.name) + 1 for thing in scene.things],
        "size": [TOWER_SIZES.index(thing.size) + 1 for thing in scene.things],
        "column": [COLUMNS.index(thing.column) + 1 for thing in scene.things],
        "row": [ROWS.index(thing.row) + 1 for thing in scene.things],
    }
    targets = {head: np.array([*values, 0])[owner] for head, values in classes.items()}
    targets["background"] = np.full(GRID * GRID, BACKGROUND_WORDS.index(scene.background))
    return targets


def scene_batch(stream: Iterator[Scene], rng: random.Random, batch_size: int) -> SceneBatch:
    """The next scenes of a stream, drawn and labelled."""
    pixels, targets = [], []
    for _ in range(batch_size):
        scene = next(stream)
        picture, boxes = compose(scene, rng)
        pixels.append(picture)
        targets.append(patch_targets(scene, boxes))
    stacked = {head: np.stack([target[head] for target in targets]) for head in HEADS}
    return SceneBatch(np.stack(pixels), stacked)


def to_pixel_values(pixels: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, 3) bytes → (B, 3, H, W) in −1…1, as SiglipImageProcessor does it."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


class TowerPretraining(nn.Module):
    """The tower with its throwaway heads."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.tower = SiglipVisionModel(config)
        self.heads = nn.ModuleDict({head: nn.Linear(config.hidden_size, size) for head, size in HEADS.items()})

    def forward(self, pixel_values: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Total loss, and the share of right patches of each head where something is drawn."""
        patches = self.tower(pixel_values=pixel_values).last_hidden_state  # (B, P, D)
        drawn = targets["object"] > 0
        loss, right = torch.zeros(()), {}
        for head, layer in self.heads.items():
            logits = layer(patches)
            each = F.cross_entropy(logits.flatten(0, 1), targets[head].flatten(), reduction="none").view_as(drawn)
            loss = loss + (each[drawn].mean() + each[~drawn].mean()) / 2
            right[head] = (logits.argmax(-1) == targets[head])[drawn].float().mean().item()
        return loss, right

"""How good are generated pictures? Found again among the held-out ones by a frozen tower; PSNR and SSIM beside it.

A generated picture is looked up among the reference pictures of the set: how many of them resemble it more than its
own does, in the features of a tower that had no part in the training of what drew it? Rank 1 is best; a model that
draws the same whatever it is told has rank 1 by chance alone, which is stated. References are what the image
tokenizer gives back of the true ids: no model of these ids can do better.

Two views of the same features: `placed`, the patches on a grid of at most 8 × 8, place by place, which sees what is
where; and `pooled`, their mean, which sees what there is. From both the mean of the references is taken away (what
all pictures share tells none apart), then they are compared by cosine.

Shapes: n generated pictures, m different references, D width, G grid cells.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from transformers import AutoImageProcessor

from qwen3_vlm.errors import DataError, ModelError
from qwen3_vlm.evaluate.intervals import Interval, bootstrap_mean, wilson_interval
from qwen3_vlm.models.bases import load_tower
from qwen3_vlm.tokenization.quality import SSIM_WINDOW, psnr, ssim

GRID = 8  # cells a side
Features = NDArray[np.float32]
Encode = Callable[[Sequence[Image.Image]], Features]
"""Pictures → (n, G, D) features of the cells of a grid."""


@dataclass(frozen=True)
class Retrieval:
    """Where a generated picture's own reference stands among all references, most alike first."""

    ranks: NDArray[np.int64]  # (n,), 1 is best
    gallery: int  # different references
    chance: float  # share of rank 1 of somebody who draws blindly
    confidence: float = 0.95

    @property
    def rank_one(self) -> Interval:
        """Share of the pictures whose own reference resembles them most, Wilson's interval."""
        return wilson_interval(int((self.ranks == 1).sum()), len(self.ranks), self.confidence)

    @property
    def median_rank(self) -> float:
        return float(np.median(self.ranks))

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable, without the single ranks."""
        return {
            "rank_one": self.rank_one.to_dict(),
            "median_rank": self.median_rank,
            "gallery": self.gallery,
            "chance": self.chance,
        }


@dataclass(frozen=True)
class PictureScores:
    """The pictures that were generated for one task."""

    task: str
    tried: int
    decoded: int  # the others have the last rank, and no PSNR
    placed: Retrieval | None  # None where no tower was at hand
    pooled: Retrieval | None
    psnr_db: Interval | None  # to the reference, mean over pictures; None where nothing decoded
    ssim: Interval | None  # None also where pictures are smaller than its window

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "task": self.task,
            "tried": self.tried,
            "decoded": self.decoded,
            **{name: found.to_dict() if (found := getattr(self, name)) else None
               for name in ("placed", "pooled", "psnr_db", "ssim")},
        }  # fmt: skip

    def row(self) -> dict[str, Any]:
        """One row of a table of results."""
        row: dict[str, Any] = {"task": self.task, "pictures": self.tried, "decoded": self.decoded}
        if self.placed and self.pooled:
            row |= {
                "own reference first": _share(self.placed.rank_one),
                "median rank": self.placed.median_rank,
                "of": self.placed.gallery,
                "first by chance": {"percent": self.placed.chance},
                "first, pooled features": _share(self.pooled.rank_one),
            }
        figures = {"PSNR, dB": self.psnr_db, "SSIM": self.ssim}
        return row | {name: value.to_dict() for name, value in figures.items() if value}


def measure_pictures(
    task: str,
    generated: Sequence[Image.Image | None],
    references: Sequence[Image.Image],
    prompts: Sequence[Hashable],
    encode: Encode | None,
    *,
    confidence: float = 0.95,
) -> PictureScores:
    """Judge what was generated against the references, one of each per prompt.

    Args:
        generated: None for what did not decode.
        prompts: what each was made of. References of equal prompts are equally right.
        encode: `tower_features`; None leaves retrieval out.

    Raises:
        DataError: the three differ in number, are empty, or a picture's size is not its reference's.
    """
    if not len(generated) == len(references) == len(prompts) or not len(references):
        raise DataError(
            f"{len(generated)} generated pictures, {len(references)} references and {len(prompts)} prompts: "
            "one of each is needed."
        )
    decoded = [number for number, picture in enumerate(generated) if picture is not None]
    views: tuple[Retrieval | None, Retrieval | None] = (None, None)
    if encode is not None:
        views = _look_up(generated, references, prompts, encode, confidence)
    pairs = [(_pixels(generated[number]), _pixels(references[number])) for number in decoded]
    for number, (made, wanted) in zip(decoded, pairs, strict=True):
        if made.shape != wanted.shape:
            raise DataError(f"Picture {number} has the shape {made.shape}, its reference {wanted.shape}.")
    large = [(made, wanted) for made, wanted in pairs if min(wanted.shape[:2]) >= SSIM_WINDOW]
    return PictureScores(
        task,
        len(references),
        len(decoded),
        *views,
        psnr_db=_mean([psnr(wanted, made) for made, wanted in pairs], confidence),
        ssim=_mean([ssim(wanted, made) for made, wanted in large], confidence),
    )


def retrieval_ranks(generated: Features, gallery: Features, own: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(n,) the rank of the best of a picture's own references; others that are just as alike stand before it.

    Args:
        generated: (n, D) features.
        gallery: (m, D) features.
        own: (n, m) true for the references that are right for a picture; at least one each.
    """
    center = gallery.mean(axis=0, dtype=np.float64)
    likeness = _unit(generated - center) @ _unit(gallery - center).T  # (n, m) cosines
    best = np.where(own, likeness, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((likeness >= best) & ~own).sum(axis=1)


class TowerFeatures:
    """The frozen tower of a SigLIP / SigLIP2 folder or hub id, in fp32.

    Raises:
        ModelError: it can't be loaded.
    """

    def __init__(self, tower: str | Path, device: str | torch.device = "cpu", batch_size: int = 32) -> None:
        self._tower: Any = load_tower(tower, dtype=torch.float32).to(device).eval()
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(str(tower), backend="pil")
        except (OSError, ValueError) as problem:
            raise ModelError(f"No image processor in {tower}: {str(problem).strip().splitlines()[0]}") from problem
        self._device, self._batch_size = device, batch_size

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Features:
        """(n, G, D) features."""
        return np.concatenate([self._encode(chunk) for chunk in _chunks(pictures, self._batch_size)])

    def _encode(self, pictures: list[Image.Image]) -> Features:
        inputs = self._processor([picture.convert("RGB") for picture in pictures], return_tensors="pt").to(self._device)
        patches = self._tower(**inputs).last_hidden_state  # (n, P, D)
        side = math.isqrt(patches.shape[1])
        shapes = inputs.get("spatial_shapes", torch.tensor([[side, patches.shape[1] // side]] * len(pictures)))
        cells = [on_grid(found, *map(int, shape)) for found, shape in zip(patches, shapes, strict=True)]
        return torch.stack(cells).float().cpu().numpy()


def on_grid(patches: Tensor, rows: int, columns: int) -> Tensor:
    """(P, D) patches of rows × columns, padding after them → (G, D), means over the cells of a grid of 8 × 8.

    A tower of fewer patches a side keeps them as they are.
    """
    placed = patches[: rows * columns].reshape(rows, columns, -1).permute(2, 0, 1)
    return adaptive_avg_pool2d(placed, (min(GRID, rows), min(GRID, columns))).flatten(1).T


def _look_up(
    generated: Sequence[Image.Image | None],
    references: Sequence[Image.Image],
    prompts: Sequence[Hashable],
    encode: Encode,
    confidence: float,
) -> tuple[Retrieval, Retrieval]:
    """Retrieval by place and pooled."""
    gallery, places = _distinct(references)
    own = np.zeros((len(references), len(gallery)), dtype=np.bool_)
    by_prompt: dict[Hashable, list[int]] = {}
    for prompt, place in zip(prompts, places, strict=True):
        by_prompt.setdefault(prompt, []).append(place)
    for number, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        own[number, [*by_prompt[prompt], place]] = True
    drawn = [number for number, picture in enumerate(generated) if picture is not None]
    wanted, made = encode(gallery), encode([picture for picture in generated if picture is not None]) if drawn else None

    def ranked(view: Callable[[Features], Features]) -> Retrieval:
        ranks = np.full(len(references), len(gallery), dtype=np.int64)
        if made is not None:
            ranks[drawn] = retrieval_ranks(view(made), view(wanted), own[drawn])
        return Retrieval(ranks, len(gallery), float(own.mean()), confidence)

    return ranked(lambda cells: cells.reshape(len(cells), -1)), ranked(lambda cells: cells.mean(axis=1))


def _distinct(pictures: Iterable[Image.Image]) -> tuple[list[Image.Image], list[int]]:
    """The different pictures, and which of them each picture is."""
    numbers: dict[tuple[tuple[int, int], bytes], int] = {}
    kept, places = [], []
    for picture in pictures:
        key = (picture.size, picture.convert("RGB").tobytes())
        if key not in numbers:
            numbers[key] = len(numbers)
            kept.append(picture)
        places.append(numbers[key])
    return kept, places


def _unit(features: NDArray[Any]) -> NDArray[np.float64]:
    """Rows of length 1; a row of zeros stays."""
    values = features.astype(np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def _pixels(picture: Image.Image | None) -> NDArray[np.uint8]:
    assert picture is not None
    return np.asarray(picture.convert("RGB"))


def _mean(values: Sequence[float], confidence: float) -> Interval | None:
    return bootstrap_mean(values, confidence=confidence) if values else None


def _share(interval: Interval) -> dict[str, float]:
    return {"percent": interval.value, "low": interval.low, "high": interval.high}


def _chunks(pictures: Sequence[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    iterator = iter(pictures)
    while chunk := list(islice(iterator, size)):
        yield chunk

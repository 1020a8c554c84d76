"""Training the demo's tiny image tokenizer: a real `JanusVQVAE` that turns 64 × 64 pixels into 64 ids.

A language model that learns nothing but new vocabulary rows has to read these ids and to write them. So they
are made to be *readable*, not only decodable: what is learned first is the encoder and its codebook, with
two throwaway parts that see single quantized patches. One sketches the pixels; the other says, from one id
alone, which object covers the patch, how big it is and what the background is (SEED, arXiv 2307.08041, makes
ids for language models from semantic features for the same reason). Then the ids stand still, and Janus's own
decoder learns to draw from them. Neither sees a held-out pair of objects, nor a held-out drawing.

`JanusVQVAE` compares raw vectors in `encode` but scales the codebook to length 1 in `decode`. Both agree as long
as the codebook's rows have length 1, which `Codebook` sees to; then the nearest row is the one of least angle.

Shapes: B pictures, P patches, N codebook rows, E codebook width.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import JanusImageProcessorPil, JanusVQVAE, JanusVQVAEConfig

from qwen3_vlm.demo.drawings import compose, drawing_is_held_out, named_drawings, plain_drawing
from qwen3_vlm.demo.muon import Muon
from qwen3_vlm.demo.tower import GRID, HEADS, PATCH, patch_targets, scene_batch, to_pixel_values
from qwen3_vlm.demo.world import BACKGROUND_WORDS, CANVAS, scenes
from qwen3_vlm.tokenization import quality

CODES = 512
CONTENT = ("object", "size", "background")  # those of the tower's heads that an id should tell by itself
CONTENT_WEIGHT = 0.2
COMMITMENT_WEIGHT = 0.25
DRAWING_SHARE = 0.1
DECAY = 0.02
UNKNOWN = -100  # no label: cross entropy leaves the patch out


def codec_config() -> JanusVQVAEConfig:
    """8 × 8 ids of 512, 1.7 M parameters.

    GroupNorm wants channels in multiples of 32, which is dear at 64 × 64 pixels and cheap at 8 × 8: so width is there.
    """
    return JanusVQVAEConfig(
        embed_dim=16,
        num_embeddings=CODES,
        latent_channels=64,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 3],
        num_res_blocks=1,
        num_patches=GRID,
    )


def new_codec() -> JanusVQVAE:
    """An untrained codec whose signal keeps its size from layer to layer, and whose residual branches start at zero.

    Janus's own start (0.02 everywhere) lets next to nothing through 32 channels; and as GroupNorm takes the
    level out of every branch, what the background is must reach the codes by the way past the branches.
    """
    codec = JanusVQVAE(codec_config())
    for name, module in codec.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if name.endswith(("conv2", "proj_out")):
                nn.init.zeros_(module.weight)
    return codec.train()


def image_processor() -> JanusImageProcessorPil:
    """Bytes → −1…1, as `to_pixel_values` does it."""
    size = {"height": CANVAS, "width": CANVAS}
    return JanusImageProcessorPil(size=size, min_size=PATCH, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def drawing_is_for_training(code: str, name: str) -> bool:
    """A tenth of all named drawings, by hash, is kept to measure with; so are the held-out skin tones."""
    return not drawing_is_held_out(code, name) and hashlib.sha256(f"codec {code}".encode()).digest()[0] % 10 > 0


@dataclass
class Pictures:
    """Pictures with, for each patch, the class of each head."""

    pixel_values: Tensor  # (B, 3, H, W) in −1…1
    targets: dict[str, Tensor]  # head → (B, P)


def pictures(seed: str, batch_size: int) -> Iterator[Pictures]:
    """The endless stream of training batches: scenes, and now and then a plain drawing with no labels."""
    rng, stream = random.Random(seed), scenes(seed)
    drawings = [code for code, name in named_drawings().items() if drawing_is_for_training(code, name)]
    unknown = dict.fromkeys(CONTENT, np.full(GRID * GRID, UNKNOWN))
    while True:
        rows: list[tuple[NDArray[np.uint8], dict[str, NDArray[np.int64]]]] = []
        for _ in range(batch_size):
            if rng.random() < DRAWING_SHARE:
                rows.append((plain_drawing(rng.choice(drawings), rng.choice(BACKGROUND_WORDS)), unknown))
            else:
                scene = next(stream)
                picture, boxes = compose(scene, rng)
                rows.append((picture, patch_targets(scene, boxes)))
        yield Pictures(
            to_pixel_values(np.stack([picture for picture, _ in rows])),
            {head: torch.from_numpy(np.stack([target[head] for _, target in rows])) for head in CONTENT},
        )


class Codebook:
    """Keeps a quantizer's rows at the running mean of what they stand for, and at length 1 (van den Oord, 2017, A.1).

    A row that hardly anything chooses is moved to where vectors are far from every row. That also places all rows
    at first, so that the background, which is most of all patches, does not take most of them.
    """

    def __init__(self, rows: Tensor, decay: float = 0.98, dead_below: float = 0.1) -> None:
        self.rows, self.decay, self.dead_below = rows, decay, dead_below  # (N, E)
        self.rows.zero_()
        self.counts = torch.zeros(len(rows))
        self.sums = torch.zeros_like(rows)

    @torch.no_grad()
    def update(self, vectors: Tensor, ids: Tensor) -> None:
        """One step of the running means; vectors (B·P, E) of length 1, ids (B·P,)."""
        new = torch.zeros_like(self.sums).index_add_(0, ids, vectors)
        self.counts.lerp_(torch.bincount(ids, minlength=len(self.rows)).float(), 1 - self.decay)
        self.sums.lerp_(new, 1 - self.decay)
        self.rows.copy_(F.normalize(self.sums, dim=-1))

    @torch.no_grad()
    def revive(self, vectors: Tensor) -> int:
        """Move the unused rows, each by k-means++ (a vector is drawn by its squared distance); returns how many."""
        dead = (self.counts < self.dead_below).nonzero()[:, 0]
        self.rows[dead] = 0
        distance = 1 - (vectors @ self.rows.T).amax(-1)
        for row in dead.tolist():
            chosen = vectors[torch.multinomial(distance.clamp(min=1e-6), 1)[0]]
            self.rows[row], self.counts[row] = chosen, 3 * self.dead_below
            self.sums[row] = chosen * self.counts[row]
            distance = torch.minimum(distance, 1 - vectors @ chosen)
        return len(dead)


class CodeTraining(nn.Module):
    """Encoder and codebook with their throwaway parts."""

    def __init__(self, codec: JanusVQVAE, width: int = 128) -> None:
        super().__init__()
        self.encoder, self.quant_conv = codec.encoder, codec.quant_conv
        self.rows = codec.quantize.embedding.weight.requires_grad_(False)
        self.codebook = Codebook(self.rows)
        embed_dim = self.rows.shape[1]
        self.scale = embed_dim**0.5
        self.sketch = nn.Sequential(
            nn.Conv2d(embed_dim, width, 3, padding=1), nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1), nn.GELU(),
            nn.Conv2d(width, 3 * PATCH**2, 1), nn.PixelShuffle(PATCH),
        )  # fmt: skip
        self.content = nn.Sequential(nn.Linear(embed_dim, 2 * width), nn.GELU())
        self.heads = nn.ModuleDict({head: nn.Linear(2 * width, HEADS[head]) for head in CONTENT})

    @torch.no_grad()
    def whiten(self, pixel_values: Tensor) -> None:
        """Start `quant_conv` at the main components of what the encoder gives, each with mean 0 and deviation 1.

        Without this, all vectors point the same way at first, and half of the training goes into spreading them.
        """
        hidden = self.encoder(pixel_values).transpose(0, 1).flatten(1)  # (D, B·P)
        mean = hidden.mean(1, keepdim=True)
        values, axes = torch.linalg.eigh(torch.cov(hidden))
        rows = (axes / values.sqrt()).T.flip(0)[: self.rows.shape[1]]
        self.quant_conv.load_state_dict({"weight": rows[:, :, None, None], "bias": -(rows @ mean)[:, 0]})

    def vectors(self, pixel_values: Tensor) -> Tensor:
        """(B, E, √P, √P) of length 1."""
        return F.normalize(self.quant_conv(self.encoder(pixel_values)), dim=1)

    def forward(self, batch: Pictures, quantize: bool, revive: bool) -> tuple[Tensor, dict[str, float]]:
        """Total loss, and plain figures beside it; the codebook moves as well."""
        vectors = self.vectors(batch.pixel_values)
        flat = vectors.permute(0, 2, 3, 1).flatten(0, 2)  # (B·P, E)
        revived = self.codebook.revive(flat.detach()) if revive else 0
        given, commitment = self.quantized(vectors) if quantize else (vectors, torch.zeros(()))
        error = log_error(self.sketch(self.scale * given), batch.pixel_values)
        content, right = self.content_loss(given.flatten(2).transpose(1, 2), batch.targets)
        loss = error + COMMITMENT_WEIGHT * commitment + CONTENT_WEIGHT * content
        figures = {"sketch_db": decibels(error), "commitment": commitment.item(), "content": content.item()}
        return loss, {**figures, "perplexity": perplexity(self.codebook.counts), "revived": revived, **right}

    def quantized(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest rows, with the gradient passed straight through, and the commitment loss."""
        flat = vectors.permute(0, 2, 3, 1).flatten(0, 2)
        ids = (flat @ self.rows.T).argmax(-1)
        nearest = self.rows[ids].view(len(vectors), GRID, GRID, -1).permute(0, 3, 1, 2)
        self.codebook.update(flat.detach(), ids)
        return vectors + (nearest - vectors).detach(), (vectors - nearest).square().sum(1).mean()

    def content_loss(self, codes: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """What single codes (B, P, E) tell: object and size where something is drawn, background where nothing is."""
        hidden, loss, right = self.content(self.scale * codes), torch.zeros(()), {}
        for head, layer in self.heads.items():
            here = (targets["object"] == 0) if head == "background" else (targets["object"] > 0)
            logits, target = layer(hidden[here]), targets[head][here]
            loss = loss + F.cross_entropy(logits, target)
            right[head] = (logits.argmax(-1) == target).float().mean().item()
        empty = targets["object"] == 0
        return loss + F.cross_entropy(self.heads["object"](hidden[empty]), targets["object"][empty]), right


def start_decoder(codec: JanusVQVAE) -> None:
    """Bring codes of length 1 to deviation 1, as the other layers expect it."""
    with torch.no_grad():
        codec.post_quant_conv.weight.mul_(codec.config.embed_dim**0.5)


def decoder_loss(codec: JanusVQVAE, pixel_values: Tensor) -> tuple[Tensor, dict[str, float]]:
    """How far the decoder is from the pictures, given ids that no longer change."""
    with torch.no_grad():
        ids = codec.encode(pixel_values).image_tokens.view(len(pixel_values), -1)
    error = log_error(codec.decode(ids), pixel_values)
    return error, {"decoder_db": decibels(error)}


def log_error(drawn: Tensor, pixel_values: Tensor) -> Tensor:
    """Mean over pictures of the logarithm of the squared error: PSNR itself, so that busy pictures don't rule."""
    return ((drawn - pixel_values).square().mean((1, 2, 3)) + 1e-3).log().mean()


def decibels(error: Tensor) -> float:
    """`log_error` in −1…1 units as PSNR."""
    return (math.log(4) - error.item()) * 10 / math.log(10)


def perplexity(counts: Tensor) -> float:
    """How many codes are in use, as if all were used alike."""
    share = counts / counts.sum().clamp(min=1e-12)
    return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))


def optimizers(*parts: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions, AdamW for everything else."""
    weights = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    convolutions = [weight for weight in weights if weight.ndim == 4]
    others = [weight for weight in weights if weight.ndim != 4]
    return [
        Muon(convolutions, muon_lr, DECAY),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def round_trip(codec: JanusVQVAE, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Pictures (B, H, W, 3) → their ids (B, P), and the pictures that these ids give."""
    ids, drawn = [], []
    for part in to_pixel_values(pixels).split(50):
        ids.append(codec.encode(part).image_tokens.view(len(part), -1))
        drawn.append(codec.decode(ids[-1]).permute(0, 2, 3, 1))
    rounded = ((torch.cat(drawn) + 1) * 127.5).round().clamp(0, 255)
    return torch.cat(ids).numpy(), rounded.to(torch.uint8).numpy()


def psnr(pixels: NDArray[np.uint8], drawn: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(B,) decibels of each picture."""
    return np.array([quality.psnr(one, other) for one, other in zip(pixels, drawn, strict=True)])


def ssim(pixels: NDArray[np.uint8], drawn: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(B,) structural similarity of each picture."""
    return np.array([quality.ssim(one, other) for one, other in zip(pixels, drawn, strict=True)])


def what_ids_tell(codec: JanusVQVAE, known: int = 3000, asked: int = 500) -> dict[str, float]:
    """The share of patches that their id alone names rightly, in scenes with held-out pairs.

    No head and no neighbours: an id means what it covers most often in `known` training scenes. That is what a
    language model's row for it can know by itself.
    """
    seen, unseen = _coded_patches(codec, known, unseen=False), _coded_patches(codec, asked, unseen=True)
    right = {}
    for head in CONTENT:
        where = "empty" if head == "background" else "drawn"
        votes = np.zeros((CODES, HEADS[head]))
        np.add.at(votes, (seen["ids"][seen[where]], seen[head][seen[where]]), 1)
        right[head] = float((votes.argmax(1)[unseen["ids"]] == unseen[head])[unseen[where]].mean())
    per_picture = [len(set(ids[empty])) for ids, empty in zip(unseen["ids"], unseen["empty"], strict=True)]
    return {**right, "background_ids_per_picture": float(np.mean(per_picture))}


def _coded_patches(codec: JanusVQVAE, count: int, unseen: bool) -> dict[str, NDArray[Any]]:
    """(count, P) ids of new scenes, with the class of each head and what is drawn on or empty."""
    rng, stream = random.Random("codec-ids"), scenes("codec-ids", unseen=unseen)
    batch = scene_batch(stream, rng, count)
    with torch.no_grad():
        ids = torch.cat([codec.encode(part).image_tokens for part in to_pixel_values(batch.pixels).split(50)])
    drawn = batch.targets["object"] > 0
    return {"ids": ids.view(count, -1).numpy(), "drawn": drawn, "empty": ~drawn, **batch.targets}


def measure(codec: JanusVQVAE) -> dict[str, float]:
    """Every figure of the model card, on pictures that no training has seen."""
    figures: dict[str, float] = {}
    for name, pixels in (("scenes", held_out_scenes(500)), ("drawings", held_out_drawings())):
        ids, drawn = round_trip(codec, pixels)
        counts = torch.from_numpy(np.bincount(ids.ravel(), minlength=CODES)).float()
        figures[f"{name}_psnr"] = float(psnr(pixels, drawn).mean())
        figures[f"{name}_psnr_worst"] = float(psnr(pixels, drawn).min())
        figures[f"{name}_ssim"] = float(ssim(pixels, drawn).mean())
        figures[f"{name}_perplexity"] = perplexity(counts)
        figures[f"{name}_ids_used"] = float((counts > 0).float().mean())
    return {**figures, **what_ids_tell(codec)}


def held_out_scenes(count: int, seed: str = "codec-held-out") -> NDArray[np.uint8]:
    """Pictures of scenes with a held-out pair of objects."""
    rng, stream = random.Random(seed), scenes(seed, unseen=True)
    return np.stack([compose(next(stream), rng)[0] for _ in range(count)])


def held_out_drawings() -> NDArray[np.uint8]:
    """The named drawings that the codec was never shown, on white."""
    return np.stack(
        [plain_drawing(code) for code, name in named_drawings().items() if not drawing_is_for_training(code, name)]
    )

"""Train the demo's DacModel (once; its result is in qwen3_vlm/demo/bases/audio_codec).

python scripts/train_audio_codec.py --out qwen3_vlm/demo/bases/audio_codec --log scripts/train_audio_codec.jsonl
"""

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import torch
from torch import nn

from qwen3_vlm.demo import audio_codec as recipe


def arguments() -> argparse.Namespace:
    """The defaults are those of the shipped weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--crop", type=int, default=19200)
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--phoneme-weight", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Speak, train, save the running average of the weights."""
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    corpus = recipe.make_corpus(args.lines, args.seed)
    whole = recipe.new_codec(recipe.codec_config())
    codec = recipe.without_full_rate_units(whole)
    training = recipe.CodecTraining(codec, len(corpus.phonemes), args.phoneme_weight, args.seed)
    training.start_codebooks(corpus.crops(rng, 64, args.crop)[0])
    optimizers = recipe.optimizers(training, args.muon_lr, args.lr)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    average = copy.deepcopy(codec)
    started = time.time()
    with args.log.open("w") as log:
        for step in range(1, args.steps + 1):
            share = min(step / 100, 0.5 + 0.5 * math.cos(math.pi * step / args.steps) + 0.01)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = share * rate
            figures = train_step(training, optimizers, *corpus.crops(rng, args.batch_size, args.crop))
            follow(average, codec, min(0.998, step / (step + 20)))
            if step % 25 == 0:
                record = {"step": step, **figures, "seconds": time.time() - started}
                log.write(json.dumps({k: round(v, 4) for k, v in record.items()}) + "\n")
                log.flush()
            if step % args.save_every == 0 or step == args.steps:
                recipe.with_full_rate_units(average, whole).half().save_pretrained(args.out)


def train_step(
    training: recipe.CodecTraining,
    optimizers: list[torch.optim.Optimizer],
    sound: torch.Tensor,
    phonemes: torch.Tensor,
) -> dict[str, float]:
    """One step of all weights and of the codebooks; its figures."""
    loss, figures = training(sound, phonemes)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for p in training.parameters() if p.requires_grad], 1.0)
    for optimizer in optimizers:
        optimizer.step()
    used = training.update_codebooks()
    return {"loss": loss.item(), **figures, "used": used, "norm": norm.item()}


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, memory: float) -> None:
    """A running average of the weights: what is shipped."""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - memory)


if __name__ == "__main__":
    main()

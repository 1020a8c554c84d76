"""Train the demo's image tokenizer (once; its result is in qwen3_vlm/demo/bases/image_tokenizer).

python scripts/train_image_codec.py --out qwen3_vlm/demo/bases/image_tokenizer --log scripts/train_image_codec.jsonl
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn
from transformers import JanusVQVAE

from qwen3_vlm.demo import image_codec as recipe

WARM_UP = 20
FIRST_QUANTIZED = 40  # until then the codebook's rows would chase an encoder that knows nothing


def main() -> None:
    """Parse, train the codes, then the decoder, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--code-steps", type=int, default=900)
    parser.add_argument("--decoder-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--muon-lr", type=float, default=0.04)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    codec = recipe.new_codec()
    with args.log.open("w") as log:
        train_codes(codec, args, log)
        train_decoder(codec, args, log)
        save(codec, args.out)
        shipped = JanusVQVAE.from_pretrained(args.out, dtype=torch.float32)
        log.write(json.dumps({key: round(value, 3) for key, value in recipe.measure(shipped).items()}) + "\n")


def train_codes(codec: JanusVQVAE, args: argparse.Namespace, log: TextIO) -> None:
    """Encoder and codebook."""
    training, stream = recipe.CodeTraining(codec), recipe.pictures(f"codes-{args.seed}", args.batch_size)
    training.whiten(next(stream).pixel_values)
    steps = args.code_steps

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        quantize = step >= FIRST_QUANTIZED
        return training(next(stream), quantize, revive=quantize and step % 10 == 0 and step < 0.8 * steps)

    descend("codes", (training,), loss_at, steps, args, log)
    save(codec, args.out)


def train_decoder(codec: JanusVQVAE, args: argparse.Namespace, log: TextIO) -> None:
    """Janus's decoder, for ids that stand still."""
    recipe.start_decoder(codec)
    stream = recipe.pictures(f"decoder-{args.seed}", args.batch_size)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        if step % 100 == 0:
            save(codec, args.out)
        return recipe.decoder_loss(codec, next(stream).pixel_values)

    descend("decoder", (codec.post_quant_conv, codec.decoder), loss_at, args.decoder_steps, args, log)


def descend(
    stage: str,
    parts: tuple[nn.Module, ...],
    loss_at: Callable[[int], tuple[Tensor, dict[str, float]]],
    steps: int,
    args: argparse.Namespace,
    log: TextIO,
) -> None:
    """`steps` steps of all optimizers, from a short warm-up down to nothing; a line of means every 20 steps."""
    optimizers = recipe.optimizers(*parts, muon_lr=args.muon_lr, adam_lr=args.adam_lr)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    started, seen = time.time(), []
    for step in range(1, steps + 1):
        loss, figures = loss_at(step)
        loss.backward()
        for optimizer, rate in zip(optimizers, rates, strict=True):
            share = min(step / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps) + 0.005)
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()
        seen.append({"loss": loss.item(), **figures})
        if step % 20 == 0:
            means = {key: round(sum(row[key] for row in seen) / len(seen), 3) for key in figures}
            log.write(
                json.dumps({"stage": stage, "step": step, **means, "seconds": round(time.time() - started)}) + "\n"
            )
            log.flush()
            seen.clear()


def save(codec: JanusVQVAE, folder: Path) -> None:
    """The codec in fp16, with the processor that scales its pictures."""
    copy.deepcopy(codec).half().save_pretrained(folder)
    recipe.image_processor().save_pretrained(folder)


if __name__ == "__main__":
    main()

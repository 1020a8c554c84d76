"""Train the demo's SigLIP tower (once; its result is in qwen3_vlm/demo/bases/tower).

python scripts/train_tower.py --steps 2000 --out qwen3_vlm/demo/bases/tower --log scripts/train_tower.jsonl
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from transformers import SiglipImageProcessorPil

from qwen3_vlm.demo import tower as recipe
from qwen3_vlm.demo.world import CANVAS, scenes


def main() -> None:
    """Parse, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng, stream = random.Random(args.seed), scenes(f"tower-{args.seed}")
    model = recipe.TowerPretraining(recipe.tower_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.02)
    started = time.time()
    with args.log.open("w") as log:
        for step in range(1, args.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * step / args.steps) + 0.005)
            batch = recipe.scene_batch(stream, rng, args.batch_size)
            loss, right = model(
                recipe.to_pixel_values(batch.pixels),
                {head: torch.from_numpy(values) for head, values in batch.targets.items()},
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 50 == 0:
                record = {"step": step, "loss": loss.item(), **right, "seconds": time.time() - started}
                log.write(json.dumps({k: round(v, 4) for k, v in record.items()}) + "\n")
                log.flush()
    model.tower.half().save_pretrained(args.out)
    SiglipImageProcessorPil(size={"height": CANVAS, "width": CANVAS}).save_pretrained(args.out)


if __name__ == "__main__":
    main()

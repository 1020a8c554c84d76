"""Train the demo's Qwen3 text base (once; its result is in qwen3_vlm/demo/bases/text).

python scripts/train_text_base.py --steps 3000 --out qwen3_vlm/demo/bases/text --log scripts/train_text_base.jsonl
"""

import argparse
import json
import math
import random
import time
from itertools import islice
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

from qwen3_vlm.demo import text_base as recipe

SLOT_COUNTS = (8, 12, 16, 16)


def main() -> None:
    """Parse, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = recipe.train_tokenizer()
    tokenizer.save_pretrained(args.out)
    encoder, rng = recipe.Encoder(tokenizer), random.Random(args.seed)
    model = Qwen3ForCausalLM(recipe.base_config())
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    with_slots, text_only = recipe.samples(f"text-{args.seed}"), recipe.text_samples(f"facts-{args.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    started, seen = time.time(), {"slots": (0.0, 0.0), "text": (0.0, 0.0)}
    with args.log.open("w") as log:
        for step in range(1, args.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(step / 150, 0.5 + 0.5 * math.cos(math.pi * step / args.steps) + 0.005)
            kind = "text" if step % 5 == 0 else "slots"
            slots = 0 if kind == "text" else rng.choice(SLOT_COUNTS)
            batch = list(islice(text_only if kind == "text" else with_slots, args.batch_size))
            loss, right = recipe.loss_of(model, encoder.batch(batch, slots), slots)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            old = seen[kind] if step > 5 else (loss.item(), right)
            seen[kind] = (0.9 * old[0] + 0.1 * loss.item(), 0.9 * old[1] + 0.1 * right)
            if step % 50 == 0:
                record = {"step": step, "seconds": time.time() - started}
                record |= {
                    f"{name}_{what}": value
                    for name, pair in seen.items()
                    for what, value in zip(("loss", "right"), pair, strict=True)
                }
                log.write(json.dumps({k: round(v, 4) for k, v in record.items()}) + "\n")
                log.flush()
            if step % 400 == 0 or step == args.steps:
                model.save_pretrained(args.out)


if __name__ == "__main__":
    main()

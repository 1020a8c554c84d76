"""Train the demo's Qwen3 text base (once; its result is in qwen3_vlm/demo/bases/text).

python scripts/train_text_base.py --steps 1400 --out qwen3_vlm/demo/bases/text --log scripts/train_text_base.jsonl
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

SLOT_COUNTS = (8, 12, 16)
ROUGH_FROM = 0.4  # share of the steps over which the slots grow rough


def main() -> None:
    """Parse, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
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
    names, started = encoder.name_ids(), time.time()
    seen: dict[str, dict[str, float]] = {}
    with args.log.open("w") as log:
        for step in range(1, args.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(step / 150, 0.5 + 0.5 * math.cos(math.pi * step / args.steps) + 0.005)
            kind = "text" if step % 5 == 0 else "slots"
            slots = 0 if kind == "text" else rng.choice(SLOT_COUNTS)
            batch = list(islice(text_only if kind == "text" else with_slots, args.batch_size))
            roughness = min(1.0, step / (ROUGH_FROM * args.steps))
            loss, figures = recipe.loss_of(model, encoder.batch(batch, slots), slots, roughness, names)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            old = seen.get(kind, figures)
            seen[kind] = {name: 0.9 * old[name] + 0.1 * value for name, value in figures.items()}
            if step % 50 == 0:
                record = {"step": step, "roughness": roughness, "seconds": time.time() - started}
                record |= {f"{part}_{name}": value for part in seen for name, value in seen[part].items()}
                log.write(json.dumps({name: round(value, 4) for name, value in record.items()}) + "\n")
                log.flush()
    model.half().save_pretrained(args.out)


if __name__ == "__main__":
    main()

"""Train the demo's Qwen3 text base (once; its result is in qwen3_vlm/demo/bases/text).

It learns in two parts. The first is 3 layers that read facts and bags of keywords; the second puts a layer behind them
and adds grids of words and rows of sounds, to be read and to be written, without letting go of the first:

python scripts/train_text_base.py keywords --out runs/text_keywords --log scripts/train_text_base.jsonl
python scripts/train_text_base.py grids --start runs/text_keywords --out qwen3_vlm/demo/bases/text \
    --log scripts/train_text_grids.jsonl
"""

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from qwen3_vlm.demo import grid_tasks, word_grids
from qwen3_vlm.demo import text_base as recipe
from qwen3_vlm.demo.word_grids import Described
from qwen3_vlm.demo.world import scenes

SLOT_COUNTS = (8, 12, 16)
ROUGH_FROM = 0.4  # share of the steps over which places grow rough
WRITING = 0.6  # how rough the places are that it has itself written, as a share
GRID_BATCH, SOUND_BATCH = 32, 16
KEPT = 200  # steps between two copies on the disk


class Part(NamedTuple):
    """How one part is trained."""

    shares: dict[str, float]  # of the steps
    steps: int
    warm_up: int
    batch_size: int  # conversations
    adam_rate: float
    muon_rate: float


PARTS = {
    "keywords": Part({"slots": 0.8, "text": 0.2}, 1400, 150, 64, 2e-3, 0.0),
    "grids": Part(
        {
            "slots": 0.13, "text": 0.05,
            "read_grid": 0.31, "write_grid": 0.30, "read_sounds": 0.06, "write_sounds": 0.15,
        }, 1600, 80, 48, 2e-3, 0.02,
    ),
}  # fmt: skip
Figures = dict[str, float]
Task = Callable[[float], tuple[Tensor, Figures]]


def main() -> None:
    """Parse, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--start", type=Path, help="what the first part has made; the second needs it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    if (args.start is None) != (args.part == "keywords"):
        parser.error("the part grids needs --start, the part keywords none")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.start is None:
        recipe.train_tokenizer().save_pretrained(args.out)
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(args.start / name, args.out / name)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = recipe.deepened(args.start) if args.start else Qwen3ForCausalLM(recipe.base_config())
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    part = PARTS[args.part]
    train(model, tasks(model, tokenizer, part.batch_size, args.seed), part, args)
    model.half().save_pretrained(args.out)


def train(model: Qwen3ForCausalLM, tasks: dict[str, Task], part: Part, args: argparse.Namespace) -> None:
    """One task a step; a line in the log every 50 steps."""
    rng, started = random.Random(args.seed), time.time()
    optimizers = recipe.optimizers(model, part.adam_rate, part.muon_rate)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    seen: dict[str, Figures] = {}
    with args.log.open("w") as log:
        for step in range(1, part.steps + 1):
            slow = min(step / part.warm_up, 0.5 + 0.5 * math.cos(math.pi * step / part.steps) + 0.005)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * slow
            if args.part == "keywords":
                name = "text" if step % 5 == 0 else "slots"
            else:
                name = rng.choices(list(part.shares), list(part.shares.values()))[0]
            roughness = min(1.0, step / (ROUGH_FROM * part.steps))
            loss, figures = tasks[name](roughness)
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            old = seen.get(name, figures)
            seen[name] = {key: 0.9 * old[key] + 0.1 * value for key, value in figures.items()}
            if step % 50 == 0:
                record = {"step": step, "roughness": roughness, "seconds": time.time() - started}
                record |= {f"{task}_{key}": value for task in sorted(seen) for key, value in seen[task].items()}
                log.write(json.dumps({key: round(value, 4) for key, value in record.items()}) + "\n")
                log.flush()
            if step % KEPT == 0:
                model.save_pretrained(args.out)  # to look at


def by_length(stream: Iterator[Described], size: int, batches: int) -> Iterator[Described]:
    """The same samples in batches of about one length, so that little is padding."""
    rng = random.Random(0)
    while True:
        pool = sorted(islice(stream, size * batches), key=lambda described: len(described.places))
        for first in rng.sample(range(0, len(pool), size), batches):
            yield from pool[first : first + size]


def tasks(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int) -> dict[str, Task]:
    """The next batch's loss of each task, at a roughness."""
    encoder = recipe.Encoder(tokenizer)
    names, wrong = encoder.name_ids(), grid_tasks.confusable(encoder.ids)
    conversations = {"slots": recipe.samples(f"text-{seed}"), "text": recipe.text_samples(f"facts-{seed}")}
    described = {
        "grid": (word_grids.grids(scenes(f"grids-{seed}"), random.Random(f"cells-{seed}")), GRID_BATCH),
        "sounds": (by_length(word_grids.spoken_rows(random.Random(f"sounds-{seed}")), SOUND_BATCH, 8), SOUND_BATCH),
    }
    rng, end = random.Random(seed), tokenizer.eos_token_id

    def talk(name: str, roughness: float) -> tuple[Tensor, Figures]:
        slots = rng.choice(SLOT_COUNTS) if name == "slots" else 0
        batch = encoder.batch(list(islice(conversations[name], batch_size)), slots)
        return recipe.loss_of(model, batch, slots, roughness, names)

    def grid(name: str, kind: str, roughness: float) -> tuple[Tensor, Figures]:
        stream, count = described[kind]
        batch = grid_tasks.grid_batch(list(islice(stream, count)), name, kind, encoder.ids, end)
        embedding = model.model.embed_tokens.weight
        rough = roughness * (WRITING if name == "write" else 1.0)
        inputs = grid_tasks.grid_inputs(embedding, batch, wrong[kind], rough)
        hidden = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        if name == "write":
            loss, figure = grid_tasks.written_loss(hidden, embedding, batch, end)
            return loss, {"loss": figure}
        return recipe.answer_loss(model, hidden, batch.labels, names)

    return {
        "slots": lambda roughness: talk("slots", roughness),
        "text": lambda roughness: talk("text", roughness),
        **{
            f"{name}_{kind}": lambda roughness, name=name, kind=kind: grid(name, kind, roughness)
            for name in ("read", "write")
            for kind in described
        },
    }


if __name__ == "__main__":
    main()

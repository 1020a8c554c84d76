"""Training new vocabulary rows: this package against the two usual ways, on the same model, batches and machine.

    python benchmarks/stage3_rows.py              # V = 151,936 + 20,544, width 1024, four layers; eight minutes
    python benchmarks/stage3_rows.py --layers 28  # Qwen3-0.6B's depth

*Ours*: TokenLM; two blocks never joined, the head at graded positions only. *Hook*: the matrices resized, all of their
rows trained, a gradient hook that zeroes those of the base. *PEFT*: the matrices resized, `trainable_token_indices`.
All start from the same weights, see the same batches, recompute layers, and step with the same AdamW (fused, no weight
decay: with a hook it would move the base). What is trained has the base's dtype on all sides; for bf16 ours is run a
second time with fp32 master rows, as `TokenLM.grow` makes them. Each run has a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import PeakMemory, checkpoint_layers, last_json_line, random_frozen, show, write_result
from narrow_products import narrow_products
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwen3_vlm.models.precision import compute_in_fp32
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.models.vocabulary_rows import fresh_rows
from qwen3_vlm.tokenization.sequences import build_sequence
from qwen3_vlm.tokenization.token_space import AudioIdentity, ImageIdentity, TextIdentity, TokenSpace

BASE_ROWS, IMAGE_CODES, AUDIO_CODES = 151_936, 16_384, (1024,) * 4  # with 64 specials: 20,544 new rows
GRID, CAPTION = (15, 15), 25  # 225 image ids and 25 text ids: sequences of 255
CASES = ("fp32-i2t", "fp32-t2i", "bf16-i2t", "bf16-t2i", "fp32-i2t-untied")
WAYS = ("hook", "peft", "ours")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GOALS = {"hook": {"memory": 0.15, "time": 0.5}, "peft": {"memory": 0.20, "time": 0.6}}
ENVIRONMENT = {  # memory that is freed goes back at once, so that the peak is what is held
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**20),
    "MALLOC_ARENA_MAX": "2",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}
Step = Callable[[dict[str, Tensor]], Tensor]


def token_space(base_rows: int) -> TokenSpace:
    """The real sizes, without padding rows: the peers have no way to leave such rows out of their softmax."""
    text = TextIdentity("Qwen/Qwen3-0.6B", base_rows, base_rows, "0" * 64)
    image = ImageIdentity("vq", "janus_vqvae", IMAGE_CODES, (240, 240), GRID, "1" * 64)
    audio = AudioIdentity("codec", "dac", AUDIO_CODES, 16_000, 1, 320, 2.0, "2" * 64)
    return TokenSpace.build(text, image, audio)


def make_base(options: argparse.Namespace) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=options.base_rows,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        num_key_value_heads=max(1, options.width // 128),
        head_dim=128,
        tie_word_embeddings=options.tied,
        attn_implementation="sdpa",
    )
    return random_frozen(lambda: Qwen3ForCausalLM(config), DTYPES[options.dtype])


def make_batches(options: argparse.Namespace) -> list[dict[str, Tensor]]:
    """One sequence to warm up and `steps` batches of made-up records, the same for every way."""
    space, generator = token_space(options.base_rows), np.random.default_rng(0)
    image = space.range_of("image")

    def batch(size: int) -> dict[str, Tensor]:
        rows = []
        for _ in range(size):
            text = generator.integers(0, space.text.tokenizer_size, CAPTION)
            grid = generator.integers(image.first, image.last + 1, GRID[0] * GRID[1])
            rows.append(build_sequence(space, options.task, {"text": text, "image": grid}))
        return {
            "input_ids": torch.from_numpy(np.stack([row.input_ids for row in rows])).long(),
            "labels": torch.from_numpy(np.stack([row.labels for row in rows])).long(),
        }

    return [batch(1), *(batch(options.batch_size) for _ in range(options.steps))]


class Way(ABC):
    """One way to train the new rows: `step` gives a loss, `trained` what the optimizer gets, `rows` the new rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.space = options, token_space(options.base_rows)
        self.first = options.base_rows
        base = make_base(options)
        made = fresh_rows(base, self.space.vocab_size_total - self.first, num_used=self.first)
        self.initial = [rows.to(DTYPES[options.dtype]) for rows in made if rows is not None]  # same values everywhere
        self.model: Any = self.prepare(base)
        self.set_rows()
        checkpoint_layers(self.model)
        self.model.train()

    @abstractmethod
    def prepare(self, base: Any) -> nn.Module:
        """The model whose rows are trained, made of the base in place."""

    @abstractmethod
    def matrices(self) -> list[Tensor]:
        """What holds the new rows: of the embedding and, untied, of the head."""

    def rows(self, matrix: Tensor) -> Tensor:
        return matrix[-len(self.initial[0]) :]

    def set_rows(self) -> None:
        with torch.no_grad():
            for matrix, initial in zip(self.matrices(), self.initial, strict=True):
                self.rows(matrix).copy_(initial)

    def arithmetic(self) -> AbstractContextManager[None]:
        return narrow_products()

    def gradients(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Of the new rows, at the initial weights. The last thing that is done with a model.

        The trained tensors keep their values but become fp32: rounded to bf16, a gradient has lost more than what is
        to be compared.
        """
        self.set_rows()
        self.model.zero_grad(set_to_none=True)
        for matrix in self.matrices():
            matrix.data = matrix.data.float()
        with self.arithmetic():
            self.model(**batch).loss.backward()
        return [self.rows(matrix.grad).clone() for matrix in self.matrices() if matrix.grad is not None]


class Ours(Way):
    def prepare(self, base: Any) -> nn.Module:
        model = TokenLM.grow(base, self.space)
        if not self.options.masters:
            for rows in model.row_parameters().values():
                rows.data = rows.data.to(model.dtype)
        return model

    def matrices(self) -> list[Tensor]:
        return list(self.model.row_parameters().values())

    def arithmetic(self) -> AbstractContextManager[None]:
        return nullcontext()  # it widens by itself


class Hook(Way):
    def prepare(self, base: Any) -> nn.Module:
        base.resize_token_embeddings(self.space.vocab_size_total, mean_resizing=False)
        base.requires_grad_(False)
        self.model = base
        for matrix in self.matrices():
            matrix.requires_grad_(True).register_hook(self.zero_base)
        return base

    def zero_base(self, gradient: Tensor) -> Tensor:
        gradient[: self.first].zero_()  # in place: a mask or a clone would cost another matrix
        return gradient

    def matrices(self) -> list[Tensor]:
        table, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        return [table] if table is head else [table, head]

    def gradients(self, batch: dict[str, Tensor]) -> list[Tensor]:
        compute_in_fp32(self.model)  # where ours is too; nothing changes for an fp32 base
        return super().gradients(batch)


class Peft(Way):
    def prepare(self, base: Any) -> nn.Module:
        from peft import TrainableTokensConfig, get_peft_model

        tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
        base.resize_token_embeddings(self.space.vocab_size_total, mean_resizing=False)
        config = TrainableTokensConfig(
            token_indices=list(range(self.first, self.space.vocab_size_total)),
            target_modules=["embed_tokens"] if tied else ["embed_tokens", "lm_head"],
        )
        return get_peft_model(base, config, autocast_adapter_dtype=False)

    def matrices(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


SIDES: dict[str, type[Way]] = {"ours": Ours, "hook": Hook, "peft": Peft}


def run_side(options: argparse.Namespace) -> dict[str, Any]:
    """One way in this process: a warm-up step, then the measured ones, of which the best counts."""
    batches = make_batches(options)
    way = SIDES[options.side](options)
    optimizer = torch.optim.AdamW(way.matrices(), lr=1e-4, weight_decay=0.0, fused=True)
    seconds, cpu_seconds = [], []
    with way.arithmetic(), PeakMemory() as memory:
        for batch in batches:
            begin, cpu_begin = time.perf_counter(), time.process_time()
            loss = way.model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - begin)
            cpu_seconds.append(time.process_time() - cpu_begin)
    if options.gradients:
        del optimizer
        torch.save(way.gradients(batches[0]), options.gradients)
    labels = batches[1]["labels"]
    return {
        "seconds": min(seconds[1:]),
        "cpu_seconds": min(cpu_seconds[1:]),  # of all threads: tells a busy machine from slow code
        "peak_mib_over_model": (memory.peak - memory.start) / 2**20,
        "loaded_mib": memory.start / 2**20,
        "loss": loss.item(),
        "tokens": labels.numel(),
        "graded_tokens": int((labels != -100).sum()),
    }


def run_child(side: str, *arguments: object) -> dict[str, Any]:
    """A way in a process of its own; later arguments win over the command line's."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, *map(str, arguments)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | ENVIRONMENT)
    return last_json_line(child.stdout)


def compare_case(dtype: str, task: str, tied: bool, folder: Path) -> dict[str, Any]:
    """All three ways of one case, and ours over each of the others."""
    case = ("--dtype", dtype, "--task", task, "--tied" if tied else "--no-tied")
    files = {way: folder / f"{way}.pt" for way in ("hook", "ours")}
    result: dict[str, Any] = {"dtype": dtype, "task": task, "tied": tied}
    for way in WAYS:
        result[way] = run_child(way, *case, *(("--gradients", files[way]) if way in files else ()))
    if dtype == "bf16" and task == "i2t":
        result["ours_masters"] = run_child("ours", *case, "--masters")["peak_mib_over_model"]
    ours = result["ours"]
    for way in ("hook", "peft"):
        peer = result[way]
        result[f"to_{way}"] = {
            "memory": ours["peak_mib_over_model"] / peer["peak_mib_over_model"],
            "time": ours["seconds"] / peer["seconds"],
            "cpu_time": ours["cpu_seconds"] / peer["cpu_seconds"],
        }
    mine, theirs = (torch.load(files[way], weights_only=True) for way in ("ours", "hook"))
    result["gradient_difference"] = max(_relative(one, other) for one, other in zip(mine, theirs, strict=True))
    report_case(result)
    return result


def _relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ ÷ ‖expected‖."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def report_case(result: dict[str, Any]) -> None:
    rows = [("", "".join(f"{way:>10}" for way in WAYS) + f"{'÷ hook':>10}{'÷ peft':>10}")]
    for name, key, ratio, form in (
        ("peak MiB over the loaded model", "peak_mib_over_model", "memory", ".0f"),
        ("seconds per step", "seconds", "time", ".2f"),
        ("CPU seconds per step", "cpu_seconds", "cpu_time", ".2f"),
    ):
        values = [format(result[way][key], form) for way in WAYS]
        values += [format(result[f"to_{way}"][ratio], ".3f") for way in ("hook", "peft")]
        rows.append((name, "".join(f"{value:>10}" for value in values)))
    rows.append(("gradient of the new rows, ours − hook", f"{result['gradient_difference']:.1e} of its norm"))
    if "ours_masters" in result:
        peak = result["ours_masters"]
        ratios = "".join(f"{peak / result[way]['peak_mib_over_model']:>10.3f}" for way in ("hook", "peft"))
        rows.append(("peak MiB of ours with fp32 master rows", f"{peak:>30.0f}{ratios}"))
    counts = result["ours"]
    title = f"{result['dtype']}, {result['task']} ({counts['graded_tokens']} of {counts['tokens']} graded), "
    show(title + ("tied" if result["tied"] else "untied"), rows)


def memory_by_base(options: argparse.Namespace, usual: float) -> dict[str, float]:
    """Our peak over the loaded model for other base vocabularies; `usual` is that of the whole one."""
    found = {options.base_rows: usual}
    for rows in (options.base_rows // 4, options.base_rows * 2):
        found[rows] = run_child("ours", "--base-rows", rows)["peak_mib_over_model"]
    lines = [(f"{count:,} base rows", f"{found[count]:.0f}") for count in sorted(found)]
    show("Ours, fp32, i2t, tied: peak MiB over the loaded model", lines)
    return {str(count): found[count] for count in sorted(found)}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases:
            dtype, task, *untied = name.split("-")
            results[name] = compare_case(dtype, task, not untied, Path(folder))
    whole = results.get("fp32-i2t")
    return {
        "cases": results,
        "goals": GOALS,
        "ours_by_base_rows": memory_by_base(options, whole["ours"]["peak_mib_over_model"]) if whole else None,
        "settings": {name: value for name, value in vars(options).items() if name not in ("side", "out", "gradients")},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--base-rows", type=int, default=BASE_ROWS)
    parser.add_argument("--batch-size", type=int, default=2, help="sequences of 255 ids")
    parser.add_argument("--steps", type=int, default=1, help="measured steps of each way, after one that warms up")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=["i2t", "t2i"], default="i2t", help=argparse.SUPPRESS)
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, default=True, help=argparse.SUPPRESS)
    parser.add_argument("--masters", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stage3_rows.json")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.side:
        print(json.dumps(run_side(options)))
        return
    write_result(options.out, compare(options))


if __name__ == "__main__":
    main()

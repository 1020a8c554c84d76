"""One stage-1 optimizer step at full size on a small machine: Qwen3-8B's shape, SigLIP2 SO400M, 82,445,824 parameters.

    python benchmarks/full_size.py             # 24 GB of memory, some 20 of them free
    python benchmarks/full_size.py --layers 2  # a quick look

Weights are random (what is measured does not depend on their values), stored in bf16 and frozen; the connector and
its AdamW states are fp32. One row of packed samples goes through tower, connector, language model and loss, backward
to the connector, and the optimizer steps: once on a shorter row to warm up, once measured. Each decoder layer is
recomputed in the backward pass, so that a row long enough to use the machine well fits; recomputation is not counted
as useful.
"""

import argparse
import gc
import os
import sys
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from length_mix import make_samples
from measuring import (
    PeakMemory,
    checkpoint_layers,
    connector_flops,
    llm_flops,
    matmul_peak,
    random_frozen,
    resident_bytes,
    show,
    tower_flops,
    write_result,
)
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from qwen3_vlm.data.collate import Collator, LoadedSample
from qwen3_vlm.models.bases import join
from qwen3_vlm.models.precision import bf16_is_fast
from qwen3_vlm.train.stages import apply_stage, format_table, get_stage

LATENTS = 64
IMAGE_TOKEN_ID = 151_669
TEXT_IDS = 151_643
WARM_UP_TOKENS = 160


def qwen3_8b(options: argparse.Namespace) -> Qwen3Config:
    """The published configuration of Qwen/Qwen3-8B-Base; options may make it smaller."""
    return Qwen3Config(
        vocab_size=options.vocab_size,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 128,
        num_key_value_heads=max(1, options.width // 512),
        head_dim=128,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )


def so400m(options: argparse.Namespace) -> SiglipVisionConfig:
    """The published vision configuration of google/siglip2-so400m-patch14-384."""
    return SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=options.tower_layers,
        num_attention_heads=16,
        image_size=options.image_size,
        patch_size=14,
        attn_implementation="sdpa",
        vision_use_head=False,
    )


def build_model(options: argparse.Namespace) -> Any:
    """Both bases in bf16 and a fresh connector, recomputing its decoder layers in the backward pass."""
    llm = random_frozen(lambda: Qwen3ForCausalLM(qwen3_8b(options)), torch.bfloat16)
    tower = random_frozen(lambda: SiglipVisionModel(so400m(options)), torch.bfloat16, seed=1)
    checkpoint_layers(llm)
    for layer in llm.model.layers[: options.kept_layers]:
        layer.gradient_checkpointing = False
    torch.manual_seed(0)
    model = join(llm, tower, image_token_id=IMAGE_TOKEN_ID, num_latents=LATENTS)
    print(format_table(apply_stage(model, get_stage("stage1_align"))), flush=True)
    return model


def make_batch(options: argparse.Namespace, room: int | None = None) -> tuple[Any, list[LoadedSample]]:
    """Samples of stage 1's lengths, as many as fit into one row of `room` (or `tokens`), with a picture each."""
    room = room or options.tokens
    candidates = make_samples(
        "pretrain",
        max(1, options.tokens // 70),
        image_tokens=LATENTS,
        image_token_id=IMAGE_TOKEN_ID,
        text_ids=min(TEXT_IDS, options.vocab_size),
        max_seq_len=options.tokens,
    )
    row: list[LoadedSample] = []
    for loaded in candidates:
        if sum(len(chosen.sample.input_ids) for chosen in [*row, loaded]) <= room:
            row.append(loaded)
    processor: Any = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    batch = Collator(processor, packing=True, max_image_pixels=1)([row])
    side = options.image_size
    batch.inputs["pixel_values"] = torch.randn(len(row), 3, side, side, generator=torch.Generator().manual_seed(0))
    return batch, row


def train_step(model: Any, batch: Any, optimizer: torch.optim.Optimizer) -> tuple[float, dict[str, float]]:
    """One optimizer step; the loss and how long each part took."""
    marks = [time.perf_counter()]
    inputs = dict(batch.inputs)
    fast = bf16_is_fast("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16) if fast else nullcontext():
        inputs["patch_embeddings"] = model.encode_patches(inputs.pop("pixel_values"))
        marks.append(time.perf_counter())
        loss = model(**inputs, num_items_in_batch=batch.num_label_tokens).loss
    marks.append(time.perf_counter())
    loss.backward()
    marks.append(time.perf_counter())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    marks.append(time.perf_counter())
    names = ("tower", "forward", "backward", "optimizer")
    return loss.item(), {name: end - start for name, (start, end) in zip(names, pairwise(marks), strict=True)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Build, warm up, measure."""
    before = resident_bytes()
    peak = matmul_peak()
    with PeakMemory() as memory:
        model = build_model(options)
        batch, row = make_batch(options)
        gc.collect()
        loaded = resident_bytes()
        optimizer = torch.optim.AdamW(model.connector_parameters().values(), lr=1e-4, weight_decay=0.0, fused=True)
        warm_up_loss, _ = train_step(model, make_batch(options, room=min(options.tokens, WARM_UP_TOKENS))[0], optimizer)
        loss, seconds = train_step(model, batch, optimizer)
    total = sum(seconds.values())
    flops = useful_flops(model, row, options)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens": batch.num_tokens,
        "graded_tokens": batch.num_label_tokens,
        "pictures": len(row),
        "loss": loss,
        "warm_up_loss": warm_up_loss,
        "seconds": {**seconds, "total": total},
        "tokens_per_second": batch.num_tokens / total,
        "peak_gb": memory.peak / 1e9,
        "loaded_gb": loaded / 1e9,
        "process_gb": before / 1e9,
        "useful_flops": flops,
        "matmul_peak_flops_per_second": peak,
        "utilisation": sum(flops.values()) / (total * peak["peak"]),
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
    }


def useful_flops(model: Any, row: list[LoadedSample], options: argparse.Namespace) -> dict[str, float]:
    """FLOPs that the step needs, by part."""
    lengths = [len(loaded.sample.input_ids) for loaded in row]
    graded = sum(loaded.sample.answer_length for loaded in row)
    patches = (options.image_size // 14) ** 2
    return {
        "tower": tower_flops(model.model.vision_tower, len(row), patches),
        "connector": connector_flops(model.config, len(row), patches),
        "language_model": llm_flops(model.model.language_model, lengths, graded, options.vocab_size),
    }


def report(result: dict[str, Any]) -> None:
    """Print what was measured."""
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items())
    peak = result["matmul_peak_flops_per_second"]["peak"]
    rows = [
        ("parameters", f"{result['parameters']:,}, of them trainable {result['trainable_parameters']:,}"),
        ("step", f"{result['pictures']} pictures, {result['tokens']} tokens, {result['graded_tokens']} graded"),
        ("seconds", seconds),
        ("peak memory", f"{result['peak_gb']:.2f} GB (model, connector and process: {result['loaded_gb']:.2f} GB)"),
        ("useful work", f"{sum(result['useful_flops'].values()) / 1e12:.2f} TFLOP"),
        ("utilisation", f"{result['utilisation']:.3f} of the measured matmul peak, {peak / 1e9:,.0f} GFLOP/s"),
        ("loss", f"{result['warm_up_loss']:.4f} → {result['loss']:.4f}"),
    ]
    show("Full-size stage-1 step", rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--tower-layers", type=int, default=27)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--image-size", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=512, help="room in the packed row")
    parser.add_argument("--kept-layers", type=int, default=0, help="decoder layers that keep their activations")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "full_size.json")
    return parser.parse_args()


def return_freed_memory() -> None:
    """Start again with an allocator that gives large blocks back at once; by default glibc keeps about 2 GB here."""
    settings = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
    if any(name not in os.environ for name in settings):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


def main() -> None:
    options = parse()
    return_freed_memory()
    result = run(options)
    report(result)
    write_result(options.out, result)


if __name__ == "__main__":
    main()

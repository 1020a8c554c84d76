"""Stage 1 of this package against the usual loop, on the same model, the same samples and the same machine.

    python benchmarks/stage1_step.py            # Qwen3-0.6B's shape, vocabulary 151,936; some minutes
    python benchmarks/stage1_step.py --layers 4 # a quick look

*Ours*: samples packed into sequences, no attention across samples, the head at supervised positions only, in chunks.
*Usual*: plain transformers as in most training scripts: random batches padded to their longest sample, logits at
every position, `CrossEntropyLoss`. Both start from the tower's outputs (the tower is frozen and would cost both the
same), train the same connector from the same weights with AdamW, in the same precision, and see the same samples
once. Each side runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from length_mix import MIXES, make_samples
from measuring import (
    PeakMemory,
    checkpoint_layers,
    connector_flops,
    last_json_line,
    llm_flops,
    matmul_peak,
    random_frozen,
    show,
    write_result,
)
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from qwen3_vlm.data.collate import Collator, LoadedSample, plan_epoch
from qwen3_vlm.models.bases import join
from qwen3_vlm.models.precision import bf16_is_fast
from qwen3_vlm.train.stages import apply_stage, get_stage

VISION_WIDTH, LATENTS = 1152, 64  # SigLIP2 SO400M, and the connector's default
TEXT_IDS = 151_643  # ordinary ids of the Qwen3 tokenizer
Step = Callable[[], tuple[Tensor, int]]  # the summed loss of a micro-batch, and how many positions it computed


def build_model(options: argparse.Namespace) -> tuple[Any, Qwen3ForCausalLM, torch.dtype]:
    """Qwen3-0.6B's shape with a connector, and the plain language model inside it; the tower stays without memory."""
    dtype = torch.bfloat16 if bf16_is_fast("cpu") else torch.float32
    text = Qwen3Config(
        vocab_size=options.vocab_size,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        num_key_value_heads=max(1, options.width // 128),
        head_dim=128,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    llm = random_frozen(lambda: Qwen3ForCausalLM(text), dtype)
    with torch.device("meta"):
        tower = SiglipVisionModel(
            SiglipVisionConfig(hidden_size=VISION_WIDTH, num_hidden_layers=1, num_attention_heads=16)
        )
    torch.manual_seed(0)
    model = join(llm, tower, image_token_id=TEXT_IDS + 26, num_latents=LATENTS)
    if options.checkpointing:
        checkpoint_layers(llm)
    apply_stage(model, get_stage("stage1_align"))
    return model, llm, dtype


def load_samples(options: argparse.Namespace) -> list[LoadedSample]:
    samples = make_samples(
        options.mix,
        options.samples,
        image_tokens=LATENTS,
        image_token_id=TEXT_IDS + 26,
        text_ids=min(TEXT_IDS, options.vocab_size),
        max_seq_len=options.max_seq_len,
        seed=options.seed,
    )
    generator = torch.Generator().manual_seed(options.seed)
    features = torch.randn(len(samples), 1, options.patches, VISION_WIDTH, generator=generator)
    return [LoadedSample(s.index, s.sample, None, f) for s, f in zip(samples, features, strict=True)]


def our_steps(model: Any, samples: Sequence[LoadedSample], options: argparse.Namespace) -> Iterator[Step]:
    """The package's plan, collation and model; as many real tokens per micro-batch as the usual loop has."""
    lengths = [len(loaded.sample.input_ids) for loaded in samples]
    rows = max(1, round(options.batch_size * sum(lengths) / len(lengths) / options.max_seq_len))
    plan = plan_epoch(
        lengths, batch_size=rows, max_seq_len=options.max_seq_len, packing=True, seed=options.seed, epoch=0
    )
    processor: Any = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    collate = Collator(processor, packing=True, max_image_pixels=1)
    for micro_batch in plan:
        batch = collate([[samples[index] for index in row] for row in micro_batch])

        def step(batch: Any = batch) -> tuple[Tensor, int]:
            return model(**batch.inputs, num_items_in_batch=1).loss, batch.inputs["input_ids"].numel()

        yield step


def usual_steps(model: Any, llm: Any, samples: Sequence[LoadedSample], options: argparse.Namespace) -> Iterator[Step]:
    """The loop that most scripts have: pad, embed, scatter, all logits, CrossEntropyLoss."""
    loss_function = nn.CrossEntropyLoss(ignore_index=-100, reduction="sum")
    for start in range(0, len(samples), options.batch_size):
        group = samples[start : start + options.batch_size]
        ids = _pad([loaded.sample.input_ids for loaded in group], 0)
        labels = _pad([loaded.sample.labels for loaded in group], -100)
        mask = _pad([[1] * len(loaded.sample.input_ids) for loaded in group], 0)
        features = torch.cat([loaded.features for loaded in group if loaded.features is not None])

        def step(
            ids: Tensor = ids, labels: Tensor = labels, mask: Tensor = mask, features: Tensor = features
        ) -> tuple[Tensor, int]:
            is_image = ids == TEXT_IDS + 26
            embeddings = llm.get_input_embeddings()(ids.masked_fill(is_image, 0))
            images = model.model.connect(features).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(is_image.unsqueeze(-1), images)
            logits = llm(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits.float()
            shifted = logits[..., :-1, :].contiguous().view(-1, logits.shape[-1])
            targets = labels[..., 1:].contiguous().view(-1)
            return loss_function(shifted, targets), ids.numel()

        yield step


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def run_side(options: argparse.Namespace) -> dict[str, Any]:
    """One side in this process: a warm-up step, then every sample once."""
    model, llm, dtype = build_model(options)
    samples = load_samples(options)

    def steps_of(part: Sequence[LoadedSample]) -> list[Step]:
        return list(
            our_steps(model, part, options) if options.side == "ours" else usual_steps(model, llm, part, options)
        )

    steps, warm_up = steps_of(samples), steps_of(samples[:2])
    optimizer = torch.optim.AdamW(model.connector_parameters().values(), lr=1e-4, weight_decay=0.0)
    tokens = sum(len(loaded.sample.input_ids) for loaded in samples)
    graded = sum(loaded.sample.answer_length for loaded in samples)
    per_step = graded * options.accumulation / len(steps)
    losses, seconds, cpu_seconds, positions = 0.0, 0.0, 0.0, 0
    with PeakMemory() as memory:
        for number, step in enumerate([warm_up[0], *steps]):
            begin, cpu_begin = time.perf_counter(), time.process_time()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss, computed = step()
            (loss / per_step).backward()
            if number % options.accumulation == 0 or number == len(steps):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if number:  # the first one warms up
                seconds += time.perf_counter() - begin
                cpu_seconds += time.process_time() - cpu_begin
                losses += loss.item()
                positions += computed
    lengths = [len(loaded.sample.input_ids) for loaded in samples]
    flops = llm_flops(llm.model, lengths, graded, options.vocab_size)
    flops += connector_flops(model.config, len(samples), options.patches)
    return {
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # of all threads: tells a busy machine from slow code
        "peak_mib_over_model": (memory.peak - memory.start) / 2**20,
        "loss": losses / graded,
        "useful_flops_per_second": flops / seconds,
        "micro_batches": len(steps),
        "positions_per_real_token": positions / tokens,
        "real_tokens": tokens,
        "graded_tokens": graded,
        "dtype": str(dtype).removeprefix("torch."),
    }


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides, each in a child process, best of `rounds`; and the machine's matmul peak beside them."""
    best: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for side in ("usual", "ours"):
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result = last_json_line(child.stdout)
            if side not in best or result["tokens_per_second"] > best[side]["tokens_per_second"]:
                best[side] = result
            print(f"{side}: {result['tokens_per_second']:,.0f} real tokens/s", flush=True)
    peak = matmul_peak()
    for result in best.values():
        result["utilisation"] = result["useful_flops_per_second"] / peak["peak"]
    ours, usual = best["ours"], best["usual"]
    return {
        "speed_ratio": ours["tokens_per_second"] / usual["tokens_per_second"],
        "memory_ratio": ours["peak_mib_over_model"] / usual["peak_mib_over_model"],
        "loss_difference": abs(ours["loss"] - usual["loss"]),
        "ours": ours,
        "usual": usual,
        "matmul_peak_flops_per_second": peak,
        "settings": {name: value for name, value in vars(options).items() if name not in ("side", "out")},
    }


def report(result: dict[str, Any]) -> None:
    """Print the comparison."""
    rows = [("", f"{'ours':>12} {'usual':>12}")]
    for name, label, unit in (
        ("tokens_per_second", "real tokens per second", ",.0f"),
        ("peak_mib_over_model", "peak MiB over the loaded model", ",.0f"),
        ("utilisation", "useful FLOPs ÷ (time × matmul peak)", ".3f"),
        ("loss", "loss per graded token", ".4f"),
        ("positions_per_real_token", "positions computed per real token", ".2f"),
        ("micro_batches", "micro-batches", "d"),
    ):
        values = [format(result[side][name], unit) for side in ("ours", "usual")]
        rows.append((label, f"{values[0]:>12} {values[1]:>12}"))
    show(f"Stage-1 step, {result['ours']['dtype']}, {result['settings']['mix']} lengths", rows)
    print(f"\n{result['speed_ratio']:.2f}× the speed at {result['memory_ratio']:.2f}× the memory")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--patches", type=int, default=729, help="per picture: 27 × 27 at 384 pixels")
    parser.add_argument("--mix", choices=sorted(MIXES), default="pretrain+instruct")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=16, help="samples per micro-batch of the usual loop")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    # 48 samples of seed 2 are padded like many samples are: 2.8 positions per real token at 16 to a batch.
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--side", choices=["ours", "usual"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stage1_step.json")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.side:
        print(json.dumps(run_side(options)))
        return
    result = compare(options)
    report(result)
    write_result(options.out, result)


if __name__ == "__main__":
    main()

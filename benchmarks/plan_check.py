"""The planner's figures against what is counted and measured on this machine: bytes, FLOPs, and the full-size step.

    python benchmarks/plan_check.py          # three minutes on two busy cores

Bytes are those of PyTorch's own allocator (the profiler's memory events: every allocation and release, temporaries
inside of kernels too), at their highest in one optimizer step beside the loaded model and the optimizer's state. FLOPs
are those of `torch.utils.flop_counter`. The demo's models are the real ones; the wider ones have random weights and
Qwen3-0.6B's width and vocabulary, with two layers. The full size is compared with what full_size.py measured and wrote
down.
"""

import argparse
import gc
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import checkpoint_layers, random_frozen, show, write_result
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from qwen3_vlm.config import load_config
from qwen3_vlm.models.base_divergence import BaseDivergence
from qwen3_vlm.models.bases import join
from qwen3_vlm.models.lora import add_lora
from qwen3_vlm.models.losses import CACHE_BYTES
from qwen3_vlm.models.precision import BLOCK_BYTES
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.tokenization.token_space import ImageIdentity, TextIdentity, TokenSpace
from qwen3_vlm.train.planner import model_of
from qwen3_vlm.train.planner_formulas import (
    executed_flops,
    step_memory,
    trainable_parameters,
    useful_flops,
)
from qwen3_vlm.train.planner_shapes import ConnectorShape, LoraShape, read_tower_shape, text_shape, tower_shape
from qwen3_vlm.train.planner_step import BF16, FP32, Batch, HeldText, Model, Numerics
from qwen3_vlm.train.stages import apply_stage, get_stage

ROOT = Path(__file__).parent.parent
CPU_FP32 = Numerics(FP32, FP32, FP32, autocast=False, dropout_mask=FP32, block_bytes=CACHE_BYTES)


@dataclass
class Case:
    """A model that is there, and the same in the planner's words."""

    name: str
    torch_model: Any
    model: Model
    batch: Batch
    inputs: dict[str, torch.Tensor]
    checkpointing: bool = False
    anchor: Callable[[torch.Tensor], torch.Tensor] | None = None  # the KL of text, as the models take it
    numerics: Numerics = CPU_FP32


def text_config(width: int, layers: int, vocabulary: int, *, tied: bool = True) -> Qwen3Config:
    """A Qwen3 of any size, as narrow in its head's width as in its own."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        num_key_value_heads=max(1, width // 128),
        head_dim=min(128, width // 2),
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )


def vlm_case(
    name: str,
    text: Qwen3Config,
    *,
    rows: int,
    length: int,
    graded: int,
    pictures: int,
    side: int = 112,
    lora: LoraShape | None = None,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    packed: bool = True,
) -> Case:
    """Stage 1, or stage 2 with an adapter, over a small tower of patches of 14 pixels."""
    vision = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=side,
        patch_size=14,
        vision_use_head=False,
        attn_implementation="sdpa",
    )
    llm = random_frozen(lambda: Qwen3ForCausalLM(text), dtype)
    tower = random_frozen(lambda: SiglipVisionModel(vision), dtype, seed=1)
    torch.manual_seed(0)
    sizes = {"num_latents": 16, "latent_dim": 128, "num_heads": 4, "head_dim": 32}
    model = join(llm, tower, image_token_id=text.vocab_size - 1, **sizes)
    if lora:
        add_lora(model.model.language_model, rank=lora.rank, alpha=2.0 * lora.rank, dropout=lora.dropout)
    if checkpointing:
        checkpoint_layers(llm)
    apply_stage(model, get_stage("stage2_sft" if lora else "stage1_align"))
    shape, towers = text_shape(text.to_dict(), name), tower_shape(vision.to_dict(), name)
    connector = ConnectorShape(192, 128, 16, 2, 128, 4, 4 * text.hidden_size, text.hidden_size, False)
    inputs = packed_inputs(text.vocab_size, rows, length, graded, pictures, 16, packed=packed)
    inputs["pixel_values"] = torch.randn(pictures, 3, side, side)
    batch = Batch(rows, length, graded, pictures, rows * length, rows, masked=packed)
    return Case(name, model, Model(shape, towers, connector, lora), batch, inputs, checkpointing)


def hold_text(case: Case) -> Case:
    """A packed case of an adapter, with the KL to the base in its loss: the second sample of each row is text alone."""
    ids, positions = case.inputs["input_ids"], case.inputs["position_ids"]
    rows, half = len(ids), ids.shape[1] - ids.shape[1] // 2
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, -half:] = True
    divergence = BaseDivergence(
        case.torch_model.model.language_model, case.torch_model.lm_head, case.torch_model.config.text_config
    )
    held = HeldText(rows, half, rows * (half - 1))
    return replace(
        case,
        batch=replace(case.batch, held=held),
        anchor=lambda hidden: divergence(hidden, ids, positions, mask).mean(),
    )


def packed_inputs(
    vocabulary: int, rows: int, length: int, graded: int, pictures: int, latents: int, *, packed: bool = True
) -> dict[str, torch.Tensor]:
    """Rows of two samples each (one, if not packed), the last positions graded, pictures at the start."""
    ids = torch.randint(0, vocabulary - 2, (rows, length), generator=torch.Generator().manual_seed(1))
    ids[:, : pictures // rows * latents] = vocabulary - 1
    labels = torch.full_like(ids, -100)
    labels[:, length - graded // rows :] = ids[:, length - graded // rows :]
    positions = torch.arange(length).repeat(rows, 1)
    if packed:
        positions[:, length // 2 :] -= length // 2
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def token_case(
    name: str, text: Qwen3Config, *, codes: int, rows: int, length: int, graded: int, checkpointing: bool = False
) -> Case:
    """Stage 3: new rows behind a frozen base, padded rows, targets among the new ids."""
    base = text.vocab_size
    image = ImageIdentity("image", "janus_vqvae", codes, (64, 64), (8, 8), "1" * 64)
    space = TokenSpace.build(TextIdentity("text", base, base, "0" * 64), image)
    model = TokenLM.grow(random_frozen(lambda: Qwen3ForCausalLM(text), torch.float32), space)
    if checkpointing:
        checkpoint_layers(model)
    apply_stage(model, get_stage("stage3_rows"))
    ids = torch.randint(base + 64, space.vocab_size_total, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    labels[:, length - graded // rows :] = ids[:, length - graded // rows :]
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    formula = Model(text_shape(text.to_dict(), name), new_rows=space.vocab_size_total - base)
    batch = Batch(rows, length, graded, 0, rows * length, rows)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return Case(name, model, formula, batch, inputs, checkpointing)


def demo_case() -> Case:
    """What `make demo` trains: its config, its bases, a batch of its size, the tower's outputs from the cache."""
    from qwen3_vlm.train.connector_recipe import build_model

    config = load_config(ROOT / "configs/demo_stage1.yaml")
    bases = {name: str(ROOT / getattr(config.model, name)) for name in ("llm", "vision_tower")}
    config = replace(config, model=replace(config.model, **bases))
    model, processor = build_model(config.model, config.seed)
    apply_stage(model, get_stage(config.stage))
    shapes = model_of(config)
    rows, length, graded, latents = config.optim.batch_size, 40, 12 * config.optim.batch_size, config.model.num_latents
    inputs = packed_inputs(shapes.text.vocabulary, rows, length, graded, rows, latents)
    ids = inputs["input_ids"]
    is_picture = ids == shapes.text.vocabulary - 1
    ids[ids == processor.image_token_id] = 0
    ids[is_picture] = processor.image_token_id
    assert shapes.tower is not None
    inputs["patch_embeddings"] = torch.randn(rows, shapes.tower.patches, shapes.tower.width)
    del inputs["position_ids"]  # rows are padded, not packed
    inputs["attention_mask"] = torch.ones_like(ids)
    inputs["attention_mask"][0, -1] = 0
    return Case("demo, stage 1", model, shapes, Batch(rows, length, graded, rows, rows * length, rows), inputs)


def make_step(case: Case) -> Callable[[], None]:
    """One optimizer step on the case's batch."""
    trained = [parameter for parameter in case.torch_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    more = {"added_loss": case.anchor} if case.anchor else {}

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if case.numerics.autocast else nullcontext():
            outputs = case.torch_model(**case.inputs, num_items_in_batch=case.batch.graded, **more)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def allocation_peak(step: Callable[[], None]) -> int:
    """Most bytes that PyTorch's allocator held at one time during the step, over what it held before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def counted_flops(step: Callable[[], None]) -> int:
    """Of all matrix products; attention is taken apart into its own (its fused CPU kernel is not in torch's list)."""

    def in_place(left: Any, first: Any, second: Any, *_: Any, **__: Any) -> int:
        return int(2 * first[0] * first[1] * second[1])

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    with counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return int(counter.get_total_flops())


def check(case: Case) -> dict[str, Any]:
    """Planned and measured, and their ratios."""
    step = make_step(case)
    step()  # the optimizer gets its state
    measured = {"bytes": allocation_peak(step), "flops": counted_flops(step)}
    without_tower = "patch_embeddings" in case.inputs
    flops = executed_flops(case.model, case.batch, checkpointing=case.checkpointing, attention_backward=2.0)
    memory = step_memory(case.model, case.batch, case.numerics, checkpointing=case.checkpointing, gradients_stay=False)
    planned = {
        "bytes": memory.gradients + memory.casts + memory.activations + memory.working,
        "flops": flops.total - flops.tower * without_tower,
    }
    loaded = memory.frozen_weights + memory.trained_weights + memory.optimizer
    return {
        "planned": planned,
        "measured": measured,
        "ratio": {name: planned[name] / measured[name] for name in planned},
        "whole_ratio": (planned["bytes"] + loaded) / (measured["bytes"] + loaded),
        "loaded_bytes": loaded,
        "batch": asdict(case.batch),
        "checkpointing": case.checkpointing,
    }


def cases() -> list[Callable[[], Case]]:
    """Each is built when its turn comes."""
    wide = {"rows": 1, "length": 192, "graded": 32}
    shape = text_config(1024, 2, 151_936)
    return [
        demo_case,
        lambda: vlm_case("width 1024, stage 1", shape, pictures=2, **wide),
        lambda: vlm_case("width 1024, stage 1, checkpointing", shape, pictures=2, checkpointing=True, **wide),
        lambda: vlm_case("width 1024, stage 2", shape, pictures=2, lora=LoraShape(16, 0.05), **wide),
        lambda: token_case("width 1024, stage 3", shape, codes=20_480, **wide),
        lambda: token_case("width 1024, stage 3, checkpointing", shape, codes=20_480, checkpointing=True, **wide),
    ]


def check_full_size(path: Path) -> dict[str, Any]:
    """Against full_size.py's step: Qwen3-8B and SO400M, weights in bf16 and widened, layers recomputed."""
    found = json.loads(path.read_text(encoding="utf-8"))
    settings = found["settings"]
    text = text_shape(
        Qwen3Config(
            vocab_size=settings["vocab_size"],
            hidden_size=settings["width"],
            intermediate_size=3 * settings["width"],
            num_hidden_layers=settings["layers"],
            num_attention_heads=settings["width"] // 128,
            num_key_value_heads=max(1, settings["width"] // 512),
            head_dim=128,
            tie_word_embeddings=False,
        ).to_dict(),
        "full size",
    )
    tower = read_tower_shape("google/siglip2-so400m-patch14-384")
    connector = ConnectorShape(tower.width, 512, 64, 2, 512, 4, 4 * text.width, text.width, False)
    model = Model(text, tower, connector)
    batch = Batch(1, found["tokens"], found["graded_tokens"], found["pictures"], found["tokens"], found["pictures"])
    numerics = Numerics(BF16, FP32, FP32, autocast=False, dropout_mask=FP32, block_bytes=CACHE_BYTES)
    memory = step_memory(model, batch, numerics, checkpointing=True, gradients_stay=False)
    planned = {
        "peak_bytes": memory.total
        + found["process_gb"] * 1e9
        + BLOCK_BYTES,  # and the block that weights are widened in
        "useful_flops": useful_flops(model, batch),
        "trainable_parameters": trainable_parameters(model),
    }
    planned["over_the_model_bytes"] = planned["peak_bytes"] - found["loaded_gb"] * 1e9
    measured = {
        "peak_bytes": found["peak_gb"] * 1e9,
        "useful_flops": sum(found["useful_flops"].values()),
        "trainable_parameters": found["trainable_parameters"],
        "over_the_model_bytes": (found["peak_gb"] - found["loaded_gb"]) * 1e9,
    }
    return {
        "planned": planned,
        "measured": measured,
        "ratio": {name: planned[name] / measured[name] for name in planned},
    }


def report(results: dict[str, dict[str, Any]], full: dict[str, Any]) -> None:
    """Print planned ÷ measured."""
    rows = [("", f"{'MB measured':>14}{'planned ÷':>11}{'with model':>11}{'GFLOP counted':>15}{'planned ÷':>11}")]
    for name, result in results.items():
        measured, ratio = result["measured"], result["ratio"]
        line = f"{measured['bytes'] / 1e6:>14,.1f}{ratio['bytes']:>11.3f}{result['whole_ratio']:>11.3f}"
        rows.append((name, line + f"{measured['flops'] / 1e9:>15,.2f}{ratio['flops']:>11.4f}"))
    show("Planned against measured", rows)
    show("Full-size step (full_size.json), planned ÷ measured", [(n, f"{v:.4f}") for n, v in full["ratio"].items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / "plan_check.json")
    options = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    found = {}
    for build in cases():
        case = build()
        found[case.name] = check(case)
        print(f"{case.name}: {found[case.name]['ratio']}", flush=True)
    full = check_full_size(results / "full_size.json")
    report(found, full)
    write_result(options.out, {"cases": found, "full_size": full})


if __name__ == "__main__":
    main()

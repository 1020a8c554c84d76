"""Two ranks, FSDP2 by hand on a CPU: run by test_later_processes.py under torch.distributed.run.

Models with adapters, and one whose whole decoder trains, are sharded, and trained with the KL to the base; one rank's
batch has no text, so the ranks must still pass through the base's layers equally often. The same model whole sees both
batches.
"""

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from qwen3_vlm.models.base_divergence import BaseDivergence
from qwen3_vlm.models.bases import load_bases
from qwen3_vlm.models.lora import add_lora, lora_parameters
from qwen3_vlm.models.trunk import frozen_copy
from qwen3_vlm.train.checkpoint import whole
from qwen3_vlm.train.stages import FULL_TRUNK, STAGES, apply_stage, audit_gradients, trainable_parameters
from qwen3_vlm.train.text_anchor import TextAnchor
from tests.models.grown import grow, make_base, pad, sequences
from tests.tiny import TINY_CONNECTOR

STEPS = 3
CASES = {**STAGES, "the whole decoder": FULL_TRUNK}
Inputs = dict[str, Any]


def vision_model(llm: str, tower: str) -> tuple[Any, Any, list[Inputs]]:
    """A model of stage 2, its decoder, and a batch for each rank: with a picture, and text alone."""
    model, processor = load_bases(llm, tower, dtype=torch.float32, initializer_range=0.2, **TINY_CONNECTOR)
    generator = torch.Generator().manual_seed(3)
    batches: list[Inputs] = []
    for question in ("<image_patch>what?", "what is a small dog?"):
        ids = torch.tensor([[*processor.encode_prompt([{"role": "user", "content": question}]), 5, 6, 7]])
        labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 3, -100, ids)
        batches.append({"input_ids": ids, "labels": labels})
    batches[0]["pixel_values"] = torch.rand(1, 3, 16, 16, generator=generator)
    batches[1]["text_mask"] = torch.ones_like(batches[1]["input_ids"])
    return model, model.model.language_model, batches


def token_model() -> tuple[Any, Any, list[Inputs]]:
    """A model of stage 4, its decoder, and a batch for each rank: tasks, and tasks with a text."""
    model = grow(make_base(tied=True))
    batches = [dict(pad(sequences()[rank::2])) for rank in range(2)]
    ids = torch.arange(5, 15)
    last = batches[1]
    last["input_ids"][0, : len(ids)] = last["labels"][0, : len(ids)] = ids
    last["labels"][0, len(ids) :] = -100
    last["text_mask"] = torch.zeros_like(last["input_ids"])
    last["text_mask"][0, : len(ids)] = 1
    return model, model.language_model, batches


def shard(model: Any, trunk: Any) -> None:
    for layer in trunk.layers:
        fully_shard(layer)
    fully_shard([trunk.norm, trunk.embed_tokens, model.lm_head], reshard_after_forward=False)
    fully_shard(model)


def step(model: Any, anchor: TextAnchor, optimizer: Any, batches: Sequence[Inputs], ranks: int, stage: str) -> float:
    """One optimizer step; FSDP averages gradients over ranks, hence counts ÷ ranks."""
    counts = COUNTS[stage]
    for batch in batches:
        inputs = dict(batch)
        mask: Tensor | None = inputs.pop("text_mask", None)
        options = anchor.options(inputs, mask, counts[1] / ranks)
        model(**inputs, **options, num_items_in_batch=counts[0] / ranks).loss.backward()
    audit_gradients(model, CASES[stage])
    norm: Any = torch.nn.utils.clip_grad_norm_(list(trainable_parameters(model).values()), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


COUNTS: dict[str, tuple[int, int]] = {}


def agree(stage: str, model: Any, trunk: Any, batches: list[Inputs]) -> None:
    base = None
    if CASES[stage] is FULL_TRUNK:
        base = frozen_copy(trunk)
        for parameter in trunk.parameters():
            parameter.data *= 1.02
    else:
        add_lora(trunk, rank=4, alpha=8, seed=1)
        for parameter in lora_parameters(trunk).values():
            parameter.data += 0.02
    apply_stage(model, CASES[stage])
    alone = copy.deepcopy(model)
    names = {id(module): name for name, module in model.named_modules()}
    pair = [(model, trunk), (alone, alone.get_submodule(names[id(trunk)]))]
    shard(*pair[0])
    COUNTS[stage] = (
        sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches),
        sum(int(batch["text_mask"].sum()) - 1 for batch in batches if "text_mask" in batch),
    )
    anchors = [
        TextAnchor(BaseDivergence(decoder, one.lm_head, one.config.get_text_config(), base), 2.0)
        for one, decoder in pair
    ]
    optimizers = [
        torch.optim.AdamW(list(trainable_parameters(one).values()), lr=0.01, eps=1e-3, fused=True) for one, _ in pair
    ]
    for _ in range(STEPS):
        ours = step(model, anchors[0], optimizers[0], [batches[dist.get_rank()]], dist.get_world_size(), stage)
        theirs = step(alone, anchors[1], optimizers[1], batches, 1, stage)
        assert abs(ours - theirs) < 1e-4 * theirs
    nats = anchors[0].take("cpu")
    dist.all_reduce(nats)
    torch.testing.assert_close(nats, anchors[1].take("cpu"), rtol=1e-4, atol=1e-6)
    assert float(nats) > 1e-3
    expected = trainable_parameters(alone)
    for name, parameter in trainable_parameters(model).items():
        torch.testing.assert_close(whole(parameter), expected[name].detach(), rtol=1e-5, atol=1e-5)
    frozen = {name: parameter for name, parameter in alone.named_parameters() if not parameter.requires_grad}
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(whole(parameter), frozen[name]), name
    print(f"{stage}: sharded and whole agree")


def main(llm: str, tower: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    agree("stage2_sft", *vision_model(llm, tower))
    agree("stage4_mmpt", *token_model())
    agree("the whole decoder", *token_model())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

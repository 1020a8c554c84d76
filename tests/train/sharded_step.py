"""Two ranks, FSDP2 by hand on a CPU: run by test_processes.py under torch.distributed.run.

Accelerate offers FSDP on accelerators only, so what is checked here is that the parts of `train` that
touch parameters, gradients and optimizer state work on shards: audit, clipping, checkpoint, resume.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from qwen3_vlm.models.bases import load_bases
from qwen3_vlm.train.checkpoint import SavedState, optimizer_tensors, restore_optimizer, whole
from qwen3_vlm.train.stages import STAGES, apply_stage, audit_gradients, trainable_parameters
from tests.tiny import TINY_CONNECTOR

STAGE = STAGES["stage1_align"]


def shard(model: Any) -> None:
    for module in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layers):
        fully_shard(module)
    tail = [model.model.language_model.norm, model.model.language_model.embed_tokens, model.lm_head]
    fully_shard(tail, reshard_after_forward=False)
    fully_shard(model)
    register_fsdp_forward_method(model, "token_losses")


def make_optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(trainable_parameters(model).values()), lr=0.01, eps=1e-3, fused=True)


def update(model: Any, optimizer: Any, batches: list[dict[str, Any]], divisor: float) -> float:
    for batch in batches:
        model(**batch, num_items_in_batch=divisor).loss.backward()
    audit_gradients(model, STAGE)
    norm: Any = torch.nn.utils.clip_grad_norm_(list(trainable_parameters(model).values()), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def main(llm: str, tower: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, processor = load_bases(llm, tower, dtype=torch.float32, initializer_range=0.2, **TINY_CONNECTOR)
    apply_stage(model, STAGE)
    alone = copy.deepcopy(model)
    shard(model)
    ids = torch.tensor([[*processor.encode_prompt([{"role": "user", "content": "<image_patch>what?"}]), 5, 6, 7]])
    labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 3, -100, ids)
    generator = torch.Generator().manual_seed(3)
    batches = [
        {"input_ids": ids, "labels": labels, "pixel_values": torch.rand(1, 3, 16, 16, generator=generator)}
        for _ in range(2)
    ]
    mine = [batches[dist.get_rank()]]
    optimizer, reference = make_optimizer(model), make_optimizer(alone)
    # FSDP averages gradients over ranks: labels ÷ ranks here, all labels there.
    torch.testing.assert_close(update(model, optimizer, mine, 3.0), update(alone, reference, batches, 6.0))

    state, expected = optimizer_tensors(model, optimizer), optimizer_tensors(alone, reference)
    assert state.keys() == expected.keys()
    if dist.get_rank() == 0:
        safetensors.torch.save_file(state, folder / "optimizer.safetensors")
    dist.barrier()
    resumed = make_optimizer(model)
    restore_optimizer(model, resumed, SavedState(folder, 1, {}))
    update(model, resumed, mine, 3.0)
    update(alone, reference, batches, 6.0)
    for name, parameter in trainable_parameters(model).items():
        torch.testing.assert_close(whole(parameter), alone.connector_state_dict()[name], rtol=1e-5, atol=1e-6)
    losses = [made.eval().token_losses(**batches[0]).loss for made in (model, alone)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    print("sharded and whole agree")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

"""Two ranks, FSDP2 by hand on a CPU: run by test_token_lm_around.py under torch.distributed.run.

A grown model is sharded and trained on half of the samples by each rank; the same model whole sees all of them.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.models.grown import grow, make_base, pad, sequences


def shard(model: Any) -> None:
    for layer in model.language_model.layers:
        fully_shard(layer)
    tail = [model.language_model.norm, model.language_model.embed_tokens, model.lm_head]
    fully_shard(tail, reshard_after_forward=False)
    fully_shard(model)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def agree(tied: bool) -> None:
    model = grow(make_base(tied=tied)).train()
    alone = copy.deepcopy(model)
    shard(model)
    assert model.tied is tied
    pair, made = (model, alone), sequences()
    mine = pad(made[dist.get_rank() :: dist.get_world_size()])
    everything = pad(made)
    labels = int((everything["labels"][:, 1:] != -100).sum())
    optimizers = [
        torch.optim.AdamW(one.row_parameters().values(), lr=1e-2, eps=1e-3, weight_decay=0.1, fused=True)
        for one in pair
    ]
    for _ in range(3):
        # FSDP averages gradients over ranks: labels ÷ ranks here, all labels there.
        model(**mine, num_items_in_batch=labels / dist.get_world_size()).loss.backward()
        alone(**everything, num_items_in_batch=labels).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, rows in model.row_parameters().items():
        assert isinstance(rows, DTensor)
        torch.testing.assert_close(whole(rows), alone.row_parameters()[name], rtol=1e-5, atol=1e-6)
    # What is sharded and frozen is still the base.
    state = {name: whole(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in alone.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(state[name], parameter), name
    with torch.no_grad():
        scores = [one.eval()(everything["input_ids"]).logits for one in pair]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for tied in (True, False):
        agree(tied)
    print("sharded and whole agree")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

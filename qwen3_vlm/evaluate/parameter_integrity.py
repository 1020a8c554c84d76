"""Did any tensor of the base change? The gate that holds whatever the optimizer did.

Every tensor of the base is hashed before rows are added and after training, one at a time. A tensor goes by the name
that it has in the plain base below its trunk ("layers.0.mlp.up_proj.weight"), however the model around it is wrapped,
so a plain causal LM, the TokenLM made of it, and one with adapters beside it can be compared.

The hash covers shape and values. 16-bit floats are hashed as fp32, which holds each of them exactly: a processor
without bf16 arithmetic keeps small tensors in fp32 (`models.precision`), and that is no change.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen3_vlm.evaluate.gates import equality_gate

BLOCK_ELEMENTS = 2**24  # hashed at one time: 64 MB in fp32
SHOWN = 20  # names in a report
_OUTER = ("module.", "_orig_mod.", "base_model.model.", "language_model.")  # what wrappers put before a name
_INNER = ("_orig_mod", "_checkpoint_wrapped_module", "base_layer")  # … and within it
_ADAPTER = "lora_"  # what adapters add begins like this


@dataclass(frozen=True)
class IntegrityReport:
    """The base's tensors before and after."""

    tensors: int
    changed: tuple[str, ...]  # other values or another shape
    missing: tuple[str, ...]  # no longer there
    digests: dict[str, str]  # before: name → sha256

    @property
    def passed(self) -> bool:
        """Every tensor is there, with its values."""
        return bool(self.tensors) and not self.changed and not self.missing

    @property
    def sha256(self) -> str:
        """One hash of all of them."""
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(self.digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def gates(self) -> list[dict[str, Any]]:
        """The `gates` of evidence.json."""
        return [equality_gate("parameter integrity", "tensors", len(self.changed) + len(self.missing), self.tensors)]

    def to_dict(self) -> dict[str, Any]:
        """The `parameter_integrity` of evidence.json."""
        return {
            "passed": self.passed,
            "tensors": self.tensors,
            "changed": list(self.changed[:SHOWN]),
            "missing": list(self.missing[:SHOWN]),
            "sha256": self.sha256,
            "digests": self.digests,
        }

    def summary(self) -> dict[str, Any]:
        """Flat, for a line of metrics.jsonl."""
        return {"passed": self.passed, "tensors": self.tensors, "changed": len(self.changed) + len(self.missing)}


def base_digests(model: nn.Module) -> dict[str, str]:
    """Name → sha256 of every tensor of the base: parameters and saved buffers, new rows and adapters left out.

    Args:
        model: a plain causal LM, a TokenLM, or one of them wrapped. Sharded tensors are gathered one at a time, so
            every rank has to call this.
    """
    seen: dict[int, str] = {}  # a tied head is the embedding's own tensor
    digests = {}
    for name, tensor in _base_tensors(model):
        if id(tensor) not in seen:
            seen[id(tensor)] = tensor_digest(tensor)
        digests[name] = seen[id(tensor)]
    return dict(sorted(digests.items()))


def compare_digests(before: Mapping[str, str], after: Mapping[str, str]) -> IntegrityReport:
    """What became of the tensors that `base_digests` found before."""
    return IntegrityReport(
        tensors=len(before),
        changed=tuple(name for name in before if name in after and before[name] != after[name]),
        missing=tuple(name for name in before if name not in after),
        digests=dict(before),
    )


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's shape and values."""
    whole = tensor.detach()
    if hasattr(whole, "full_tensor"):  # a shard
        whole = whole.full_tensor()
    digest = hashlib.sha256(f"{tuple(whole.shape)} {_kind(whole)}\n".encode())
    for block in whole.reshape(-1).split(BLOCK_ELEMENTS):
        values = block.float() if block.dtype in (torch.bfloat16, torch.float16) else block
        digest.update(values.contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, tensor)."""
    inner = getattr(model, "base_model_prefix", "") or "model"
    tensors = model.state_dict(keep_vars=True)  # the very tensors: tied ones are one object
    for name, tensor in tensors.items():
        parts = [part for part in _strip(name, f"{inner}.").split(".") if part not in _INNER]
        if parts[-1] == "rows" or any(part.startswith(_ADAPTER) for part in parts):
            continue
        if parts[-2:-1] == ["base"]:  # of SplitEmbedding and SplitHead
            del parts[-2]
        yield ".".join(parts), tensor


def _strip(name: str, prefix: str) -> str:
    """A name without what stands before the trunk's own names."""
    while found := next((outer for outer in (*_OUTER, prefix) if name.startswith(outer)), ""):
        name = name.removeprefix(found)
        if found in ("language_model.", prefix):
            break
    return name


def _kind(tensor: Tensor) -> str:
    return "float32" if tensor.dtype in (torch.bfloat16, torch.float16) else str(tensor.dtype).removeprefix("torch.")

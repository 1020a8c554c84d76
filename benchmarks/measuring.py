"""What both benchmarks measure with: peak memory, the machine's matmul peak, useful FLOPs, random models.

Useful FLOPs are those that any implementation of the step must spend: forward matmuls of real tokens, and the
gradients that reach something trainable. Padding, positions nobody grades, recomputation and weight gradients
of frozen layers do not count, so doing less of them shows as a higher utilisation.

Shapes: P patches, N latents, D width, V vocabulary, L tokens of one sample.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from qwen3_vlm.evaluate.environment import describe_environment
from qwen3_vlm.models.precision import bf16_is_fast
from qwen3_vlm.storage import atomic_write_json

MATMUL_SIZES = ((512, 4096, 4096), (1024, 1024, 3072), (2048, 2048, 2048))  # rows, inner, columns


class PeakMemory:
    """Largest resident memory of this process between enter and exit, sampled every few milliseconds, in bytes."""

    def __init__(self, interval_seconds: float = 0.005) -> None:
        self.interval_seconds = interval_seconds
        self.start = self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = resident_bytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval_seconds):
            self.peak = max(self.peak, resident_bytes())


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def matmul_peak(seconds: float = 2.0) -> dict[str, float]:
    """FLOP/s of the best matmul per data type, and of the best of all ("peak"); bf16 only where it is native."""
    dtypes = [torch.float32, *([torch.bfloat16] if bf16_is_fast("cpu") else [])]
    rates = {
        str(dtype).removeprefix("torch."): max(_matmul_rate(*shape, dtype, seconds / 6) for shape in MATMUL_SIZES)
        for dtype in dtypes
    }
    return {**rates, "peak": max(rates.values())}


def _matmul_rate(rows: int, inner: int, columns: int, dtype: torch.dtype, seconds: float) -> float:
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        begin = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - begin)
    return 2 * rows * inner * columns / best


def random_frozen(build: Callable[[], nn.Module], dtype: torch.dtype, *, seed: int = 0, std: float = 0.02) -> Any:
    """A frozen module with random weights that never exists in more than `dtype`: what a checkpoint would load to.

    Norm weights are one and biases zero. One block of normal numbers is repeated, from a place of its own per
    tensor: sixteen gigabytes of fresh ones would take longer than the step that is measured.
    """
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(2**22 + 1, generator=generator).mul_(std).to(dtype)
    with init_empty_weights(include_buffers=False):
        module = build()
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, dtype=dtype)
            if parameter.ndim < 2:
                values.fill_(0.0 if name == "bias" else 1.0)
            else:
                _fill(values.view(-1), block, int(torch.randint(len(block), (1,), generator=generator)))
            setattr(owner, name, nn.Parameter(values, requires_grad=False))
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    return module


def checkpoint_layers(llm: Any) -> None:
    """Recompute each decoder layer in the backward pass, as `model.gradient_checkpointing` does in a run."""
    enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _fill(values: torch.Tensor, block: torch.Tensor, offset: int) -> None:
    rolled = block.roll(offset)
    for start in range(0, len(values), len(rolled)):
        part = values[start : start + len(rolled)]
        part.copy_(rolled[: len(part)])


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers below `module`: multiply-adds per token of one forward pass."""
    return sum(child.weight.numel() for child in module.modules() if isinstance(child, nn.Linear))


def llm_flops(body: nn.Module, lengths: Sequence[int], graded: int, vocab_size: int) -> float:
    """Forward and input gradients of the language model: body at all real tokens, head at graded ones.

    `body` is the model without its head. Attention is causal within a sample: half of L², two matmuls forward, four
    backward.
    """
    config = body.config
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = sum(3 * 2 * length**2 * width for length in lengths) * config.num_hidden_layers
    return 4.0 * linear_weights(body) * sum(lengths) + attention + 4.0 * graded * config.hidden_size * vocab_size


def connector_flops(config: Any, images: int, patches: int) -> float:
    """Forward, weight and input gradients of resampler and projector, per the architecture's sizes."""
    latent, vision = config.latent_dim, config.vision_config.hidden_size
    inner, latents = config.num_heads * config.head_dim, config.num_latents
    per_layer = 2 * latents * latent * inner + 2 * patches * latent * inner  # q, out; k, v
    per_layer += 2 * latents * patches * inner + 2 * latents * latent * latent * config.ff_mult
    projector = latents * config.projector_hidden_size * (latent + config.text_config.hidden_size)
    once = patches * vision * latent  # the tower needs no gradient
    return images * (3 * 2.0 * (config.depth * per_layer + projector) + 2 * 2.0 * once)


def tower_flops(tower: nn.Module, images: int, patches: int) -> float:
    """Forward only: the tower is frozen and nothing trainable stands before it."""
    config = tower.config
    embedding = config.num_channels * config.patch_size**2 * config.hidden_size
    attention = 4 * patches**2 * config.hidden_size * config.num_hidden_layers
    return images * (2.0 * patches * (linear_weights(tower) + embedding) + attention)


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a benchmark's JSON with the machine it ran on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, {**result, "environment": describe_environment()})
    print(f"Written: {path}")


def show(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a small table."""
    print(f"\n{title}")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def last_json_line(text: str) -> dict[str, Any]:
    """The result that a child process printed last."""
    result: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return result

"""The same ids from the same input: which device computes, and in what arithmetic.

Ids are what a model is trained on, so nothing that a caller has switched on for speed may reach a tokenizer:
no autocast, no TF32 or bf16 matrix products, no algorithm whose result depends on the order of threads on a GPU.
The caller's settings stand again afterwards. Settings of torch are global: while a tokenizer runs in one
thread, the others of that process compute in full precision too.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from qwen3_vlm.errors import ModelError

__all__ = ["choose_device", "exact_arithmetic"]

# cuBLAS is deterministic with a workspace of fixed size alone; it is read when a process first uses cuBLAS.
_CUBLAS_KEY, _CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


def choose_device(name: str) -> torch.device:
    """`auto`: a CUDA GPU where there is one, else the CPU.

    Raises:
        ModelError: there is no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as problem:  # AssertionError: a build without CUDA
        first = str(problem).strip().split("\n", 1)[0]
        raise ModelError(f"The device {name!r} can't be used on this machine ({first}); try auto or cpu.") from problem
    if device.type == "cuda":
        os.environ.setdefault(_CUBLAS_KEY, _CUBLAS_WORKSPACE)
    return device


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, full precision, and deterministic algorithms on a GPU; restored at the end."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_full_precision())
        if device.type == "cuda":
            stack.enter_context(_deterministic_algorithms())
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """fp32 products in fp32: `set_float32_matmul_precision` and its like mean TF32 on a GPU and bf16 on a CPU."""
    backends: Any = torch.backends
    on_gpu = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    places = (*on_gpu, backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it would pick the fastest of several algorithms by the clock
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark

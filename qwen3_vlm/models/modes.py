"""Training or evaluation: the mode of every module, put back as it was."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off and no graph; afterwards every module is back in the very mode it was in.

    Module by module, because in training the frozen bases stay in evaluation mode while the
    connector does not: `model.train()` would switch them all.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training

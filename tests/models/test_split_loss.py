"""The two-block loss against the joined head in float64: values, gradients, options, memory."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen3_vlm.models import losses
from qwen3_vlm.models.losses import split_cross_entropy

WIDTH, BASE, USED, NEW = 16, 50, 45, 20


def reference(hidden: Tensor, base: Tensor, rows: Tensor, target: Tensor, smoothing: float, z: float) -> Tensor:
    """Textbook formulas over one joined matrix without the padding rows."""
    scores = hidden @ torch.cat([base[:USED], rows]).T
    log_z = scores.logsumexp(-1)
    log_p = scores - log_z[:, None]
    place = torch.where(target >= BASE, target - BASE + USED, target)
    nll = -log_p[torch.arange(len(target)), place]
    return (1 - smoothing) * nll - smoothing * log_p.mean(-1) + z * log_z.square()


def parts(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, base, rows, target: targets in both blocks."""
    torch.manual_seed(seed)
    hidden, base, rows = (torch.randn(n, WIDTH, dtype=dtype) for n in (count, BASE, NEW))
    both = torch.cat([torch.arange(USED), torch.arange(BASE, BASE + NEW)])
    return hidden.requires_grad_(), base, rows.requires_grad_(), both[torch.randint(len(both), (count,))]


def relative(found: Any, expected: Any) -> float:
    """Largest difference in units of the largest value."""
    return float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize("block_rows", [1, 13, 1000])
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, smoothing: float, z: float, chunk_rows: int, block_rows: int
) -> None:
    monkeypatch.setattr(losses, "CACHE_BYTES", 4 * WIDTH * block_rows)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * block_rows * chunk_rows)
    hidden, base, rows, target = parts(37)
    weights = torch.rand(37)
    loss = split_cross_entropy(hidden, base, rows, target, num_used=USED, label_smoothing=smoothing, z_loss=z)
    (loss * weights).sum().backward()  # type: ignore[no-untyped-call]
    hidden64, rows64 = (tensor.detach().double().requires_grad_() for tensor in (hidden, rows))
    expected = reference(hidden64, base.double(), rows64, target, smoothing, z)
    (expected * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert relative(loss, expected) < 1e-6
    assert relative(hidden.grad, hidden64.grad) < 1e-6
    assert relative(rows.grad, rows64.grad) < 1e-6
    assert base.grad is None


def test_gradcheck() -> None:
    hidden, base, rows, target = parts(5, torch.float64)
    options = {"num_used": USED, "label_smoothing": 0.1, "z_loss": 1e-2}
    assert torch.autograd.gradcheck(lambda h, r: split_cross_entropy(h, base, r, target, **options), (hidden, rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_base_with_master_rows(dtype: torch.dtype) -> None:
    hidden, base, rows, target = parts(40)
    narrow = base.to(dtype)
    split_cross_entropy(hidden, narrow, rows, target, num_used=USED).mean().backward()
    hidden64, rows64 = (tensor.detach().double().requires_grad_() for tensor in (hidden, rows))
    reference(hidden64, narrow.double(), rows64, target, 0, 0).mean().backward()
    assert rows.grad is not None
    assert rows.grad.dtype == torch.float32
    assert relative(rows.grad, rows64.grad) < 2e-2
    assert relative(hidden.grad, hidden64.grad) < 2e-2


@given(st.lists(st.integers(0, BASE + NEW - 1), min_size=1, max_size=12), st.floats(-30, 30))
@settings(max_examples=50, deadline=None)
def test_any_targets_and_scales(ids: list[int], scale: float) -> None:
    hidden, base, rows, _ = parts(len(ids))
    target = torch.tensor(ids)
    if any(USED <= value < BASE for value in ids):
        with pytest.raises(ValueError, match="padding row of the base"):
            split_cross_entropy(hidden, base, rows, target, num_used=USED)
        return
    loss = split_cross_entropy(hidden * scale, base, rows, target, num_used=USED)
    assert torch.isfinite(loss).all()
    expected = reference(hidden.double() * scale, base.double(), rows.double(), target, 0, 0)
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-5)


def test_autocast_does_not_part_forward_and_backward() -> None:
    found = []
    for enabled in (False, True):
        hidden, base, rows, target = parts(9)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = split_cross_entropy(hidden, base, rows, target, num_used=USED)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        found.append((loss, hidden.grad, rows.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("wrong", [-100, -1, BASE + NEW])
def test_a_target_that_is_no_id_is_refused_not_clamped(wrong: int) -> None:
    hidden, base, rows, target = parts(3)
    target[1] = wrong
    with pytest.raises(ValueError, match=f"The target {wrong} is no id"):
        split_cross_entropy(hidden, base, rows, target, num_used=USED)


def test_frozen_hidden_states_and_frozen_rows() -> None:
    hidden, base, rows, target = parts(9)
    split_cross_entropy(hidden.detach(), base, rows, target).sum().backward()
    assert rows.grad is not None
    with torch.no_grad():
        assert split_cross_entropy(hidden, base, rows, target).shape == (9,)
    split_cross_entropy(hidden, base, rows.detach(), target).sum().backward()
    assert hidden.grad is not None


def test_no_supervised_position() -> None:
    hidden, base, rows, target = parts(3)
    loss = split_cross_entropy(hidden[:0], base, rows, target[:0])
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert loss.shape == (0,)
    assert rows.grad is not None
    assert not rows.grad.any()


def test_a_trainable_base_is_refused() -> None:
    hidden, base, rows, target = parts(3)
    with pytest.raises(ValueError, match="base block of the head is trainable"):
        split_cross_entropy(hidden, base.requires_grad_(), rows, target)

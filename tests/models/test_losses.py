"""The chunked loss against float64 cross entropy: values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.models import losses
from qwen3_vlm.models.losses import chunked_cross_entropy, linear_cross_entropy, supervised_positions


def reference(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden.double() @ weight.double().T, target, reduction="none")


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, trainable: bool, chunk_rows: int) -> None:
    vocabulary, rows, width = 97, 23, 12
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * vocabulary * chunk_rows)
    monkeypatch.setattr(losses, "CACHE_BYTES", 4 * width * 10)
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=trainable)
    target = torch.randint(vocabulary, (rows,))
    scale = torch.rand(rows)

    loss = linear_cross_entropy(hidden, weight, target)
    (loss * scale).sum().backward()  # type: ignore[no-untyped-call]
    hidden64 = hidden.detach().double().requires_grad_()
    weight64 = weight.detach().double().requires_grad_()
    expected = reference(hidden64, weight64, target)
    (expected * scale.double()).sum().backward()  # type: ignore[no-untyped-call]

    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, atol=1e-6, rtol=1e-5)  # type: ignore[union-attr]
    if trainable:
        torch.testing.assert_close(weight.grad.double(), weight64.grad, atol=1e-6, rtol=1e-5)  # type: ignore[union-attr]
    else:
        assert weight.grad is None


def test_any_head_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 50 * 3)
    head = torch.nn.Linear(8, 50)
    hidden = torch.randn(10, 8, requires_grad=True)
    target = torch.randint(50, (10,))
    expected = F.cross_entropy(head(hidden), target, reduction="none")
    torch.testing.assert_close(chunked_cross_entropy(hidden, head, target, 50), expected)


def test_no_supervised_token_gives_an_empty_loss_that_has_a_gradient() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    for loss in (
        linear_cross_entropy(hidden, torch.randn(5, 8), torch.empty(0, dtype=torch.long)),
        chunked_cross_entropy(hidden, torch.nn.Linear(8, 5), torch.empty(0, dtype=torch.long), 5),
    ):
        assert loss.shape == (0,)
        loss.sum().backward()  # type: ignore[no-untyped-call]


def test_bf16_is_near_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(40, 64), 0.1 * torch.randn(300, 64), torch.randint(300, (40,))
    loss = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference(hidden, weight, target), atol=3e-2, rtol=1e-2)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda width: st.lists(
            st.lists(st.sampled_from([-100, 3, 5, 8]), min_size=width, max_size=width), min_size=1, max_size=4
        )
    )
)
def test_supervised_positions_equal_a_hand_count(labels: list[list[int]]) -> None:
    expected = [
        (row, column - 1, label)
        for row, line in enumerate(labels)
        for column, label in enumerate(line)
        if column > 0 and label != -100
    ]
    found = supervised_positions(torch.tensor(labels))
    assert list(zip(*(part.tolist() for part in found), strict=True)) == expected

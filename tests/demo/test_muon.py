"""The optimizer of the codecs: steps of equal singular values, by two ways to the same matrix."""

import pytest
import torch

from qwen3_vlm.demo.muon import Muon, orthogonal, orthogonal_by_gram


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 70)])
def test_singular_values_are_brought_to_about_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    for way in (orthogonal, orthogonal_by_gram):
        values = torch.linalg.svdvals(way(matrix))
        assert 0.5 < values.min() <= values.max() < 1.5
    torch.testing.assert_close(orthogonal(matrix), orthogonal_by_gram(matrix), atol=1e-3, rtol=1e-3)


def test_a_step_goes_downhill_and_decays() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(16, 4, 3))
    target = torch.randn(16, 4, 3)
    optimizer = Muon([weight], 0.05, 0.1)
    start = float((weight.detach() - target).square().sum())
    for _ in range(40):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert float((weight.detach() - target).square().sum()) < 0.5 * start

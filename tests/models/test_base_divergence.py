"""KL(base ‖ adapted) of texts: against float64 and a sample at a time, and none from a fresh adapter."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen3_vlm.models import losses
from qwen3_vlm.models.base_divergence import BaseDivergence, predictions_of
from qwen3_vlm.models.lora import add_lora, lora_parameters, without_lora
from tests.models.grown import make_base

LENGTHS = (5, 7, 3, 9)  # of four samples, packed two in a row; the second and the last are text alone
PACKED = torch.tensor([[*range(5), *range(7)], [*range(3), *range(9)]])
TEXT = torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] * 9])


def adapted(family: str = "qwen3", *, shaken: bool = True, **options: Any) -> Any:
    model = make_base(family, **options)
    add_lora(model.base_model, rank=4, alpha=8)
    generator = torch.Generator().manual_seed(5)
    for parameter in lora_parameters(model.base_model).values():
        if shaken:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model.requires_grad_(False)


def ids() -> Tensor:
    return torch.randint(0, 300, PACKED.shape, generator=torch.Generator().manual_seed(1))


def measure(model: Any, text: Tensor | None = TEXT) -> tuple[Tensor, dict[str, Tensor]]:
    """KL of each prediction, and the gradients of their sum."""
    trunk, parameters = model.base_model, lora_parameters(model.base_model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    hidden = trunk(input_ids=ids(), position_ids=PACKED, use_cache=False).last_hidden_state
    found = BaseDivergence(trunk, model.get_output_embeddings(), model.config)(hidden, ids(), PACKED, text)
    gradients = torch.autograd.grad(found.sum(), list(parameters.values()), allow_unused=True)
    return found.detach(), dict(zip(parameters, gradients, strict=True))


def reference(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """In float64: each text alone, both distributions whole, autograd's own gradient."""
    model = copy.deepcopy(model).double()
    parameters = lora_parameters(model.base_model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    found = []
    for sample in (ids()[0, 5:], ids()[1, 3:]):
        after = model(sample[None], use_cache=False).logits[0, :-1].log_softmax(dim=-1)
        with without_lora(model), torch.no_grad():
            before = model(sample[None], use_cache=False).logits[0, :-1].log_softmax(dim=-1)
        found.append(torch.nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(dim=-1))
    gradients = torch.autograd.grad(torch.cat(found).sum(), list(parameters.values()))
    return torch.cat(found).detach(), dict(zip(parameters, gradients, strict=True))


@pytest.mark.parametrize(
    ("family", "options"), [("qwen3", {}), ("qwen3", {"tied": False}), ("gemma2", {}), ("cohere", {})]
)
def test_value_and_gradient_against_float64(
    family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 384 * 4)  # four positions at a time
    model = adapted(family, **options)
    (found, gradients), (expected, wanted) = measure(model), reference(model)
    assert found.shape == (14,)
    assert float(expected.mean()) > 0.01
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    for name, gradient in gradients.items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(gradient.double(), wanted[name], rtol=1e-3, atol=1e-5 * scale + 1e-8)


def test_a_fresh_adapter_has_no_divergence_and_no_gradient() -> None:
    fresh, shaken = (measure(adapted(shaken=shaken)) for shaken in (False, True))
    assert float(fresh[0].abs().max()) < 1e-6 < float(shaken[0].min())
    largest = [max(float(gradient.abs().max()) for gradient in part[1].values()) for part in (fresh, shaken)]
    assert largest[0] < 1e-6 < 0.01 < largest[1]


@pytest.mark.parametrize("text", [None, torch.zeros_like(TEXT)])
def test_without_texts_it_is_nothing_that_still_has_a_graph(text: Tensor | None) -> None:
    found, gradients = measure(adapted(), text)
    assert found.shape == (0,)
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients.values())


def test_only_tokens_that_follow_one_of_their_own_sample_are_predicted() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 0, 1, 2]])
    text = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0]])
    expected = torch.tensor([[1, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0]])
    assert predictions_of(text.bool(), positions).int().equal(expected.int())


def test_both_distributions_are_never_there_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 384 * 2)
    model, most = adapted(), 0
    scores = BaseDivergence._scores

    def watched(self: BaseDivergence, hidden: Tensor) -> Tensor:
        nonlocal most
        most = max(most, len(hidden))
        return scores(self, hidden)

    monkeypatch.setattr(BaseDivergence, "_scores", watched)
    assert len(measure(model)[0]) == 14
    assert most == 2

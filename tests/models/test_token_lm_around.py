"""TokenLM with what people put around a model: PEFT's LoRA, torch.compile, Accelerate, FSDP2."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen3_vlm.models.lora import without_lora
from qwen3_vlm.models.token_lm import TokenLM
from tests.models.grown import ROWS, USED, grow, make_base, pad, sequences, texts
from tests.train.processes import run_on_two_ranks

TEXT = (0, ROWS)


def with_lora(model: TokenLM, whole: bool) -> Any:
    """PEFT's own two ways to put an adapter on a model. Both freeze all else, so the rows are thawed after them."""
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config) if whole else inject_adapter_in_model(config, model)
    for rows in model.row_parameters().values():
        rows.requires_grad_(True)
    return adapted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [True, False], ids=["get_peft_model", "inject_adapter"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_lora_beside_the_rows(tied: bool, whole: bool, dtype: torch.dtype) -> None:
    """Rows and adapter learn, the base does not; without the adapter text is the base's to the bit."""
    base = make_base(tied=tied).to(dtype)
    before = grow(base).eval()
    model = grow(base)
    adapted = with_lora(model, whole).train()
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in trainable if ".lora_" not in name} == {"rows"}
    batches, losses = [pad(sequences()), pad(sequences(first=11))], []
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(20):
        loss = adapted(**batches[step % 2]).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval()
    ids = texts()
    with torch.no_grad():
        expected = before(ids, score_range=TEXT).logits
        assert not torch.equal(adapted(ids, score_range=TEXT).logits, expected)
        with adapted.disable_adapter() if whole else without_lora(adapted):
            assert torch.equal(adapted(ids, score_range=TEXT).logits[..., :USED], expected[..., :USED])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_compiled_trunk_is_the_same(tied: bool, backend: str) -> None:
    batch, found = pad(sequences()), []
    for compiled in (False, True):
        model = grow(make_base(tied=tied)).train()
        if compiled:
            torch.compiler.reset()
            model.language_model.compile(backend=backend, fullgraph=True)
        output = model(**batch)
        output.loss.backward()
        found.append((output.loss.detach(), *(rows.grad for rows in model.row_parameters().values())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    model.eval()
    ids = texts()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, grow(make_base(tied=tied)).eval()(ids).logits)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_accelerate_prepares_a_grown_model(tied: bool) -> None:
    from accelerate import Accelerator

    model, batch = grow(make_base(tied=tied)).train(), pad(sequences())
    expected = copy.deepcopy(model)
    accelerator = Accelerator(cpu=True)
    optimizers = [torch.optim.AdamW(one.row_parameters().values(), lr=1e-2) for one in (model, expected)]
    prepared, optimizer = accelerator.prepare(model, optimizers[0])
    accelerator.backward(prepared(**batch).loss)
    optimizer.step()
    expected(**batch).loss.backward()
    optimizers[1].step()
    for name, rows in accelerator.unwrap_model(prepared).row_parameters().items():
        assert torch.equal(rows, expected.row_parameters()[name])


def test_a_copy_of_a_model_in_the_middle_of_training() -> None:
    """Nothing of a step stays behind that could not be copied."""
    model, batch = grow(make_base()).train(), pad(sequences())
    loss = model(**batch).loss
    again = copy.deepcopy(model)
    loss.backward()
    again(**batch).loss.backward()
    assert torch.equal(gradient(model), gradient(again))


def test_vectors_instead_of_ids() -> None:
    """A lookup outside the model, and its loss inside: the gradients are those of ids."""
    batch = pad(sequences())
    model, other = grow(make_base()).train(), grow(make_base()).train()
    model(**batch).loss.backward()
    vectors = other.embedding(batch.pop("input_ids"))
    other(inputs_embeds=vectors, **batch).loss.backward()
    torch.testing.assert_close(gradient(other), gradient(model), rtol=1e-5, atol=1e-8)


def test_accumulated_and_repeated_backward_passes() -> None:
    model, batch = grow(make_base()).train(), pad(sequences())
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    once = gradient(model).clone()
    loss.backward()
    torch.testing.assert_close(gradient(model), 2 * once)
    model(**batch).loss.backward()
    torch.testing.assert_close(gradient(model), 3 * once)


def gradient(model: TokenLM) -> Tensor:
    found = model.embedding.rows.grad
    assert found is not None
    return found


@pytest.mark.slow
def test_fsdp2_on_two_ranks_is_one_process() -> None:
    printed = run_on_two_ranks("tests.models.sharded_rows")
    assert printed.count("sharded and whole agree") == 2

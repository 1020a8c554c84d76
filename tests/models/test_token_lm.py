"""TokenLM against plain transformers with joined matrices in float64, and against the base that it must not move."""

import copy
import hashlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3_vlm.errors import ModelError
from qwen3_vlm.models.precision import compute_in_fp32, must_widen
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.tokenization.sequences import SEQUENCES
from tests.data.tiny_shards import tiny_space
from tests.models.grown import FAMILIES, ROWS, SPACE, TOTAL, USED, grow, joined, make_base, pad, sequences, texts

TEXT = (0, ROWS)  # the score range of text mode


def digests(module: nn.Module) -> dict[str, str]:
    """sha256 of each tensor's bytes, under the names that the base gives them."""
    found = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        plain = name.replace("embed_tokens.base.", "embed_tokens.").replace("lm_head.base.", "lm_head.")
        plain = plain.replace("language_model.", "model.")
        found[plain] = hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


def continuation(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)


class TextOnly:
    def next_range(self, input_ids: Tensor) -> tuple[int, int]:
        return TEXT


def plain_base(base: Any) -> Any:
    """The base alone, in the arithmetic that the TokenLM chooses for it."""
    plain = copy.deepcopy(base)
    if must_widen(plain.get_output_embeddings().weight):
        compute_in_fp32(plain)
    return plain


def assert_text_is_the_bases(model: TokenLM, plain: Any) -> None:
    """Logits bit-equal, so the perplexity is equal; greedy continuations equal."""
    ids = texts()
    with torch.no_grad():
        found, whole = model(ids, score_range=TEXT).logits, model(ids).logits
        vectors = plain.get_input_embeddings()(ids)
        expected = plain(inputs_embeds=vectors.float() if model.widened else vectors).logits
    assert torch.equal(found[..., :USED], expected[..., :USED])
    assert torch.equal(whole[..., :USED], expected[..., :USED])
    assert (found[..., USED:] == -torch.inf).all()
    if not model.widened:
        said = continuation(plain, ids[:3], suppress_tokens=list(range(USED, ROWS)))
        assert torch.equal(continuation(model, ids[:3], grammar=TextOnly()), said)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_identity_after_500_steps(tied: bool, dtype: torch.dtype) -> None:
    """AdamW at 1e-2 with weight decay 0.1 over every parameter that there is."""
    base = make_base(tied=tied).to(dtype)
    model, plain = grow(base).train(), plain_base(base)
    before, begun = digests(plain), {name: rows.detach().clone() for name, rows in model.row_parameters().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    batches = [pad(sequences(first=first)) for first in (1, 8, 15, 22)]
    losses = []
    for step in range(500):
        loss = model(**batches[step % len(batches)]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], "the rows learn"
    after = digests(model)
    assert before.items() <= after.items()
    assert {name.split(".")[-1] for name in after.keys() - before.keys()} == {"rows"}
    for name, rows in model.row_parameters().items():
        assert (rows.detach() - begun[name]).abs().mean() > 0.05, name
    assert_text_is_the_bases(model.eval(), plain)


def reference_losses(plain: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(loss, task) of each graded token, from plain transformers' scores without the padding rows."""
    scores = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    scores = scores.index_fill(-1, torch.arange(USED, ROWS), -torch.inf)
    target = batch["labels"][:, 1:]
    losses = F.cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="none", ignore_index=-100)
    graded = target.flatten() != -100
    return losses[graded], batch["task_ids"][:, :-1].flatten()[graded]


def row_gradients(plain: Any) -> dict[str, Tensor]:
    """What a gradient hook on the joined matrices would keep."""
    table, head = plain.get_input_embeddings().weight, plain.get_output_embeddings().weight
    found = {"embeddings": table.grad[ROWS:]}
    return found if head is table else found | {"lm_head": head.grad[ROWS:]}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_joined_matrices(family: str, tied: bool) -> None:
    """In float64, weighted by task; every family with its own scaling of embeddings and scores."""
    base = make_base(family, tied=tied)
    model = grow(base).double().train()
    plain = joined(base, grow(base)).double()
    batch, weights = pad(sequences()), torch.rand(len(SEQUENCES), generator=torch.Generator().manual_seed(1))
    output = model(**batch, task_weights=weights)
    output.loss.backward()
    losses, tasks = reference_losses(plain, batch)
    expected = (losses * weights.double()[tasks]).sum() / len(losses)
    expected.backward()
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-10, atol=0)
    for number in range(len(SEQUENCES)):
        torch.testing.assert_close(output.task_losses[number], losses[tasks == number].sum().detach())
        assert output.task_counts[number] == (tasks == number).sum()
    found, wanted = model.row_parameters(), row_gradients(plain)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name].grad, wanted[name], rtol=1e-8, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_fp32_and_token_losses(tied: bool) -> None:
    base = make_base(tied=tied)
    model, batch = grow(base), pad(sequences())
    plain = joined(base, model).double()
    expected, tasks = reference_losses(plain, batch)
    expected.mean().backward()
    model.train()(**batch).loss.backward()
    for name, wanted in row_gradients(plain).items():
        error = (model.row_parameters()[name].grad.double() - wanted).norm() / wanted.norm()
        assert error < 1e-6, name
    graded = model.eval().token_losses(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
    assert ((graded.loss.double() - expected).abs() / expected.abs().max()).max() < 1e-6
    assert torch.equal(batch["task_ids"][graded.row, graded.position], tasks)
    assert (batch["labels"][graded.row, graded.position + 1] != -100).all()


def test_scores_are_those_of_joined_matrices_in_every_range() -> None:
    base = make_base(tied=False)
    model, ids = grow(base).eval(), torch.arange(TOTAL - 30, TOTAL)[None]
    expected = joined(base, model)(ids).logits
    expected[..., USED:ROWS] = -torch.inf
    for first, last in ((0, TOTAL), TEXT, (ROWS, TOTAL), (ROWS + 64, ROWS + 80), (5, ROWS + 3)):
        found = model(ids, score_range=(first, last)).logits
        torch.testing.assert_close(found[..., first:last], expected[..., first:last], rtol=1e-5, atol=1e-5)
        assert (found[..., :first] == -torch.inf).all()
        assert (found[..., last:] == -torch.inf).all()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_padding_rows_are_never_said(tied: bool) -> None:
    """Even where the base prefers one of them to everything else."""
    base = make_base(tied=tied)
    with torch.no_grad():
        weight = base.get_output_embeddings().weight
        weight[USED:] = 100 * weight[:5].sign()
        weight[USED + 1] = -weight[USED]
    ids = texts(4)
    assert (base.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[:, ids.shape[1] :] >= USED).any()
    model = grow(base).eval()
    said = model.generate(ids, max_new_tokens=8, do_sample=True, temperature=5.0, pad_token_id=0)
    assert not ((said >= USED) & (said < ROWS)).any()
    assert torch.isfinite(model(ids, labels=ids).loss)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradient_checkpointing_changes_nothing(tied: bool) -> None:
    gradients, batch = [], pad(sequences())
    for recompute in (False, True):
        model = grow(make_base(tied=tied)).train()
        if recompute:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
        model(**batch).loss.backward()
        gradients.append([rows.grad for rows in model.row_parameters().values()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_bf16_base_with_fp32_master_rows(tied: bool) -> None:
    base, batch = make_base(tied=tied).bfloat16(), pad(sequences())
    model = grow(base).train()
    assert model.dtype == torch.bfloat16
    assert {rows.dtype for rows in model.row_parameters().values()} == {torch.float32}
    loss = model(**batch).loss
    loss.backward()
    plain = joined(base, model).double()
    losses, _ = reference_losses(plain, batch)
    losses.mean().backward()
    torch.testing.assert_close(loss.double(), losses.mean(), rtol=1e-2, atol=0)
    for name, wanted in row_gradients(plain).items():
        found = model.row_parameters()[name].grad
        assert found.dtype == torch.float32
        assert (found.double() - wanted).norm() / wanted.norm() < 2e-2


def test_smoothing_and_z_loss_reach_the_loss() -> None:
    model, batch = grow(make_base()).train(), pad(sequences())
    plain = model(**batch).loss
    assert not torch.equal(model(**batch, label_smoothing=0.1).loss, plain)
    assert model(**batch, z_loss=1e-2).loss > plain
    capped = grow(make_base("gemma2"))
    with pytest.raises(ValueError, match="soft cap"):
        capped(**batch, z_loss=1e-2)


def test_sums_are_divided_by_what_the_whole_step_has() -> None:
    """Two halves with the whole's divisor add up to the whole: losses and gradients."""
    model, made = grow(make_base()).train(), sequences()
    whole = model(**pad(made))
    whole.loss.backward()
    together, model.embedding.rows.grad = model.embedding.rows.grad, None
    count = whole.task_counts.sum()
    halves = [model(**pad(part), num_items_in_batch=count) for part in (made[:4], made[4:])]
    for half in halves:
        half.loss.backward()
    torch.testing.assert_close(sum(half.loss for half in halves), whole.loss)
    torch.testing.assert_close(model.embedding.rows.grad, together, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sum(half.task_losses for half in halves), whole.task_losses)


def test_a_batch_with_nothing_to_grade() -> None:
    model, batch = grow(make_base()).train(), pad(sequences())
    batch["labels"] = torch.full_like(batch["labels"], -100)
    output = model(**batch)
    output.loss.backward()
    assert output.loss.item() == 0
    assert not model.embedding.rows.grad.any()


def test_packed_samples_do_not_see_each_other() -> None:
    model, made = grow(make_base()).eval(), sequences(("i2t", "t2a"))
    packed = {
        "input_ids": torch.tensor([[int(value) for one in made for value in one.input_ids]]),
        "labels": torch.tensor([[int(value) for one in made for value in one.labels]]),
        "position_ids": torch.tensor([[place for one in made for place in range(len(one))]]),
    }
    alone = [pad([one]) for one in made]
    expected = torch.cat([model.token_losses(input_ids=one["input_ids"], labels=one["labels"]).loss for one in alone])
    torch.testing.assert_close(model.token_losses(**packed).loss, expected)


def test_weights_without_tasks_and_another_base_are_refused() -> None:
    model, batch = grow(make_base()), pad(sequences())
    del batch["task_ids"]
    with pytest.raises(ValueError, match="task_weights need task_ids"):
        model(**batch, task_weights=torch.ones(len(SEQUENCES)))
    with pytest.raises(ModelError, match="has 384 embedding rows; the token space was built for 50"):
        TokenLM.grow(make_base(), tiny_space())


def test_the_bases_tensors_are_not_copied() -> None:
    base = make_base()
    places = {tensor.data_ptr() for tensor in base.state_dict().values()}
    model = TokenLM.grow(base, SPACE)
    rows = {parameter.data_ptr() for parameter in model.row_parameters().values()}
    assert {tensor.data_ptr() for tensor in model.state_dict().values()} == places | rows

"""New rows behind a frozen vocabulary: against one joined matrix, and against the untouched base."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen3_vlm.errors import ConfigError, ModelError
from qwen3_vlm.models.vocabulary_rows import SplitEmbedding, SplitHead, add_rows, fresh_rows, is_tied
from tests.tiny import VOCABULARY_ROWS, save_tiny_llm

NEW, USED = 40, 300


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_tiny_llm(tmp_path_factory.mktemp("base"), tied=request.param)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def grown(base: Any, **options: Any) -> Any:
    model = copy.deepcopy(base)
    add_rows(model, *fresh_rows(model, NEW, num_used=USED, **options), USED)
    return model


def joined(base: Any, model: Any) -> Any:
    """The same model with plain joined matrices."""
    plain = copy.deepcopy(base)
    plain.resize_token_embeddings(VOCABULARY_ROWS + NEW, mean_resizing=False)
    with torch.no_grad():
        plain.get_input_embeddings().weight[VOCABULARY_ROWS:] = model.get_input_embeddings().rows
        plain.get_output_embeddings().weight[VOCABULARY_ROWS:] = model.get_output_embeddings().rows
    return plain


def test_logits_are_those_of_joined_matrices(base: Any) -> None:
    model = grown(base)
    plain = joined(base, model)
    ids = torch.randint(VOCABULARY_ROWS + NEW, (3, 17), generator=torch.Generator().manual_seed(0))
    found, expected = model(ids).logits, plain(ids).logits
    assert found.shape == expected.shape
    assert (found[..., USED:VOCABULARY_ROWS] == -torch.inf).all(), "padding rows are never predicted"
    kept = [*range(USED), *range(VOCABULARY_ROWS, VOCABULARY_ROWS + NEW)]
    torch.testing.assert_close(found[..., kept], expected[..., kept], atol=1e-5, rtol=1e-5)


def test_text_is_the_base_bit_for_bit(base: Any) -> None:
    model = grown(base)
    ids = torch.randint(USED, (2, 23), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(ids).logits[..., :USED], base(ids).logits[..., :USED])


def test_only_the_new_rows_are_trained(base: Any) -> None:
    model = grown(base)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(parameter.numel() for parameter in trainable.values()) == NEW * 32 * (1 if is_tied(base) else 2)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1, weight_decay=0.5)
    ids = torch.randint(VOCABULARY_ROWS, VOCABULARY_ROWS + NEW, (2, 9), generator=torch.Generator().manual_seed(2))
    for _ in range(5):
        optimizer.zero_grad()
        logits = model(ids).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        plain = name.replace("embed_tokens.base.", "embed_tokens.").replace("lm_head.base.", "lm_head.")
        if plain in before:
            assert torch.equal(tensor, before[plain]), name
    moved = model.get_input_embeddings().rows - fresh_rows(base, NEW, num_used=USED)[0]
    assert moved.abs().max() > 0.1


def test_fresh_rows_have_the_bases_own_spread(base: Any) -> None:
    used = base.get_input_embeddings().weight[:USED].double()
    many, _ = fresh_rows(base, 20_000, num_used=USED)
    assert (many.double().mean(0) - used.mean(0)).abs().max() < 0.01
    assert (many.double().std(0) / used.std(0, correction=0) - 1).abs().max() < 0.03
    zero_mean, _ = fresh_rows(base, 20_000, num_used=USED, init="normal")
    assert zero_mean.mean(0).abs().max() < 0.01
    again, _ = fresh_rows(base, 20_000, num_used=USED)
    other, _ = fresh_rows(base, 20_000, num_used=USED, seed=1)
    assert torch.equal(many, again)
    assert not torch.equal(many, other)


def test_a_head_that_begins_at_zero(base: Any) -> None:
    if is_tied(base):
        with pytest.raises(ConfigError, match="zero_head"):
            fresh_rows(base, NEW, num_used=USED, init="zero_head")
        return
    model = grown(base, init="zero_head")
    assert not model(torch.tensor([[1, 2, 3]])).logits[..., VOCABULARY_ROWS:].any()


def test_part_of_the_head(base: Any) -> None:
    model = grown(base)
    head = model.get_output_embeddings()
    assert isinstance(head, SplitHead)
    hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        head.score_rows(hidden, 5, 12), head(hidden)[:, VOCABULARY_ROWS + 5 : VOCABULARY_ROWS + 12]
    )


def test_a_scaled_embedding_scales_new_rows_too() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    table = Gemma3TextScaledWordEmbedding(10, 4, 0, embed_scale=3.0)
    split = SplitEmbedding(table, torch.nn.Parameter(torch.ones(2, 4)))
    assert torch.equal(split(torch.tensor([[11]])), torch.full((1, 1, 4), 3.0))
    assert torch.equal(split(torch.tensor([5])), table(torch.tensor([5])))


def test_rows_that_do_not_fit(base: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(base)
    embeddings, head = fresh_rows(model, NEW, num_used=USED)
    with pytest.raises(ModelError, match="ties its head" if is_tied(base) else "a head of its own"):
        add_rows(model, embeddings, embeddings if head is None else None, USED)
    with pytest.raises(ModelError, match=r"have the shape \(40, 31\)"):
        add_rows(model, embeddings[:, 1:], head, USED)
    with pytest.raises(ModelError, match="385 ids, the base 384 rows"):
        add_rows(model, embeddings, head, VOCABULARY_ROWS + 1)

"""Caption scores against the published tool's own values (cider_d.json says how they were made)."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.evaluate.caption_scores import cider_d, exact_match, ptb_words, score_captions

FIXTURE: dict[str, Any] = json.loads((Path(__file__).parent / "cider_d.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("key", "references"), [("all_references", None), ("first_reference_only", 1)])
def test_cider_d_equals_the_published_tool(key: str, references: int | None) -> None:
    items = FIXTURE["items"]
    result = cider_d([item["candidate"] for item in items], [item["references"][:references] for item in items])
    assert result.score == pytest.approx(FIXTURE[key]["score"], abs=1e-12)
    np.testing.assert_allclose(result.per_caption, FIXTURE[key]["per_caption"], atol=1e-12)


def test_words_equal_the_published_tokenizer() -> None:
    for item in FIXTURE["items"]:
        assert " ".join(ptb_words(item["candidate"])) == item["candidate_words"]
        assert [" ".join(ptb_words(text)) for text in item["references"]] == item["references_words"]


def test_cider_d_by_hand() -> None:
    """Two samples, one word each: tf-idf is log 2, the cosine 1 for unigrams and 0 for longer n-grams."""
    assert cider_d(["cat", "dog"], ["cat", "dog"]).per_caption.tolist() == pytest.approx([2.5, 2.5])
    assert cider_d(["dog", "dog"], ["cat", "dog"]).per_caption.tolist() == pytest.approx([0.0, 2.5])
    assert cider_d(["cat"], ["cat"]).score == 0.0  # one sample has no idf


def test_length_penalty_by_hand() -> None:
    """Ten bigrams too many cost exp(−10² ÷ 72)."""
    short = "w1 w2 w3 w4 w5 w6"
    padded = short + " w1 w2 w3 w4 w5 w6 w1 w2 w3 w4"
    scores = cider_d([padded, "z"], [short, "z"]).per_caption
    assert 0 < scores[0] < 10 * math.exp(-(10**2) / 72)


words = st.sampled_from(["a", "red", "cat", "dog", "sits", "on", "the", "mat"])
captions = st.lists(words, min_size=4, max_size=9).map(" ".join)


@settings(deadline=None, max_examples=40)
@given(st.lists(captions, min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_cider_d_does_not_depend_on_the_order_of_samples(references: list[str], random: Any) -> None:
    candidates = [random.choice(references) for _ in references]
    order = list(range(len(references)))
    random.shuffle(order)
    straight = cider_d(candidates, references).per_caption
    shuffled = cider_d([candidates[i] for i in order], [references[i] for i in order]).per_caption
    np.testing.assert_allclose(shuffled, straight[order], atol=1e-9)
    assert (straight >= -1e-9).all()
    assert (straight <= 10 + 1e-9).all()


def test_a_perfect_caption_of_its_own_words_scores_ten() -> None:
    references = ["one two three four", "five six seven eight"]
    assert cider_d(references, references).per_caption.tolist() == pytest.approx([10.0, 10.0])


def test_exact_match_ignores_blanks_alone() -> None:
    got = exact_match([" a  cat\n", "A cat", "a cat."], ["a cat", "a cat", ["a dog", "a cat."]])
    assert got.tolist() == [True, False, True]


def test_score_captions_is_plain_json() -> None:
    scores = score_captions(["a cat", "a dog"], ["a cat", "a cow"])
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert scores["exact_match"] == 0.5
    assert scores["exact_match_low"] < 0.5 < scores["exact_match_high"]
    assert score_captions([], [])["n"] == 0


def test_unpaired_input_is_refused() -> None:
    with pytest.raises(ValueError, match="one reference per candidate"):
        cider_d(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="no reference"):
        exact_match(["a"], [[]])

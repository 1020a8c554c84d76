"""The grammar against a hand-written list of what may come, against `parse_sequence`, and against any scores."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen3_vlm.errors import ConfigError, ModelError, TokenError
from qwen3_vlm.generate.grammar import Grammar, GrammarProcessor
from qwen3_vlm.tokenization.sequences import SEQUENCES, parse_sequence, prompt_ids
from qwen3_vlm.tokenization.token_space import TextIdentity, TokenSpace
from tests.data.tiny_shards import tiny_space

SPACE = tiny_space()  # text 0–49 (45 used), specials 50–113, image 114–129 (2 × 3), audio 130–133, 134–138, 139–144
TEXT_START, TEXT_END, IMG_START, IMG_END, AUD_START, AUD_END, GEN_TEXT, GEN_IMG, GEN_AUD, PAD = range(50, 60)
TEXT, IMAGE, BOOKS = range(45), range(114, 130), (range(130, 134), range(134, 139), range(139, 145))
GRAMMAR = Grammar(SPACE, min_text=2, max_text=4, min_frames=1, max_frames=3)
SOURCE = {"text": [7, 8], "image": [114] * 6, "audio": [130, 134, 139]}

BY_HAND: list[tuple[list[int], list[int]]] = [  # what stands there, what may come
    ([5, 6], [*TEXT]),
    ([GEN_TEXT], [TEXT_START]),
    ([GEN_IMG], [IMG_START]),
    ([3, TEXT_END, GEN_AUD], [AUD_START]),
    ([GEN_TEXT, TEXT_START], [*TEXT]),
    ([GEN_TEXT, TEXT_START, 1], [*TEXT]),
    ([GEN_TEXT, TEXT_START, 1, 2], [*TEXT, TEXT_END]),
    ([GEN_TEXT, TEXT_START, 1, 2, 3], [*TEXT, TEXT_END]),
    ([GEN_TEXT, TEXT_START, 1, 2, 3, 4], [TEXT_END]),
    ([GEN_IMG, IMG_START], [*IMAGE]),
    ([GEN_IMG, IMG_START, *[114] * 5], [*IMAGE]),
    ([GEN_IMG, IMG_START, *[114] * 6], [IMG_END]),
    ([GEN_AUD, AUD_START], [*BOOKS[0]]),
    ([GEN_AUD, AUD_START, 130], [*BOOKS[1]]),
    ([GEN_AUD, AUD_START, 130, 134], [*BOOKS[2]]),
    ([GEN_AUD, AUD_START, 130, 134, 139], [AUD_END, *BOOKS[0]]),
    ([GEN_AUD, AUD_START, 130, 134, 139, 131], [*BOOKS[1]]),
    ([GEN_AUD, AUD_START, *[130, 134, 139] * 3], [AUD_END]),
    ([GEN_AUD, AUD_START, 130, 134, 139, AUD_END], [PAD]),
    ([GEN_IMG, IMG_START, *[114] * 6, IMG_END, PAD, PAD], [PAD]),
]


def row(*ids: int) -> Tensor:
    return torch.tensor([ids])


def may_come(grammar: Grammar, input_ids: Tensor) -> list[list[int]]:
    return [line.nonzero()[:, 0].tolist() for line in grammar.allowed(input_ids)]


@pytest.mark.parametrize(("ids", "expected"), BY_HAND, ids=lambda value: " ".join(map(str, value[-4:])))
def test_what_may_come_by_hand(ids: list[int], expected: list[int]) -> None:
    assert may_come(GRAMMAR, row(*ids)) == [sorted(expected)]


@pytest.mark.parametrize("pad", [PAD, 0, 44, 113])
def test_rows_of_one_batch_stand_anywhere_and_padding_does_not_matter(pad: int) -> None:
    longest = max(len(ids) for ids, _ in BY_HAND)
    batch = torch.tensor([[pad] * (longest + 3 - len(ids)) + ids for ids, _ in BY_HAND])
    assert may_come(GRAMMAR, batch) == [sorted(expected) for _, expected in BY_HAND]


@pytest.mark.parametrize(("ids", "expected"), BY_HAND, ids=lambda value: " ".join(map(str, value[-4:])))
def test_the_range_to_score_has_all_that_may_come(ids: list[int], expected: list[int]) -> None:
    assert GRAMMAR.next_range(row(*ids)) == (min(expected), max(expected) + 1)


def test_the_range_of_a_batch_leaves_out_rows_that_need_no_score() -> None:
    image = [GEN_IMG, IMG_START, 114]
    done = [IMG_START, IMG_END, PAD]
    assert GRAMMAR.next_range(torch.tensor([image, done])) == (114, 130)
    assert GRAMMAR.next_range(torch.tensor([done, done])) == (PAD, PAD + 1)
    assert GRAMMAR.next_range(torch.tensor([image, [GEN_AUD, AUD_START, 130]])) == (114, 139)


@pytest.mark.parametrize("task", ["a2t", "i2t", "t2a", "t2i", "a2i", "i2a", "copy_image", "copy_audio"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_walk_through_the_grammar_is_a_whole_sequence(task: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = prompt_ids(SPACE, task, {name: np.array(values) for name, values in SOURCE.items()}).tolist()
    for _ in range(GRAMMAR.most_ids(SEQUENCES[task].target)):
        ids.append(int(rng.choice(may_come(GRAMMAR, row(*ids))[0])))
        if ids[-1] in GRAMMAR.stop_ids:
            break
    parsed = parse_sequence(SPACE, np.array(ids))
    assert (parsed.source, parsed.target) == (SEQUENCES[task].source, SEQUENCES[task].target)
    assert may_come(GRAMMAR, row(*ids)) == [[PAD]]


@pytest.mark.parametrize("task", ["i2t", "t2a", "t2i"])
def test_what_may_not_come_makes_no_sequence(task: str) -> None:
    """Each id that the grammar leaves out, put in: no continuation the grammar knows can save it."""
    grammar = Grammar(SPACE, min_text=1, max_text=2, max_frames=2)
    prompt = prompt_ids(SPACE, task, {name: np.array(values) for name, values in SOURCE.items()}).tolist()
    target = {"text": [3, 4], "image": [120] * 6, "audio": [130, 134, 139] * 2}[SEQUENCES[task].target]
    end = {"text": TEXT_END, "image": IMG_END, "audio": AUD_END}[SEQUENCES[task].target]
    padding = range(45, 50)  # rows of the base that its tokenizer does not have: `parse_sequence` knows no better
    for place in range(len(target) + 1):
        before = prompt + target[:place]
        wrong = set(range(SPACE.vocab_size_total)) - set(may_come(grammar, row(*before))[0]) - set(padding)
        if place == len(target):
            wrong -= set(TEXT) | set(BOOKS[0])  # longer than asked for, but a sequence
        for value in wrong:
            rest = [] if value == end else [*target[place + 1 :], end]
            with pytest.raises(TokenError):
                parse_sequence(SPACE, np.array([*before, value, *rest]))


def test_interleaved_answers() -> None:
    grammar = Grammar(SPACE, then=[["image", "stop"], ["text", "audio"]], max_text=4)
    first = [GEN_TEXT, TEXT_START, 1, 2, TEXT_END]
    second = [*first, GEN_IMG, IMG_START, *[114] * 6, IMG_END]
    third = [*second, GEN_AUD, AUD_START, 130, 134, 139, AUD_END]
    assert may_come(grammar, row(*first)) == [[GEN_IMG, PAD]]
    assert may_come(grammar, row(*first, GEN_IMG)) == [[IMG_START]]
    assert may_come(grammar, row(*second)) == [[GEN_TEXT, GEN_AUD]]
    assert may_come(grammar, row(*third)) == [[PAD]]
    assert may_come(grammar, row(*first, PAD)) == [[PAD]]
    assert grammar.next_range(row(*first)) == (GEN_IMG, PAD + 1)
    assert grammar.stop_ids == [PAD]
    clip = 3 * 100  # two seconds of 50 frames
    assert grammar.most_ids("text") == 5 + (2 + 7) + (2 + clip + 1) + 1


def test_the_source_of_a_prompt_is_no_segment_of_the_answer() -> None:
    grammar = Grammar(SPACE, then=[["image"]])
    assert may_come(grammar, row(TEXT_START, 3, TEXT_END, GEN_TEXT, TEXT_START, 3, TEXT_END)) == [[GEN_IMG]]


def test_how_generation_ends() -> None:
    assert GRAMMAR.stop_ids == [TEXT_END, IMG_END, AUD_END]
    assert [GRAMMAR.most_ids(name) for name in ("text", "image", "audio")] == [5, 7, 10]
    config = GRAMMAR.generation_config("image", num_beams=3)
    assert (config.max_new_tokens, config.eos_token_id, config.pad_token_id) == (7, GRAMMAR.stop_ids, PAD)
    assert (config.num_beams, config.do_sample, config.repetition_penalty) == (3, False, 1.0)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([GEN_IMG, IMG_START, *[114] * 7], "a picture has 6"),
        ([GEN_IMG, 114], "<\\|img_start\\|> is due"),
        ([TEXT_START, 3, TEXT_END], "does not say what shall come"),
    ],
)
def test_beginnings_that_nothing_can_follow(ids: list[int], message: str) -> None:
    with pytest.raises(TokenError, match=message):
        GRAMMAR.allowed(row(*ids))
    assert GRAMMAR.next_range(row(*ids)) is None  # a piece of a prompt: nothing is sampled after it


def test_a_space_without_sound_or_pictures() -> None:
    space = TokenSpace.build(TextIdentity("tiny", 20, 18, "0" * 64))
    grammar = Grammar(space)
    assert may_come(grammar, row(20)) == [[*range(18)]]
    for start in (22, 24):
        with pytest.raises(TokenError, match="no range for"):
            grammar.allowed(row(start))
    with pytest.raises(TokenError, match="no range for image"):
        Grammar(space, then=[["image"]])


@pytest.mark.parametrize(
    "lengths", [{"min_text": 3, "max_text": 2}, {"max_text": 0, "min_text": 0}, {"min_frames": 0}, {"max_frames": 0}]
)
def test_lengths_that_contradict_each_other(lengths: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Grammar(SPACE, **lengths)


@pytest.mark.parametrize("then", [[["image"], []], ["image"], [["pictures"]]])
def test_plans_that_are_none(then: Any) -> None:
    with pytest.raises(ConfigError, match="must be lists of text, image, audio and stop"):
        Grammar(SPACE, then=then)


# The processor --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(which=st.integers(0, len(BY_HAND) - 1), seed=st.integers(0, 2**32), scale=st.sampled_from([0.0, 1.0, 1e4, 1e30]))
def test_log_probabilities_of_what_may_come_and_nothing_else(which: int, seed: int, scale: float) -> None:
    ids, expected = BY_HAND[which]
    scores = scale * torch.randn(1, SPACE.vocab_size_total, generator=torch.Generator().manual_seed(seed))
    scores[0, [value for value in range(SPACE.vocab_size_total) if value not in expected][::2]] = torch.inf
    result = GrammarProcessor(GRAMMAR)(row(*ids), scores)
    assert result.isfinite().nonzero()[:, 1].tolist() == sorted(expected)
    reference = scores[0, sorted(expected)].double().log_softmax(-1)
    torch.testing.assert_close(result[0, sorted(expected)].double(), reference, rtol=1e-5, atol=1e-5)
    assert int(result.argmax()) in expected


def test_scores_that_were_not_computed_change_nothing() -> None:
    batch = torch.tensor([[GEN_AUD, AUD_START, 130, 134, 139], [GEN_IMG, IMG_START, 114, 115, 116]])
    scores = torch.randn(2, SPACE.vocab_size_total)
    first, last = GRAMMAR.next_range(batch) or (0, 0)
    ranged = torch.full_like(scores, -torch.inf)
    ranged[:, first:last] = scores[:, first:last]
    assert torch.equal(GrammarProcessor(GRAMMAR)(batch, scores), GrammarProcessor(GRAMMAR)(batch, ranged))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers(bad: float) -> None:
    scores: Any = torch.zeros(1, SPACE.vocab_size_total)
    scores[0, 120] = bad
    with pytest.raises(ModelError, match="no numbers"):
        GrammarProcessor(GRAMMAR)(row(GEN_IMG, IMG_START), scores)
    with pytest.raises(ModelError, match="no numbers"):
        GrammarProcessor(GRAMMAR)(row(GEN_IMG, IMG_START), torch.full_like(scores, -torch.inf))


def test_scores_of_another_vocabulary() -> None:
    with pytest.raises(ModelError, match="scores 50 ids; the token space has 145"):
        GrammarProcessor(GRAMMAR)(row(GEN_IMG, IMG_START), torch.zeros(1, 50))

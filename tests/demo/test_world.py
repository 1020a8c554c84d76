"""The world says only what is true, repeats itself exactly, and keeps held-out pairs apart."""

import random
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.demo.drawings import compose
from qwen3_vlm.demo.facts import count_right, read_facts, score
from qwen3_vlm.demo.questions import fact_list, question_and_answer
from qwen3_vlm.demo.world import (
    BACKGROUND_WORDS,
    CANVAS,
    HELD_OUT_PAIRS,
    NAMES,
    OBJECTS,
    SIZE_WORDS,
    UNSEEN_MIX,
    Scene,
    Thing,
    sample_scene,
    scenes,
)

PLACES = {"plain": 0, "one": 1, "group": 0, "row": 1, "column": 1, "trio_row": 2, "trio_column": 2}
seeds = st.integers(0, 10**6).map(str)


def test_at_least_forty_objects_and_a_tenth_of_their_pairs_held_out() -> None:
    pairs = len(NAMES) * (len(NAMES) - 1) // 2
    assert len(NAMES) >= 40
    assert len(set(OBJECTS.values())) == len(NAMES)
    assert 0.08 < len(HELD_OUT_PAIRS) / pairs < 0.13


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_training_scenes_never_hold_a_held_out_pair_and_unseen_ones_always_do(seed: str) -> None:
    for scene in islice(scenes(seed), 20):
        assert not scene.pairs() & HELD_OUT_PAIRS
    for scene in islice(scenes(seed, unseen=True), 5):
        assert scene.pairs() & HELD_OUT_PAIRS
    for scene in islice(scenes(seed, mix=UNSEEN_MIX), 5):
        assert not scene.pairs() & HELD_OUT_PAIRS


@settings(max_examples=50, deadline=None)
@given(seeds)
def test_a_caption_gives_its_facts_back(seed: str) -> None:
    scene = sample_scene(random.Random(seed))
    facts = read_facts(scene.caption())
    assert facts.background == scene.background
    named = [name for count, _, name in facts.mentions for _ in range(count)]
    sizes = [size for count, size, _ in facts.mentions for _ in range(count)]
    assert named == [thing.name for thing in scene.things]
    assert sizes == [thing.size.replace("whole", "") for thing in scene.things]
    assert len(facts.places) == PLACES[scene.layout]


@settings(max_examples=50, deadline=None)
@given(seeds)
def test_places_in_the_caption_are_where_the_pixels_are(seed: str) -> None:
    rng = random.Random(seed)
    scene = sample_scene(rng)
    picture, boxes = compose(scene, rng)
    assert picture.shape == (CANVAS, CANVAS, 3)
    middles = [(left + size / 2, top + size / 2) for left, top, size in boxes]
    assert all(left >= 0 and left + size <= CANVAS for left, _, size in boxes)
    relations = {"left of": 0, "above": 1}
    for index, word in enumerate(read_facts(scene.caption()).places):
        if word in relations:
            axis, other = relations[word], middles[index + 1]
            assert all(first[axis] < other[axis] for first in middles[: index + 1])


def test_the_caption_of_a_known_scene() -> None:
    cat, car = Thing("cat", "small", "left", "top"), Thing("car", "big", "right", "top")
    owl = Thing("owl", "big", "middle", "bottom")
    assert Scene("trio_row", (cat, car, owl), "blue").caption() == (
        "a small cat left of a big car, both above a big owl on a blue background"
    )
    assert Scene("group", (cat, cat), "pink").caption() == "two small cats on a pink background"


def test_the_same_seed_draws_the_same_picture() -> None:
    pictures = [compose(next(scenes("a")), random.Random(3))[0] for _ in range(2)]
    assert np.array_equal(*pictures)
    assert list(islice(scenes("a"), 9)) == list(islice(scenes("a"), 9)) != list(islice(scenes("b"), 9))


def test_facts_are_counted_mention_by_mention() -> None:
    true = read_facts("a small cat left of a big car on a blue background")
    said = read_facts("a small cat above a small car on a pink background")
    assert [count_right(kind, said, true) for kind in ("object", "size", "place", "background")] == [
        (2, 2), (1, 2), (0, 1), (0, 1)
    ]  # fmt: skip
    longer = read_facts("a small cat left of a big car, both above a big owl on a blue background")
    assert count_right("object", longer, true) == (2, 3)
    assert count_right("object", true, longer) == (2, 3)
    assert count_right("object", read_facts("two small cats on a blue background"), true) == (0, 2)
    assert count_right("background", read_facts("nothing"), true) == (0, 1)


def test_scores_of_a_perfect_and_a_useless_captioner() -> None:
    truth = [scene.caption() for scene in islice(scenes("s"), 40)]
    perfect, useless = score(truth, truth), score(["?"] * 40, truth)
    assert perfect.exact.value == 1
    assert all(kind.value == 1 for kind in perfect.facts.values())
    assert useless.exact.value == 0
    assert 0.85 < perfect.facts["background"].low < 1  # 40 captions can't prove certainty
    assert all(kind.value == 0 for kind in useless.facts.values())


@pytest.mark.parametrize("seed", range(20))
def test_questions_are_answered_truly(seed: int) -> None:
    rng = random.Random(seed)
    scene = sample_scene(rng)
    question, answer = question_and_answer(scene, rng)
    if question.startswith("is there a "):
        assert (question.removeprefix("is there a ") in {thing.name for thing in scene.things}) == (answer == "yes")
    assert answer in {"yes", "no", "one", "two", "three", *SIZE_WORDS, *BACKGROUND_WORDS} or answer in scene.caption()
    assert all(thing.name in fact_list(scene, rng) for thing in scene.things)

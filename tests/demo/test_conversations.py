"""Conversations about two pictures: true, balanced, and about nothing that training shows."""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.data.captions import IMAGE_MARK, open_records
from qwen3_vlm.demo.conversations import (
    KINDS,
    TRAINING_MIX,
    TRAINING_TURNS,
    TURNS,
    Picture,
    Talks,
    TalkSizes,
    llava_conversation,
    read_pictures,
    write_conversations,
)
from qwen3_vlm.demo.dataset import DemoSizes, build
from qwen3_vlm.demo.mixed_text import MAX_BYTES, texts
from qwen3_vlm.demo.world import BACKGROUND_WORDS, COLUMNS, NAMES, ROWS, Scene, plain_scene, scenes
from qwen3_vlm.errors import DataError
from qwen3_vlm.evaluate.text_suite import TEXTS

NUMBERS = ("none", "one", "two", "three")
YES = {True: "yes", False: "no"}
SIZES = TalkSizes(train=60, heldout=40, texts=60)


def pictures_of(stream: Sequence[Scene]) -> list[Picture]:
    return [Picture.of(f"{index}.png", scene.caption()) for index, scene in enumerate(stream)]


SCENES = list(islice(scenes("conversations"), 700))
UNSEEN = list(islice(scenes("conversations", unseen=True), 300))
PLAIN = [plain_scene(name) for name in NAMES]
PICTURES, UNSEEN_PICTURES = pictures_of(SCENES), pictures_of([*UNSEEN, *PLAIN])
BESIDE = UNSEEN_PICTURES[len(UNSEEN) :]
UNSEEN_PICTURES = UNSEEN_PICTURES[: len(UNSEEN)]


def which(truths: Sequence[bool]) -> str:
    return "both" if all(truths) else "first" if truths[0] else "second" if truths[1] else "neither"


def beside(scene: Scene, where: str, name: str) -> str:
    """What is left of or above a thing, from the cells in which the things stand."""
    (it,) = [thing for thing in scene.things if thing.name == name]
    if where == "left of":
        found = [t for t in scene.things if t.row == it.row and COLUMNS.index(t.column) < COLUMNS.index(it.column)]
    else:
        found = [t for t in scene.things if t.column == it.column and ROWS.index(t.row) < ROWS.index(it.row)]
    (other,) = found
    return f"a {other.size} {other.name}"


def true_answer(question: str, before: str, shown: Sequence[Scene]) -> str:
    """The answer from the scenes themselves; `before` is the question that a follow-up is about."""
    if follow := re.fullmatch(r"and (?:of|in) the (first|second) picture", question):
        question = re.sub("first|second", follow[1], before)
    if found := re.fullmatch(r"which picture shows a (\w+)", question):
        seen = [list(dict.fromkeys(thing.name for thing in scene.things)) for scene in shown]
        first, second = (", ".join(f"a {name} {YES[name == found[1]]}" for name in names) for names in seen)
        return f"{first}; {second}: {which([found[1] in names for names in seen])}"
    if found := re.fullmatch(r"which picture has a (\w+) background", question):
        first, second = (scene.background for scene in shown)
        truths = [first == found[1], second == found[1]]
        return f"{first} {YES[truths[0]]}; {second} {YES[truths[1]]}: {which(truths)}"
    numbers = [len(scene.things) for scene in shown]
    if question == "which picture has more objects":
        more = which([numbers[0] > numbers[1], numbers[1] > numbers[0]])
        return f"{NUMBERS[numbers[0]]}; {NUMBERS[numbers[1]]}: {more}"
    scene = shown["second" in question.split()[-2:]]
    if re.fullmatch(r"what colour is the background of the (first|second) picture", question):
        return scene.background
    if re.fullmatch(r"how many objects are there in the (first|second) picture", question):
        return NUMBERS[len(scene.things)]
    found = re.fullmatch(r"what is (left of|above) the (\w+) in the (first|second) picture", question)
    assert found, question
    return beside(scene, found[1], found[2])


def check_answers(turns: Sequence[tuple[str, str]], shown: Sequence[Scene]) -> None:
    before = ""
    for question, answer in turns:
        assert answer == true_answer(question, before, shown), (question, before, shown)
        before = question


def turns_of(record: dict[str, Any]) -> list[tuple[str, str]]:
    texts = [turn["value"] for turn in record["conversations"]]
    return [(question.rsplit("\n", 1)[-1], answer) for question, answer in zip(texts[::2], texts[1::2], strict=True)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("talk") / "data", DemoSizes(train=150, unseen=60, seen=2))


@pytest.fixture(scope="module")
def folder(data: Path) -> Path:
    return write_conversations(data, data.parent / "talk", SIZES)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(), unseen=st.booleans(), training=st.booleans())
def test_every_answer_is_true_of_the_scenes_themselves(seed: int, unseen: bool, training: bool) -> None:
    pictures, known = (UNSEEN_PICTURES, [*UNSEEN, *PLAIN]) if unseen else (PICTURES, SCENES)
    talks = Talks(pictures, str(seed), TRAINING_MIX if training else None, BESIDE if unseen else ())
    for _ in range(5):
        pair, asked = talks.next()
        check_answers([(item.question, item.answer) for item in asked], [known[int(it.path[:-4])] for it in pair])
        assert pair[0] != pair[1]
        assert set(pair) & set(pictures), "a plain drawing stands beside one of the others"
        assert len({item.question for item in asked}) == len(asked) == (TRAINING_TURNS if training else TURNS)


def test_every_kind_is_asked_and_no_answer_can_be_guessed() -> None:
    """Even who knows how often each answer follows each form of question is seldom right (a comparison: at its end)."""
    talks = Talks(UNSEEN_PICTURES, "balance", beside=BESIDE)
    answers: dict[str, dict[str, Counter[str]]] = {kind: defaultdict(Counter) for kind in KINDS}
    for _ in range(1500):
        for item in talks.next()[1]:
            form = re.sub(rf"\b({'|'.join((*NAMES, *BACKGROUND_WORDS))})\b", "*", item.question)
            answers[item.kind][form][item.answer.rsplit(": ", 1)[-1]] += 1
    for kind, forms in answers.items():
        asked_of = sum(sum(counts.values()) for counts in forms.values())
        guessed = sum(max(counts.values()) for counts in forms.values())
        assert asked_of > 600
        assert guessed / asked_of < 0.38, (kind, forms)


def test_the_files_are_true_and_keep_the_held_out_pairs_apart(folder: Path) -> None:
    """The pictures are those of the data set, whose scenes follow from its seed."""
    known = {
        "train": list(islice(scenes("train-0"), 150)),
        "unseen": list(islice(scenes("unseen-0", unseen=True), 60)),
        "plain": PLAIN,
    }
    for name, allowed, number in (("train", {"train"}, 60), ("heldout", {"unseen", "plain"}, 40)):
        records = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        assert len(records) == len({record["id"] for record in records}) == number
        for record in records:
            paths = [Path(path) for path in record["image"]]
            assert {path.parent.name for path in paths} <= allowed
            shown = [known[path.parent.name][int(path.stem)] for path in paths]
            assert any(scene.has_held_out_pair() for scene in shown) == (name == "heldout")
            check_answers(turns_of(record), shown)
            assert len(record["kinds"]) == len(turns_of(record))


def test_the_importer_of_a_users_own_data_reads_them(data: Path, folder: Path) -> None:
    records = open_records([str(folder / "train.json"), str(folder / "heldout.json")], str(data))
    assert len(records) == 100
    shown = Counter()
    for record in records:
        marks = [turn.text.count(IMAGE_MARK) for turn in record.turns]
        turns = TRAINING_TURNS if "train" in record.id else TURNS
        assert (len(record.turns), len(record.images), sum(marks)) == (2 * turns, 2, 2)
        assert marks[0] == 2 or marks[:3] == [1, 0, 1]
        shown[marks[0]] += 1
        for ref in record.images:
            ref.check_present()
    assert min(shown[1], shown[2]) > 10, "the second picture comes at once, or with the second question"


def test_text_stands_beside_them_of_many_alphabets_and_in_no_test(data: Path, folder: Path) -> None:
    records = open_records([str(folder / "text.json")], str(data))
    assert len(records) == 60
    assert max(len(text.encode()) for text in islice(texts("any"), 300)) <= MAX_BYTES
    assert not any(record.images for record in records)
    whole = " ".join(turn.text for record in records for turn in record.turns)
    alphabets = {unicodedata.name(letter, "").split()[0] for letter in whole if letter.isalpha()}
    assert {"LATIN", "CYRILLIC", "ARABIC", "CJK", "HANGUL"} <= alphabets
    assert not any(text[:20] in whole for text in TEXTS), "the suite on which drift is measured is not trained on"


def test_before_the_second_picture_is_shown_nothing_is_asked_of_it(folder: Path) -> None:
    for record in json.loads((folder / "train.json").read_text(encoding="utf-8")):
        first, *others = [turn["value"] for turn in record["conversations"]][::2]
        if first.count("<image>") == 1:
            assert first.rstrip(".").endswith("first picture")
            assert others[0].startswith("second picture\n<image>\n")


def test_conversations_follow_from_their_seed_and_are_kept(data: Path, folder: Path, tmp_path: Path) -> None:
    again = write_conversations(data, tmp_path / "again", SIZES)
    other = write_conversations(data, tmp_path / "other", SIZES, seed=1)
    for name in ("train.json", "heldout.json", "text.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes() != (other / name).read_bytes()
    before = (again / "train.json").stat().st_mtime_ns
    write_conversations(data, tmp_path / "again", SIZES)
    assert (again / "train.json").stat().st_mtime_ns == before
    write_conversations(data, tmp_path / "again", TalkSizes(train=5, heldout=5, texts=5))
    assert len(json.loads((again / "train.json").read_text(encoding="utf-8"))) == 5


def test_a_picture_is_what_its_caption_says(data: Path) -> None:
    pictures = read_pictures(data / "train.json")
    for picture, scene in zip(pictures, islice(scenes("train-0"), 150), strict=True):
        assert picture.background == scene.background
        assert len(picture.objects) == len(scene.things)
        assert picture.names == {thing.name for thing in scene.things}


def test_what_can_not_be_asked_is_said() -> None:
    with pytest.raises(DataError, match="'a view of the sea' is no caption"):
        Picture.of("a.png", "a view of the sea")
    with pytest.raises(DataError, match="No two of 1 pictures"):
        Talks(PICTURES[:1], "one").next()


def test_the_labels_stand_before_their_pictures() -> None:
    pair, asked = Talks(PICTURES, "labels").next()
    at_once = llava_conversation("a", pair, asked, later=False)["conversations"]
    later = llava_conversation("a", pair, asked, later=True)["conversations"]
    assert at_once[0]["value"] == f"first picture\n<image>\nsecond picture\n<image>\n{asked[0].question}"
    assert later[2]["value"] == f"second picture\n<image>\n{asked[1].question}"
    assert [turn["value"] for turn in later[1::2]] == [item.answer for item in asked]

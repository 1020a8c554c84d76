"""Conversations of several turns about two pictures, in LLaVA's format, from pictures with true captions.

    DIR/train.json      about pictures of the training set
    DIR/heldout.json    about two new pictures: both show a pair of objects that training never shows together, or one
                        does and the other is a plain drawing (of one object, so that there is one to count)
    DIR/text.json       conversations without pictures (see mixed_text)

What is asked and answered follows from the captions alone, so it is right where they are. Before a pair of pictures
is chosen it is decided what will be asked, and what the answer is to be: each answer of a form is then as frequent as
the others, and guessing from the question gets no further than one of them. Where the pictures are compared, the
answer says first what it sees in each (`green yes; blue no: first`): a word of it is then one reading or one
comparison, never two readings and a comparison at once. The pictures stay where they are; their paths are relative to
the data set's folder (`data.image_root`).
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from qwen3_vlm.demo.facts import read_facts
from qwen3_vlm.demo.mixed_text import llava_texts
from qwen3_vlm.demo.questions import COUNTS
from qwen3_vlm.demo.world import BACKGROUND_WORDS, NAMES
from qwen3_vlm.errors import DataError
from qwen3_vlm.storage import atomic_directory

Kind = Literal["colour", "count", "object", "which"]
KINDS: tuple[Kind, ...] = ("colour", "count", "object", "which")
# Of the training conversations. Many short answers to a pair of pictures: each is a lesson in which of them is meant.
TRAINING_MIX: dict[Kind, float] = {"which": 1.8, "count": 0.6, "object": 1.5, "colour": 0.5}
POSITIONS = ("first", "second")
TURNS, TRAINING_TURNS = 3, 6
ANSWERS = tuple(COUNTS.values())
_IMAGE = "<image>"
_FOLLOW_UPS = 0.3  # share of the conversations in which a question is put again, about the other picture
_SHOWN_LATER = 0.5  # of the conversations that begin with a question about the first picture: the second comes later
_PLANS, _PAIRS, _TRIES = 100, 40, 300  # sets of questions that are tried, pairs for each, pictures for each place


@dataclass(frozen=True)
class TalkSizes:
    """How many conversations."""

    train: int = 8_000
    heldout: int = 400
    texts: int = 2_000


@dataclass(frozen=True)
class Picture:
    """A picture's path in the data set, and what its caption says of it."""

    path: str
    objects: tuple[tuple[str, str], ...]  # (name, size or ""), in the caption's order
    background: str
    relation: str  # of the first object to the second: "left of", "above" or ""

    @classmethod
    def of(cls, path: str, caption: str) -> "Picture":
        """Raises: DataError: the caption is none of the demo's."""
        facts = read_facts(caption)
        objects = tuple((name, size) for count, size, name in facts.mentions for _ in range(count))
        if not objects or facts.background is None:
            raise DataError(f"{path}: {caption!r} is no caption of the demo's world.")
        alone = len(facts.mentions) == 1
        return cls(path, objects, facts.background, "" if alone else facts.places[0])

    @cached_property
    def named(self) -> tuple[str, ...]:
        """Names of the objects, each once, in the caption's order."""
        return tuple(dict.fromkeys(name for name, _ in self.objects))

    @cached_property
    def names(self) -> frozenset[str]:
        """Of the objects."""
        return frozenset(self.named)


Pair = tuple[Picture, Picture]


@dataclass(frozen=True)
class Asked:
    """One question with its true answer."""

    kind: Kind
    question: str
    answer: str
    about: int | None  # which picture alone it is about: 0, 1; None: both


@dataclass(frozen=True)
class Form:
    """A question that is going to be asked: `ask` gives it with its answer, or None where the pair does not fit."""

    theme: str  # of which a conversation has one question: the number of objects tells what else can be asked of them
    about: int | None
    ask: Callable[[Pair, random.Random], Asked | None]


def colour(about: int, again: bool = False) -> Form:
    """`what colour is the background of the first picture`."""
    place = f"of the {POSITIONS[about]} picture"
    question = f"and {place}" if again else f"what colour is the background {place}"
    return Form(f"colour {about}", about, lambda pair, rng: Asked("colour", question, pair[about].background, about))


def count(about: int, answer: str, again: bool = False) -> Form:
    """`how many objects are there in the second picture`, where that is the answer."""
    place = f"in the {POSITIONS[about]} picture"
    question = f"and {place}" if again else f"how many objects are there {place}"

    def ask(pair: Pair, rng: random.Random) -> Asked | None:
        return Asked("count", question, answer, about) if COUNTS[len(pair[about].objects)] == answer else None

    return Form(f"objects {about}", about, ask)


def neighbour(about: int) -> Form:
    """`what is left of the cow in the first picture`."""

    def ask(pair: Pair, rng: random.Random) -> Asked | None:
        picture = pair[about]
        if not picture.relation:
            return None
        (name, size), (other, _) = picture.objects[:2]
        question = f"what is {picture.relation} the {other} in the {POSITIONS[about]} picture"
        return Asked("object", question, f"a {size} {name}", about)

    return Form(f"objects {about}", about, ask)


def which_shows(answer: str) -> Form:
    """`which picture shows a cow`, where that is the answer."""

    def ask(pair: Pair, rng: random.Random) -> Asked | None:
        """A name for which the answer is true of the pair; each object that is seen is checked against it."""
        first, second = (picture.names for picture in pair)
        fitting = {"first": first - second, "second": second - first, "both": first & second}
        names = sorted(fitting.get(answer) or (set(NAMES) - first - second if answer == "neither" else ()))
        if not names:
            return None
        name = rng.choice(names)
        seen = [", ".join(f"a {_checked(shown, name)}" for shown in picture.named) for picture in pair]
        return _compared(f"which picture shows a {name}", seen, answer)

    return Form("", None, ask)


def which_background(answer: str) -> Form:
    """`which picture has a green background`, where that is the answer."""

    def ask(pair: Pair, rng: random.Random) -> Asked | None:
        words = [w for w in BACKGROUND_WORDS if _which(*(picture.background == w for picture in pair)) == answer]
        if not words:
            return None
        word = rng.choice(words)
        seen = [_checked(picture.background, word) for picture in pair]
        return _compared(f"which picture has a {word} background", seen, answer)

    return Form("", None, ask)


def which_has_more(answer: str) -> Form:
    """`which picture has more objects`, where that is the answer; `neither` where they have as many."""

    def ask(pair: Pair, rng: random.Random) -> Asked | None:
        first, second = (len(picture.objects) for picture in pair)
        true = _which(first > second, second > first)
        seen = [COUNTS[len(picture.objects)] for picture in pair]
        return _compared("which picture has more objects", seen, answer) if true == answer else None

    return Form("more", None, ask)


def _compared(question: str, seen: Sequence[str], answer: str) -> Asked:
    """`two; three: second`: what is seen in the first picture and in the second, and what follows."""
    return Asked("which", question, f"{'; '.join(seen)}: {answer}", None)


def _checked(seen: str, wanted: str) -> str:
    return f"{seen} {'yes' if seen == wanted else 'no'}"


def _which(first: bool, second: bool) -> str:
    return {(True, False): "first", (False, True): "second", (True, True): "both"}.get((first, second), "neither")


class Talks:
    """An endless, repeatable stream of conversations about pairs of these pictures.

    Args:
        mix: how often each kind of question comes, in conversations of `TRAINING_TURNS`; None: `TURNS` different kinds,
            each as often as the others.
        beside: pictures of which one may stand beside one of `pictures`, where none of those fits.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        seed: str,
        mix: Mapping[Kind, float] | None = None,
        beside: Sequence[Picture] = (),
    ) -> None:
        self.pictures, self.rng, self.mix = pictures, random.Random(seed), mix
        self.beside, self._aside = beside, set(beside)

    def next(self) -> tuple[Pair, tuple[Asked, ...]]:
        """Two different pictures, and different questions about them with their answers.

        Raises:
            DataError: no pair of the pictures fits any of the questions that came up.
        """
        for _ in range(_PLANS):
            forms = self._forms()
            for _ in range(_PAIRS):
                first, second = self._fitting(forms, 0), self._fitting(forms, 1)
                if first is None or second is None or {first, second} <= self._aside:
                    break  # "one object" and "what is left of …" can't be asked of the same picture
                pair = first, second
                asked = [form.ask(pair, self.rng) for form in forms]
                found = tuple(item for item in asked if item)
                if first != second and len({item.question for item in found}) == len(forms):
                    return pair, found
        raise DataError(f"No two of {len(self.pictures)} pictures fit a conversation. Give more of them.")

    def _fitting(self, forms: Sequence[Form], about: int) -> Picture | None:
        """A picture that can be asked all that is about it alone."""
        asked = [form for form in forms if form.about == about]
        for pictures in filter(None, (self.pictures, self.beside)):
            for _ in range(_TRIES):
                picture = self.rng.choice(pictures)
                if all(form.ask((picture, picture), self.rng) for form in asked):
                    return picture
        return None

    def _forms(self) -> list[Form]:
        forms: list[Form] = []
        again: Form | None = None
        for kind in self._kinds():
            form, other = self._form(kind)
            form = again or form
            if form.theme and form.theme in {other.theme for other in forms}:
                return self._forms()
            forms.append(form)
            again = other if not again and other and self.rng.random() < _FOLLOW_UPS else None
        return forms

    def _kinds(self) -> list[Kind]:
        if self.mix is None:
            return self.rng.sample(KINDS, TURNS)
        return self.rng.choices(tuple(self.mix), tuple(self.mix.values()), k=TRAINING_TURNS)

    def _form(self, kind: Kind) -> tuple[Form, Form | None]:
        """What to ask, and the same about the other picture as a follow-up, where there is one."""
        rng, about = self.rng, self.rng.randrange(2)
        if kind == "colour":
            return colour(about), colour(1 - about, again=True)
        if kind == "count":
            answer, other = rng.choice(ANSWERS), rng.choice(ANSWERS)
            return count(about, answer), count(1 - about, other, again=True)
        if kind == "object":
            return neighbour(about), None
        make = rng.choice((which_shows, which_background, which_has_more))
        answers = (*POSITIONS, "neither") if make is which_has_more else (*POSITIONS, "neither", "both")
        return make(rng.choice(answers)), None


def llava_conversation(identity: str, pair: Pair, asked: Sequence[Asked], later: bool) -> dict[str, Any]:
    """One conversation in LLaVA's format; with `later` the second picture comes with the second question."""
    shown = [f"{position} picture\n{_IMAGE}\n" for position in POSITIONS]
    before = [shown[0], shown[1]] if later else ["".join(shown)]
    turns = []
    for number, item in enumerate(asked):
        opening = before[number] if number < len(before) else ""
        turns.append({"from": "human", "value": opening + item.question})
        turns.append({"from": "gpt", "value": item.answer})
    kinds = [item.kind for item in asked]
    return {"id": identity, "image": [picture.path for picture in pair], "conversations": turns, "kinds": kinds}


def read_pictures(path: Path) -> list[Picture]:
    """The pictures of one of the demo's caption files.

    Raises:
        DataError: a caption is none of the demo's.
    """
    records = json.loads(path.read_text(encoding="utf-8"))
    return [Picture.of(record["image"], record["conversations"][1]["value"]) for record in records]


def write_conversations(data: Path, folder: Path, sizes: TalkSizes | None = None, seed: int = 0) -> Path:
    """Conversations about the pictures of a demo data set, whole or not at all; what is there already is kept.

    Args:
        data: folder of the data set (see `dataset.build`).

    Raises:
        DataError: a caption is none of the demo's, or there are too few pictures.
        StorageError: the disk is full or the folder can't be written.
    """
    captions = (data / "stamp.json").read_text(encoding="utf-8")
    sizes = sizes or TalkSizes()
    stamp = json.dumps({"seed": seed, **vars(sizes), "data": captions}, sort_keys=True)
    if (folder / "stamp.json").is_file() and (folder / "stamp.json").read_text(encoding="utf-8") == stamp:
        return folder
    with atomic_directory(folder) as temporary:
        for part, source, number, mix in (
            ("train", "train", sizes.train, TRAINING_MIX),
            ("heldout", "heldout_unseen", sizes.heldout, None),
        ):
            beside = read_pictures(data / "heldout_plain.json") if part == "heldout" else ()
            talks = Talks(read_pictures(data / f"{source}.json"), f"{part}-{seed}", mix, beside)
            _write(temporary / f"{part}.json", [_record(f"talk-{part}-{index:06d}", talks) for index in range(number)])
        _write(temporary / "text.json", list(llava_texts(f"text-{seed}", sizes.texts)))
        (temporary / "stamp.json").write_text(stamp, encoding="utf-8")
    return folder


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text(json.dumps(records, indent=0), encoding="utf-8")


def _record(identity: str, talks: Talks) -> dict[str, Any]:
    pair, asked = talks.next()
    later = asked[0].about == 0 and talks.rng.random() < _SHOWN_LATER
    return llava_conversation(identity, pair, asked, later)

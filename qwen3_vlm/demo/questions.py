"""Questions that a scene answers, and the scene as a loose list of facts."""

import random

from qwen3_vlm.demo.world import COUNT_WORDS, NAMES, Scene, Thing, phrase

COUNTS = {1: "one", **COUNT_WORDS}


def question_and_answer(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """One of the questions that this scene has an answer to."""
    asked = rng.choice(scene.things)
    choices = [
        ("what colour is the background", scene.background),
        ("how many objects are there", COUNTS[len(scene.things)]),
        (f"is there a {asked.name}", "yes"),
    ]
    absent = rng.choice(NAMES)
    if all(thing.name != absent for thing in scene.things):
        choices.append((f"is there a {absent}", "no"))
    if scene.layout != "plain":
        choices.append((f"how big is the {asked.name}", asked.size))
    if len(scene.things) > 1 and scene.layout != "group":
        choices += 2 * [_neighbour(scene.things)]
    return rng.choice(choices)


def _neighbour(things: tuple[Thing, ...]) -> tuple[str, str]:
    """`what is left of the dog` → `a small cat`."""
    first, second = things[:2]
    where = "left of" if first.row == second.row else "above"
    return f"what is {where} the {second.name}", phrase(first)


def fact_list(scene: Scene, rng: random.Random) -> str:
    """`top right: big dog, blue, top left: small cat`: everything known, in any order."""
    facts = [f"{thing.row} {thing.column}: {thing.size} {thing.name}" for thing in scene.things]
    facts.append(scene.background)
    rng.shuffle(facts)
    return ", ".join(facts)

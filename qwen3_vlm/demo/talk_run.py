"""Stage 2 of the guided run: conversations about two pictures, the gates, and what it answers.

It calls what a real run calls: `train(config)` trains connector and adapter and runs the gates, the answers are asked
for as `qwen3-vlm eval` asks for them. The model talks: what it answered itself, right or wrong, stands before the
next question. The demo's own is the verdict: how many answers of each kind are right, with the pictures and without,
and whether stage 1's captions are as good as they were. An answer is right where every word of it is; of a comparison
(`a cow no; a tree yes: second`) it is also said how often the word behind the colon is, whatever stands before it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from qwen3_vlm.config import RunConfig, load_config
from qwen3_vlm.demo.conversations import KINDS, TURNS, TalkSizes, write_conversations
from qwen3_vlm.demo.facts import Scores
from qwen3_vlm.demo.paths import BASES, CONFIGS
from qwen3_vlm.demo.telling import percent, tell
from qwen3_vlm.errors import GateError
from qwen3_vlm.evaluate.intervals import Interval, wilson_interval
from qwen3_vlm.storage import atomic_write_json

if TYPE_CHECKING:
    from qwen3_vlm.train.eval_captions import Answer

CONFIG = CONFIGS / "demo_stage2.yaml"
SIZES = TalkSizes()
DEMANDED, BLIND_LIMIT = 0.80, 0.35  # right answers with the pictures, at least; without them, at most
CAPTION_LOSS = 0.02  # of the exact held-out captions, at most, against stage 1
CONCLUSION = "which: its last word"  # a row of the table
SHOWN = 12  # conversations in the report


@dataclass(frozen=True)
class Talk:
    """A held-out conversation as it went."""

    kinds: tuple[str, ...]
    answers: tuple["Answer", ...]
    pictures: tuple[Path, ...]

    @property
    def right(self) -> list[bool]:
        """Answer by answer."""
        return [item.prediction == item.reference for item in self.answers]


@dataclass(frozen=True)
class Share:
    """Right answers of one kind."""

    answers: int
    seeing: Interval
    blind: Interval


@dataclass(frozen=True)
class Results:
    """What is judged: conversations, and captions with stage 1's connector and with this stage's."""

    talks: tuple[Talk, ...]
    before: Scores
    after: Scores

    def share(self, *kinds: str, part: Callable[[str], str] = str) -> Share:
        """Of the answers of these kinds; `part`: what of an answer is compared."""
        pairs = [(kind, item) for talk in self.talks for kind, item in zip(talk.kinds, talk.answers, strict=True)]
        found = [item for kind, item in pairs if kind in kinds]
        seeing, blind = (
            sum(part(said) == part(item.reference) for said, item in zip(column, found, strict=True))
            for column in ([item.prediction for item in found], [item.blind for item in found])
        )
        return Share(len(found), wilson_interval(seeing, len(found)), wilson_interval(blind, len(found)))

    def rows(self) -> dict[str, Share]:
        """All answers, then kind by kind, and what the comparisons come to."""
        kinds: dict[str, Share] = {kind: self.share(kind) for kind in KINDS}
        return {"all": self.share(*KINDS), **kinds, CONCLUSION: self.share("which", part=concluded)}

    def whole(self) -> Interval:
        """Share of the conversations with every answer right."""
        return wilson_interval(sum(all(talk.right) for talk in self.talks), len(self.talks))


def concluded(answer: str) -> str:
    """`a cow no; a tree yes: second` → `second`."""
    return answer.rsplit(": ", 1)[-1]


def run_talk(out: Path, connector: Path, console: Console) -> Path | None:
    """Write conversations, train on them, talk; the trained add-on, or None where a signal ended it.

    Args:
        out: of the whole demo; its data set is in `out/data`.
        connector: of stage 1: training starts from it, and its captions are the measure of the new ones.

    Raises:
        GateError: a gate failed, or the answers are worse than the demo promises.
    """
    from qwen3_vlm.train.train_utils import train

    console.print("[bold]Stage 2[/] Conversations about two pictures: the connector goes on, an adapter joins it")
    write_conversations(out / "data", out / "talk", SIZES)
    config = talk_config(out, connector)
    result = train(config)
    if result.add_on_dir is None:
        return None
    console.print("It talks about pictures that training never saw")
    results = judge(out, connector, Path(result.add_on_dir), config)
    write_results(Path(result.output_dir), results)
    check(tell(result, results_table(results), console), results)
    return Path(result.add_on_dir)


def talk_config(out: Path, connector: Path) -> RunConfig:
    """`configs/demo_stage2.yaml` with its folders below `out`."""
    values = {
        "model.llm": BASES / "text",
        "model.vision_tower": BASES / "tower",
        "model.connector": connector,
        "data.train": [str(out / "talk" / "train.json"), str(out / "data" / "train.json")],
        "data.eval": [str(out / "talk" / "heldout.json")],
        "text.files": [str(out / "talk" / "text.json")],
        "data.image_root": out / "data",
        "data.feature_cache": out / "features",
        "output_dir": out / "talk_run",
    }
    return load_config(CONFIG, [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()])


def judge(out: Path, connector: Path, adapted: Path, config: RunConfig) -> Results:
    """Hold every held-out conversation, and caption stage 1's pictures with both add-ons."""
    from qwen3_vlm.demo.run import caption_tests

    before, after = (caption_tests(out / "data", add_on, ["unseen"])["unseen"] for add_on in (connector, adapted))
    return Results(hold_talks(out, adapted, config), before, after)


def hold_talks(out: Path, adapted: Path, config: RunConfig) -> tuple[Talk, ...]:
    """Every held-out conversation, the model's own answers standing before the next question."""
    from qwen3_vlm.data.captions import open_records
    from qwen3_vlm.train.add_ons import load_vlm
    from qwen3_vlm.train.eval_captions import answer

    path = out / "talk" / "heldout.json"
    model, processor = load_vlm(adapted)
    answers, _ = answer(model, processor, open_records([str(path)], str(out / "data")), config, own_answers=True)
    by_id: dict[str, list[Answer]] = {}
    for item in answers:
        by_id.setdefault(item.id, []).append(item)
    return tuple(
        Talk(
            tuple(record["kinds"]),
            tuple(by_id[record["id"]]),
            tuple(out / "data" / name for name in record["image"]),
        )
        for record in json.loads(path.read_text(encoding="utf-8"))
    )


def results_table(results: Results) -> Table:
    """One line per kind of question, for a terminal."""
    table = Table("", "answers", "seeing", "blind", title="Held-out answers right, % (95 % interval)")
    for name, share in results.rows().items():
        table.add_row(name, str(share.answers), percent(share.seeing), percent(share.blind))
    table.add_row(f"all {TURNS} of a conversation", str(len(results.talks)), percent(results.whole()), "")
    table.add_row("captions exact, before", str(results.before.captions), percent(results.before.exact), "")
    table.add_row("captions exact, after", str(results.after.captions), percent(results.after.exact), "")
    return table


def write_results(run_dir: Path, results: Results) -> None:
    """Tables for the report: answers, captions, and conversations as they went."""
    shares = results.rows()
    tables = {
        "held_out_answers": {
            "title": "Held-out answers",
            "rows": [
                {"question": name, "answers": it.answers, "seeing": _cell(it.seeing), "blind": _cell(it.blind)}
                for name, it in shares.items()
            ],
            "note": "Exact answers in conversations about two pictures; at least one shows a pair of objects that "
            "no training picture shows together. The model's own answers stand before the next question. Blind: the "
            f"same model, the same text, no pictures. All {TURNS} answers right in {percent(results.whole())} % of "
            f"{len(results.talks)} conversations.",
            "headline": {"label": "held-out answers right", "text": f"{100 * shares['all'].seeing.value:.0f} %"},
            "order": 1,
        },
        "held_out_captions": {
            "title": "Stage 1's captions, before and after",
            "rows": [results.before.row("stage 1"), results.after.row("stage 2")],
            "note": "Of scenes with an unseen pair of objects; per cent right with 95 % intervals.",
            "order": 2,
        },
        "conversations": {
            "title": "Conversations about two pictures",
            "rows": [row for number, talk in enumerate(results.talks[:SHOWN], 1) for row in _talk_rows(number, talk)],
            "note": f"The first {min(SHOWN, len(results.talks))} of those that are held out, as they went.",
            "order": 3,
        },
    }
    (run_dir / "results").mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        atomic_write_json(run_dir / "results" / f"{name}.json", table)


def _cell(it: Interval) -> dict[str, float]:
    return {"percent": it.value, "low": it.low, "high": it.high}


def _talk_rows(number: int, talk: Talk) -> list[dict[str, Any]]:
    """A row per turn; a picture stands in the row in which it was shown."""
    from PIL import Image

    from qwen3_vlm.data.records import IMAGE_MARK
    from qwen3_vlm.evaluate.golden import thumbnail_uri

    rows: list[dict[str, Any]] = []
    shown = 0
    for item, right in zip(talk.answers, talk.right, strict=True):
        row: dict[str, Any] = {"": f"{number}: {sum(talk.right)} of {len(talk.right)}" if not rows else ""}
        new = range(shown, shown + item.question.count(IMAGE_MARK))
        for index, column in enumerate(("first picture", "second picture")):
            opened = thumbnail_uri(Image.open(talk.pictures[index]).convert("RGB")) if index in new else None
            row[column] = {"image": opened} if opened else ""
        shown = new.stop
        question = item.question.rsplit("\n", 1)[-1]
        said = {"question": question, "answer": item.prediction, "truth": item.reference, "right": right}
        rows.append(row | said | {"blind": item.blind})
    return rows


def check(gates: Sequence[dict[str, Any]], results: Results) -> None:
    """Raise what falls short of what the demo promises.

    Raises:
        GateError: naming each figure.
    """
    short = [f"gate {gate['name']}" for gate in gates if not gate["passed"]] + ([] if gates else ["no gate was run"])
    shares = results.rows()
    demanded = {name: shares[name].seeing.value for name in ("all", "colour", "count", "object", CONCLUSION)}
    short += [f"answers ({name}) {value:.1%} < {DEMANDED:.0%}" for name, value in demanded.items() if value < DEMANDED]
    if shares["all"].blind.value > BLIND_LIMIT:
        short.append(f"blind answers {shares['all'].blind.value:.1%} > {BLIND_LIMIT:.0%}")
    lost = results.before.exact.value - results.after.exact.value
    if lost > CAPTION_LOSS:
        short.append(f"exact captions {lost:.1%} fewer than after stage 1; {CAPTION_LOSS:.0%} at most")
    if short:
        raise GateError(f"The demo falls short of what it promises: {'; '.join(short)}.")

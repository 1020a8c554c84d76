"""What a connector answers to held-out questions about pictures, with the pictures and without.

Every answer of a conversation is asked for, after the true answers before it or after the model's own. Without its
pictures the model gets the same text: what it then still gets right can be guessed, and is no sight.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qwen3_vlm.config import RunConfig
from qwen3_vlm.data.images import load_image
from qwen3_vlm.data.records import IMAGE_MARK, Record
from qwen3_vlm.errors import ImageError
from qwen3_vlm.evaluate.caption_languages import score_languages
from qwen3_vlm.evaluate.captioning import Request, generate_answers
from qwen3_vlm.evaluate.metrics import LossReport, evaluate_loss
from qwen3_vlm.storage import atomic_write_text
from qwen3_vlm.train.data_source import DataSource
from qwen3_vlm.train.eval_tables import Table, caption_rows, loss_row

ANSWERS_FILE = "answers.jsonl"
_CHUNK = 64  # records whose pictures are open at a time


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a held-out conversation."""

    id: str
    turn: int  # 0 is the first
    question: str
    reference: str
    prediction: str = ""
    blind: str = ""  # what is said without the picture


def loss_table(model: Any, data: DataSource, config: RunConfig) -> Table:
    """The loss on everything held out."""
    batches = data.eval_batches(data.eval.indices, config.eval.batch_size)
    refused = LossReport.of_refused(data.unusable_eval())
    report = LossReport.merge([evaluate_loss(model, batches), refused])
    return Table("loss", "Held-out loss", [loss_row("answers", report, config.eval.confidence)])


def answer_table(
    model: Any,
    processor: Any,
    data: DataSource,
    config: RunConfig,
    folder: Path,
    *,
    samples: int,
    language: str,
) -> Table:
    """Scores of the answers to at most `samples` held-out conversations with pictures; all answers go to `folder`."""
    table = Table("answers", "Held-out answers")
    indices = data.eval.pick(data.eval.with_pictures(), samples, config.seed)
    records = [data.eval.records[index] for index in indices]
    answers, unreadable = answer(model, processor, records, config)
    if unreadable:
        table.notes.append(f"{unreadable} conversations were left out: a picture can't be read.")
    if not answers:
        table.notes.append("No held-out conversation has a picture that can be read.")
        return table
    lines = [json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in answers]
    atomic_write_text(folder / ANSWERS_FILE, "".join(lines))
    later = [item for item in answers if item.turn]
    parts = [("answers", answers)]
    if later:
        parts = [("first answers", [item for item in answers if not item.turn]), ("later answers", later)]
    for name, part in parts:
        for sight, said in (("yes", [item.prediction for item in part]), ("no", [item.blind for item in part])):
            references = [item.reference for item in part]
            scores = score_languages(said, references, [language] * len(part), config.eval.confidence)
            table.rows += caption_rows(scores, {"of": name, "sees the picture": sight})
    return table


@dataclass(frozen=True, slots=True)
class _Talk:
    """A held-out conversation with its pictures open."""

    record: Record
    pictures: list[Image.Image]

    @property
    def answers(self) -> int:
        return len(self.record.turns) // 2


def answer(
    model: Any, processor: Any, records: Sequence[Record], config: RunConfig, *, own_answers: bool = False
) -> tuple[list[Answer], int]:
    """All answers of these conversations, greedily, and how many conversations have a picture that can't be read.

    Args:
        own_answers: what the model itself answered before stands in the conversation, as when one talks with it;
            else the true answers do.
    """
    answers: list[Answer] = []
    unreadable = 0
    for start in range(0, len(records), _CHUNK):
        talks: list[_Talk] = []
        for record in records[start : start + _CHUNK]:
            try:
                talks.append(_Talk(record, _pictures(record, config.data.max_image_pixels)))
            except ImageError:
                unreadable += 1
        said = _hold(model, processor, talks, config, sees=True, own=own_answers)
        guessed = _hold(model, processor, talks, config, sees=False, own=own_answers)
        for talk, texts, guesses in zip(talks, said, guessed, strict=True):
            turns = talk.record.turns
            answers += [
                Answer(talk.record.id, number, turns[2 * number].text, turns[2 * number + 1].text, text, guess)
                for number, (text, guess) in enumerate(zip(texts, guesses, strict=True))
            ]
    return answers, unreadable


def _hold(
    model: Any, processor: Any, talks: Sequence[_Talk], config: RunConfig, *, sees: bool, own: bool
) -> list[list[str]]:
    """The answers of each conversation: all first ones, then all second ones …"""
    said: list[list[str]] = [[] for _ in talks]
    for number in range(max((talk.answers for talk in talks), default=0)):
        waiting = [index for index, talk in enumerate(talks) if number < talk.answers]
        requests = [_request(talks[index], number, said[index] if own else None, processor) for index in waiting]
        if not sees:
            requests = [_without_pictures(request, processor.image_token) for request in requests]
        texts = generate_answers(
            model,
            processor,
            requests,
            max_new_tokens=config.eval.golden_max_new_tokens,
            batch_size=config.eval.batch_size,
        )
        for index, text in zip(waiting, texts, strict=True):
            said[index].append(text)
    return said


def _pictures(record: Record, max_pixels: int) -> list[Image.Image]:
    """Raises: ImageError: one can't be read."""
    return [load_image(ref.read_bytes(), max_pixels=max_pixels, name=ref.name) for ref in record.images]


def _request(talk: _Talk, number: int, said: Sequence[str] | None, processor: Any) -> Request:
    """What asks for answer `number`; before it stand the answers `said`, or the true ones."""
    turns = talk.record.turns[: 2 * number + 1]
    texts = [turn.text.replace(IMAGE_MARK, processor.image_token) for turn in turns]
    if said is not None:
        texts[1::2] = said[:number]
    messages = [{"role": turn.role, "content": turn.text} for turn in talk.record.preface]
    messages += [{"role": turn.role, "content": text} for turn, text in zip(turns, texts, strict=True)]
    shown = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    return Request(messages, talk.pictures[:shown])


def _without_pictures(request: Request, image_token: str) -> Request:
    none: list[Image.Image] = []
    messages = [
        {**message, "content": str(message["content"]).replace(image_token, "").strip()} for message in request.messages
    ]
    return Request(messages, none)

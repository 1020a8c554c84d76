"""What a connector answers to held-out questions about pictures, with the pictures and without.

Every answer of a conversation is asked for, after the true answers before it. Without its picture the model gets
the same text: what it then still gets right can be guessed, and is no sight.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
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


def answer(model: Any, processor: Any, records: Sequence[Record], config: RunConfig) -> tuple[list[Answer], int]:
    """All answers of these conversations, greedily, and how many conversations have a picture that can't be read."""
    answers: list[Answer] = []
    unreadable = 0
    options: dict[str, Any] = {
        "max_new_tokens": config.eval.golden_max_new_tokens,
        "batch_size": config.eval.batch_size,
    }
    for start in range(0, len(records), _CHUNK):
        asked: list[Answer] = []
        seeing: list[Request] = []
        blind: list[Request] = []
        for record in records[start : start + _CHUNK]:
            try:
                found = list(_questions(record, processor.image_token, config.data.max_image_pixels))
            except ImageError:
                unreadable += 1
                continue
            for item, request in found:
                asked.append(item)
                seeing.append(request)
                blind.append(_without_pictures(request, processor.image_token))
        said = generate_answers(model, processor, seeing, **options)
        guessed = generate_answers(model, processor, blind, **options)
        answers += [
            replace(item, prediction=text, blind=guess) for item, text, guess in zip(asked, said, guessed, strict=True)
        ]
    return answers, unreadable


def _questions(record: Record, image_token: str, max_pixels: int) -> Iterator[tuple[Answer, Request]]:
    """Each answer of a conversation, and the request that asks for it.

    Raises:
        ImageError: a picture can't be read.
    """
    pictures = [load_image(ref.read_bytes(), max_pixels=max_pixels, name=ref.name) for ref in record.images]
    messages: list[dict[str, str]] = []
    shown = 0
    for number, turn in enumerate(record.turns):
        if turn.role == "assistant":
            wanted = Answer(record.id, number // 2, record.turns[number - 1].text, turn.text)
            yield wanted, Request(list(messages), pictures[:shown])
        shown += turn.text.count(IMAGE_MARK)
        messages.append({"role": turn.role, "content": turn.text.replace(IMAGE_MARK, image_token)})


def _without_pictures(request: Request, image_token: str) -> Request:
    none: list[Image.Image] = []
    messages = [
        {**message, "content": str(message["content"]).replace(image_token, "").strip()} for message in request.messages
    ]
    return Request(messages, none)

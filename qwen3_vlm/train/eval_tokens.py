"""What a token LM makes of held-out records: texts, pictures and sounds, each judged against the record's own.

Everything that is generated is kept, beside what it should have been: eval/step-000200/ holds the pictures, sounds and
items.jsonl of `evaluate.token_golden`, eval/reference/ the references.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from qwen3_vlm.errors import DataError, ModelError, RecordError
from qwen3_vlm.evaluate.caption_languages import score_languages
from qwen3_vlm.evaluate.decode_success import Prompt
from qwen3_vlm.evaluate.generated_images import Encode, TowerFeatures, measure_pictures
from qwen3_vlm.evaluate.generated_sounds import Listener, Sound, measure_speech
from qwen3_vlm.evaluate.metrics import evaluate_loss
from qwen3_vlm.evaluate.speech import Recogniser
from qwen3_vlm.evaluate.token_golden import REFERENCE_FOLDER, TokenGoldenItem, dump_token_golden
from qwen3_vlm.generate.sampling import Choice, Sampling
from qwen3_vlm.tokenization.sequences import sequence_format
from qwen3_vlm.train.eval_options import EvalOptions
from qwen3_vlm.train.eval_tables import Table, caption_rows, loss_row
from qwen3_vlm.train.token_evaluations import GENERATED_TOGETHER, TokenEvaluations
from qwen3_vlm.train.token_source import TokenSource


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One record to generate for."""

    id: str
    ids: Mapping[str, Any]  # modality → global ids
    language: str


@dataclass(frozen=True, slots=True)
class Judges:
    """What judges, and why one is missing."""

    encode: Encode | None
    listener: Listener | None
    problems: Mapping[str, str]  # "image", "audio" → a sentence


def loss_table(model: Any, data: TokenSource, *, batch_size: int, confidence: float) -> Table:
    """The loss of each task on its held-out records."""
    table = Table("loss", "Held-out loss by task")
    for task, indices in data.held_out.items():
        if len(indices):
            report = evaluate_loss(model, data.eval_batches(task, indices.tolist(), batch_size))
            table.rows.append(loss_row(task, report, confidence))
    return table


def find_judges(options: EvalOptions, tower: str | None, tasks: Sequence[str], device: Any) -> Judges:
    """A tower for pictures and a recogniser for speech, where the tasks need them and they can be had."""
    targets = {sequence_format(task).target for task in tasks}
    encode: Encode | None = None
    listener: Listener | None = None
    problems = {}
    if "image" in targets:
        if tower is None:
            problems["image"] = "No retrieval: name a frozen SigLIP tower with --vision-tower."
        else:
            try:
                encode = TowerFeatures(tower, device)
            except ModelError as problem:
                problems["image"] = f"No retrieval: {problem}"
    if "audio" in targets:
        try:
            listener = Recogniser(options.recogniser)
        except ModelError as problem:
            problems["audio"] = f"Word errors were not measured. {problem}"
    return Judges(encode, listener, problems)


def generated_tables(
    evaluations: TokenEvaluations,
    data: TokenSource,
    judges: Judges,
    folder: Path,
    *,
    step: int,
    options: EvalOptions,
    confidence: float,
) -> list[Table]:
    """Generate for held-out records of each task, and judge: a table per modality.

    Args:
        folder: eval/ of the run.
    """
    records = {task: found for task in judged_tasks(data) if (found := held_out(data, task, options))}
    made = _generate(evaluations, records, folder, step, options)
    tables = {
        "text": Table("texts", "Held-out texts"),
        "image": Table("pictures", "Held-out pictures"),
        "audio": Table("sounds", "Held-out sounds"),
    }
    media = _Media(folder, step)
    for task, found in records.items():
        target = sequence_format(task).target
        table, items = tables[target], made[task]
        if target == "text":
            table.rows += text_rows(task, items, found, confidence)
        elif target == "image":
            table.rows.append(_picture_row(task, items, media, judges, confidence))
        else:
            texts = [_words(record, evaluations) for record in found]
            row, problem = _sound_row(task, items, texts, media, judges)
            table.rows.append(row)
            table.notes += [problem] if problem else []
    for modality, sentence in judges.problems.items():
        tables[modality].notes.append(sentence)
    return [table for table in tables.values() if table.rows]


def judged_tasks(data: TokenSource) -> list[str]:
    """The tasks that make something else of their source: not those that copy it."""
    formats = {task: sequence_format(task) for task in data.tasks}
    return [task for task, wanted in formats.items() if wanted.source != wanted.target]


def held_out(data: TokenSource, task: str, options: EvalOptions) -> list[HeldOut]:
    """The first held-out records of a task, in their fixed random order; a damaged one is passed over."""
    found: list[HeldOut] = []
    count = options.samples_of(sequence_format(task).target)
    for index in data.held_out[task]:
        if len(found) == count:
            break
        try:
            record = data.eval[int(index)]
        except RecordError:
            continue
        found.append(HeldOut(record.id, record.ids, str(record.meta.get("language") or options.language)))
    return found


def text_rows(
    task: str, items: Sequence[TokenGoldenItem], records: Sequence[HeldOut], confidence: float
) -> list[dict[str, Any]]:
    """Scores by language; what did not decode is a wrong answer."""
    languages = [record.language for record in records]
    said = ["" if item.error else item.prediction for item in items]
    scores = score_languages(said, [item.reference for item in items], languages, confidence)
    return caption_rows(scores, {"task": task})


class _Media:
    """The pictures and sounds of one dump."""

    def __init__(self, folder: Path, step: int) -> None:
        self.made, self.references = folder / f"step-{step:06d}", folder / REFERENCE_FOLDER

    def pictures(self, item: TokenGoldenItem) -> tuple[Image.Image | None, Image.Image]:
        """Generated, None if it did not decode; and the reference."""
        made = _read_picture(self.made / item.prediction_file) if item.prediction_file else None
        return made, _read_picture(self.references / item.reference_file)

    def sounds(self, item: TokenGoldenItem) -> tuple[Sound | None, Sound]:
        """Likewise."""
        made = _read_sound(self.made / item.prediction_file) if item.prediction_file else None
        return made, _read_sound(self.references / item.reference_file)


def _generate(
    evaluations: TokenEvaluations,
    records: Mapping[str, Sequence[HeldOut]],
    folder: Path,
    step: int,
    options: EvalOptions,
) -> dict[str, list[TokenGoldenItem]]:
    """Task → what was generated for each record, in order."""
    assert evaluations.tokenizers is not None  # the caller has looked
    choice = Choice(temperature=options.temperature, top_p=options.top_p)
    plain, guided = (
        evaluations.generator(Sampling(image=choice, audio=choice, guidance=guidance))
        for guidance in (1.0, options.guidance)
    )

    def generate(prompts: Sequence[Prompt]) -> Iterable[Any]:
        """Prompts of one task → ids. What an empty source means is known where sources were left out in training."""
        return (guided if evaluations.source_dropout(prompts[0][0]) else plain)(prompts)

    shutil.rmtree(folder / REFERENCE_FOLDER, ignore_errors=True)  # they may be of other data
    items = dump_token_golden(
        evaluations.tokenizers,
        generate,
        {task: [(record.id, record.ids) for record in found] for task, found in records.items()},
        folder,
        step=step,
        batch_size=GENERATED_TOGETHER,
    )
    return {task: [item for item in items if item.task == task] for task in records}


def _picture_row(
    task: str, items: Sequence[TokenGoldenItem], media: _Media, judges: Judges, confidence: float
) -> dict[str, Any]:
    made, wanted = zip(*map(media.pictures, items), strict=True)
    prompts = [item.prompt for item in items]
    return measure_pictures(task, made, wanted, prompts, judges.encode, confidence=confidence).row()


def _sound_row(
    task: str, items: Sequence[TokenGoldenItem], texts: Sequence[str], media: _Media, judges: Judges
) -> tuple[dict[str, Any], str]:
    """The row, and why word errors are not in it."""
    plain = {"task": task, "sounds": len(items), "decoded": sum(not item.error for item in items)}
    if judges.listener is None:
        return plain, ""
    made, wanted = zip(*map(media.sounds, items), strict=True)
    try:
        return measure_speech(task, texts, made, wanted, judges.listener).row(), ""
    except (DataError, ModelError) as problem:
        return plain, f"{task}: {problem}"


def _words(record: HeldOut, evaluations: TokenEvaluations) -> str:
    """The text of a record, which a sound of it should say; "" where it has none."""
    ids = record.ids.get("text")
    assert evaluations.tokenizers is not None
    return "" if ids is None or not len(ids) else evaluations.tokenizers.decode_text(ids)


def _read_picture(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _read_sound(path: Path) -> Sound:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return np.ascontiguousarray(samples.T), int(rate)

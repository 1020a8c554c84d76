"""`qwen3-vlm eval`: measure a run's add-on, or one of its checkpoints, on the held-out data that its config names.

What fits the add-on is measured, whatever stage trained it:

    a connector (with an adapter or without)    loss, gates, answers with and without the pictures
    token rows (with an adapter or without)     loss by task, gates, and what is generated: texts, pictures, sounds

The run's folder gets results/eval_*.json, everything that was generated in eval/, and a new report.html. Nothing else
of it changes; the gates of the training stay in the add-on's evidence.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from qwen3_vlm.config import RunConfig, load_config
from qwen3_vlm.errors import ConfigError
from qwen3_vlm.evaluate.report import write_report
from qwen3_vlm.models.row_files import ROWS_INFO
from qwen3_vlm.storage import read_json
from qwen3_vlm.train import eval_captions, eval_tokens
from qwen3_vlm.train.connector_files import INFO
from qwen3_vlm.train.eval_options import EvalOptions
from qwen3_vlm.train.eval_tables import Table, gate_table, write_tables
from qwen3_vlm.train.recipe import Recipe, make_recipe
from qwen3_vlm.train.run import make_accelerator
from qwen3_vlm.train.token_evaluations import TokenEvaluations
from qwen3_vlm.train.token_source import TokenSource

CONFIG_FILE = "config.yaml"
ADD_ON_FOLDERS = ("connector", "rows")
_INFOS = (INFO, ROWS_INFO)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is evaluated."""

    run: Path  # where results go
    add_on: Path
    config: Path
    step: int


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What was measured, and where it stands."""

    subject: Subject
    tables: tuple[Table, ...]
    results: Path
    report: Path | None  # None where the add-on lies in no run folder


def evaluate_run(
    path: Path,
    *,
    checkpoint: int | None = None,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    options: EvalOptions | None = None,
) -> EvalResult:
    """Evaluate a run folder, or an add-on inside one.

    Args:
        checkpoint: step of one of the run's checkpoints; None: the finished add-on, or the newest checkpoint.
        config: the YAML file to use instead of the run's own.
        overrides: dotted key=value pairs on top of it, such as `tokens.folders=[…]` where data has moved.

    Raises:
        ConfigError: there is nothing to evaluate, or no config that names held-out data.
        AddOnError, BaseMismatchError, TamperedFileError, DataError, ModelError: as in training.
        StorageError: the run folder can't be written.
    """
    options = options or EvalOptions()
    subject = find_subject(path, checkpoint, config)
    settings = load_config(subject.config, overrides)
    # Features of all pictures are for training; here each picture is looked at a few times.
    settings = replace(settings, output_dir=str(subject.run), data=replace(settings.data, feature_cache=None))
    accelerator, _ = make_accelerator(settings)
    if accelerator.num_processes > 1:
        raise ConfigError("`eval` runs in one process; start it without a launcher.")
    tables = _measure(subject, settings, accelerator, options)
    origin = f"`qwen3-vlm eval` of {subject.add_on.name} at step {subject.step:,}."
    results = subject.run / "results"
    write_tables(results, tables, origin)
    report = write_report(subject.run) if (subject.run / CONFIG_FILE).is_file() else None
    return EvalResult(subject, tuple(tables), results, report)


def find_subject(path: Path, checkpoint: int | None = None, config: Path | None = None) -> Subject:
    """The run, its add-on and its config that a path means.

    Raises:
        ConfigError: it is neither a run folder nor an add-on in one, or has no such checkpoint.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; give a run folder or an add-on in one.")
    path = path.resolve()
    if _is_add_on(path):
        if checkpoint is not None:
            raise ConfigError(f"{path} is an add-on; --checkpoint goes with the folder of its run.")
        run = next((parent for parent in path.parents[:2] if (parent / CONFIG_FILE).is_file()), path.parent)
        add_on = path
    else:
        run, add_on = path, _add_on_of(path, checkpoint)
    found = config or run / CONFIG_FILE
    if not found.is_file():
        raise ConfigError(
            f"There is no {CONFIG_FILE} beside {add_on}, so what was held out is not known. "
            "Give the run's folder, or its configuration with --config."
        )
    return Subject(run, add_on, found, _step(add_on))


def _measure(subject: Subject, config: RunConfig, accelerator: Accelerator, options: EvalOptions) -> list[Table]:
    recipe: Any = make_recipe(config, accelerator, subject.run)
    model = _load(recipe, subject.add_on, accelerator)
    data: Any = recipe.open_data(model, subject.run / "cache")
    evaluations: Any = recipe.evaluations(model, data)
    with accelerator.autocast():
        if isinstance(data, TokenSource):
            return _token_tables(subject, config, recipe, model, data, evaluations, options)
        return _caption_tables(subject, config, recipe, model, data, evaluations, options)


def _load(recipe: Recipe, add_on: Path, accelerator: Accelerator) -> Any:
    recipe.check()
    model = recipe.build()
    recipe.describe(model)
    recipe.load(add_on, model)
    model.requires_grad_(False)
    return model.to(accelerator.device).eval()


def _caption_tables(
    subject: Subject, config: RunConfig, recipe: Any, model: Any, data: Any, evaluations: Any, options: EvalOptions
) -> list[Table]:
    if not len(data.eval):
        raise ConfigError("Nothing is held out: set data.eval, or data.eval_fraction, as in training.")
    tables = [eval_captions.loss_table(model, data, config)]
    folder = subject.run / "eval" / f"step-{subject.step:06d}"
    tables.append(
        eval_captions.answer_table(
            model, recipe.processor, data, config, folder, samples=options.samples, language=options.language
        )
    )
    return [*tables, *([gate_table(evaluations.gates()["gates"])] if options.gates else [])]


def _token_tables(
    subject: Subject,
    config: RunConfig,
    recipe: Any,
    model: Any,
    data: TokenSource,
    evaluations: TokenEvaluations,
    options: EvalOptions,
) -> list[Table]:
    settings = config.eval
    if not any(map(len, data.held_out.values())):
        raise ConfigError(f"Nothing is held out: no record of the split {config.tokens.eval_split!r} fits a task.")
    loss = eval_tokens.loss_table(model, data, batch_size=settings.batch_size, confidence=settings.confidence)
    tables = [loss]
    if evaluations.tokenizers is None:
        loss.notes.append(f"Nothing was generated: {recipe.uti_problem}")
    else:
        tower = options.vision_tower or (
            config.model.vision_tower if Path(config.model.vision_tower).is_dir() else None
        )
        judges = eval_tokens.find_judges(options, tower, eval_tokens.judged_tasks(data), model.device)
        tables += eval_tokens.generated_tables(
            evaluations,
            data,
            judges,
            subject.run / "eval",
            step=subject.step,
            options=options,
            confidence=settings.confidence,
        )
    return [*tables, *([gate_table(evaluations.gates()["gates"])] if options.gates else [])]


def _add_on_of(run: Path, checkpoint: int | None) -> Path:
    """The folder of a run that is to be evaluated."""
    checkpoints = {
        int(number): folder
        for folder in (run / "checkpoints").glob("step-*")
        if (number := folder.name.removeprefix("step-")).isdecimal() and _is_add_on(folder)
    }
    if checkpoint is not None:
        if checkpoint not in checkpoints:
            there = ", ".join(map(str, sorted(checkpoints))) or "none"
            raise ConfigError(f"{run} has no checkpoint of step {checkpoint:,}; there are: {there}.")
        return checkpoints[checkpoint]
    finished = [folder for name in ADD_ON_FOLDERS if _is_add_on(folder := run / name)]
    if not finished and not checkpoints:
        raise ConfigError(f"{run} holds neither an add-on ({', '.join(ADD_ON_FOLDERS)}) nor a checkpoint of one.")
    return finished[0] if finished else checkpoints[max(checkpoints)]


def _is_add_on(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _INFOS)


def _step(add_on: Path) -> int:
    """The training step that an add-on's description names; 0 where it names none."""
    name = next(name for name in _INFOS if (add_on / name).is_file())
    step = read_json(add_on / name, error=ConfigError).get("step")
    return step if isinstance(step, int) and step >= 0 else 0

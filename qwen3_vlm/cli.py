"""The command line: each command parses its arguments, calls one function of the package and prints.

Errors of `qwen3_vlm.errors` are printed as the sentence they are, with exit status 1; anything
unexpected likewise, unless QWEN3_VLM_DEBUG=1 asks for the stack trace. Usage errors exit with 2, Ctrl-C
with 130. What a command needs is imported inside it, so that `--help` answers at once.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from qwen3_vlm import __version__
from qwen3_vlm.cli_chat import chat
from qwen3_vlm.cli_data import data_app
from qwen3_vlm.cli_eval import evaluate
from qwen3_vlm.cli_generate import generate_app
from qwen3_vlm.cli_plan import plan
from qwen3_vlm.cli_uti import uti_app
from qwen3_vlm.errors import DataError, ImageError, Qwen3VLMError

if TYPE_CHECKING:
    from PIL.Image import Image

DEBUG_VARIABLE = "QWEN3_VLM_DEBUG"

app = typer.Typer(
    help="Teach a frozen text-only Qwen3 to see and hear, by training and shipping a small add-on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(generate_app, name="generate")
app.add_typer(uti_app, name="uti")
app.command(name="eval")(evaluate)
app.command()(plan)
app.command()(chat)

ConfigPath = Annotated[Path, typer.Argument(help="YAML file, such as configs/stage1_align.yaml.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as optim.learning_rate=2e-4.")
]
Llm = Annotated[str | None, typer.Option(help="LLM to use instead of the one that the add-on names.")]
Tower = Annotated[str | None, typer.Option(help="Vision tower to use instead of the one in connector.json.")]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a base from the hub.")]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit status; no stack trace unless asked for."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="qwen3-vlm")
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
            raise
        print(explain(error), file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def explain(error: Exception) -> str:
    """What to tell the user: our own sentences as they are, others on one line with a way to see more."""
    if isinstance(error, Qwen3VLMError):
        return f"Error: {error}"
    hint = f"Run again with {DEBUG_VARIABLE}=1 for the stack trace."
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("qwen3_vlm"):
        return f"Error: the Python package {error.name} is not installed; try pip install 'qwen3-vlm[demo]'. {hint}"
    if isinstance(error, MemoryError):
        return f"Error: the memory is full; try a smaller optim.batch_size or data.max_seq_len. {hint}"
    return f"Error: unexpected {type(error).__name__}{': ' + text if text else ''}. {hint}"


def _print_version(asked: bool) -> None:
    if asked:
        print(f"qwen3-vlm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that stand before the command."""


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train as a YAML file says; run it again to go on where it stopped."""
    from qwen3_vlm.config import load_config
    from qwen3_vlm.train.train_utils import train as run

    print_result(run(load_config(config, overrides or [])))


@app.command()
def sweep(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train over the grid of learning rates and vision_ln, and rank the runs."""
    from qwen3_vlm.config import load_config
    from qwen3_vlm.train.sweep import sweep as run

    print(run(load_config(config, overrides or [])))


@app.command()
def verify(
    directory: Annotated[
        Path, typer.Argument(help="Connector directory or trainable-rows folder.", show_default=False)
    ],
    gates: Annotated[bool, typer.Option("--gates", help="Also ask that every gate of its evidence passed.")] = False,
    llm: Llm = None,
    vision_tower: Tower = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Check an add-on's files and, where they can be found, its bases; exit status 1 if anything is wrong."""
    from qwen3_vlm.train.verify import verify_add_on

    print(verify_add_on(directory, llm, vision_tower, gates=gates, trust_remote_code=trust_remote_code))


@app.command()
def caption(
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.", show_default=False)],
    checkpoint: Annotated[Path, typer.Option(help="Connector directory.", show_default=False)],
    prompt: Annotated[str | None, typer.Option(help="What to ask about each picture.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
    llm: Llm = None,
    vision_tower: Tower = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Say what is in pictures, one line each, greedily decoded."""
    from qwen3_vlm.evaluate.captioning import caption_images
    from qwen3_vlm.train.add_ons import load_vlm

    paths = find_pictures(images)
    quiet_loading()
    model, processor = load_vlm(checkpoint, llm, vision_tower, trust_remote_code=trust_remote_code)
    asked = {} if prompt is None else {"prompt": prompt}
    failures: list[ImageError] = []
    for batch in _batches(_readable(paths, failures), batch_size):
        pictures = [picture for _, picture in batch]
        answers = caption_images(
            model, processor, pictures, max_new_tokens=max_new_tokens, batch_size=batch_size, **asked
        )
        for (path, _), answer in zip(batch, answers, strict=True):
            line = {"image": str(path), "caption": answer}
            print(json.dumps(line, ensure_ascii=False) if as_json else f"{path}: {answer}", flush=True)
    if failures:
        print(f"{len(failures)} of {len(paths)} pictures could not be read.", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)]) -> None:
    """Write report.html of a run, finished or not: curves, gates, golden samples, costs."""
    from qwen3_vlm.evaluate.report import write_report

    _require_folder(run, "run folder")
    print(write_report(run))


@app.command(name="golden-diff")
def golden_diff(
    first: Annotated[Path, typer.Argument(help="Golden file or folder: golden/step-000200.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="The same of another checkpoint.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
) -> None:
    """Show which golden answers differ between two checkpoints."""
    from qwen3_vlm.evaluate.golden import diff_golden

    difference = diff_golden(first, second)
    print(json.dumps(difference.to_dict(), ensure_ascii=False, indent=2) if as_json else difference.to_text())


@app.command()
def export(
    directory: Annotated[
        Path, typer.Argument(help="Connector directory or trainable-rows folder.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    llm: Llm = None,
    vision_tower: Tower = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights, for rows; else the one of the training.")] = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Write an add-on and its bases as one Hugging Face folder that loads without this package."""
    from qwen3_vlm.train.export_rows import export_add_on

    quiet_loading()
    options: Any = {"llm": llm, "vision_tower": vision_tower, "dtype": dtype, "trust_remote_code": trust_remote_code}
    print(export_add_on(directory, out, **options))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    later: Annotated[bool, typer.Option("--later", help="Go on from there: conversations, drawing, speaking.")] = False,
) -> None:
    """Build the embedded data set, train connector and rows on tiny bases, check them and show them."""
    if later:
        from qwen3_vlm.demo.later_run import run_later

        run_later(out)
        return
    from qwen3_vlm.demo.run import run_demo

    run_demo(out)


def find_pictures(paths: Iterable[Path]) -> list[Path]:
    """Files as given, folders as the sorted pictures somewhere below them.

    Raises:
        DataError: a path is missing, or a folder holds no picture.
    """
    from qwen3_vlm.data.images import IMAGE_SUFFIXES

    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not inside:
                known = ", ".join(IMAGE_SUFFIXES[:8])
                raise DataError(f"The folder {path} holds no picture: no file that ends in {known} or the like.")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path} does not exist; give a picture or a folder of pictures.")
    return found


def quiet_loading() -> None:
    """No progress bar per weight file while a model is loaded."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def print_result(result: Any) -> None:
    """Where a run left its things, and how its gates went."""
    print(f"Run: {result.output_dir} (step {result.step:,})")
    if result.add_on_dir is None:
        print("It was stopped and saved; the same command goes on from there.")
        return
    print(f"Add-on: {result.add_on_dir}")
    from qwen3_vlm.evaluate.gates import describe_gate

    for gate in (result.evidence or {}).get("gates", []):
        print(f"Gate {gate['name']}: {describe_gate(gate)}")


def _readable(paths: Iterable[Path], failures: list[ImageError]) -> "Iterator[tuple[Path, Image]]":
    """Pictures that can be read; the others are told on stderr and collected in `failures`."""
    from qwen3_vlm.config import DataConfig
    from qwen3_vlm.data.images import load_image

    max_pixels = DataConfig().max_image_pixels
    for path in paths:
        try:
            yield path, load_image(path, max_pixels=max_pixels, name=str(path))
        except ImageError as error:
            failures.append(error)
            print(f"Error: {error}", file=sys.stderr)


def _batches(items: "Iterable[tuple[Path, Image]]", size: int) -> "Iterator[list[tuple[Path, Image]]]":
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _require_folder(path: Path, what: str) -> None:
    if not path.is_dir():
        raise DataError(f"The {what} {path} does not exist.")

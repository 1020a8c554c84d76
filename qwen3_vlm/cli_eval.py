"""`qwen3-vlm eval`: measure a run, or one of its checkpoints, on what it held out.

Like `cli`, it parses its arguments, calls one function and prints; what it needs is imported inside it.
"""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder, or an add-on in one.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of its config, such as model.llm=… after a move."),
    ] = None,
    checkpoint: Annotated[int | None, typer.Option(help="Step of a checkpoint; else the finished add-on.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out records of each task to generate for.")] = 200,
    gates: Annotated[bool, typer.Option(help="Measure the gates again, too.")] = True,
    sounds: Annotated[
        int | None, typer.Option(min=1, help="The same where sounds are made; hearing takes long.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Of pictures and sounds; 0: the likeliest id.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Of pictures and sounds.")] = 1.0,
    guidance: Annotated[float, typer.Option(help="Beyond 1: how far from what an empty source would give.")] = 1.0,
    vision_tower: Annotated[
        str | None, typer.Option(help="SigLIP tower that judges pictures; else the config's, where it is a folder.")
    ] = None,
    recogniser: Annotated[
        Path | None, typer.Option(help="Whisper folder in CTranslate2's format that judges speech (extra asr).")
    ] = None,
    language: Annotated[str, typer.Option(help="Of texts whose record names none, such as de or zh.")] = "en",
    config: Annotated[Path | None, typer.Option(help="YAML file instead of the run's config.yaml.")] = None,
) -> None:
    """Measure what a run has learnt on held-out data: losses, gates, answers, pictures and sounds; renew its report."""
    from transformers.utils import logging

    from qwen3_vlm.train.eval_options import EvalOptions
    from qwen3_vlm.train.eval_run import evaluate_run

    logging.disable_progress_bar()
    options = EvalOptions(samples, gates, temperature, guidance, vision_tower, recogniser, language, top_p, sounds)
    result = evaluate_run(run, checkpoint=checkpoint, config=config, overrides=overrides or (), options=options)
    for table in result.tables:
        print(table.to_text())
    print(f"Report: {result.report}" if result.report else f"Results: {result.results}")

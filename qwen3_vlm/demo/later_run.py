"""The later stages of the guided run, from the folder that the first ones left.

Stage 2, conversations, goes on from the connector; stage 4, drawing and speaking, from the rows.
"""

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from qwen3_vlm.demo.draw_run import run_draw
from qwen3_vlm.demo.paths import running_command
from qwen3_vlm.demo.run import STOPPED, wait_passively
from qwen3_vlm.demo.talk_run import run_talk
from qwen3_vlm.errors import ConfigError, GateError
from qwen3_vlm.evaluate.speech import bundled_recogniser


def run_later(out: Path) -> None:
    """Train and judge both stages below `out`.

    Raises:
        ConfigError: the guided run did not end there.
        ModelError: there is no recogniser to judge what is said.
        GateError: a gate failed, or the answers, drawings or sounds are worse than the demo promises; both stages are
            run before that is said.
    """
    wait_passively()
    connector, rows = out / "run" / "connector", out / "tokens_run" / "rows"
    for add_on in (connector, rows):
        if not add_on.is_dir():
            raise ConfigError(
                f"There is no {add_on}: it comes from {running_command()} demo --out {out}; run that first."
            )
    bundled_recogniser()
    console, started = Console(), time.monotonic()
    short: list[str] = []
    add_ons: list[Path] = []
    stages: dict[Path, Callable[[Path, Path, Console], Path | None]] = {connector: run_talk, rows: run_draw}
    for add_on, run_stage in stages.items():
        try:
            trained = run_stage(out, add_on, console)
        except GateError as problem:
            short.append(str(problem))
            continue
        if trained is None:
            console.print(STOPPED)
            return
        add_ons.append(trained)
    if short:
        raise GateError("\n".join(short))
    talker, drawer = add_ons
    console.print(f"{time.monotonic() - started:.0f} s in all. Now one model that does all of it:", style="bold")
    print(f"  {running_command()} chat --connector {talker} --rows {drawer}")

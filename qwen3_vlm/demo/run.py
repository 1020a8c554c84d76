"""The guided run: a data set, stage 1 on the tiny bases, the gates, captions of unseen scenes, a report; then tokens.

It calls what a real run calls: `data` reads its files, `train(config)` trains and runs the gates,
`caption_images` captions, `write_report` writes the page. Only the scoring of facts is the demo's own.
"""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from qwen3_vlm.config import RunConfig, load_config
from qwen3_vlm.demo.dataset import DemoSizes, build
from qwen3_vlm.demo.facts import KINDS, Scores, score
from qwen3_vlm.demo.paths import BASES, CONFIGS, running_command
from qwen3_vlm.errors import ConfigError, GateError
from qwen3_vlm.storage import atomic_write_json

CONFIG = CONFIGS / "demo_stage1.yaml"
TESTS = {
    "unseen": "unseen pairs",
    "seen": "known pairs",
    "plain": "plain drawings",
}
SCENE = "a small cat left of a big apple on a blue background"
STOPPED = "The run was stopped; start it again and it goes on from there."
SIZES = DemoSizes(phrases=1600, phrases_unseen=400)
DEMANDED_EXACT, DEMANDED_FACT = 0.5, 0.8  # of the unseen combinations


@dataclass(frozen=True)
class TestSet:
    """Pictures with their true captions."""

    prompt: str
    pictures: tuple[Path, ...]
    captions: tuple[str, ...]


def run_demo(out: Path) -> None:
    """Build, train, check, caption, report; everything is below `out`.

    Raises:
        ConfigError: the configuration of the demo is not beside the package.
        GateError: a gate failed, or the captions are worse than the demo promises.
    """
    wait_passively()
    from qwen3_vlm.demo.token_run import run_tokens
    from qwen3_vlm.evaluate.gates import describe_gate
    from qwen3_vlm.evaluate.report import write_report
    from qwen3_vlm.train.train_utils import train

    console, started = Console(), time.monotonic()
    console.print(
        f"[bold]1/8[/] The data set: scenes of OpenMoji drawings, and voices, below {out / 'data'}", soft_wrap=True
    )
    build(out / "data", SIZES)
    console.print("[bold]2/8[/] Stage 1: the connector learns, tower and language model stay frozen")
    result = train(demo_config(out))
    if result.add_on_dir is None:
        console.print(STOPPED)
        return
    connector = Path(result.add_on_dir)
    console.print("[bold]3/8[/] Captions of pictures that training never saw")
    scores = caption_tests(out / "data", connector)
    _write_results(Path(result.output_dir), scores)
    console.print("[bold]4/8[/] The report")
    report = write_report(Path(result.output_dir))
    for gate in (result.evidence or {}).get("gates", []):
        console.print(f"gate: loss {gate['name']}: {describe_gate(gate)}", markup=False)
    console.print(_table(scores))
    console.print(f"{time.monotonic() - started:.0f} s so far. Report: {report}", soft_wrap=True)
    _check(result.evidence, scores)
    rows = run_tokens(out, connector, console)
    if rows is None:
        console.print(STOPPED)
        return
    console.print(f"{time.monotonic() - started:.0f} s in all. Now with pictures and words of your own:", style="bold")
    for arguments in (
        f"caption PICTURE.png --checkpoint {connector}",
        f'generate image "{SCENE}" -o cat.png --top-p 0.9 --guidance 2 --checkpoint {rows}',
        f'generate audio "a small cat" -o cat.wav --checkpoint {rows}',
        f"generate text --image cat.png --checkpoint {rows}",
        f"generate text --audio cat.wav --checkpoint {rows}",
    ):
        print(f"  {running_command()} {arguments}")
    console.print("Or on to conversations about two pictures, and to drawing and speaking:", style="bold")
    print(f"  {running_command()} demo --later --out {out}")


def wait_passively() -> None:
    """Let OpenMP threads sleep while they wait, if torch is not loaded yet.

    By default they spin. On a machine that is busy with something else two spinning threads rob each other of
    the cores that they wait for: steps of these tiny models were measured to take 20 times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")


def demo_config(out: Path) -> RunConfig:
    """`configs/demo_stage1.yaml` with its folders below `out`.

    Raises:
        ConfigError: the file is missing, as in an installation without the repository.
    """
    if not CONFIG.is_file():
        raise ConfigError(f"The demo needs {CONFIG.name} from the repository's configs; run it in a clone.")
    folders = {
        "model.llm": BASES / "text",
        "model.vision_tower": BASES / "tower",
        "data.train": [str(out / "data" / "train.json")],
        "data.eval": [str(out / "data" / "heldout_unseen.json")],
        "data.feature_cache": out / "features",
        "output_dir": out / "run",
    }
    return load_config(CONFIG, [f"{key}={json.dumps(value, default=str)}" for key, value in folders.items()])


def read_test_set(path: Path) -> TestSet:
    """One of the data set's LLaVA JSON files."""
    records = json.loads(path.read_text(encoding="utf-8"))
    turns = [record["conversations"] for record in records]
    pictures = tuple(path.parent / record["image"] for record in records)
    prompt = turns[0][0]["value"].removeprefix("<image>\n")
    return TestSet(prompt, pictures, tuple(turn[1]["value"] for turn in turns))


def caption_tests(data: Path, connector: Path, names: Iterable[str] = tuple(TESTS)) -> dict[str, Scores]:
    """Caption held-out sets with a trained connector and compare with the truth."""
    from qwen3_vlm.evaluate.captioning import caption_images
    from qwen3_vlm.train.add_ons import load_vlm

    model, processor = load_vlm(connector)
    scores = {}
    for name in names:
        test = read_test_set(data / f"heldout_{name}.json")
        pictures = (Image.open(path).convert("RGB") for path in test.pictures)
        said = caption_images(model, processor, pictures, prompt=test.prompt, max_new_tokens=32, batch_size=50)
        scores[name] = score(said, test.captions)
    return scores


def _rows(scores: dict[str, Scores]) -> list[dict[str, str]]:
    return [scores[name].row(TESTS[name]) for name in scores]


def _write_results(run_dir: Path, scores: dict[str, Scores]) -> None:
    note = (
        "Per cent of the captions that are right word for word, and of the facts that are right, with 95 % intervals. "
        "Unseen pairs: every scene shows at least one pair of objects that no training scene shows together."
    )
    table = {"title": "Held-out captions", "rows": _rows(scores), "note": note, "order": 1}
    (run_dir / "results").mkdir(parents=True, exist_ok=True)
    atomic_write_json(run_dir / "results" / "held_out_captions.json", table)


def _table(scores: dict[str, Scores]) -> Table:
    """One column per test set, so that it fits a terminal of 80 characters."""
    rows = _rows(scores)
    table = Table(
        "", *(f"{row['test set']} ({row['captions']})" for row in rows), title="Per cent right (95 % interval)"
    )
    for line in ("exact", *KINDS):
        table.add_row(line, *(row.get(line, "–") for row in rows))
    return table


def _check(evidence: dict[str, object] | None, scores: dict[str, Scores]) -> None:
    """Raise what falls short of what the demo promises."""
    gates = (evidence or {}).get("gates", [])
    assert isinstance(gates, list)
    short = [f"gate {gate['name']}" for gate in gates if not gate["passed"]] + ([] if gates else ["no gate was run"])
    unseen = scores["unseen"]
    if unseen.exact.value < DEMANDED_EXACT:
        short.append(f"exact captions {unseen.exact.value:.0%} < {DEMANDED_EXACT:.0%}")
    short += [
        f"{kind} {it.value:.0%} < {DEMANDED_FACT:.0%}" for kind, it in unseen.facts.items() if it.value < DEMANDED_FACT
    ]
    if short:
        raise GateError(f"The demo falls short of what it promises: {'; '.join(short)}.")

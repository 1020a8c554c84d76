"""The second half of the guided run: pictures and voices as tokens, stage 3, the gates, and what comes out.

Again it calls what a real run calls: the tokenizers are opened from a uti.yaml, `data tokenize` and its audit make
the shards, `train(config)` trains the rows and runs the gates, `generate` draws, speaks and answers. The
demo's own is how the results are judged: what is drawn is captioned by the model of the first half, which knows nothing
of tokens; what is said is compared with the truth.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from qwen3_vlm.config import RunConfig, load_config
from qwen3_vlm.data.shard_audit import audit_shards
from qwen3_vlm.data.tokenize import tokenize_manifest
from qwen3_vlm.demo.facts import Scores, score
from qwen3_vlm.demo.paths import BASES, CONFIGS
from qwen3_vlm.demo.telling import percent, tell
from qwen3_vlm.errors import DataError, GateError
from qwen3_vlm.evaluate.intervals import Interval, wilson_interval
from qwen3_vlm.storage import atomic_write_json

UTI_CONFIG, RUN_CONFIG = CONFIGS / "demo_uti.yaml", CONFIGS / "demo_stage3.yaml"
TRAINING, HELD_OUT = ("pictures", "phrases"), ("pictures_unseen", "phrases_unseen")  # manifests of the data set
DRAWN = 100  # pictures that are drawn from unseen descriptions, and captioned


def run_tokens(out: Path, connector: Path, console: Console) -> Path | None:
    """Tokenize, train, draw, speak and answer; the trained rows, or None where a signal ended it.

    Args:
        out: of the whole demo; its data set is in `out/data`.
        connector: of the first half: it judges what is drawn.

    Raises:
        DataError: the shards do not pass their audit.
        GateError: a gate failed.
    """
    from qwen3_vlm.train.train_utils import train

    console.print("[bold]5/8[/] One token space for text, pictures and sounds; the data set as tokens")
    folders = tokenize_data(out)
    console.print("[bold]6/8[/] Stage 3: the new vocabulary rows learn, the language model stays frozen")
    result = train(token_config(out, folders))
    if result.add_on_dir is None:
        return None
    console.print("[bold]7/8[/] What it draws, hears and says, of descriptions that training never saw")
    results = judge(out, Path(result.add_on_dir), connector)
    write_results(Path(result.output_dir), results)
    console.print("[bold]8/8[/] The report")
    gates = tell(result, results_table(results), console)
    failed = [gate["name"] for gate in gates if not gate["passed"]]
    if failed or not gates:
        raise GateError(f"The demo falls short of what it promises: {', '.join(failed) or 'no gate was run'}.")
    return Path(result.add_on_dir)


def uti_overrides() -> list[str]:
    """The demo's tokenizers, wherever the package lies."""
    sources = {"text.tokenizer": "text", "image.source": "image_tokenizer", "audio.source": "audio_codec"}
    return [f"{key}={json.dumps(str(BASES / name))}" for key, name in sources.items()]


def tokenize_data(out: Path, workers: int = 2) -> list[Path]:
    """Shards of the training and the held-out manifests, each with its audit; what is there already is kept.

    Raises:
        DataError: an audit fails.
    """
    from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer

    UnifiedTokenizer.open(UTI_CONFIG, uti_overrides()).save(out / "space")
    return tokenize_parts(out / "data", out / "tokens", out / "space", (*TRAINING, *HELD_OUT), workers)


def tokenize_parts(data: Path, tokens: Path, space: Path, parts: Sequence[str], workers: int = 2) -> list[Path]:
    """Manifests of a data set → audited shards below `tokens`, in order; what ends in "unseen" is held out, whole.

    Raises:
        DataError: an audit fails.
    """
    from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer

    folders = []
    for name in parts:
        folder = tokens / name
        fractions = {"val": float(name.endswith("unseen")), "test": 0.0}
        tokenize_manifest(data / f"manifest_{name}.jsonl", folder, space, workers=workers, fractions=fractions)
        audit = audit_shards(folder, UnifiedTokenizer.open(folder))
        if not audit.passed:
            raise DataError(f"The audit of {folder} failed:\n{audit.table()}")
        folders.append(folder)
    return folders


def token_config(out: Path, folders: Sequence[Path]) -> RunConfig:
    """`configs/demo_stage3.yaml` with its folders below `out`."""
    values = {
        "model.llm": BASES / "text",
        "tokens.folders": [str(folder) for folder in folders],
        "output_dir": out / "tokens_run",
    }
    return load_config(RUN_CONFIG, [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()])


def judge(out: Path, rows: Path, connector: Path) -> dict[str, Any]:
    """What the trained model makes of held-out records: task → figures.

    Drawings are judged by what the connector's model sees in them; sounds by whether the model itself hears the
    words in them again.
    """
    from qwen3_vlm.evaluate.captioning import caption_images
    from qwen3_vlm.generate.generation import generate
    from qwen3_vlm.generate.sampling import Choice, Sampling
    from qwen3_vlm.models.token_lm import TokenLM
    from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
    from qwen3_vlm.train.add_ons import load_vlm

    model, uti = TokenLM.from_add_on(rows), UnifiedTokenizer.open(rows)
    likely = Choice(top_p=0.9)
    options: dict[str, Any] = {"sampling": Sampling(image=likely, audio=likely), "batch_size": 50}
    guided = options | {"sampling": Sampling(image=likely, guidance=2.0)}
    scenes, names = (read_manifest(out / "data" / f"manifest_{name}.jsonl")[:DRAWN] for name in HELD_OUT)
    captions = [record["text"] for record in scenes]

    read = generate(model, uti, "text", [{"image": record["image"]} for record in scenes], **options)
    drawn = generate(model, uti, "image", [{"text": text} for text in captions], **guided)
    vlm, processor = load_vlm(connector)
    prompt = "Describe the image."
    seen = caption_images(vlm, processor, drawn, prompt=prompt, max_new_tokens=32, batch_size=50)
    heard = generate(model, uti, "text", [{"audio": record["audio"]} for record in names], **options)
    spoken = generate(model, uti, "audio", [{"text": record["text"]} for record in names], **options)
    again = generate(model, uti, "text", [{"audio": sound} for sound in spoken], **options)
    words = [record["text"] for record in names]
    return {
        "i2t": score(read, captions),
        "t2i": score(seen, captions),
        "a2t": exact_share(heard, words),
        "t2a": exact_share(again, words),
    }


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """The records of a manifest with their picture and sound read."""
    from qwen3_vlm.data.sounds import load_sound

    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        media = {kind: path.parent / name for kind, name in record["modalities"].items()}
        loaded: dict[str, Any] = {"text": record["text"]}
        if "image" in media:
            loaded["image"] = Image.open(media["image"]).convert("RGB")
        if "audio" in media:
            loaded["audio"] = load_sound(media["audio"], max_seconds=60, name=str(media["audio"]))
        found.append(loaded)
    return found


def exact_share(said: Sequence[str], truth: Sequence[str]) -> Interval:
    """Share of answers that are right word for word, with its Wilson interval."""
    return wilson_interval(sum(a == b for a, b in zip(said, truth, strict=True)), len(truth))


def results_table(results: dict[str, Any]) -> Table:
    """One line per task, for a terminal."""
    table = Table("", "right, % (95 % interval)", title="Held-out records")
    for task, name in (("i2t", "pictures read: captions exact"), ("t2i", "pictures drawn, then captioned: exact")):
        scores: Scores = results[task]
        table.add_row(name, percent(scores.exact))
        for kind, interval in scores.facts.items():
            table.add_row(f"  {kind}", percent(interval))
    table.add_row("names heard", percent(results["a2t"]))
    table.add_row("names said, then heard again", percent(results["t2a"]))
    return table


def write_results(run_dir: Path, results: dict[str, Any]) -> None:
    """Two tables for the report."""
    pictures = [results[task].row(name) for task, name in (("i2t", "read from ids"), ("t2i", "drawn, then captioned"))]
    sounds = [
        {"test": name, "right, %": percent(it)}
        for name, it in (("names heard", results["a2t"]), ("names said, heard again", results["t2a"]))
    ]
    tables = {
        "held_out_pictures": {
            "title": "Held-out pictures",
            "rows": pictures,
            "note": "Per cent right with 95 % intervals, on scenes with an unseen pair of objects. What is drawn is "
            "judged by the captions of the connector's model, which never saw a token.",
            "order": 1,
        },
        "held_out_sounds": {
            "title": "Held-out sounds",
            "rows": sounds,
            "note": "Names that are said are judged by the same model's hearing: consistency, not quality.",
            "order": 2,
        },
    }
    (run_dir / "results").mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        atomic_write_json(run_dir / "results" / f"{name}.json", table)

"""`qwen3-vlm data …`: look at data sets, bring them into a manifest, tokenize them, audit the result.

Like `cli`, each command parses its arguments, calls one function and prints; what it needs is imported inside it.
"""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3_vlm.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from qwen3_vlm.config import RunConfig

CONFIG_SUFFIXES = frozenset({".yaml", ".yml"})
STOPPED = 130  # exit status after Ctrl-C

data_app = typer.Typer(help="Look at data sets, import and tokenize them.", no_args_is_help=True)
import_app = typer.Typer(
    help="Write a raw manifest (JSON Lines) for data that you have; what is left out is counted with its reason.",
    no_args_is_help=True,
)
data_app.add_typer(import_app, name="import")

ConfigPath = Annotated[Path, typer.Argument(help="YAML file, such as configs/stage1_align.yaml.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as optim.learning_rate=2e-4.")
]
Manifest = Annotated[Path, typer.Argument(metavar="MANIFEST", help="JSON Lines file.", show_default=False)]
Folder = Annotated[Path, typer.Argument(help="Folder of data, with folders in it or not.", show_default=False)]
Out = Annotated[
    Path | None, typer.Option("--out", help="Manifest to write; default: manifest.jsonl in the folder of the data.")
]
Source = Annotated[str | None, typer.Option(help="What the manifest calls this source; default: the folder's name.")]
Task = Annotated[str | None, typer.Option(help="What the records are for, such as i2t or t2a.")]


class Engine(StrEnum):
    """Who does the work."""

    processes = "processes"
    ray = "ray"


class Turns(StrEnum):
    """What of a conversation becomes the text."""

    first = "first"
    all = "all"


@data_app.command()
def doctor(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="A YAML file followed by KEY=VALUE overrides, or record files (LLaVA JSON, JSONL, tar) and folders.",
            show_default=False,
        ),
    ],
    export: Annotated[Path | None, typer.Option(help="Folder for report.json, report.txt and problems.jsonl.")] = None,
    tokens: Annotated[bool, typer.Option(help="Check labels, placeholders and lengths with the tokenizer.")] = True,
    pictures: Annotated[bool, typer.Option(help="Read and decode every picture.")] = True,
) -> None:
    """Find what is wrong with a data set before training does; exit status 1 if anything is."""
    from qwen3_vlm.data.doctor import examine

    config = read_sources(sources)
    report = examine(config, load_processor(config) if tokens else None, decode_images=pictures, progress=True)
    print(report.table())
    if export is not None:
        report.export(export)
        print(f"Findings: {export}")
    raise typer.Exit(report.exit_status)


@data_app.command(name="cache-benchmark")
def cache_benchmark(
    config: ConfigPath,
    overrides: Overrides = None,
    images: Annotated[int, typer.Option(min=1, help="Pictures to measure with.")] = 64,
) -> None:
    """Measure whether caching the tower's outputs on disk pays on this machine."""
    from qwen3_vlm.config import load_config
    from qwen3_vlm.train.cache_benchmark import measure_feature_cache

    print(measure_feature_cache(load_config(config, overrides or []), images=images))


@data_app.command(name="manifest-audit")
def manifest_audit(
    manifest: Manifest,
    decode: Annotated[bool, typer.Option("--decode", help="Read and decode every picture and sound.")] = False,
    files: Annotated[bool, typer.Option(help="Look whether the files are there and inside the folder.")] = True,
    problems: Annotated[Path | None, typer.Option(help="JSON Lines file for one line per problem.")] = None,
) -> None:
    """Check every line of a raw manifest; exit status 1 if a record can't be used."""
    from qwen3_vlm.data.manifest_audit import Media, audit_manifest

    media: Media = "decode" if decode else "files" if files else "none"
    report = audit_manifest(manifest, media=media, problems=problems, progress=True)
    print(report.table())
    if problems is not None:
        print(f"Problems: {problems}")
    raise typer.Exit(report.exit_status)


@import_app.command(name="pairs")
def import_pairs(folder: Folder, out: Out = None, source: Source = None, task: Task = None) -> None:
    """Pictures with a .txt, .caption or .json of the same name beside them."""
    from qwen3_vlm.data import manifest_import

    print(manifest_import.import_pairs(folder, out, source=source, task=task).table())


@import_app.command(name="audio-csv")
def import_audio_csv(
    folder: Folder,
    table: Annotated[Path, typer.Argument(metavar="CSV", help="CSV or TSV: path and text.", show_default=False)],
    out: Out = None,
    path_column: Annotated[str | None, typer.Option(help="Column of the path: a name, or a number from 0.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the text: a name, or a number from 0.")] = None,
    source: Source = None,
    task: Task = None,
) -> None:
    """An audio folder with a table of what is said (Common Voice, LJSpeech and the like)."""
    from qwen3_vlm.data import manifest_import

    columns = {"path_column": path_column, "text_column": text_column}
    print(manifest_import.import_audio_csv(folder, table, out, **columns, source=source, task=task).table())


@import_app.command(name="llava")
def import_llava(
    files: Annotated[list[str], typer.Argument(help="LLaVA JSON, JSONL or WebDataset tars.", show_default=False)],
    image_root: Annotated[
        Path | None, typer.Option(help="What the picture paths are relative to; default: the JSON's own folder.")
    ] = None,
    out: Out = None,
    turns: Annotated[Turns, typer.Option(help="The first answer, or the whole conversation as text.")] = Turns.first,
    source: Source = None,
    task: Task = None,
) -> None:
    """LLaVA-Pretrain, LLaVA-Instruct and whatever else has their format."""
    from qwen3_vlm.data import manifest_import

    report = manifest_import.import_llava(
        list(files), out, image_root=image_root, turns=turns.value, source=source, task=task
    )
    print(report.table())


@import_app.command(name="hf")
def import_hf(
    folder: Annotated[
        Path, typer.Argument(help="What save_to_disk wrote, a folder of Parquet files, or one.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the manifest and its media.", show_default=False)],
    image_column: Annotated[str | None, typer.Option(help="Column of pictures.")] = None,
    audio_column: Annotated[str | None, typer.Option(help="Column of sounds.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of texts, or of class labels.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of ids; without one, ids are content hashes.")] = None,
    source: Source = None,
    task: Task = None,
) -> None:
    """A Hugging Face data set on disk (Arrow or Parquet); pictures and sounds are written out as files."""
    from qwen3_vlm.data.manifest_import_hf import Columns, import_hf_dataset

    columns = Columns(image_column, audio_column, text_column, id_column)
    print(import_hf_dataset(folder, out, columns=columns, source=source, task=task).table())


@data_app.command()
def tokenize(
    manifest: Manifest,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the tokenized data set.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of uti.yaml, such as image.batch_size=8."),
    ] = None,
    uti: Annotated[Path | None, typer.Option(help="uti.yaml, or a folder with one; default: the one in OUT.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes or Ray actors; default: one per core.")] = None,
    engine: Annotated[Engine, typer.Option(help="Processes on this machine, or a Ray cluster.")] = Engine.processes,
    shard_records: Annotated[int, typer.Option(min=1, help="Records per shard.")] = 1_000,
    val: Annotated[float, typer.Option(min=0, max=1, help="Share of records held out for validation.")] = 0.01,
    test: Annotated[float, typer.Option(min=0, max=1, help="Share of records held out for tests.")] = 0.01,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Stop when more of the records can't be used; 1 never stops.")
    ] = 1.0,
    restart: Annotated[bool, typer.Option("--restart", help="Remove what OUT holds and begin anew.")] = False,
    download: Annotated[bool, typer.Option(help="Fetch tokenizers that are not on this machine.")] = True,
) -> None:
    """Turn a manifest into shards of ids; run it again to go on where it stopped.

    A record that can't be used is listed in OUT/tokenize_errors.jsonl with its reason and stops nothing. However
    often the work is interrupted and whoever does it, the bytes of the result are the same.
    """
    from qwen3_vlm.data.tokenize import run_tokenize

    finished = run_tokenize(
        manifest,
        out,
        _uti_config(uti, out),
        overrides or [],
        workers=workers,
        engine=engine.value,
        shard_records=shard_records,
        fractions={"val": val, "test": test},
        max_bad_fraction=max_bad_fraction,
        restart=restart,
        download=download,
    )
    raise typer.Exit(0 if finished else STOPPED)


@data_app.command()
def audit(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a tokenized data set.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of uti.yaml, such as image.source=/data/codec."),
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Records that are read, checked and decoded.")] = 1_000,
    every: Annotated[bool, typer.Option("--all", help="Read and check every record.")] = False,
    manifest: Annotated[
        Path | None, typer.Option(help="The manifest it was made from, to tokenize a few records again and compare.")
    ] = None,
    download: Annotated[bool, typer.Option(help="Fetch tokenizers that are not on this machine.")] = True,
) -> None:
    """Check a tokenized data set and write OUT/audit.json; exit status 1 if anything is wrong.

    Training refuses a data set without a passing audit of exactly what is there.
    """
    from qwen3_vlm.data.shard_audit import run_shard_audit

    count = None if every else sample
    report = run_shard_audit(out, sample=count, manifest=manifest, overrides=overrides or (), download=download)
    raise typer.Exit(report.exit_status)


def _uti_config(given: Path | None, out: Path) -> Path:
    if given is not None:
        return given
    if not (out / "uti.yaml").is_file():
        raise ConfigError(f"{out} has no uti.yaml to go on with; give one with --uti, such as configs/uti.yaml.")
    return out


def read_sources(sources: Sequence[str]) -> "RunConfig":
    """The configuration of `SOURCE...`: a YAML file with overrides, or plain record files."""
    from qwen3_vlm.config import load_config, parse_config

    if Path(sources[0]).suffix.lower() in CONFIG_SUFFIXES:
        return load_config(sources[0], sources[1:])
    overrides = [source for source in sources if "=" in source and not Path(source).exists()]
    files = [source for source in sources if source not in overrides]
    return parse_config({"data": {"train": files}} if files else {}, overrides, source="command line")


def load_processor(config: "RunConfig") -> Any:
    """The tokenizer and image processor of the bases, without their weights."""
    from qwen3_vlm.models import Qwen3VLMProcessor

    model = config.model
    try:
        return Qwen3VLMProcessor.from_bases(model.llm, model.vision_tower, model.num_latents, model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The tokenizer of {model.llm} or the image processor of {model.vision_tower} can't be read. Name folders "
            "with model.llm=… and model.vision_tower=…, or leave out what needs them with --no-tokens."
        ) from error

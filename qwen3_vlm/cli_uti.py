"""`qwen3-vlm uti …`: token spaces and the tokenizers behind them.

Like `cli`, each command parses its arguments, calls one function and prints; what it needs is imported inside it.
"""

import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3_vlm.errors import ConfigError, DataError, TokenError, TokenSpaceError

if TYPE_CHECKING:
    from qwen3_vlm.tokenization.audit import UTIAudit
    from qwen3_vlm.tokenization.token_space import TokenSpace
    from qwen3_vlm.tokenization.unified_tokenizer import Encoded, UnifiedTokenizer

IDS_FORMAT = 1
DEMO_PICTURES, DEMO_SOUNDS = 16, 6  # what is audited where nothing is given
TEXT_SUFFIXES = (".txt", ".md")
MAX_TEXT_BYTES = 50_000_000
MAX_PIXELS = 40_000_000

uti_app = typer.Typer(
    help="Token spaces: text, pictures and sounds as ids of one vocabulary, and back.", no_args_is_help=True
)


class Kind(StrEnum):
    """What a file is."""

    image = "image"
    audio = "audio"
    text = "text"


Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="uti.yaml, or a folder that holds one.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as image.source=/data/tokenizer."),
]
Device = Annotated[str | None, typer.Option(help="Where the tokenizers run: auto, cpu, cuda, cuda:1, mps.")]
Space = Annotated[Path, typer.Argument(help="token_space.json, or a folder that holds one.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


@uti_app.command()
def build(
    config: Config,
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    overrides: Overrides = None,
) -> None:
    """Open the tokenizers of a uti.yaml and write the token space that they make.

    OUT gets uti.yaml, token_space.json and token_space.sha256. A folder that holds another token space is refused.
    """
    uti = open_uti(config, None, overrides or [])
    _refuse_another_space(out, uti.token_space)
    uti.save(out)
    print(uti.token_space.describe())
    print(f"Token space: {out}")


@uti_app.command()
def describe(path: Space, as_json: AsJson = False) -> None:
    """Show the ranges and special tokens of a token space, after checking it and its hash."""
    space = load_space(path)
    print(json.dumps(space.to_dict(), indent=2, ensure_ascii=False) if as_json else space.describe())


@uti_app.command()
def diff(first: Space, second: Space) -> None:
    """Show every difference between two token spaces; exit status 1 if there is any."""
    one, other = load_space(first), load_space(second)
    lines = one.differences(other)
    if not lines:
        print(f"The same token space: {one.sha256}")
        return
    print(f"{first} ≠ {second} in {len(lines)} fields:")
    print("\n".join(f"  {line}" for line in lines))
    raise typer.Exit(1)


@uti_app.command()
def audit(
    config: Config,
    out: Annotated[Path, typer.Argument(help="Folder for report.json, recon.png, recon.wav, index.html.")],
    overrides: Overrides = None,
    images: Annotated[Path | None, typer.Option(help="Folder of pictures; default: scenes of the demo.")] = None,
    sounds: Annotated[Path | None, typer.Option(help="Folder of sounds; default: the demo's held-out voice.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Text file, one text a line; default: captions.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="report.json of an earlier audit, to be gated against.")] = None,
    device: Device = None,
) -> None:
    """Check that ids never vary, lie in their ranges and come back, and how well; exit status 1 if not.

    With --baseline the means must not fall behind: PSNR −0.5 dB, SSIM −0.02, SNR −1 dB, log-mel L1 × 1.05.
    """
    from qwen3_vlm.storage import read_json
    from qwen3_vlm.tokenization.audit import audit_uti
    from qwen3_vlm.tokenization.audit_page import write_audit

    earlier = None if baseline is None else read_json(baseline, error=DataError)
    uti = open_uti(config, device, overrides or [])
    result = audit_uti(
        uti,
        images=(read_pictures(images) if images else demo_pictures()) if uti.image_tokenizer is not None else {},
        sounds=(read_sounds(sounds) if sounds else demo_sounds()) if uti.audio_codec is not None else {},
        texts=read_texts(texts) if texts else demo_texts(),
        baseline=earlier,
        reopen=lambda: open_uti(config, device, overrides or []),
        progress=_say,
    )
    page = write_audit(result, out)
    _say("")
    print(audit_summary(result))
    print(f"Page: {page}")
    raise typer.Exit(0 if result.passed else 1)


@uti_app.command()
def conformance(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Put an image tokenizer and an audio codec, built in or yours, through the checks that every adapter must pass.

    Exit status 1 if one fails.
    """
    from qwen3_vlm.tokenization.conformance import run_conformance_for
    from qwen3_vlm.tokenization.uti_config import load_uti_config

    settings = load_uti_config(config, overrides or [])
    if settings.image is None and settings.audio is None:
        raise ConfigError(f"{config} has neither an image nor an audio section, so there is no adapter to check.")
    reports = run_conformance_for(settings)
    if as_json:
        print(json.dumps([report.to_dict() for report in reports], indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(report.to_text() for report in reports))
    raise typer.Exit(0 if all(report.passed for report in reports) else 1)


@uti_app.command()
def encode(
    config: Config,
    file: Annotated[Path, typer.Argument(help="Picture, sound or text file.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="JSON file to write; default: print it.")] = None,
    kind: Annotated[Kind | None, typer.Option("--as", help="What the file is; default: by its suffix.")] = None,
    device: Device = None,
) -> None:
    """Turn one file into global ids and the metadata that decoding needs, as JSON."""
    from qwen3_vlm.storage import atomic_write_json

    sort = kind or kind_of(file)
    content = {Kind.image: read_picture, Kind.audio: read_sound, Kind.text: _read_text}[sort](file, str(file))
    uti = open_uti(config, device)
    values: dict[str, Any] = {"format": IDS_FORMAT, "modality": str(sort), "token_space_sha256": uti.sha256}
    values |= _encoded(uti, sort, content)
    if out is None:
        print(json.dumps(values, ensure_ascii=False))
        return
    atomic_write_json(out, values, indent=None)
    print(f"{len(values['ids']):,} {sort} ids: {out}")


@uti_app.command()
def decode(
    config: Config,
    ids: Annotated[Path, typer.Argument(help="JSON file that `uti encode` wrote.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="File to write: .png and the like, .wav, .txt.", show_default=False)],
    device: Device = None,
) -> None:
    """Turn ids back into a picture, a sound or a text."""
    values = read_ids(ids)
    kind = Kind(values["modality"])
    require_suffix(out, kind)
    uti = open_uti(config, device)
    if values["token_space_sha256"] != uti.sha256:
        raise TokenSpaceError(
            f"{ids} has ids of the token space {values['token_space_sha256']}; {config} is {uti.sha256}, so they mean "
            "something else."
        )
    write_content(out, kind, _decoded(uti, kind, values["ids"], values["metadata"]))
    print(out)


def open_uti(config: Path, device: str | None, overrides: Sequence[str] = ()) -> "UnifiedTokenizer":
    """The tokenizers of a uti.yaml, on `device` where it is given."""
    from qwen3_vlm.tokenization.uti_config import load_uti_config

    settings = load_uti_config(config, overrides)
    given = [name for name in ("image", "audio") if device is not None and getattr(settings, name) is not None]
    _quiet_loading()
    from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer

    return UnifiedTokenizer.open(config, [*overrides, *(f"{name}.device={device}" for name in given)])


def load_space(path: Path) -> "TokenSpace":
    """A token space from its file or folder, with a hint where a uti.yaml was given."""
    from qwen3_vlm.tokenization.token_space import TokenSpace

    if path.suffix in (".yaml", ".yml"):
        raise TokenSpaceError(f"{path} is a configuration; `qwen3-vlm uti build {path} OUT` makes a token space of it.")
    return TokenSpace.load(path)


def kind_of(file: Path) -> Kind:
    """What a file is, by its suffix.

    Raises:
        DataError: the suffix is not known.
    """
    from qwen3_vlm.data.images import IMAGE_SUFFIXES
    from qwen3_vlm.data.sounds import AUDIO_SUFFIXES

    suffixes = ((Kind.image, IMAGE_SUFFIXES), (Kind.audio, AUDIO_SUFFIXES), (Kind.text, TEXT_SUFFIXES))
    for kind, known in suffixes:
        if file.suffix.lower() in known:
            return kind
    raise DataError(f"{file} is neither .png, .wav, .txt nor the like; say what it is with --as image, audio or text.")


def read_pictures(folder: Path) -> dict[str, Any]:
    """Name → picture, for all pictures below a folder, sorted."""
    from qwen3_vlm.data.images import IMAGE_SUFFIXES

    return _read_folder(folder, IMAGE_SUFFIXES, "picture", read_picture)


def read_sounds(folder: Path) -> dict[str, Any]:
    """Name → (waveform, sampling rate), for all sounds below a folder, sorted."""
    from qwen3_vlm.data.sounds import AUDIO_SUFFIXES

    return _read_folder(folder, AUDIO_SUFFIXES, "sound", read_sound)


def read_texts(file: Path) -> list[str]:
    """The lines of a UTF-8 file, without the empty ones."""
    return [line for line in _read_text(file, str(file)).split("\n") if line.strip()]


def demo_pictures() -> dict[str, Any]:
    """Scenes of the demo that no tokenizer was trained on: each shows a held-out pair of objects."""
    from qwen3_vlm.demo.drawings import compose

    rng = random.Random("audit")
    return {f"scene-{number:02}": compose(scene, rng)[0] for number, scene in enumerate(_demo_scenes(DEMO_PICTURES))}


def demo_sounds() -> dict[str, Any]:
    """Their captions, spoken by the demo's held-out voice."""
    from qwen3_vlm.demo.voices import HELD_OUT_VOICE, SAMPLING_RATE, speak

    spoken = enumerate(scene.caption() for scene in _demo_scenes(DEMO_SOUNDS))
    return {f"voice-{number:02}": (speak(text, HELD_OUT_VOICE), SAMPLING_RATE) for number, text in spoken}


def demo_texts() -> list[str]:
    """Their captions."""
    return [scene.caption() for scene in _demo_scenes(DEMO_PICTURES)]


def audit_summary(result: "UTIAudit") -> str:
    """Figures, gates, and what fails."""
    from qwen3_vlm.tokenization.audit import GATES

    lines = []
    for gate in GATES:
        summary = result.report["figures"].get(gate.modality, {}).get(gate.figure)
        if summary and summary["mean"] is not None:
            unit = f" {gate.unit}" if gate.unit else ""
            spread = f"p10 {summary['p10']:.3f}, median {summary['p50']:.3f}, {summary['items']} items"
            lines.append(f"{gate.title}: {summary['mean']:.3f}{unit} ({spread})")
    lines += [f"Gate {gate['name']}: {'passed' if gate['passed'] else 'FAILED'}, {gate['reason']}"
              for gate in result.report["gates"]]  # fmt: skip
    checks = result.report["checks"]
    lines += [f"FAILED {c['modality']}: {c['name']}: {c['detail']}" for c in checks if not c["passed"]]
    passed = sum(check["passed"] for check in checks)
    return "\n".join([*lines, f"{passed} of {len(checks)} checks passed."])


def read_ids(path: Path) -> dict[str, Any]:
    """What `uti encode` wrote.

    Raises:
        TokenError: it is something else.
    """
    from qwen3_vlm.storage import read_json

    values = read_json(path, error=TokenError)
    ids, metadata = values.get("ids"), values.get("metadata")
    good = isinstance(ids, list) and all(type(value) is int for value in ids)
    good = good and values.get("format") == IDS_FORMAT and values.get("modality") in list(Kind)
    if not good or not isinstance(metadata, dict | None) or not isinstance(values.get("token_space_sha256"), str):
        raise TokenError(f"{path} is no file of ids: `qwen3-vlm uti encode` writes one.", "bad_file")
    return {"metadata": None, **values}


def _encoded(uti: "UnifiedTokenizer", kind: Kind, content: Any) -> dict[str, Any]:
    if kind is Kind.text:
        return {"ids": uti.encode_text(content), "metadata": None}
    encoded: Encoded = uti.encode_image(content) if kind is Kind.image else uti.encode_audio(*content)
    return {"ids": encoded.ids.tolist(), "metadata": encoded.metadata}


def _decoded(uti: "UnifiedTokenizer", kind: Kind, ids: list[int], metadata: Any) -> Any:
    if kind is Kind.text:
        return uti.decode_text(ids)
    return uti.decode_image(ids, metadata) if kind is Kind.image else uti.decode_audio(ids, metadata)


def require_suffix(out: Path, kind: Kind) -> None:
    """Refuse a file name that content of this kind can't be written under.

    Raises:
        DataError: says which suffix it takes.
    """
    if kind is Kind.audio and out.suffix.lower() != ".wav":
        raise DataError(f"{out}: sounds are written as .wav files; give the file that suffix.")
    if kind is Kind.image:
        from PIL import Image

        if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
            raise DataError(f"{out}: pictures can't be written with that suffix; .png keeps every pixel.")


def write_content(out: Path, kind: Kind, content: Any) -> None:
    """Write a string, a PIL image, or (waveform, sampling rate in Hz); `require_suffix` has passed.

    Raises:
        StorageError: it can't be written.
    """
    from qwen3_vlm.storage import atomic_file, atomic_write_bytes, atomic_write_text

    if kind is Kind.text:
        atomic_write_text(out, content)
    elif kind is Kind.audio:
        from qwen3_vlm.tokenization.audit_page import wav_bytes

        atomic_write_bytes(out, wav_bytes(*content))
    else:
        from PIL import Image

        with atomic_file(out) as temporary:
            content.save(temporary, Image.registered_extensions()[out.suffix.lower()])


def _refuse_another_space(out: Path, space: "TokenSpace") -> None:
    from qwen3_vlm.tokenization.token_space import FILE_NAME, TokenSpace

    if (out / FILE_NAME).is_file():
        lines = TokenSpace.load(out).differences(space)
        if lines:
            raise TokenSpaceError(
                f"{out} holds another token space, which data and models may be bound to; give an empty folder. "
                "Differences (there, new):\n  " + "\n  ".join(lines)
            )


def _read_folder(
    folder: Path, suffixes: tuple[str, ...], what: str, read: Callable[[Path, str], Any]
) -> dict[str, Any]:
    if not folder.is_dir():
        raise DataError(f"The folder {folder} does not exist; give one with {what}s in it.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not files:
        raise DataError(f"The folder {folder} holds no {what}: no file that ends in {', '.join(sorted(suffixes))}.")
    return {_name(path.relative_to(folder)): read(path, str(path)) for path in files}


def _name(path: Path) -> str:
    """A name that JSON and HTML can hold, whatever bytes the file system has."""
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


def read_picture(path: Path, name: str) -> Any:
    """A PIL image; `name` is what errors call it."""
    from qwen3_vlm.data.images import load_image

    return load_image(path, max_pixels=MAX_PIXELS, name=name)


def read_sound(path: Path, name: str) -> Any:
    """(waveform, sampling rate in Hz); `name` is what errors call it."""
    from qwen3_vlm.data.sounds import load_sound

    return load_sound(path, max_seconds=3600, name=name)


def _read_text(path: Path, name: str) -> str:
    from qwen3_vlm.storage import read_bytes

    data = read_bytes(path, MAX_TEXT_BYTES, error=DataError, name=f"The text {name}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"The text {name} is not UTF-8 (byte {error.start:,}); save it as UTF-8.") from error


def _demo_scenes(count: int) -> Iterable[Any]:
    from qwen3_vlm.demo.world import scenes

    return islice(scenes("audit", unseen=True), count)


def _say(message: str) -> None:
    """One line on a terminal that is written over by the next; nothing in a log."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{message[:100]}", end="", file=sys.stderr, flush=True)


def _quiet_loading() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()

"""`qwen3-vlm generate …`: pictures, sounds and words from an add-on of token rows.

Like `cli`, each command parses its arguments, calls one function and prints; what it needs is imported inside it.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3_vlm.cli_uti import Kind, open_uti, read_picture, read_sound, require_suffix, write_content
from qwen3_vlm.errors import ConfigError

if TYPE_CHECKING:
    from qwen3_vlm.generate.grammar import Grammar
    from qwen3_vlm.generate.sampling import Choice
    from qwen3_vlm.models.token_lm import TokenLM
    from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer

generate_app = typer.Typer(
    help="Pictures, sounds and words from a token model: only ids that decode can come out.", no_args_is_help=True
)

Text = Annotated[str | None, typer.Argument(help='What it shall be, such as "a red heart".', show_default=False)]
Picture = Annotated[Path | None, typer.Option(help="Picture to make it of.")]
Sound = Annotated[Path | None, typer.Option(help="Sound to make it of.")]
Checkpoint = Annotated[Path, typer.Option(help="Trainable-rows directory.", show_default=False)]
Llm = Annotated[str | None, typer.Option(help="LLM to use instead of the one that the add-on names.")]
Uti = Annotated[Path | None, typer.Option(help="uti.yaml to use instead of the add-on's, where tokenizers moved.")]
Seed = Annotated[int, typer.Option(help="Of the first sample; the next one has the next.")]
Count = Annotated[int, typer.Option(min=1, help="Samples; with several, files are numbered.")]
Temperature = Annotated[str, typer.Option(help="0: the likeliest id. For sounds also one per codebook: 0.7,0.9,1,1.")]
TopK = Annotated[str, typer.Option(help="Of so many likeliest ids alone; 0: of all. Likewise one per codebook.")]
TopP = Annotated[str, typer.Option(help="Of the likeliest ids with this much probability. Likewise.")]
Guidance = Annotated[float, typer.Option(help="Beyond 1: how far from what an empty text would give.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples at a time; a sample does not depend on it.")]
Device = Annotated[str | None, typer.Option(help="Where everything runs: auto, cpu, cuda, cuda:1, mps.")]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the base.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]


@generate_app.command()
def image(
    text: Text = None,
    *,
    checkpoint: Checkpoint,
    image: Picture = None,
    audio: Sound = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .png and the like.")] = Path("image.png"),
    llm: Llm = None,
    uti: Uti = None,
    seed: Seed = 0,
    count: Count = 1,
    temperature: Temperature = "1",
    top_k: TopK = "0",
    top_p: TopP = "1",
    guidance: Guidance = 1.0,
    batch_size: BatchSize = 8,
    device: Device = None,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Draw a picture of a text, or of a sound or another picture."""
    from qwen3_vlm.generate.generation import generate
    from qwen3_vlm.generate.sampling import Sampling

    require_suffix(out, Kind.image)
    source = _source(text=text, image=image, audio=audio)
    sampling = Sampling(image=_choices(temperature, top_k, top_p, 1)[0], guidance=guidance)
    model, tokenizer = open_model(checkpoint, llm, uti, device, trust_remote_code=trust_remote_code)
    options = {"sampling": sampling, "seed": seed, "batch_size": batch_size}
    pictures = generate(model, tokenizer, "image", [source] * count, **options)
    _write(pictures, Kind.image, out, seed, as_json)


@generate_app.command()
def audio(
    text: Text = None,
    *,
    checkpoint: Checkpoint,
    image: Picture = None,
    audio: Sound = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .wav.")] = Path("audio.wav"),
    llm: Llm = None,
    uti: Uti = None,
    seed: Seed = 0,
    count: Count = 1,
    temperature: Temperature = "1",
    top_k: TopK = "0",
    top_p: TopP = "1",
    guidance: Guidance = 1.0,
    min_seconds: Annotated[float, typer.Option(min=0, help="Shortest sound.")] = 0.0,
    max_seconds: Annotated[
        float | None, typer.Option(help="Longest sound; default: one clip, or what the model can read.")
    ] = None,
    batch_size: BatchSize = 8,
    device: Device = None,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Speak, or whatever else the model has learnt to sound like, from a text, a picture or another sound."""
    from qwen3_vlm.generate.generation import generate
    from qwen3_vlm.generate.sampling import Sampling

    require_suffix(out, Kind.audio)
    source = _source(text=text, image=image, audio=audio)
    model, tokenizer = open_model(checkpoint, llm, uti, device, trust_remote_code=trust_remote_code)
    identity = tokenizer.token_space.audio
    choices = _choices(temperature, top_k, top_p, identity.num_codebooks if identity else 1)
    options: dict[str, Any] = {"sampling": Sampling(audio=tuple(choices), guidance=guidance), "seed": seed}
    options |= {"batch_size": batch_size, "grammar": _sound_grammar(tokenizer, min_seconds, max_seconds)}
    sounds = generate(model, tokenizer, "audio", [source] * count, **options)
    _write(sounds, Kind.audio, out, seed, as_json)


@generate_app.command()
def text(
    checkpoint: Checkpoint,
    image: Annotated[Path | None, typer.Option(help="Picture to describe.")] = None,
    audio: Annotated[Path | None, typer.Option(help="Sound to put into words.")] = None,
    llm: Llm = None,
    uti: Uti = None,
    seed: Seed = 0,
    count: Count = 1,
    temperature: Temperature = "0",
    top_k: TopK = "0",
    top_p: TopP = "1",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest text, in tokens.")] = None,
    batch_size: BatchSize = 8,
    device: Device = None,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Put a picture or a sound into words."""
    from qwen3_vlm.generate.generation import generate
    from qwen3_vlm.generate.grammar import Grammar
    from qwen3_vlm.generate.sampling import Sampling

    source = _source(image=image, audio=audio)
    sampling = Sampling(text=_choices(temperature, top_k, top_p, 1)[0])
    model, tokenizer = open_model(checkpoint, llm, uti, device, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"sampling": sampling, "seed": seed, "batch_size": batch_size}
    options |= {"grammar": None if max_tokens is None else Grammar(tokenizer.token_space, max_text=max_tokens)}
    for number, answer in enumerate(generate(model, tokenizer, "text", [source] * count, **options)):
        print(json.dumps({"text": answer, "seed": seed + number}, ensure_ascii=False) if as_json else answer)


def open_model(
    checkpoint: Path, llm: str | None, uti: Path | None, device: str | None, *, trust_remote_code: bool
) -> "tuple[TokenLM, UnifiedTokenizer]":
    """The model of an add-on, and the tokenizers that its folder or another uti.yaml names.

    Raises:
        AddOnError: the add-on can't be used, or not with this base.
        TokenSpaceError: the tokenizers are not those that it was trained with.
    """
    from qwen3_vlm.models.row_files import find_rows, load_token_lm
    from qwen3_vlm.tokenization.exact import choose_device

    folder = find_rows(checkpoint)
    foreign = uti is None and not trust_remote_code  # a downloaded uti.yaml may not ask for code to be run
    tokenizer = open_uti(uti or folder, device, ["text.trust_remote_code=false"] * foreign)
    where = None if device is None else choose_device(device)
    model = load_token_lm(folder, llm, device=where, trust_remote_code=trust_remote_code)
    model.token_space.require_same(tokenizer.token_space, f"What {uti or folder} loads")
    return model, tokenizer


def _source(**given: Any) -> dict[str, Any]:
    """The one source that was given; a file is read.

    Raises:
        ConfigError: none was given, or several.
        DataError: a file can't be read.
    """
    found = {kind: value for kind, value in given.items() if value is not None}
    if len(found) != 1:
        raise ConfigError(f"Give {'a text, ' * ('text' in given)}--image or --audio, one of them.")
    ((kind, value),) = found.items()
    read: dict[str, Any] = {"text": lambda text, _: text, "image": read_picture, "audio": read_sound}
    return {kind: read[kind](value, str(value))}


def _choices(temperature: str, top_k: str, top_p: str, count: int) -> "list[Choice]":
    """`count` choices of numbers that were given once for all, or once for each."""
    from qwen3_vlm.generate.sampling import Choice

    columns = [
        _numbers("--temperature", temperature, count),
        [int(value) for value in _numbers("--top-k", top_k, count, whole=True)],
        _numbers("--top-p", top_p, count),
    ]
    return [Choice(*values) for values in zip(*columns, strict=True)]


def _numbers(option: str, text: str, count: int, *, whole: bool = False) -> list[float]:
    try:
        values = [int(part) if whole else float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} is {text!r}; it must be a{' whole' * whole} number, or several with commas."
        ) from None
    if len(values) not in (1, count):
        raise ConfigError(f"{option} has {len(values)} numbers; give one{f', or {count}' * (count > 1)}.")
    return values * (count // len(values))


def _sound_grammar(tokenizer: "UnifiedTokenizer", min_seconds: float, max_seconds: float | None) -> "Grammar | None":
    """None where no lengths are asked for: then the default ones hold."""
    from qwen3_vlm.generate.grammar import Grammar

    audio = tokenizer.token_space.audio
    if audio is None or (not min_seconds and max_seconds is None):
        return None
    most = audio.frames_per_clip if max_seconds is None else int(max_seconds * audio.frame_rate_hz)
    least = max(1, round(min_seconds * audio.frame_rate_hz))
    return Grammar(tokenizer.token_space, min_frames=least, max_frames=most)


def _write(contents: list[Any], kind: Kind, out: Path, seed: int, as_json: bool) -> None:
    """Write one file, or several with their seeds in their names, and tell where they are."""
    for number, content in enumerate(contents, start=seed):
        file = out if len(contents) == 1 else out.with_name(f"{out.stem}-{number}{out.suffix}")
        write_content(file, kind, content)
        print(json.dumps({"file": str(file), "seed": number}) if as_json else file)

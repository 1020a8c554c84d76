"""`qwen3-vlm chat …`: a conversation with one model that sees through a connector and draws and speaks through rows.

Like `cli`, the command parses its arguments, calls the package and prints; what it needs is imported inside it.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3_vlm.cli_uti import Kind, open_uti, read_picture, read_sound, require_suffix, write_content
from qwen3_vlm.errors import ConfigError, Qwen3VLMError

if TYPE_CHECKING:
    from qwen3_vlm.generate.chat import Reply
    from qwen3_vlm.models.omni import OmniModel

SUFFIXES = {Kind.image: ".png", Kind.audio: ".wav"}
HELP = """\
/image FILE      show a picture with the next message
/audio FILE      play a sound with the next message
/draw [WORDS]    a picture of the words, or of the sound that is shown
/say [WORDS]     a sound of the words, or of the picture that is shown
/aloud WORDS     an answer that is said instead of written
/new             begin again
/quit            leave; so does the end of the input
Anything else is a message."""


class Made(StrEnum):
    """What a picture or a sound is made of."""

    message = "message"
    answer = "answer"
    conversation = "conversation"


def chat(
    text: Annotated[
        str | None, typer.Argument(help="One message; without it, and without files, a conversation begins.")
    ] = None,
    *,
    connector: Annotated[Path, typer.Option(help="Connector directory.", show_default=False)],
    rows: Annotated[Path, typer.Option(help="Trainable-rows directory.", show_default=False)],
    image: Annotated[list[Path] | None, typer.Option(help="Picture that comes before the text.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="Sound that comes before the text.")] = None,
    reply: Annotated[Kind, typer.Option(help="What the answer shall be.")] = Kind.text,
    made_of: Annotated[Made, typer.Option("--of", help="What a picture or a sound is made of.")] = Made.message,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File for a picture or a sound; of a conversation, a folder.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="Further adapter; the first one makes the reply.")
    ] = None,
    llm: Annotated[str | None, typer.Option(help="LLM to use instead of the one that the connector names.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="Vision tower to use instead of the connector's.")] = None,
    uti: Annotated[
        Path | None, typer.Option(help="uti.yaml to use instead of the rows', where tokenizers moved.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the bases, where the add-ons were trained in two.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first reply; the next one has the next.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(help="Of all that is chosen; default: 0 for words, 1 for pictures and sounds.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Of pictures and sounds; see `generate`.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in words, in tokens.")] = 256,
    device: Annotated[str | None, typer.Option(help="Where everything runs: auto, cpu, cuda, cuda:1, mps.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the base.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per reply.")] = False,
) -> None:
    """Talk with one model that sees, reads, hears, draws and speaks; one message, or a conversation."""
    once = text is not None or bool(image or audio)
    _refuse_idle(once, reply, made_of, out)
    if once and reply in SUFFIXES:
        out = out or Path(f"reply{SUFFIXES[reply]}")
        require_suffix(out, reply)
    more = dict(_named(value) for value in adapter or ())
    parts = [_part(Kind.image, path) for path in image or ()] + [_part(Kind.audio, path) for path in audio or ()]
    options: dict[str, Any] = {"sampling": _sampling(temperature, guidance), "max_new_tokens": max_tokens}
    options |= {"adapter": next(iter(more))} if more else {}
    omni = open_omni(
        connector,
        rows,
        uti=uti,
        device=device,
        adapters=more,
        llm=llm,
        vision_tower=vision_tower,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if once:
        Talk(omni, Path(), seed, as_json, options, parts).say(text or "", reply, made_of, out)
    else:
        talk(Talk(omni, out or Path(), seed, as_json, options), sys.stdin)


def _refuse_idle(once: bool, reply: Kind, made_of: Made, out: Path | None) -> None:
    """Options that would do nothing.

    Raises:
        ConfigError: names one.
    """
    if once and reply is Kind.text:
        for name, value in (("--out", out), ("--of", None if made_of is Made.message else made_of.value)):
            if value is not None:
                raise ConfigError(
                    f"{name} is {value}, and the answer is text, which is printed: ask for a picture or a sound with "
                    f"--reply, or leave {name} out."
                )
    if not once and (reply is not Kind.text or made_of is not Made.message):
        name = "--of" if reply is Kind.text else "--reply"
        raise ConfigError(
            f"{name} is for one message, and none is given: say what to answer, or ask for pictures and sounds with "
            "/draw, /say and /aloud in a conversation."
        )


def open_omni(
    connector: Path,
    rows: Path,
    *,
    uti: Path | None,
    device: str | None,
    trust_remote_code: bool,
    **options: Any,
) -> "OmniModel":
    """The two add-ons around one base, with the tokenizers that the rows' folder or another uti.yaml names.

    Raises:
        AddOnError: an add-on can't be used, or not with this base.
        TokenSpaceError: the tokenizers are not those that the rows were trained with.
    """
    from qwen3_vlm.models.row_files import find_rows
    from qwen3_vlm.tokenization.exact import choose_device
    from qwen3_vlm.train.omni_files import load_omni

    folder = find_rows(rows)
    foreign = uti is None and not trust_remote_code  # a downloaded uti.yaml may not ask for code to be run
    tokenizer = open_uti(uti or folder, device, ["text.trust_remote_code=false"] * foreign)
    where = None if device is None else choose_device(device)
    return load_omni(connector, folder, uti=tokenizer, device=where, trust_remote_code=trust_remote_code, **options)


@dataclass
class Talk:
    """A conversation so far, and what is shown with its next message."""

    omni: "OmniModel"
    folder: Path  # of pictures and sounds
    seed: int
    as_json: bool
    options: dict[str, Any]
    shown: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    replies: int = 0

    def say(self, text: str, kind: Kind = Kind.text, made_of: Made = Made.message, out: Path | None = None) -> None:
        """One message and its reply, which is printed or written.

        Raises:
            Qwen3VLMError: there can be none; the conversation is as it was before, and what was shown is gone: it may
                be what can't be answered, and would stand in the way of the next message too.
        """
        from qwen3_vlm.generate.chat import chat, with_words

        shown, self.shown = self.shown, []
        content = [*shown, *([{"type": "text", "text": text}] if text else [])]
        messages = [*self.messages, {"role": "user", "content": content}]
        if kind is Kind.text or made_of is Made.answer:
            messages = with_words(self.omni, messages)
        options = {**self.options, "seed": self.seed + self.replies, "streamer": self._streamer(kind)}
        reply = chat(self.omni, messages, kind.value, source=made_of.value, **options)
        if options["streamer"] is None:
            self._tell(reply, kind, out)
        self.messages, self.replies = [*messages, reply.message()], self.replies + 1

    def _streamer(self, kind: Kind) -> Any:
        """Shows words while they come, where somebody is looking."""
        if kind is not Kind.text or self.as_json or not sys.stdout.isatty():
            return None
        from transformers import TextStreamer

        return TextStreamer(self.omni.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def _tell(self, reply: "Reply", kind: Kind, out: Path | None) -> None:
        if kind is Kind.text:
            print(json.dumps({"text": reply.text}, ensure_ascii=False) if self.as_json else reply.text, flush=True)
            return
        file = out or self.folder / f"reply-{self.replies + 1}{SUFFIXES[kind]}"
        write_content(file, kind, reply.image if kind is Kind.image else reply.audio)
        line = {"file": str(file), "words": reply.words, "seed": self.seed + self.replies}
        print(json.dumps(line, ensure_ascii=False) if self.as_json else file, flush=True)


def talk(session: Talk, lines: Iterable[str]) -> None:
    """A conversation, line by line; what can't be answered is told and the conversation goes on."""
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP)
        print("> ", end="", flush=True)
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return
        shown = len(session.shown)
        try:
            _obey(session, command, rest.strip(), line.strip())
        except Qwen3VLMError as error:
            dropped = " What was shown with it is left out from here on." if len(session.shown) < shown else ""
            print(f"Error: {error}{dropped}", file=sys.stderr, flush=True)
        if interactive:
            print("> ", end="", flush=True)


def _obey(session: Talk, command: str, rest: str, line: str) -> None:
    match command:
        case "":
            pass
        case "/image" | "/audio":
            session.shown.append(_part(Kind(command[1:]), Path(rest)))
        case "/draw":
            session.say(rest, Kind.image)
        case "/say":
            session.say(rest, Kind.audio)
        case "/aloud":
            session.say(rest, Kind.audio, Made.answer)
        case "/new":
            session.messages, session.shown = [], []
        case _ if command.startswith("/"):
            print(HELP)
        case _:
            session.say(line)


def _part(kind: Kind, file: Path) -> dict[str, Any]:
    content = read_picture(file, str(file)) if kind is Kind.image else read_sound(file, str(file))
    return {"type": kind.value, kind.value: content}


def _named(value: str) -> tuple[str, str]:
    name, equals, folder = value.partition("=")
    if not (name and equals and folder):
        raise ConfigError(f"--adapter is {value!r}; it must be NAME=DIR.")
    return name, folder


def _sampling(temperature: float | None, guidance: float) -> Any:
    from qwen3_vlm.generate.sampling import Choice, Sampling

    if temperature is None:
        return Sampling(guidance=guidance)
    choice = Choice(temperature)
    return Sampling(text=choice, image=choice, audio=choice, guidance=guidance)

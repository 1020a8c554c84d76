"""Conversations with one model for both tracks: it reads words, pictures and sounds, and answers with any of them.

    the conversation ─ chat template, pictures through the connector ─ `OmniModel.vlm` → words
    one source of it ─ UnifiedTokenizer → the prompt that rows were trained on ─ `OmniModel.token_lm` → picture or sound

Connector and rows were trained apart: the one on conversations with pictures in them, the other on one source and one
target. So what the one makes reaches the other as words or as a picture, unless it is asked for otherwise: a sound is
put into words before it enters the conversation, and a picture is drawn of the words of one message, or of an answer.

Words are greedy unless a temperature is given; every reply has a seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import LogitsProcessorList

from qwen3_vlm.config import require
from qwen3_vlm.errors import ModelError, TokenError
from qwen3_vlm.generate.generation import (
    DEFAULT,
    Segment,
    Source,
    decode,
    encode_fitting,
    generate,
    generate_segments,
    grammar_after,
    run_rows,
    split_segments,
)
from qwen3_vlm.generate.grammar import Grammar
from qwen3_vlm.generate.sampling import Sampler, Sampling, WordSampler
from qwen3_vlm.models.modes import evaluation_mode
from qwen3_vlm.models.omni import OmniModel
from qwen3_vlm.tokenization.pictures import as_rgb
from qwen3_vlm.tokenization.sequences import BOUNDARIES
from qwen3_vlm.tokenization.token_space import MODALITIES, Content
from qwen3_vlm.tokenization.unified_tokenizer import Sound

__all__ = ["Reply", "chat", "with_words"]

ROLES = ("system", "user", "assistant")
MAX_NEW_TOKENS = 256
Way = Literal["connector", "tokens", "words"]  # how a picture or a sound enters a conversation
ReplySource = Literal["message", "answer", "conversation"]
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One text, picture or sound of a message."""

    modality: Content
    value: Any
    words: str | None = None  # of a picture or a sound, where they are known


@dataclass(frozen=True, slots=True)
class Turn:
    """One message."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as the model reads it, up to where the answer begins."""

    ids: list[int]  # (T,); each picture of the connector's as copies of `<image_patch>`
    images: tuple[Any, ...]
    has_tokens: bool  # whether pictures or sounds stand in it as ids


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model answered: one of `text`, `image` and `audio` is there."""

    ids: npt.NDArray[np.int64]  # (n,) global, without what ends them
    text: str | None = None
    image: Image.Image | None = None
    audio: Sound | None = None  # waveform (A, S) and sampling rate in Hz
    words: str | None = None  # what was drawn or said, where that was words

    def message(self) -> dict[str, Any]:
        """For the conversation to go on with; a picture in it is looked at through the connector."""
        if self.text is not None:
            return {"role": "assistant", "content": self.text}
        name, value = ("image", self.image) if self.image is not None else ("audio", self.audio)
        part = {"type": name, name: value} | ({} if self.words is None else {"text": self.words})
        return {"role": "assistant", "content": [part]}


def chat(
    omni: OmniModel,
    messages: Sequence[Message],
    reply: Content = "text",
    *,
    source: ReplySource = "message",
    pictures: Way = "connector",
    sounds: Way = "words",
    adapter: str | EllipsisType | None = ...,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
    grammar: Grammar | None = None,
    streamer: Any = None,
) -> Reply:
    """The next answer of a conversation, whose last message is the user's.

    Args:
        messages: [{"role": "system" | "user" | "assistant", "content": str or parts}]; parts are {"type": "text",
            "text": str}, {"type": "image", "image": picture}, {"type": "audio", "audio": (waveform, rate in Hz)}. A
            picture or sound may have its words as "text".
        reply: what the answer shall be.
        source: what a picture or sound is made of: the last "message", which then is a text, a picture or a sound
            alone; the "answer" in words that would come instead; or the whole "conversation" as it stands, which no
            stage of this package trains.
        pictures, sounds: how they enter the conversation: through the "connector" (pictures alone), as "tokens", which
            no stage of this package trains either, or in "words" that the rows make of them.
        adapter: of the pass that makes the reply. Left out it is the connector's where a picture goes through the
            connector, the rows' where there are tokens in prompt or answer, and none for plain text.
        max_new_tokens: of an answer in words.
        grammar: lengths of a picture's or sound's answer; see `generate_ids`.
        streamer: of the library, such as `TextStreamer`: gets the ids of an answer in words while they come.

    Raises:
        TokenError: a message is none, or nothing can be made of the last one; says which and why.
        ModelError: the conversation is longer than the model can read, or there is no such adapter.
    """
    _check_options(reply, source, pictures, sounds, sampling)
    turns = _read(omni, messages)
    ways: dict[str, Way] = {"image": pictures, "audio": sounds}
    if reply == "text":
        return _answer(omni, turns, ways, adapter, sampling, seed, max_new_tokens, streamer)
    if source == "conversation":
        return _go_on(omni, turns, ways, reply, adapter, sampling, seed, grammar)
    if source == "message":
        given = _one_source(turns[-1])
    else:
        given = {"text": str(_answer(omni, turns, ways, ..., sampling, seed, max_new_tokens).text)}
    model = omni.speaking(_chosen(adapter, omni.speaks_with))
    options: dict[str, Any] = {"grammar": grammar, "sampling": sampling, "seed": seed}
    ((segment, *_),) = generate_segments(model, omni.uti, reply, [given], **options)
    return _decoded(omni, segment, given.get("text"))


def with_words(omni: OmniModel, messages: Sequence[Message], modality: Content = "audio") -> list[dict[str, Any]]:
    """The messages, with what each sound (or picture) says beside it as "text".

    For conversations that go on: what was put into words once need not be listened to again at every turn.

    Raises:
        TokenError: a message is none; says which and why.
    """
    _turns(omni, messages)
    found = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [_with_words(omni, part) if part.get("type") == modality else part for part in content]
        found.append({**message, "content": content})
    return found


def _with_words(omni: OmniModel, part: Mapping[str, Any]) -> dict[str, Any]:
    if part.get("text"):
        return dict(part)
    return {**part, "text": _heard(omni, Part(part["type"], part[part["type"]]))}


# What is given ------------------------------------------------------------------------------------------------


def _check_options(reply: Any, source: Any, pictures: Any, sounds: Any, sampling: Sampling) -> None:
    require(reply in MODALITIES, "reply", reply, f"must be one of {', '.join(MODALITIES)}")
    require(
        source in ("message", "answer", "conversation"), "source", source, "must be message, answer or conversation"
    )
    require(pictures in ("connector", "tokens", "words"), "pictures", pictures, "must be connector, tokens or words")
    require(sounds in ("tokens", "words"), "sounds", sounds, "must be tokens or words")
    if source == "conversation":
        require(sampling.guidance == 1, "guidance", sampling.guidance, "must be 1: a conversation has no empty prompt")


def _read(omni: OmniModel, messages: Sequence[Message]) -> list[Turn]:
    """The messages, checked.

    Raises:
        TokenError: one is none, or the last one is not the user's.
    """
    turns = _turns(omni, messages)
    if not turns or turns[-1].role != "user":
        raise TokenError("The last message must be the user's: it is what is answered.", "bad_message")
    return turns


def _turns(omni: OmniModel, messages: Sequence[Message]) -> list[Turn]:
    """Message by message.

    Raises:
        TokenError: names the first that is none.
    """
    marks = _marks(omni)
    turns = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            kind = type(message).__name__
            raise TokenError(f'Message {number} is a {kind}; {{"role": "user", "content": …}} is one.', "bad_message")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise TokenError(f"Message {number} has the role {role!r}; there are {', '.join(ROLES)}.", "bad_message")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, Sequence) or not parts:
            raise TokenError(f"Message {number} has no content: a text, or a list of parts.", "bad_message")
        turns.append(Turn(str(role), tuple(_part(part, f"Message {number}", marks) for part in parts)))
    return turns


def _marks(omni: OmniModel) -> list[str]:
    """What the tokenizer reads as a mark wherever it stands, such as <|im_end|> and <image_patch>."""
    return [str(token) for token in omni.processor.tokenizer.added_tokens_decoder.values() if token.special]


def _part(part: Any, where: str, marks: Sequence[str]) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in MODALITIES or part.get(kind) is None:
        raise TokenError(
            f'{where} has a part that is none: {{"type": "text", "text": …}} is, and likewise with image and audio.',
            "bad_message",
        )
    words = part.get("text")
    if words is not None and not isinstance(words, str):
        raise TokenError(f"{where} has a text that is no string but a {type(words).__name__}.", "bad_message")
    for mark in marks:
        if mark in (words or ""):
            raise TokenError(
                f"{where} has {mark} in its text, which is no word but a mark between messages.", "reserved_text"
            )
    return Part("text", words) if kind == "text" else Part(kind, part[kind], words)


def _one_source(turn: Turn) -> Source:
    """The last message as the source of one task.

    Raises:
        TokenError: it has several.
    """
    kinds = {part.modality for part in turn.parts}
    if kinds == {"text"}:
        return {"text": "\n".join(part.value for part in turn.parts)}
    if len(turn.parts) > 1:
        raise TokenError(
            f"The last message has {' and '.join(sorted(kinds))} in {len(turn.parts)} parts; a picture or a sound is "
            'made of one. Give it alone, or ask for what is made of the "answer" in words.',
            "several_sources",
        )
    return {turn.parts[0].modality: turn.parts[0].value}


def _heard(omni: OmniModel, part: Part) -> str:
    """A picture or a sound in words, by the rows and their adapter; marks, which they can make too, are no words."""
    words: str = generate(omni.token_lm, omni.uti, "text", [{part.modality: part.value}])[0]
    marks = _marks(omni)
    while found := [mark for mark in marks if mark in words]:  # what is left can be one too
        words = words.replace(found[0], "")
    return words.strip()


# The conversation as ids --------------------------------------------------------------------------------------


def _prompt(omni: OmniModel, turns: Sequence[Turn], ways: Mapping[str, Way]) -> Prompt:
    """The chat template's ids; a picture or sound stands where its mark stood, on a line of its own."""
    mark = omni.processor.image_token
    messages, marked = [], []
    for turn in turns:
        lines = []
        for part in turn.parts:
            if part.modality == "text" or ways[part.modality] == "words":
                lines.append(part.value if part.modality == "text" else part.words or _heard(omni, part))
            else:
                lines.append(mark)
                marked.append(part)
        messages.append({"role": turn.role, "content": "\n".join(lines)})
    expanded = omni.processor.encode_prompt(messages)
    if (places := omni.processor.placeholders(expanded)) != len(marked):
        raise ModelError(f"The chat template makes {places} places of {len(marked)} pictures and sounds.")
    ids: list[int] = []
    values, waiting = iter(expanded), iter(marked)
    for value in values:
        if value != omni.processor.image_token_id:
            ids.append(value)
            continue
        copies = [value, *(next(values) for _ in range(omni.processor.num_image_tokens - 1))]
        part = next(waiting)
        ids += copies if ways[part.modality] == "connector" else _segment(omni, part)
    seen = [part.value for part in marked if ways[part.modality] == "connector"]
    return Prompt(ids, tuple(seen), len(seen) < len(marked))


def _segment(omni: OmniModel, part: Part) -> list[int]:
    """A picture or a sound as tokens between its boundaries."""
    space, boundary = omni.token_space, BOUNDARIES[part.modality]
    (ids,) = encode_fitting(omni.token_lm, omni.uti, {part.modality: part.value}).values()
    return [space.special(boundary.start), *ids.tolist(), space.special(boundary.end)]


def _pixels(omni: OmniModel, prompt: Prompt) -> dict[str, Any]:
    if not prompt.images:
        return {}
    values = omni.processor.pixel_values([as_rgb(image) for image in prompt.images])
    return {name: value.to(omni.device) for name, value in values.items()}


# Answers ------------------------------------------------------------------------------------------------------


def _chosen(asked: str | EllipsisType | None, usual: str | None) -> str | None:
    return usual if asked is ... else asked


@torch.no_grad()
def _answer(
    omni: OmniModel,
    turns: Sequence[Turn],
    ways: Mapping[str, Way],
    adapter: str | EllipsisType | None,
    sampling: Sampling,
    seed: int,
    max_new_tokens: int,
    streamer: Any = None,
) -> Reply:
    """The answer in words."""
    prompt = _prompt(omni, turns, ways)
    usual = omni.sees_with if prompt.images else omni.speaks_with if prompt.has_tokens else None
    model: Any = omni.seeing(_chosen(adapter, usual))
    config = _word_config(omni, len(prompt.ids), max_new_tokens)
    processors = []
    if sampling.text.temperature:
        processors.append(WordSampler(sampling.text, omni.token_space.text.tokenizer_size, [seed]))
    input_ids = torch.tensor([prompt.ids], device=omni.device)
    with evaluation_mode(model):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            logits_processor=LogitsProcessorList(processors),
            generation_config=config,
            streamer=streamer,
            **_pixels(omni, prompt),
        )
    ids = output[0, len(prompt.ids) :].cpu().numpy().astype(np.int64)
    ids = ids[:-1] if len(ids) and ids[-1] in config.eos_token_id else ids
    return Reply(ids, text=omni.processor.tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip())


def _word_config(omni: OmniModel, prompt: int, max_new_tokens: int) -> Any:
    """How an answer in words is decoded: greedily unless a `WordSampler` leaves one id, whatever the base brings along.

    Raises:
        ModelError: there is no room for an answer.
    """
    stop_ids, pad_id = omni.processor.stop_token_ids(), omni.processor.tokenizer.pad_token_id
    positions = getattr(omni.token_lm.config, "max_position_embeddings", None) or prompt + max_new_tokens
    if prompt >= positions:
        raise ModelError(f"The conversation takes {prompt:,} ids; the model reads {positions:,}, its answer included.")
    return Grammar(omni.token_space).generation_config(
        "text",
        max_new_tokens=min(max_new_tokens, positions - prompt),
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0] if pad_id is None else pad_id,
    )


def _go_on(
    omni: OmniModel,
    turns: Sequence[Turn],
    ways: Mapping[str, Way],
    reply: Content,
    adapter: str | EllipsisType | None,
    sampling: Sampling,
    seed: int,
    grammar: Grammar | None,
) -> Reply:
    """A picture or a sound that follows the conversation itself."""
    prompt = _prompt(omni, turns, ways)
    boundary = BOUNDARIES[reply]
    row = np.array([*prompt.ids, *map(omni.token_space.special, (boundary.gen, boundary.start))], dtype=np.int32)
    model = omni.speaking(_chosen(adapter, omni.speaks_with))
    grammar = grammar or grammar_after(model, len(row))
    sampler = Sampler(grammar, sampling, [seed])
    output = run_rows(model, [row], grammar, sampler, grammar.generation_config(reply), **_pixels(omni, prompt))
    return _decoded(omni, split_segments(grammar, reply, output[0])[0], None)


def _decoded(omni: OmniModel, segment: Segment, words: str | None) -> Reply:
    content: dict[str, Any] = {segment.modality: decode(omni.uti, segment)}
    return replace(Reply(segment.ids, **content), words=words)

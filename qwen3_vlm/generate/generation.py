"""Answers: a picture of words, words of a sound, and so on, one or many.

    what is given ─ UnifiedTokenizer → prompt ─ TokenLM.generate under the grammar → ids ─ UnifiedTokenizer → answer

Every answer has a seed of its own: sample i of a call has `seed + i`, and comes out the same alone with that seed,
whatever else is in the batch. All that is generated can be decoded: the grammar lets nothing else come.

Shapes: B rows, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from qwen3_vlm.errors import ModelError, TokenError
from qwen3_vlm.generate.grammar import Grammar
from qwen3_vlm.generate.sampling import Sampler, Sampling
from qwen3_vlm.models.modes import evaluation_mode
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.tokenization.sequences import (
    BOUNDARIES,
    OVERHEAD,
    SEQUENCES,
    Ids,
    prompt_ids,
    sequence_format,
    unconditional_prompt,
)
from qwen3_vlm.tokenization.token_space import Content
from qwen3_vlm.tokenization.unified_tokenizer import Sound, UnifiedTokenizer

__all__ = [
    "Segment",
    "generate",
    "generate_audio",
    "generate_ids",
    "generate_image",
    "generate_segments",
    "generate_text",
    "run",
    "task_of",
]

DEFAULT = Sampling()
Source = Mapping[str, Any]  # {"text": str}, {"image": picture} or {"audio": (waveform, sampling rate)}


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of an answer, whole: what stands between its start and its end token."""

    modality: Content
    ids: npt.NDArray[np.int64]  # (n,) global


def generate_image(model: TokenLM, tokenizer: UnifiedTokenizer, text: str, **options: Any) -> Image.Image:
    """A picture of a text; `options` as in `generate`."""
    return generate(model, tokenizer, "image", [{"text": text}], **options)[0]


def generate_audio(model: TokenLM, tokenizer: UnifiedTokenizer, text: str, **options: Any) -> Sound:
    """A sound of a text: float32 (A, S) and its sampling rate in Hz; `options` as in `generate`."""
    return generate(model, tokenizer, "audio", [{"text": text}], **options)[0]


def generate_text(
    model: TokenLM,
    tokenizer: UnifiedTokenizer,
    *,
    image: Any = None,
    audio: Sound | None = None,
    **options: Any,
) -> str:
    """The words of a picture or of a sound (waveform, sampling rate in Hz); `options` as in `generate`.

    Raises:
        TokenError: neither or both were given.
    """
    if (image is None) == (audio is None):
        raise TokenError("Give a picture or a sound, one of them.", "missing_source")
    source = {"image": image} if audio is None else {"audio": audio}
    return generate(model, tokenizer, "text", [source], **options)[0]


def generate(
    model: TokenLM, tokenizer: UnifiedTokenizer, target: Content, sources: Sequence[Source], **options: Any
) -> list[Any]:
    """One answer per source: pictures, (waveform, sampling rate), or strings.

    Args:
        target: what the answers are.
        sources: {"text": str}, {"image": PIL image or pixels} or {"audio": (waveform, sampling rate)} each.
        options: `grammar`, `sampling`, `seed`, `batch_size` and more, as in `generate_ids`.

    Raises:
        TokenSpaceError: model and tokenizer do not belong together.
        TokenError: a source can't become ids, or no task goes from it to the target.
    """
    answers = generate_segments(model, tokenizer, target, sources, **options)
    return [decode(tokenizer, segments[0]) for segments in answers]


def generate_segments(
    model: TokenLM, tokenizer: UnifiedTokenizer, target: Content, sources: Sequence[Source], **options: Any
) -> list[list[Segment]]:
    """As `generate`, but ids, and all segments of each answer: a grammar's `then` can make several."""
    model.token_space.require_same(tokenizer.token_space, "The tokenizer")
    prompts = []
    for source in sources:
        ids = encode_fitting(model, tokenizer, source)
        prompts.append((task_of(next(iter(ids)), target), ids))
    return generate_ids(model, prompts, **options)


@torch.no_grad()
def generate_ids(
    model: TokenLM,
    prompts: Sequence[tuple[str, Mapping[str, npt.NDArray[Any]]]],
    *,
    grammar: Grammar | None = None,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    batch_size: int = 8,
    **settings: Any,
) -> list[list[Segment]]:
    """The segments of each answer.

    Args:
        prompts: a task and the ids of its source by modality, such as ("t2i", {"text": ids}).
        grammar: lengths, and what may follow the first segment; None: one segment, as long as `Grammar` has it or as
            the model can read.
        seed: of the first sample; the next one has the next.
        settings: more for the library's `GenerationConfig`, such as `cache_implementation="static"`.

    Raises:
        TokenError: a source is missing, empty or of another modality's ids, or no such task.
        ModelError: prompt and longest answer are more than the model can read, or its scores are no numbers.
    """
    grammar = grammar or fitting_grammar(model, prompts)
    model.token_space.require_same(grammar.token_space, "The grammar")
    answers: list[list[Segment]] = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        seeds = range(seed + start, seed + start + len(chunk))
        rows = run(model, chunk, grammar, sampling, seeds, **settings)
        targets = [sequence_format(task).target for task, _ in chunk]
        answers += [split_segments(grammar, first, row) for first, row in zip(targets, rows, strict=True)]
    return answers


def run(
    model: TokenLM,
    prompts: Sequence[tuple[str, Mapping[str, npt.NDArray[Any]]]],
    grammar: Grammar,
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    streamer: Any = None,
    stopping: StoppingCriteriaList | None = None,
    **settings: Any,
) -> Tensor:
    """One call of the model's own `generate` → (B, T) new ids, padded on the right.

    In evaluation mode, whatever mode the model is in: without dropout, and with a cache beside gradient checkpointing.
    """
    space = model.token_space
    sampler = Sampler(grammar, sampling, seeds)
    rows = [prompt_ids(space, task, ids) for task, ids in prompts]
    if sampler.guided:
        rows += [unconditional_prompt(space, task) for task, _ in prompts]
    firsts = {sequence_format(task).target for task, _ in prompts}
    config = max((grammar.generation_config(first, **settings) for first in firsts), key=lambda c: c.max_new_tokens)
    output = run_rows(model, rows, grammar, sampler, config, streamer=streamer, stopping_criteria=stopping)
    return output[: len(prompts)]


def run_rows(
    model: TokenLM, rows: Sequence[Ids], grammar: Grammar, sampler: Sampler, config: Any, **inputs: Any
) -> Tensor:
    """`run` for prompts as they stand, a start token at the end of each; `inputs` are more for the model's `generate`.

    Raises:
        ModelError: prompt and longest answer are more than the model can read.
    """
    input_ids, attention_mask = pad_left(rows, grammar.pad_id)
    _check_length(model, input_ids.shape[1], config.max_new_tokens)
    library: Any = model
    with evaluation_mode(model):
        output: Tensor = library.generate(
            input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            grammar=grammar,
            logits_processor=LogitsProcessorList([sampler]),
            generation_config=config,
            **inputs,
        )
    return output[:, input_ids.shape[1] :]


def fitting_grammar(model: TokenLM, prompts: Sequence[tuple[str, Mapping[str, npt.NDArray[Any]]]]) -> Grammar:
    """The default grammar, with answers no longer than the model can read after the longest of these prompts."""
    return grammar_after(
        model, max((len(prompt_ids(model.token_space, task, ids)) for task, ids in prompts), default=0)
    )


def grammar_after(model: TokenLM, prompt_length: int) -> Grammar:
    """The default grammar, with answers no longer than the model can read after so many ids."""
    space = model.token_space
    positions = getattr(model.config, "max_position_embeddings", None)
    default = Grammar(space)
    if positions is None:
        return default
    room = positions - prompt_length - 1
    codebooks = space.audio.num_codebooks if space.audio else 1
    longest = {"max_text": default.text_lengths[1], "max_frames": default.frames[1]}
    fitting = {"max_text": room, "max_frames": room // codebooks}
    return Grammar(space, **{name: max(1, min(value, fitting[name])) for name, value in longest.items()})


def pad_left(rows: Sequence[Ids], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths → ids and attention mask (B, T)."""
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, longest - len(row) :] = torch.from_numpy(row.astype(np.int64))
        attention_mask[number, longest - len(row) :] = 1
    return input_ids, attention_mask


def split_segments(grammar: Grammar, first: Content, row: Tensor) -> list[Segment]:
    """The segments of one answer (T,), whose first one began in the prompt.

    Raises:
        TokenError: a segment is not whole: generation was stopped inside it, by a limit that is not the grammar's.
    """
    space = grammar.token_space
    starts = {space.special(boundary.start): modality for modality, boundary in BOUNDARIES.items()}
    ids = row.cpu().numpy()
    segments, modality, begin = [], first, 0
    while True:
        ends = np.flatnonzero(ids[begin:] == space.special(BOUNDARIES[modality].end))
        if not len(ends):
            raise TokenError(f"The {modality} is not whole: generation was stopped inside it.", "unfinished")
        end = begin + int(ends[0])
        segments.append(Segment(modality, ids[begin:end]))
        if end + 2 >= len(ids) or int(ids[end + 2]) not in starts:  # an end token, a switch, a start token
            return segments
        modality, begin = starts[int(ids[end + 2])], end + 3


def encode(tokenizer: UnifiedTokenizer, source: Source) -> dict[str, npt.NDArray[Any]]:
    """The ids of one source by modality.

    Raises:
        TokenError: it can't become ids, or names no modality.
    """
    match dict(source):
        case {"text": ""}:
            raise TokenError("The text is empty; say in words what shall come.", "empty_text")
        case {"text": text}:
            return {"text": np.array(tokenizer.encode_text(text))}
        case {"image": image}:
            return {"image": tokenizer.encode_image(image).ids}
        case {"audio": (waveform, sampling_rate_hz)}:
            return {"audio": tokenizer.encode_audio(waveform, sampling_rate_hz).ids}
    raise TokenError(f"A source is a text, an image or an audio, not {', '.join(source) or 'nothing'}.", "bad_source")


def encode_fitting(model: Any, tokenizer: UnifiedTokenizer, source: Source) -> dict[str, npt.NDArray[Any]]:
    """As `encode`; a sound is not encoded if the model can't read it as a whole.

    Raises:
        ModelError: it can't; says how long a sound may be.
    """
    positions, codec = getattr(model.config, "max_position_embeddings", None), tokenizer.token_space.audio
    if positions is None or codec is None:
        return encode(tokenizer, source)
    match dict(source):
        case {"audio": (waveform, sampling_rate_hz)}:
            sound = tokenizer.prepare_audio(waveform, sampling_rate_hz)
        case _:
            return encode(tokenizer, source)
    count = sum(clip.shape[-1] for clip in sound.clips) // codec.samples_per_frame * codec.num_codebooks
    most = positions - OVERHEAD - 1
    if count > most:
        raise ModelError(
            f"The sound lasts {sound.samples / codec.sampling_rate_hz:,.1f} s, {count:,} ids; the model reads "
            f"{positions:,} at a time: {max(most, 0) / codec.ids_per_second:,.1f} s of sound at most. Give it a part "
            "that is shorter."
        )
    (encoded,) = tokenizer.encode_prepared([sound])
    return {"audio": encoded.ids}


def decode(tokenizer: UnifiedTokenizer, segment: Segment) -> Any:
    """A string, a PIL image, or (waveform, sampling rate in Hz)."""
    if segment.modality == "text":
        return tokenizer.decode_text(segment.ids)
    if segment.modality == "image":
        return tokenizer.decode_image(segment.ids)
    return tokenizer.decode_audio(segment.ids)


def task_of(source: str, target: str) -> str:
    """The task that goes from one modality to another.

    Raises:
        TokenError: there is none.
    """
    for task, wanted in SEQUENCES.items():
        if (wanted.source, wanted.target, wanted.noise_rate) == (source, target, 0.0):
            return task
    raise TokenError(f"No task goes from {source} to {target}; there are {', '.join(SEQUENCES)}.", "unknown_task")


def _check_length(model: TokenLM, prompt: int, answer: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and prompt + answer > positions:
        raise ModelError(
            f"The prompt has {prompt:,} ids and the answer can have {answer:,}; the model reads {positions:,}. Give "
            "the grammar a smaller max_text or max_frames."
        )

"""Ids while they are generated, and sound while its ids come.

The library's `generate` pushes ids to a streamer; here it runs in a thread of its own, so that ids can be pulled.
Whoever stops pulling stops the generation.

A codec's samples depend on frames around them, those to come included. So a piece of sound is given once the frames
that could still change it are there. How many that are is measured on the codec (`unsettled_frames`): none for Mimi, a
few for EnCodec, whose sounds begin with a reflection of what follows, some twenty for DAC. Each clip is decoded from
its beginning, because recurrent codecs remember all of it. The pieces together are what `decode_audio` makes of all
ids, to about half a step of a 16-bit sample.

Shapes: B rows, A channels, S samples, K codebooks, F frames.
"""

from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qwen3_vlm.config import require
from qwen3_vlm.generate.generation import DEFAULT, Source, encode, fitting_grammar, run, task_of
from qwen3_vlm.generate.grammar import Grammar
from qwen3_vlm.generate.sampling import Sampling
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from qwen3_vlm.tokenization.waveforms import Waveform

__all__ = ["IdStreamer", "SoundPieces", "stream_audio", "stream_ids", "unsettled_frames"]

SETTLED = 2.0**-16  # of full scale: half a step of a 16-bit sample
PROBES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # frames


class IdStreamer(BaseStreamer):
    """Calls `emit` with each new id of the first row: the one sample, or with guidance its prompted half."""

    def __init__(self, emit: Callable[[int], None]) -> None:
        self.emit = emit
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """The prompt (B, T) at first, then (B,) one id per row."""
        if self._prompt_seen:
            self.emit(int(value[0]))
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


def stream_ids(
    model: TokenLM,
    prompt: tuple[str, Mapping[str, npt.NDArray[Any]]],
    *,
    grammar: Grammar | None = None,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    **settings: Any,
) -> Iterator[int]:
    """The ids of one answer as they come, its end token last; the same as those of `generate_ids`.

    Args:
        prompt: a task and the ids of its source by modality, such as ("t2i", {"text": ids}).
        settings: as in `generate_ids`.

    Raises:
        TokenError, ModelError: as `generate_ids`.
    """
    grammar = grammar or fitting_grammar(model, [prompt])
    model.token_space.require_same(grammar.token_space, "The grammar")
    found: SimpleQueue[int | BaseException | None] = SimpleQueue()
    stopped = Event()
    options = {**settings, "streamer": IdStreamer(found.put), "stopping": StoppingCriteriaList([_Stopped(stopped)])}

    def work() -> None:
        try:
            run(model, [prompt], grammar, sampling, [seed], **options)
            found.put(None)
        except BaseException as error:  # told to whoever pulls
            found.put(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        while (value := found.get()) is not None:
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()


def stream_audio(
    model: TokenLM, tokenizer: UnifiedTokenizer, source: Source, *, piece_seconds: float = 0.5, **options: Any
) -> Iterator[Waveform]:
    """Pieces (A, S) of one sound while it is generated.

    Args:
        source: {"text": str} or {"image": picture}, as in `generate`.
        piece_seconds: the shortest piece, but for the last of a clip.
        options: `grammar`, `sampling`, `seed` and more, as in `stream_ids`.

    Raises:
        TokenSpaceError: model and tokenizer do not belong together.
        ConfigError: the pieces have no length.
    """
    model.token_space.require_same(tokenizer.token_space, "The tokenizer")
    ids = encode(tokenizer, source)
    pieces = SoundPieces(tokenizer, piece_seconds)
    for value in stream_ids(model, (task_of(next(iter(ids)), "audio"), ids), **options):
        if value == tokenizer.token_space.special("<|aud_end|>"):
            break
        if (piece := pieces.push(value)) is not None:
            yield piece
    if (piece := pieces.finish()) is not None:
        yield piece


class SoundPieces:
    """Ids of a sound one by one → pieces of it, as soon as nothing that comes can change them.

    Args:
        unsettled: frames at the end of what is there that later ones can still change; None: measured.

    Raises:
        ConfigError: the pieces have no length.
        TokenError: the space has no audio.
    """

    def __init__(self, tokenizer: UnifiedTokenizer, piece_seconds: float = 0.5, unsettled: int | None = None) -> None:
        require(piece_seconds > 0, "piece_seconds", piece_seconds, "must be above 0")
        tokenizer.token_space.range_of("audio", 0)
        identity: Any = tokenizer.token_space.audio
        self.tokenizer = tokenizer
        self.codebooks, self.clip_frames = identity.num_codebooks, identity.frames_per_clip
        self.samples_per_frame = identity.samples_per_frame
        self.piece_frames = max(1, round(piece_seconds * identity.frame_rate_hz))
        self.unsettled = unsettled_frames(tokenizer) if unsettled is None else unsettled
        self._ids: list[int] = []  # of the clip that is being generated
        self._given = 0  # frames of it

    def push(self, value: int) -> Waveform | None:
        """One more id → a piece (A, S), if there is one now.

        Raises:
            TokenError: an id is no audio id, or of another codebook than is due.
        """
        self._ids.append(value)
        frames, rest = divmod(len(self._ids), self.codebooks)
        if rest:
            return None
        if frames == self.clip_frames:
            return self.finish()
        settled = frames - self.unsettled
        return self._give(settled) if settled - self._given >= self.piece_frames else None

    def finish(self) -> Waveform | None:
        """What is left of the clip, at its end or at the sound's."""
        frames = len(self._ids) // self.codebooks
        piece = self._give(frames) if frames > self._given else None
        self._ids, self._given = [], 0
        return piece

    def _give(self, until: int) -> Waveform:
        sound, _ = self.tokenizer.decode_audio(self._ids)
        piece = sound[:, self._given * self.samples_per_frame : until * self.samples_per_frame]
        self._given = until
        return piece


def unsettled_frames(tokenizer: UnifiedTokenizer) -> int:
    """How many frames at the end of a sound sound otherwise once more frames follow, by more than `SETTLED`.

    Measured on random codes: beginnings of several lengths, decoded alone and as a part of the whole. Where most of
    a beginning can change, a codec may need all of it: then a clip is given as a whole.
    """
    codec: Any = tokenizer.audio_codec
    identity: Any = tokenizer.token_space.audio
    random = np.random.Generator(np.random.PCG64(0))
    frames = min(2 * PROBES[-1], identity.frames_per_clip)
    codes = np.stack([random.integers(0, size, frames) for size in codec.codebook_sizes])[None]  # (1, K, F)
    whole = codec.decode(codes)[0]  # (A, S)
    unsettled = 0
    for length in PROBES:
        if 2 * length > frames:
            break
        alone = codec.decode(codes[:, :, :length])[0]
        changes = np.abs(alone - whole[:, : alone.shape[1]]).reshape(len(alone), length, -1)
        changed = changes.max(axis=(0, 2)) > SETTLED  # (F,)
        unsettled = max(unsettled, length - int(np.argmax(changed)) if changed.any() else 0)
    unsettled += -(-unsettled // 8)  # a longer search finds a frame or two more
    return unsettled if unsettled <= frames * 3 // 8 else int(identity.frames_per_clip)


class _Stopped(StoppingCriteria):
    """Ends all rows when nobody wants more ids."""

    def __init__(self, stopped: Event) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.stopped.is_set(), device=input_ids.device, dtype=torch.bool)

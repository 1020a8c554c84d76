"""Streams against what is generated and decoded at once; a stream that nobody reads on; sound before its end."""

import functools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_vlm.errors import ConfigError, ModelError, TokenError, TokenSpaceError
from qwen3_vlm.generate.generation import generate_audio, generate_ids
from qwen3_vlm.generate.grammar import Grammar
from qwen3_vlm.generate.sampling import Choice, Sampling
from qwen3_vlm.generate.streaming import SoundPieces, stream_audio, stream_ids, unsettled_frames
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.tokenization.audio_codecs import open_audio_codec
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from qwen3_vlm.tokenization.uti_config import AudioConfig
from tests.generate.tiny_speaker import tiny_speaker
from tests.tokenization.plain_codecs import Steps, plain_uti
from tests.tokenization.tiny_models import save_tiny

HOT = Sampling(text=Choice(1.5), image=Choice(1.5), audio=Choice(1.5))
STEP_16_BIT = 2.0**-15


@pytest.fixture(scope="module")
def speaker(tiny_llm_dir: Path) -> tuple[TokenLM, UnifiedTokenizer]:
    return tiny_speaker(tiny_llm_dir)


def threads() -> int:
    return threading.active_count()


@pytest.mark.parametrize("task", ["t2i", "t2a", "copy_image"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_ids_come_one_by_one_and_are_the_same(
    speaker: tuple[TokenLM, UnifiedTokenizer], task: str, guidance: float
) -> None:
    model, uti = speaker
    sampling = Sampling(image=Choice(1.5), audio=Choice(1.5), guidance=guidance)
    grammar = Grammar(uti.token_space, max_frames=7)
    source = {"text": np.array([4, 5]), "image": uti.token_space.range_of("image").first + np.arange(16)}
    ((segment,),) = generate_ids(model, [(task, source)], grammar=grammar, sampling=sampling, seed=6)
    found = list(stream_ids(model, (task, source), grammar=grammar, sampling=sampling, seed=6))
    assert found[:-1] == segment.ids.tolist()
    assert found[-1] in grammar.stop_ids


def test_who_stops_reading_stops_the_model(
    speaker: tuple[TokenLM, UnifiedTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, uti = speaker
    calls: list[int] = []
    forward = TokenLM.forward

    @functools.wraps(forward)
    def slow(self: TokenLM, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        time.sleep(0.01)
        return forward(self, *arguments, **options)

    before = threads()
    grammar = Grammar(uti.token_space, min_frames=200, max_frames=240)
    stream = stream_ids(model, ("t2a", {"text": np.array([4])}), grammar=grammar)
    monkeypatch.setattr(TokenLM, "forward", slow)
    assert [next(stream) for _ in range(3)]
    assert threads() == before + 1
    stream.close()
    assert threads() == before
    assert len(calls) < 100


def test_an_error_in_the_model_reaches_who_reads(tiny_llm_dir: Path) -> None:
    model, _ = tiny_speaker(tiny_llm_dir)
    with torch.no_grad():
        model.row_parameters()["embeddings"].fill_(torch.nan)
    before = threads()
    with pytest.raises(ModelError, match="no numbers"):
        list(stream_ids(model, ("t2i", {"text": np.array([4])})))
    with pytest.raises(TokenError, match="no task"):
        list(stream_ids(model, ("x2y", {"text": np.array([4])}), grammar=Grammar(model.token_space)))
    assert threads() == before


def test_sound_of_a_codec_without_context_is_bit_equal(speaker: tuple[TokenLM, UnifiedTokenizer]) -> None:
    model, uti = speaker
    options: dict[str, Any] = {"grammar": Grammar(uti.token_space, min_frames=50, max_frames=70), "sampling": HOT}
    whole, _ = generate_audio(model, uti, "a red heart", **options)
    pieces = list(stream_audio(model, uti, {"text": "a red heart"}, piece_seconds=0.005, **options))  # 10 frames
    assert [piece.shape for piece in pieces[:5]] == [(1, 40)] * 5
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)


# Type → frames that a later one can change. Mimi is causal. EnCodec too, but its sounds begin with a reflection of what
# follows. DAC's convolutions look as far ahead as back.
CODECS = {"encodec": range(4, 9), "mimi": range(1), "dac": range(15, 25)}


@pytest.fixture(scope="module", params=CODECS)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, UnifiedTokenizer]:
    """A tiny model of a codec class with context, in clips of two seconds."""
    kind: str = request.param
    source = str(save_tiny(tmp_path_factory.mktemp(kind), kind))
    config = AudioConfig(type=kind, source=source, clip_seconds=2.0)
    uti = plain_uti()
    return kind, UnifiedTokenizer(
        type(uti.config)(text=uti.config.text, audio=config), uti.text_tokenizer, None, open_audio_codec(config)
    )


@pytest.mark.parametrize("frames", [1, 37, 230])  # within a piece, within a clip, beyond two clips
@pytest.mark.parametrize("piece_seconds", [0.01, 0.3])
def test_pieces_of_codecs_with_context(real: tuple[str, UnifiedTokenizer], frames: int, piece_seconds: float) -> None:
    _, uti = real
    rng = np.random.default_rng(frames)
    assert uti.audio_codec is not None
    codes = np.stack([rng.integers(0, size, frames) for size in uti.audio_codec.codebook_sizes])
    ids = uti.token_space.audio_to_global(codes)
    whole, _ = uti.decode_audio(ids)
    maker = SoundPieces(uti, piece_seconds)
    pieces = [piece for value in ids.tolist() if (piece := maker.push(value)) is not None]
    if (last := maker.finish()) is not None:
        pieces.append(last)
    assert maker.finish() is None
    sound = np.concatenate(pieces, axis=1)
    assert sound.shape == whole.shape
    assert np.abs(sound - whole).max() < STEP_16_BIT


def test_how_much_of_a_sound_can_still_change(real: tuple[str, UnifiedTokenizer]) -> None:
    kind, uti = real
    assert unsettled_frames(uti) in CODECS[kind]


def test_the_first_piece_comes_long_before_the_end(real: tuple[str, UnifiedTokenizer]) -> None:
    _, uti = real
    assert uti.audio_codec is not None
    count = len(uti.audio_codec.codebook_sizes)
    ids = uti.token_space.audio_to_global(np.zeros((count, 90), dtype=np.int64)).tolist()
    maker = SoundPieces(uti, 0.02)
    first = next(number for number, value in enumerate(ids) if maker.push(value) is not None)
    assert first + 1 == count * (maker.piece_frames + unsettled_frames(uti))


class Backwards(Steps):
    """Every sample depends on all frames of the clip: nothing is settled before its end."""

    def decode(self, codes: Any) -> Any:
        sound = super().decode(codes)
        return sound - sound.mean(axis=2, keepdims=True)


def test_a_codec_that_needs_the_whole_clip_is_waited_for() -> None:
    uti = plain_uti(audio=Backwards())
    ids = uti.token_space.audio_to_global(np.random.default_rng(0).integers(0, 16, (2, 450)))
    maker = SoundPieces(uti, 0.001)
    assert unsettled_frames(uti) == maker.clip_frames == 400
    pieces = [piece for value in ids.tolist() if (piece := maker.push(value)) is not None]
    assert [piece.shape for piece in pieces] == [(1, 1600)]
    last = maker.finish()
    assert last is not None
    np.testing.assert_array_equal(np.concatenate([*pieces, last], axis=1), uti.decode_audio(ids)[0])


def test_what_is_refused(speaker: tuple[TokenLM, UnifiedTokenizer]) -> None:
    model, uti = speaker
    with pytest.raises(ConfigError, match="piece_seconds"):
        SoundPieces(uti, 0.0)
    maker = SoundPieces(uti, 0.0001)
    maker.push(uti.token_space.range_of("audio", 0).first)
    with pytest.raises(TokenError, match="belongs to AUDIO_CB0"):
        maker.push(uti.token_space.range_of("audio", 0).first)
    with pytest.raises(TokenSpaceError, match="another token space"):
        next(stream_audio(model, plain_uti(audio=Finer()), {"text": "x"}))


class Finer(Steps):
    """Another codec, by its weights."""

    weights_sha256 = "f1e4" * 16

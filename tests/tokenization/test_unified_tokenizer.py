"""The three tokenizers behind one token space, on tiny models saved to disk."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DacModel, JanusVQVAE

from qwen3_vlm.errors import ConfigError, ModelError, TokenError, TokenSpaceError
from qwen3_vlm.tokenization.token_space import TokenSpace
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer, _in_fixed_calls
from tests.tiny import save_tiny_llm
from tests.tokenization.tiny_models import SIDE, SIZE, save_tiny

RATE, HOP, CODEBOOKS, CLIP_FRAMES = 800, 8, 3, 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A uti.yaml and what it names."""
    root = tmp_path_factory.mktemp("uti")
    config = {
        "text": {"tokenizer": str(save_tiny_llm(root / "llm")), "name": "tiny"},
        "image": {"type": "janus_vqvae", "source": str(save_tiny(root / "picture", "janus_vqvae")), "fit": "pad"},
        "audio": {"type": "dac", "source": str(save_tiny(root / "sound", "dac")), "clip_seconds": 0.5},
    }
    (root / "uti.yaml").write_text(yaml.safe_dump(config))
    halves = {"rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (root / "picture" / "preprocessor_config.json").write_text(json.dumps(halves))
    return root


@pytest.fixture(scope="module")
def uti(folder: Path) -> UnifiedTokenizer:
    return UnifiedTokenizer.open(folder, download=False)


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """Of all sizes."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*rng.integers(4, 40, 2), 3), dtype=np.uint8) for _ in range(count)]


def sounds(count: int, seed: int = 0) -> list[tuple[np.ndarray, int]]:
    """Of all lengths, some of several clips, some resampled."""
    rng = np.random.default_rng(seed)
    return [
        (rng.uniform(-1, 1, rng.integers(1, 1300)).astype(np.float32), int(rng.choice([RATE, 1000])))
        for _ in range(count)
    ]


def through_json(tree: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(tree, allow_nan=False))


def test_sizes_come_from_the_tokenizers(uti: UnifiedTokenizer) -> None:
    space = uti.token_space
    first = space.text.vocab_size + 64
    assert space.image is not None
    assert (space.image.codebook_size, space.image.resolution, space.image.grid) == (SIZE, (SIDE, SIDE), (4, 4))
    assert space.audio is not None
    assert (space.audio.codebook_sizes, space.audio.samples_per_frame) == ((SIZE,) * CODEBOOKS, HOP)
    assert [span.first for span in space.ranges.values()] == [0, first - 64, *range(first, first + 4 * SIZE, SIZE)]
    assert (space.image.name, space.audio.name) == ("picture", "sound"), "names, not paths"


def test_image_ids_are_the_models_own_plus_the_offset(folder: Path, uti: UnifiedTokenizer) -> None:
    import torch

    pixels = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    model = JanusVQVAE.from_pretrained(folder / "picture").eval()
    with torch.no_grad():
        codes = model.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1).image_tokens
    assert uti.encode_image(pixels).ids.tolist() == (codes.flatten() + uti.token_space.text.vocab_size + 64).tolist()


def test_audio_ids_are_the_models_own_frame_by_frame(folder: Path, uti: UnifiedTokenizer) -> None:
    import torch

    sound = np.random.default_rng(1).uniform(-1, 1, 5 * HOP).astype(np.float32)
    model = DacModel.from_pretrained(folder / "sound").eval()
    with torch.no_grad():
        codes = model.encode(torch.from_numpy(sound)[None, None]).audio_codes[0].tolist()
    first = uti.token_space.text.vocab_size + 64 + SIZE
    expected = [first + SIZE * k + codes[k][frame] for frame in range(5) for k in range(CODEBOOKS)]
    assert uti.encode_audio(sound, RATE).ids.tolist() == expected


@pytest.mark.parametrize("batch_size", [1, 4])
def test_alone_and_in_a_batch_are_the_same(folder: Path, batch_size: int) -> None:
    overrides = [f"image.batch_size={batch_size}", f"audio.batch_size={batch_size}"]
    uti = UnifiedTokenizer.open(folder, overrides, download=False)
    seen, heard = pictures(11), sounds(11)
    for picture, encoded in zip(seen, uti.encode_images(seen), strict=True):
        alone = uti.encode_image(picture)
        assert np.array_equal(alone.ids, encoded.ids)
        assert alone.metadata == encoded.metadata
    for sound, encoded in zip(heard, uti.encode_audios(heard), strict=True):
        alone = uti.encode_audio(*sound)
        assert np.array_equal(alone.ids, encoded.ids)
        assert alone.metadata == encoded.metadata
    texts = ["", "a", "e\u0301 👩\u200d👧"]
    assert uti.encode_texts(texts) == [uti.encode_text(text) for text in texts]


def test_metadata_suffices_to_decode(folder: Path, uti: UnifiedTokenizer) -> None:
    other = UnifiedTokenizer.open(folder, download=False)
    for picture in pictures(5):
        encoded = uti.encode_image(picture)
        decoded = other.decode_image(encoded.ids.tolist(), through_json(encoded.metadata))
        height, width = picture.shape[:2]
        scale = SIDE / max(height, width)
        assert decoded.size == (max(1, round(width * scale)), max(1, round(height * scale))), "borders are cut off"
        assert other.decode_image(encoded.ids, encoded.metadata, borders=True).size == (SIDE, SIDE)
    for waveform, rate in sounds(8):
        encoded = uti.encode_audio(waveform, rate)
        decoded, decoded_rate = other.decode_audio(encoded.ids.tolist(), through_json(encoded.metadata))
        assert decoded_rate == RATE
        assert abs(decoded.shape[1] - len(waveform) * RATE / rate) <= 1
        assert len(encoded.ids) == -(-decoded.shape[1] // HOP) * CODEBOOKS
        assert sum(encoded.metadata["clip_frames"]) == len(encoded.ids) // CODEBOOKS
        assert max(encoded.metadata["clip_frames"]) <= CLIP_FRAMES


def test_generated_ids_decode_without_metadata(uti: UnifiedTokenizer) -> None:
    space = uti.token_space
    rng = np.random.default_rng(0)
    picture = uti.decode_image(space.image_to_global(rng.integers(0, SIZE, (4, 4))))
    assert picture.size == (SIDE, SIDE)
    sound, _ = uti.decode_audio(space.audio_to_global(rng.integers(0, SIZE, (CODEBOOKS, 120))))
    assert sound.shape == (1, 120 * HOP)
    assert uti.decode_audio([])[0].shape == (1, 0)


def test_what_does_not_decode_is_refused(uti: UnifiedTokenizer) -> None:
    picture, sound = uti.encode_image(pictures(1)[0]), uti.encode_audio(*sounds(1)[0])
    cases: list[tuple[Any, Sequence[int], dict[str, Any] | None, str]] = [
        (uti.decode_image, picture.ids[:-1].tolist(), None, "wrong_grid"),
        (uti.decode_image, [*picture.ids[:-1].tolist(), 3], None, "out_of_range"),
        (uti.decode_image, picture.ids.tolist(), sound.metadata, "bad_metadata"),
        (uti.decode_image, picture.ids.tolist(), {**picture.metadata, "content_box": [0, 0, 99, 1]}, "bad_metadata"),
        (uti.decode_image, picture.ids.tolist(), {**picture.metadata, "content_box": "all"}, "bad_metadata"),
        (uti.decode_audio, sound.ids[:-1].tolist(), None, "short_frame"),
        (uti.decode_audio, sound.ids[:-CODEBOOKS].tolist(), sound.metadata, "short_frame"),
        (uti.decode_audio, sound.ids[::-1].tolist(), None, "out_of_range"),
        (uti.decode_audio, sound.ids.tolist(), {**sound.metadata, "samples": 10**9}, "bad_metadata"),
        (uti.decode_audio, sound.ids.tolist(), {**sound.metadata, "clip_frames": [True]}, "bad_metadata"),
        (uti.decode_audio, sound.ids.tolist(), {**sound.metadata, "token_space_sha256": "0"}, "other_token_space"),
        (uti.decode_text, [uti.token_space.text.vocab_size], None, "out_of_range"),
    ]
    for decode, ids, metadata, reason in cases:
        with pytest.raises(TokenError) as caught:
            decode(ids) if metadata is None else decode(ids, metadata)
        assert caught.value.reason == reason, caught.value


def test_a_modality_that_is_left_out_has_no_ids(folder: Path) -> None:
    uti = UnifiedTokenizer.open(folder, ["image=null", "audio=null"], download=False)
    assert list(uti.token_space.ranges) == ["TEXT", "SPECIAL"]
    with pytest.raises(TokenError, match="no images"):
        uti.encode_image(pictures(1)[0])
    with pytest.raises(TokenError, match="no audio"):
        uti.decode_audio([])


def test_a_saved_space_must_be_the_tokenizers_own(folder: Path, uti: UnifiedTokenizer, tmp_path: Path) -> None:
    uti.save(tmp_path)
    again = UnifiedTokenizer.open(tmp_path, download=False)
    assert again.sha256 == uti.sha256
    assert again.config == uti.config
    assert (tmp_path / "token_space.sha256").read_text().strip() == TokenSpace.load(tmp_path).sha256
    with pytest.raises(TokenSpaceError, match=r"(?s)ranges.AUDIO_CB2.*audio_codec.codebook_sizes.*vocab_size_total"):
        UnifiedTokenizer.open(tmp_path, ["audio.num_codebooks=2"], download=False)
    other = save_tiny(tmp_path / "other", "dac", codebook_dim=5)
    with pytest.raises(TokenSpaceError, match=r"audio_codec.name: sound ≠ other\n  audio_codec.weights_sha256"):
        UnifiedTokenizer.open(tmp_path, [f"audio.source={other}"], download=False)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("image.codebook_size=7", ConfigError, "image.codebook_size"),
        ("audio.sampling_rate_hz=16000", ConfigError, "audio.sampling_rate_hz"),
        ("audio.num_codebooks=4", ConfigError, "audio.num_codebooks is 4, but .* has 3"),
        ("text.vocab_size=5", ModelError, "text.vocab_size is 5"),
        ("special.count=9", TokenSpaceError, "ranges.SPECIAL has 9 ids"),
        ("special.extra=[<|img_end|>]", TokenSpaceError, "names <.img_end.> more than once"),
        ("audio.clip_seconds=0.001", TokenSpaceError, "clip_seconds is 0.001, shorter than one frame"),
        ("image.batch_size=0", ConfigError, "image.batch_size is 0"),
        ("image.sorce=x", ConfigError, "unknown key image.sorce. Did you mean source"),
    ],
)
def test_values_that_contradict_the_tokenizers(folder: Path, override: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        UnifiedTokenizer.open(folder, [override], download=False)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(-99, 99)), max_size=20), st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_calls_have_one_shape_and_results_keep_their_order(items: list[tuple[int, int]], batch_size: int) -> None:
    shapes = set()

    def negate(batch: np.ndarray) -> np.ndarray:
        shapes.add(batch.shape[0])
        return -batch

    arrays = [np.full(length, value) for length, value in items]
    results = _in_fixed_calls(arrays, batch_size, negate)
    assert [result.tolist() for result in results] == [(-array).tolist() for array in arrays]
    assert shapes <= {batch_size}

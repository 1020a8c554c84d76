"""The adapters against transformers called directly, and against arithmetic by hand."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qwen3_vlm.errors import ConfigError, ModelError, TokenError
from qwen3_vlm.tokenization.audio_codecs import AudioCodec, open_audio_codec
from qwen3_vlm.tokenization.uti_config import AudioConfig
from tests.tokenization.tiny_models import AUDIO_TYPES, SIZE, rewrite, save_tiny, tiny_model, weights_of

HOPS = {"encodec": 8, "dac": 8, "mimi": 16}
BOOKS = {"encodec": 4, "dac": 3, "mimi": 4}
FRAMES = 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_tiny(tmp_path_factory.mktemp(kind), kind) for kind in AUDIO_TYPES}


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder of its own for a test that changes it."""
    return lambda kind: Path(shutil.copytree(folders[kind], tmp_path / kind))


def open_it(folder: Path, kind: str, **values: Any) -> Any:
    return open_audio_codec(AudioConfig(type=kind, source=str(folder), device="cpu", **values), download=False)


def sounds(samples: int, channels: int = 1, clips: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(-1, 1, (clips, channels, samples)).astype(np.float32)


@torch.no_grad()
def peers_ids(kind: str, model: Any, waveforms: NDArray[np.float32]) -> NDArray[np.int64]:
    values = torch.from_numpy(waveforms)
    if kind == "encodec":
        return model.encode(values, torch.ones_like(values).bool(), bandwidth=2.0).audio_codes[0].numpy()
    return model.encode(values).audio_codes.numpy()


@torch.no_grad()
def peers_sound(kind: str, model: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    codes = torch.from_numpy(ids)
    if kind == "encodec":
        return model.decode(codes[None], [None]).audio_values.numpy()
    if kind == "dac":
        return model.decode(audio_codes=codes).audio_values[:, None].numpy()
    return model.decode(codes).audio_values.numpy()


@pytest.mark.parametrize("kind", AUDIO_TYPES)
def test_ids_and_sounds_are_the_peers(kind: str, folders: dict[str, Path]) -> None:
    codec, model = open_it(folders[kind], kind), tiny_model(kind)
    assert isinstance(codec, AudioCodec)
    assert codec.codebook_sizes == (SIZE,) * BOOKS[kind]
    assert (codec.sampling_rate_hz, codec.channels, codec.samples_per_frame) == (800, 1, HOPS[kind])
    waveforms = sounds(FRAMES * HOPS[kind])
    ids = codec.encode(waveforms)
    assert (ids.shape, ids.dtype) == ((3, BOOKS[kind], FRAMES), np.int64)
    np.testing.assert_array_equal(ids, peers_ids(kind, model, waveforms))
    assert min(len(np.unique(ids[:, book])) for book in range(BOOKS[kind])) > SIZE // 4
    decoded = codec.decode(ids)
    assert (decoded.shape, decoded.dtype) == (waveforms.shape, np.float32)
    np.testing.assert_allclose(decoded, peers_sound(kind, model, ids), atol=1e-6)
    assert decoded.std() > 0.01


@pytest.mark.parametrize("kind", AUDIO_TYPES)
def test_fewer_codebooks_are_the_first_of_all(kind: str, folders: dict[str, Path]) -> None:
    """EnCodec has bandwidths for 1, 2 and 4 codebooks, none for 3."""
    waveforms, model = sounds(FRAMES * HOPS[kind]), tiny_model(kind)
    every = open_it(folders[kind], kind).encode(waveforms)
    for count in range(1, BOOKS[kind]):
        codec = open_it(folders[kind], kind, num_codebooks=count)
        assert codec.codebook_sizes == (SIZE,) * count
        ids = codec.encode(waveforms)
        np.testing.assert_array_equal(ids, every[:, :count])
        np.testing.assert_allclose(codec.decode(ids), peers_sound(kind, model, ids), atol=1e-6)


@torch.no_grad()
def test_residual_ids_by_hand(folders: dict[str, Path]) -> None:
    """DAC in float64: the row of least angle, whose projection is taken off before the next codebook."""
    model, waveforms = tiny_model("dac").double(), sounds(FRAMES * 8)
    residual = model.encoder(torch.from_numpy(waveforms).double())
    wanted = []
    for layer in model.quantizer.quantizers:
        rows = layer.codebook.weight.numpy()
        vectors = layer.in_proj(residual).transpose(1, 2).numpy()  # (B, F, D)
        cosines = np.einsum("bfd,nd->bfn", vectors, rows / np.linalg.norm(rows, axis=1, keepdims=True))
        cosines /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        best = np.sort(cosines, -1)
        assert (best[..., -1] - best[..., -2] > 1e-5).all()  # else fp32 may decide otherwise
        wanted.append(cosines.argmax(-1))
        picked = rows[wanted[-1]] @ layer.out_proj.weight.numpy()[..., 0].T + layer.out_proj.bias.numpy()
        residual = residual - torch.from_numpy(picked).transpose(1, 2)
    np.testing.assert_array_equal(open_it(folders["dac"], "dac").encode(waveforms), np.stack(wanted, 1))


@pytest.mark.parametrize("kind", AUDIO_TYPES)
@pytest.mark.parametrize("frames", [1, 2, 3, 101])
def test_any_number_of_frames(kind: str, frames: int, folders: dict[str, Path]) -> None:
    codec = open_it(folders[kind], kind)
    waveforms = sounds(frames * HOPS[kind])
    ids = codec.encode(waveforms)
    assert ids.shape == (3, BOOKS[kind], frames)
    assert codec.decode(ids).shape == waveforms.shape


def test_mimi_gives_a_clip_the_same_ids_alone_and_in_a_batch(folders: dict[str, Path]) -> None:
    """Where transformers#43377 found a difference, clips of a batch had been padded to one length."""
    codec, waveforms = open_it(folders["mimi"], "mimi"), sounds(FRAMES * 16)
    alone = np.concatenate([codec.encode(waveforms[i : i + 1]) for i in range(len(waveforms))])
    np.testing.assert_array_equal(codec.encode(waveforms), alone)


def test_stereo(tmp_path: Path) -> None:
    codec = open_it(save_tiny(tmp_path, "encodec", audio_channels=2), "encodec", channels=2)
    waveforms = sounds(FRAMES * 8, channels=2)
    ids = codec.encode(waveforms)
    np.testing.assert_array_equal(ids, peers_ids("encodec", tiny_model("encodec", audio_channels=2), waveforms))
    assert codec.decode(ids).shape == (3, 2, FRAMES * 8)
    assert (ids != codec.encode(waveforms[:, ::-1].copy())).any()


def test_odd_strides_of_dac_still_decode_to_whole_frames(tmp_path: Path) -> None:
    ratios = {"downsampling_ratios": [2, 5]}
    codec = open_it(save_tiny(tmp_path, "dac", **ratios), "dac")
    assert codec.samples_per_frame == 10
    waveforms = sounds(FRAMES * 10)
    ids = codec.encode(waveforms)
    wanted = peers_sound("dac", tiny_model("dac", **ratios), ids)
    decoded = codec.decode(ids)
    assert decoded.shape == waveforms.shape
    lacking = waveforms.shape[-1] - wanted.shape[-1]
    assert 0 < lacking < 10
    np.testing.assert_allclose(decoded[..., :-lacking], wanted, atol=1e-6)
    assert not decoded[..., -lacking:].any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalize": True}, "it is not among the ids, so they alone could not be decoded"),
        ({"chunk_length_s": 1.0, "overlap": 0.01}, r"overlapping chunks of 1\.0 s"),
    ],
)
def test_an_encodec_that_ids_alone_do_not_describe_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path, "encodec", **changes)
    with pytest.raises(ModelError, match=said):
        open_it(folder, "encodec")


def test_a_mimi_without_its_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import MimiModel

    config = tiny_model("mimi").config
    config.decoder_config = None
    MimiModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder or its decoder dropped"):
        open_it(tmp_path, "mimi")


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("encodec", {"sampling_rate_hz": 24000}, r"audio\.sampling_rate_hz is 24000 in the configuration, .* has 800"),
        ("encodec", {"channels": 2}, r"audio\.channels is 2 in the configuration, .* has 1"),
        ("dac", {"codebook_size": 1024}, r"audio\.codebook_size is 1024 in the configuration, .* has 32"),
        ("dac", {"num_codebooks": 9}, r"audio\.num_codebooks is 9, but .* has 3 codebooks"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    kind: str, values: dict[str, Any], said: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=said):
        open_it(folders[kind], kind, **values)


def test_mimi_needs_its_semantic_codebooks(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "mimi", num_semantic_quantizers=2)
    with pytest.raises(ConfigError, match="needs at least its 2 semantic codebooks"):
        open_it(folder, "mimi", num_codebooks=1)


@pytest.mark.parametrize("kind", AUDIO_TYPES)
def test_weights_must_be_exactly_the_classs(kind: str, copied: Callable[[str], Path]) -> None:
    """Mimi's class by itself keeps silent about surplus tensors of its halves."""
    folder = copied(kind)
    tensors = weights_of(folder)[1]
    rewrite(folder, {**tensors, "encoder.more.weight": torch.zeros(3)})
    with pytest.raises(ModelError, match=r"no place for, such as encoder\..*more\.weight"):
        open_it(folder, kind)
    name = next(name for name in tensors if name.endswith("bias"))
    rewrite(folder, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ModelError, match=r"lacks 1 tensors of its class, such as \S+bias"):
        open_it(folder, kind)
    rewrite(folder, {**tensors, name: torch.zeros(1, 2)})
    with pytest.raises(ModelError, match=r"of another shape than its config says, such as \S+bias"):
        open_it(folder, kind)
    with pytest.raises(ModelError, match="does not hold a"):
        open_it(folder, "mimi" if kind != "mimi" else "dac")


def test_old_names_of_weight_norm_are_read(copied: Callable[[str], Path]) -> None:
    """facebook/encodec_24khz has `weight_g` and `weight_v`."""
    folder = copied("encodec")
    codec, waveforms = open_it(folder, "encodec"), sounds(FRAMES * 8)
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    tensors = {}
    for name, tensor in weights_of(folder)[1].items():
        stem, _, tail = name.partition("parametrizations")
        tensors[stem + old["parametrizations" + tail] if tail else name] = tensor
    rewrite(folder, tensors)
    np.testing.assert_array_equal(open_it(folder, "encodec").encode(waveforms), codec.encode(waveforms))


@pytest.mark.parametrize(
    ("codes", "reason"),
    [
        (np.full((1, 3, 2), SIZE), "out_of_range"),
        (np.full((1, 3, 2), -1), "out_of_range"),
        (np.zeros((1, 2, 2), np.int64), "wrong_shape"),
        (np.zeros((1, 3, 0), np.int64), "wrong_shape"),
        (np.zeros((3, 2), np.int64), "wrong_shape"),
        (np.zeros((1, 3, 2), bool), "wrong_dtype"),
    ],
)
def test_ids_that_cannot_be_decoded(folders: dict[str, Path], codes: Any, reason: str) -> None:
    with pytest.raises(TokenError) as caught:
        open_it(folders["dac"], "dac").decode(codes)
    assert caught.value.reason == reason


def test_sounds_that_cannot_be_encoded(folders: dict[str, Path]) -> None:
    codec, good = open_it(folders["dac"], "dac"), sounds(64)
    holed = good.copy()
    holed[0, 0, 5] = np.nan
    for wrong, reason in (
        (good.astype(np.float64), "wrong_dtype"),
        (good[0], "wrong_shape"),
        (good.repeat(2, 1), "wrong_shape"),
        (good[..., :63], "short_frame"),
        (good[..., :0], "short_frame"),
        (holed, "not_finite"),
    ):
        with pytest.raises(TokenError) as caught:
            codec.encode(wrong)
        assert caught.value.reason == reason


def test_a_pickled_codec_is_opened_again_with_its_settings(folders: dict[str, Path]) -> None:
    codec = open_it(folders["encodec"], "encodec", num_codebooks=3)
    again = pickle.loads(pickle.dumps(codec))
    assert again.codebook_sizes == (SIZE,) * 3
    np.testing.assert_array_equal(again.encode(sounds(64)), codec.encode(sounds(64)))


def test_the_digest_knows_settings_that_no_shape_shows(folders: dict[str, Path], tmp_path: Path) -> None:
    kind = "mimi"
    digest = open_it(folders[kind], kind).weights_sha256
    assert open_it(folders[kind], kind, num_codebooks=2).weights_sha256 == digest
    assert open_it(save_tiny(tmp_path, kind, sliding_window=7), kind).weights_sha256 != digest

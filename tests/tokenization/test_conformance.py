"""The suite passes what conforms, ours and a third party's, and each fault fails its own check alone."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_vlm.errors import ConfigError, ModelError
from qwen3_vlm.tokenization.audio_codecs import open_audio_codec
from qwen3_vlm.tokenization.conformance import run_conformance, run_conformance_for
from qwen3_vlm.tokenization.image_tokenizers import image_tokenizer_types, open_image_tokenizer
from qwen3_vlm.tokenization.uti_config import AudioConfig, ImageConfig, UTIConfig
from tests.tokenization import example_adapter
from tests.tokenization.example_adapter import SIDE, STEPS, BlockColours, MeanSteps, OtherElsewhere
from tests.tokenization.tiny_models import AUDIO_TYPES, IMAGE_TYPES, save_tiny

ENTRY_POINTS = """
[qwen3_vlm.image_tokenizers]
block_colours = blocky:open_image
broken_factory = blocky:fail
no_module = blocky.nowhere:open_image
mean_steps = blocky:open_audio

[qwen3_vlm.audio_codecs]
mean_steps = blocky:open_audio
"""


def install(folder: Path, name: str, entry_points: str) -> None:
    """What pip leaves of a distribution that has entry points."""
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example adapter installed as the distribution `blocky`."""
    shutil.copy(example_adapter.__file__, tmp_path / "blocky.py")
    install(tmp_path, "blocky", ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def image_config(kind: str, **values: Any) -> ImageConfig:
    return ImageConfig(**{"type": kind, "source": "nowhere", **values})


def test_a_third_partys_adapters_conform_in_a_new_process_too(third_party: Path) -> None:
    config = UTIConfig(image=image_config("block_colours"), audio=AudioConfig(type="mean_steps", source="nowhere"))
    reports = run_conformance_for(config)
    for report in reports:
        assert report.passed, report.to_text()
        assert {row.name for row in report.rows} >= {"reopened", "other_process", "odd_contents"}
        assert json.loads(json.dumps(report.to_dict()))["passed"] is True
        assert "it conforms" in report.to_text()
        assert report.figures["ids equal alone and in a batch"] == 1.0
    assert [report.kind for report in reports] == ["image", "audio"]
    assert "refuses_not_finite" in reports[1].to_text()


def test_types_of_third_parties_are_listed_and_opened(third_party: Path) -> None:
    assert image_tokenizer_types()[:3] == ["diffusers_vq", "emu3_vqvae", "janus_vqvae"]
    assert "block_colours" in image_tokenizer_types()
    assert open_image_tokenizer(image_config("block_colours")).grid == (8, 8)
    with pytest.raises(ConfigError, match=r"'nothing' is not known.*janus_vqvae, block_colours"):
        open_image_tokenizer(image_config("nothing"))
    with pytest.raises(ConfigError, match=r"'blocky' is not known; there are: dac, encodec, mimi, mean_steps"):
        open_audio_codec(AudioConfig(type="blocky", source="nowhere"))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("broken_factory", r"blocky 1\.2 can't be opened \(RuntimeError: the licence server does not answer\)"),
        ("no_module", r"blocky 1\.2 can't be opened \(ModuleNotFoundError"),
        ("mean_steps", r"'mean_steps' \(MeanSteps\) has no codebook_size, resolution, grid"),
    ],
)
def test_a_failing_third_party_is_named(third_party: Path, kind: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        open_image_tokenizer(image_config(kind))


def test_two_distributions_of_one_type_are_refused(third_party: Path) -> None:
    install(third_party, "chunky", "[qwen3_vlm.image_tokenizers]\nblock_colours = chunky:open_it\n")
    with pytest.raises(ConfigError, match=r"offered by blocky 1\.2 and chunky 1\.2"):
        open_image_tokenizer(image_config("block_colours"))


def test_a_third_partys_sizes_must_agree_with_the_config_too(third_party: Path) -> None:
    with pytest.raises(ConfigError, match=r"image\.codebook_size is 8192 .* has 512"):
        open_image_tokenizer(image_config("block_colours", codebook_size=8192))
    with pytest.raises(ConfigError, match=r"image\.resolution is 64 .* has 32"):
        open_image_tokenizer(image_config("block_colours", resolution=64))
    with pytest.raises(ConfigError, match=r"audio\.num_codebooks is 4 .* has 2"):
        open_audio_codec(AudioConfig(type="mean_steps", source="nowhere", num_codebooks=4))


@pytest.mark.parametrize("kind", IMAGE_TYPES)
def test_our_image_tokenizers_conform(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", kind)
    tokenizer = open_image_tokenizer(ImageConfig(type=kind, source=str(folder), resolution=16, device="cpu"))
    report = run_conformance(tokenizer, "image", batch_size=2, new_process=False)
    assert report.passed, report.to_text()


@pytest.mark.parametrize("kind", AUDIO_TYPES)
def test_our_audio_codecs_conform(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", kind)
    codec = open_audio_codec(AudioConfig(type=kind, source=str(folder), device="cpu"))
    report = run_conformance(codec, "audio", batch_size=2, new_process=kind == "dac")
    assert report.passed, report.to_text()


class ListGrid(BlockColours):
    grid = [8, 8]  # type: ignore[assignment]  # noqa: RUF012


class ShortDigest(BlockColours):
    weights_sha256 = "b10c"


class NumpySize(BlockColours):
    codebook_size = np.int64(512)  # type: ignore[assignment]


class Int32Ids(BlockColours):
    def encode(self, pixels: Any) -> Any:
        return super().encode(pixels).astype(np.int32)


class FlatIds(BlockColours):
    def encode(self, pixels: Any) -> Any:
        return super().encode(pixels).reshape(len(pixels), -1)


class IdTooHigh(BlockColours):
    def encode(self, pixels: Any) -> Any:
        codes = super().encode(pixels)
        codes[:, 0, 0] = self.codebook_size
        return codes


class Counting(BlockColours):
    calls = 0

    def encode(self, pixels: Any) -> Any:
        self.calls += 1
        return (super().encode(pixels) + self.calls) % self.codebook_size


class LooksAtNeighbours(BlockColours):
    def encode(self, pixels: Any) -> Any:
        return (super().encode(pixels) + int(pixels.sum(dtype=np.int64))) % self.codebook_size


class LooksAtPlace(BlockColours):
    def encode(self, pixels: Any) -> Any:
        return (super().encode(pixels) + np.arange(len(pixels))[:, None, None]) % self.codebook_size


class TrustsMemory(BlockColours):
    def encode(self, pixels: Any) -> Any:
        return super().encode(pixels.ravel(order="K").reshape(pixels.shape))


class WritesToPixels(BlockColours):
    def encode(self, pixels: Any) -> Any:
        codes = super().encode(pixels)
        pixels //= 2
        return codes


class WritesToCodes(BlockColours):
    def decode(self, codes: Any) -> Any:
        pixels = super().decode(codes)
        codes[...] = 0
        return pixels


class DecodesFloats(BlockColours):
    def decode(self, codes: Any) -> Any:
        return (super().decode(codes) / 255).astype(np.float32)


class DecodesAtRandom(BlockColours):
    def decode(self, codes: Any) -> Any:
        noise = np.random.default_rng().integers(0, 9, (len(codes), SIDE, SIDE, 3), np.uint8)
        return super().decode(codes) + noise


class DecodesByPlace(BlockColours):
    def decode(self, codes: Any) -> Any:
        return super().decode(codes) // 2 + 9 * np.arange(len(codes), dtype=np.uint8)[:, None, None, None]


class ForgetsAnId(BlockColours):
    codebook_size = 513

    def decode(self, codes: Any) -> Any:
        if codes.max() == 512:
            raise IndexError("512")
        return super().decode(codes)


class DividesByLight(BlockColours):
    def encode(self, pixels: Any) -> Any:
        return super().encode(pixels) + 0 // int(pixels.max())


class SharesItsResult(BlockColours):
    def __init__(self) -> None:
        self.results: dict[int, Any] = {}

    def encode(self, pixels: Any) -> Any:
        result = self.results.setdefault(len(pixels), np.zeros((len(pixels), 8, 8), np.int64))
        result[...] = super().encode(pixels)
        return result


class CutsPictures(BlockColours):
    def encode(self, pixels: Any) -> Any:
        if pixels.ndim == 4 and pixels.shape[1] > SIDE:
            pixels = pixels[:, :SIDE]
        return super().encode(pixels)


class CastsPixels(BlockColours):
    def encode(self, pixels: Any) -> Any:
        return super().encode(pixels.astype(np.uint8))


class Clamps(BlockColours):
    def decode(self, codes: Any) -> Any:
        return super().decode(np.minimum(codes, self.codebook_size - 1))


class CountsFromTheEnd(BlockColours):
    def decode(self, codes: Any) -> Any:
        return super().decode(np.where(codes == -1, self.codebook_size - 1, codes))


class CantBeSent(BlockColours):
    def __init__(self) -> None:
        self.hook = lambda: None


class NewEachTime(BlockColours):
    def __init__(self) -> None:
        self.shift = int.from_bytes(os.urandom(4), "little") % 500 + 1

    def __reduce__(self) -> Any:
        return NewEachTime, ()

    def encode(self, pixels: Any) -> Any:
        return (super().encode(pixels) + self.shift) % self.codebook_size


IMAGE_FAULTS = [
    (ListGrid, "attributes"),
    (ShortDigest, "attributes"),
    (NumpySize, "attributes"),
    (Int32Ids, "encode_result"),
    (FlatIds, "encode_result"),
    (IdTooHigh, "ids_in_range"),
    (Counting, "encode_repeats"),
    (LooksAtNeighbours, "encode_neighbours"),
    (LooksAtPlace, "encode_neighbours"),
    (TrustsMemory, "encode_layouts"),
    (WritesToPixels, "encode_keeps_input"),
    (WritesToCodes, "decode_keeps_input"),
    (DecodesFloats, "decode_result"),
    (DecodesAtRandom, "decode_repeats"),
    (DecodesByPlace, "decode_neighbours"),
    (ForgetsAnId, "every_id"),
    (DividesByLight, "odd_contents"),
    (SharesItsResult, "results_owned"),
    (CutsPictures, "refuses_shapes"),
    (CastsPixels, "refuses_dtypes"),
    (Clamps, "refuses_ids_above"),
    (CountsFromTheEnd, "refuses_negative_ids"),
    (CantBeSent, "reopened"),
    (NewEachTime, "reopened"),
]


@pytest.mark.parametrize(("adapter", "check"), IMAGE_FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_each_fault_of_an_image_tokenizer_fails_its_check_alone(adapter: type[BlockColours], check: str) -> None:
    report = run_conformance(adapter(), "image", new_process=False)
    assert report.failures == [check], report.to_text()
    assert not report.passed


def test_ids_that_differ_in_a_new_process_are_found() -> None:
    report = run_conformance(OtherElsewhere(), "image")  # its class lies where importing it is cheap
    assert report.failures == ["other_process"], report.to_text()


class DropsTheRest(MeanSteps):
    def encode(self, waveforms: Any) -> Any:
        return super().encode(waveforms[..., : waveforms.shape[-1] // 16 * 16])


class HearsNaNAsSilence(MeanSteps):
    def encode(self, waveforms: Any) -> Any:
        return super().encode(np.nan_to_num(waveforms, posinf=1))


class TakesShortClips(MeanSteps):
    def encode(self, waveforms: Any) -> Any:
        if waveforms.shape[-1] > 8000:
            raise MemoryError("too long")
        return super().encode(waveforms)


class AFrameTooMany(MeanSteps):
    def encode(self, waveforms: Any) -> Any:
        return np.pad(super().encode(waveforms), ((0, 0), (0, 0), (0, 1)))


class ASampleTooFew(MeanSteps):
    def decode(self, codes: Any) -> Any:
        return super().decode(codes)[..., :-1]


class DecodesToNaN(MeanSteps):
    def decode(self, codes: Any) -> Any:
        return np.where(codes.max() == STEPS - 1, np.float32(np.nan), super().decode(codes))


class MixesUpCodebooks(MeanSteps):
    codebook_sizes = (STEPS, STEPS // 2)


AUDIO_FAULTS = [
    (DropsTheRest, "refuses_part_of_a_frame"),
    (HearsNaNAsSilence, "refuses_not_finite"),
    (TakesShortClips, "odd_contents"),
    (AFrameTooMany, "encode_result"),
    (ASampleTooFew, "decode_result"),
    (DecodesToNaN, "decode_result"),
    (MixesUpCodebooks, "ids_in_range"),
]


@pytest.mark.parametrize(("adapter", "check"), AUDIO_FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_each_fault_of_an_audio_codec_fails_its_check_alone(adapter: type[MeanSteps], check: str) -> None:
    report = run_conformance(adapter(), "audio", new_process=False)
    assert report.failures == [check], report.to_text()


def test_what_rests_on_a_failed_check_is_not_run() -> None:
    report = run_conformance(ListGrid(), "image", new_process=False)
    assert {row.passed for row in report.rows[1:]} == {None}
    assert "not run" in report.to_text()
    assert report.figures == {}
    with pytest.raises(ValueError, match="2 or more"):
        run_conformance(BlockColours(), "image", batch_size=1)

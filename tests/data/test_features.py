"""The feature cache gives back exactly what the tower gave, survives kills and full disks, refuses strangers."""

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen3_vlm.data import features as module
from qwen3_vlm.data.cache_benchmark import CacheBenchmark, cache_benchmark
from qwen3_vlm.data.captions import ImageRef, open_records
from qwen3_vlm.data.collate import Collator
from qwen3_vlm.data.encode import SampleEncoder
from qwen3_vlm.data.features import FeatureCache, feature_fingerprint
from qwen3_vlm.data.loader import batch_loader
from qwen3_vlm.errors import DataError, ImageError, StorageError
from tests.data.helpers import WordProcessor, caption_records, png, write_json

PIXELS = WordProcessor().pixel_values


class Tower:
    """(I, 3, 1, 1) → (I, 5, 6), another value at every place, and it counts."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.encoded = 0

    def __call__(self, pixel_values: Tensor) -> Tensor:
        self.encoded += len(pixel_values)
        places = torch.linspace(0.1, 3, 30).view(5, 6)
        return (pixel_values.mean(dim=1).view(-1, 1, 1) * places).to(self.dtype)


@pytest.fixture
def refs(tmp_path: Path) -> list[ImageRef]:
    paths = [tmp_path / f"k{number}.png" for number in range(10)]
    for number, path in enumerate(paths):
        path.write_bytes(png((20 * number, 5, 7)))
    return [ImageRef(str(path)) for path in paths]


def build(folder: Path, refs: Sequence[ImageRef], tower: Tower, **options: object) -> FeatureCache:
    cache = FeatureCache(folder, "tower A")
    cache.build(refs, PIXELS, tower, batch_size=4, **options)  # type: ignore[arg-type]
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_come_back_exactly(tmp_path: Path, refs: list[ImageRef], dtype: torch.dtype, num_workers: int) -> None:
    build(tmp_path / "cache", refs, Tower(dtype), num_workers=num_workers)
    cache = FeatureCache(tmp_path / "cache", "tower A")
    expected = Tower(dtype)(torch.tensor([[20.0 * number, 5, 7] for number in (7, 0, 7)]).view(3, 3, 1, 1))
    found = cache.read([refs[7], refs[0], refs[7]])
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert len(cache) == 10
    assert refs[3] in cache


def test_each_picture_is_encoded_once(tmp_path: Path, refs: list[ImageRef]) -> None:
    copy = tmp_path / "copy.png"
    copy.write_bytes(refs[0].read_bytes())
    tower = Tower()
    cache = FeatureCache(tmp_path / "cache", "tower A")
    report = cache.build([*refs, *refs, ImageRef(str(copy))], PIXELS, tower, batch_size=4)
    assert (report.encoded, report.already, report.skipped) == (10, 1, [])
    assert tower.encoded == 10
    again = FeatureCache(tmp_path / "cache", "tower A").build(refs, PIXELS, tower)
    assert (again.encoded, again.already) == (0, 10)
    assert tower.encoded == 10


def test_bad_pictures_are_listed_and_refused_later_with_their_own_reason(tmp_path: Path, refs: list[ImageRef]) -> None:
    bad = ImageRef(str(tmp_path / "bad.png"))
    Path(bad.path).write_bytes(png()[:40])
    gone = ImageRef(str(tmp_path / "gone.png"))
    cache = FeatureCache(tmp_path / "cache", "tower A")
    report = cache.build([bad, *refs[:2], gone], PIXELS, Tower())
    assert [skipped.reason for skipped in report.skipped] == ["unreadable_image", "missing_image"]
    for ref, reason in ((bad, "unreadable_image"), (gone, "missing_image"), (refs[5], "not_cached")):
        with pytest.raises(ImageError) as caught:
            cache.read([ref])
        assert caught.value.reason == reason


def test_a_changed_picture_is_not_taken_for_the_old_one(tmp_path: Path, refs: list[ImageRef]) -> None:
    cache = build(tmp_path / "cache", refs, Tower())
    Path(refs[0].path).write_bytes(png((1, 2, 3)))
    with pytest.raises(ImageError, match="not in the feature cache"):
        cache.read(refs[:1])


def test_another_fingerprint_is_refused(tmp_path: Path, refs: list[ImageRef]) -> None:
    build(tmp_path / "cache", refs, Tower())
    with pytest.raises(DataError, match="another tower"):
        FeatureCache(tmp_path / "cache", "tower B")
    assert feature_fingerprint("a", "bc") != feature_fingerprint("ab", "c")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1, "fingerprint": "tower A"}', '{"format": 99}'])
def test_damaged_descriptions_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(DataError):
        FeatureCache(tmp_path, "tower A")


@pytest.mark.parametrize("cut", [1, 119, 120, 121, 700])
@pytest.mark.parametrize("name", ["features.bin", "keys.bin"])
def test_torn_ends_are_written_anew(tmp_path: Path, refs: list[ImageRef], name: str, cut: int) -> None:
    """Whatever of either file a power cut took, a build goes on from what is complete."""
    build(tmp_path / "cache", refs, Tower())
    whole = {file: (tmp_path / "cache" / file).read_bytes() for file in ("features.bin", "keys.bin")}
    torn = whole[name][: max(0, len(whole[name]) - cut)]
    (tmp_path / "cache" / name).write_bytes(torn)
    complete = min(len(torn) // (120 if name == "features.bin" else 32), 10)
    tower = Tower()
    cache = build(tmp_path / "cache", refs, tower)
    assert tower.encoded == 10 - complete
    assert {file: (tmp_path / "cache" / file).read_bytes() for file in whole} == whole
    assert torch.equal(cache.read(refs), Tower()(PIXELS([_load(ref) for ref in refs])["pixel_values"]))


def test_a_killed_build_goes_on_where_it_stopped(tmp_path: Path, refs: list[ImageRef]) -> None:
    script = textwrap.dedent(f"""
        import os
        from pathlib import Path
        from tests.data.test_features import Tower, build, ImageRef
        class Killed(Tower):
            def __call__(self, pixel_values):
                if self.encoded >= 8:
                    os.kill(os.getpid(), 9)
                return super().__call__(pixel_values)
        refs = [ImageRef(path) for path in {[ref.path for ref in refs]!r}]
        build(Path({str(tmp_path / "cache")!r}), refs, Killed())
    """)
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    tower = Tower()
    assert len(build(tmp_path / "cache", refs, tower)) == 10
    assert tower.encoded == 2


def test_a_full_disk_is_a_sentence_and_loses_nothing(
    tmp_path: Path, refs: list[ImageRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    append = module._append_bytes

    def full(path: Path, data: bytes) -> None:
        if path.exists() and path.stat().st_size >= 480:
            append(path, np.asarray(data).tobytes()[:50])
            raise OSError(28, "No space left on device")
        append(path, data)

    monkeypatch.setattr(module, "_append_bytes", full)
    with pytest.raises(StorageError, match="the disk is full"):
        build(tmp_path / "cache", refs, Tower())
    monkeypatch.undo()
    assert (tmp_path / "cache" / "features.bin").stat().st_size == 480
    tower = Tower()
    assert len(build(tmp_path / "cache", refs, tower)) == 10
    assert tower.encoded == 6


def test_two_builders_at_once_are_refused(tmp_path: Path, refs: list[ImageRef]) -> None:
    folder = tmp_path / "cache"

    def nested(pixel_values: Tensor) -> Tensor:
        build(folder, refs, Tower())
        raise AssertionError

    with pytest.raises(StorageError, match="Another process is building"):
        FeatureCache(folder, "tower A").build(refs, PIXELS, nested)


def test_strange_tower_outputs_are_refused(tmp_path: Path, refs: list[ImageRef]) -> None:
    for number, (tower, message) in enumerate(
        [
            (lambda pixel_values: torch.full((4, 5, 6), float("nan")), "not finite"),
            (lambda pixel_values: torch.zeros(4, 6), "dimensions"),
            (lambda pixel_values: torch.zeros(3, 5, 6), "gave"),
        ]
    ):
        with pytest.raises(DataError, match=message):
            FeatureCache(tmp_path / str(number), "x").build(refs, PIXELS, tower, batch_size=4)
    with pytest.raises(DataError, match="one fixed resolution"):
        FeatureCache(tmp_path / "n", "x").build(refs, lambda images: {**PIXELS(images), "spatial_shapes": 1}, Tower())


def test_collator_reads_features_instead_of_pictures(tmp_path: Path, refs: list[ImageRef]) -> None:
    records = open_records([str(write_json(tmp_path / "a.json", caption_records(10)))])
    cache = build(tmp_path / "cache", refs[:9], Tower())
    processor = WordProcessor()
    collator = Collator(processor, packing=True, max_image_pixels=100, features=cache)
    batches = [((4, 2), (8,)), ((9,),)]
    for workers in (0, 1):
        batch, without = batch_loader(records, SampleEncoder(processor, 100), collator, batches, workers)
        assert "pixel_values" not in batch.inputs
        assert torch.equal(batch.inputs["patch_embeddings"], cache.read([refs[4], refs[2], refs[8]]))
        assert [skipped.reason for skipped in without.skipped] == ["not_cached"]


def test_thousands_of_small_pictures_are_cached_quickly(tmp_path: Path) -> None:
    """20,000 pictures of 64×64 in well under a minute, the tower apart."""
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(1000)]
    for path in paths:
        path.write_bytes(png(tuple(generator.integers(0, 255, 3).tolist()), (64, 64)))
    start = time.process_time()
    report = FeatureCache(tmp_path / "cache", "x").build([ImageRef(str(path)) for path in paths], PIXELS, Tower())
    assert report.encoded + report.already == 1000
    assert time.process_time() - start < 2


def test_benchmark_measures_and_says_one_sentence(tmp_path: Path, refs: list[ImageRef]) -> None:
    class Slow(Tower):
        def __call__(self, pixel_values: Tensor) -> Tensor:
            time.sleep(0.02 * len(pixel_values))
            return super().__call__(pixel_values)

    folder = tmp_path / "cache"
    result = cache_benchmark([*refs, ImageRef("gone")], PIXELS, Slow(), folder, total_images=1000, passes=50)
    assert result.measured_images == 10
    assert result.encode_seconds > 0.02 > result.read_seconds
    assert result.bytes_per_image == 120
    assert result.pays
    assert result.sentence.startswith("The feature cache pays here for 50 passes: encoding takes ")
    assert "\n" not in result.sentence
    assert list(folder.iterdir()) == []
    json.dumps(result.to_dict())
    with pytest.raises(DataError, match="None of the pictures"):
        cache_benchmark([ImageRef("gone")], PIXELS, Tower(), folder, total_images=1, passes=1)


@pytest.mark.parametrize(
    ("encode", "read", "passes", "free", "pays", "words"),
    [
        (0.1, 0.01, 1, 10**12, False, "does not pay here for 1 passes"),
        (0.1, 0.01, 2, 10**12, True, "faster from 1.2 passes on"),
        (0.01, 0.1, 99, 10**12, False, "faster never"),
        (0.1, 0.01, 99, 10**6, False, "does not fit here: 1,000 pictures take 1.6 GiB of 0.0 GiB free"),
    ],
)
def test_verdicts(encode: float, read: float, passes: int, free: int, pays: bool, words: str) -> None:
    result = CacheBenchmark(10, 1000, passes, encode, 0.01, read, 1_680_000, free)
    assert result.pays is pays
    assert words in result.sentence


def _load(ref: ImageRef) -> object:
    from qwen3_vlm.data.images import load_image

    return load_image(ref.read_bytes(), max_pixels=1000, name=ref.name)

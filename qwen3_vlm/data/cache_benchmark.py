"""Does the feature cache pay here? Measured on this machine, this disk and this tower, in a minute or less."""

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen3_vlm.data.features import DEFAULT_MAX_PIXELS, Encode, FeatureCache, Pixels, encode_pictures
from qwen3_vlm.data.images import load_image
from qwen3_vlm.data.records import ImageRef
from qwen3_vlm.errors import DataError, ImageError

FREE_SHARE = 0.9  # of the free space, at most, that a cache may take


@dataclass(frozen=True, slots=True)
class CacheBenchmark:
    """Seconds per picture of each way, and what that means for the whole data set."""

    measured_images: int
    total_images: int
    passes: int  # times that each picture is used: epochs × runs
    encode_seconds: float  # read, decode, prepare and encode one picture
    write_seconds: float
    read_seconds: float  # read one picture's features from disk, not from memory
    bytes_per_image: int
    free_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.bytes_per_image * self.total_images

    @property
    def fits(self) -> bool:
        return self.total_bytes <= FREE_SHARE * self.free_bytes

    @property
    def break_even_passes(self) -> float:
        """Passes from which on the cache is faster; infinite where reading is no faster than encoding."""
        saved = self.encode_seconds - self.read_seconds
        return (self.encode_seconds + self.write_seconds) / saved if saved > 0 else float("inf")

    @property
    def pays(self) -> bool:
        return self.fits and self.passes > self.break_even_passes

    @property
    def sentence(self) -> str:
        """The verdict and the figures that it stands on."""
        cost = (
            f"encoding takes {self.encode_seconds * 1e3:.2f} ms a picture and reading {self.read_seconds * 1e3:.2f} ms"
        )
        size = f"{self.total_images:,} pictures take {_gib(self.total_bytes)} of {_gib(self.free_bytes)} free"
        if not self.fits:
            return f"The feature cache does not fit here: {size}."
        verdict = "pays" if self.pays else "does not pay"
        even = f"from {self.break_even_passes:.1f} passes on" if self.break_even_passes < 1e6 else "never"
        return f"The feature cache {verdict} here for {self.passes} passes: {cost}; it is faster {even}; {size}."

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable figures and verdict."""
        return asdict(self) | {"total_bytes": self.total_bytes, "pays": self.pays, "sentence": self.sentence}


def cache_benchmark(
    refs: Sequence[ImageRef],
    pixel_values: Pixels,
    encode: Encode,
    folder: str | Path,
    *,
    total_images: int,
    passes: int,
    batch_size: int = 32,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> CacheBenchmark:
    """Encode, write and read `refs` once below `folder` (removed again), the first batch as a warm-up.

    Raises:
        DataError: none of the pictures can be read.
        StorageError: the folder can't be written.
    """
    good = _readable(refs, max_pixels)
    if not good:
        raise DataError("None of the pictures given to the cache benchmark can be read.")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".cache-benchmark-", dir=target))
    try:
        _encode_seconds(good[:batch_size], pixel_values, encode, batch_size, max_pixels)
        encode_seconds = _encode_seconds(good, pixel_values, encode, batch_size, max_pixels)
        cache = FeatureCache(scratch, "benchmark")
        start = time.perf_counter()
        cache.build(good, pixel_values, encode, batch_size=batch_size, max_pixels=max_pixels)
        write_seconds = max(0.0, time.perf_counter() - start - encode_seconds)
        read_seconds = _read_seconds(cache, good, batch_size)
        return CacheBenchmark(
            measured_images=len(good),
            total_images=total_images,
            passes=passes,
            encode_seconds=encode_seconds / len(good),
            write_seconds=write_seconds / len(good),
            read_seconds=read_seconds / len(good),
            bytes_per_image=cache.bytes_per_image,
            free_bytes=shutil.disk_usage(target).free,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _readable(refs: Sequence[ImageRef], max_pixels: int) -> list[ImageRef]:
    """Those that decode, each content once: the cache keeps one copy."""
    found: dict[bytes, ImageRef] = {}
    for ref in refs:
        try:
            data = ref.read_bytes()
            load_image(data, max_pixels=max_pixels, name=ref.name)
            found[data] = ref
        except ImageError:
            continue
    return list(found.values())


def _encode_seconds(
    refs: Sequence[ImageRef], pixel_values: Pixels, encode: Encode, batch_size: int, max_pixels: int
) -> float:
    start = time.perf_counter()
    for first in range(0, len(refs), batch_size):
        batch = refs[first : first + batch_size]
        pictures = [load_image(ref.read_bytes(), max_pixels=max_pixels, name=ref.name) for ref in batch]
        encode_pictures(pictures, pixel_values, encode)
    return time.perf_counter() - start


def _read_seconds(cache: FeatureCache, refs: Sequence[ImageRef], batch_size: int) -> float:
    _forget(cache.folder / "features.bin")
    start = time.perf_counter()
    for first in range(0, len(refs), batch_size):
        cache.read(refs[first : first + batch_size])
    return time.perf_counter() - start


def _forget(path: Path) -> None:
    """Ask the system to drop its copy of a file from memory, so that the disk itself is timed."""
    if not hasattr(os, "posix_fadvise"):
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _gib(size: int) -> str:
    return f"{size / 1024**3:,.1f} GiB"

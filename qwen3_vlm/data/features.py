"""Outputs of the frozen tower on disk, so that each picture is encoded once and read ever after.

A folder holds `cache.json` (format, fingerprint, shape, dtype), `features.bin` (one block per picture) and
`keys.bin` (sha256 of each picture's bytes, in the same order). Both grow at their ends, features
before keys, so a build that is killed goes on where it stopped and a torn end is written anew. A cache made
with another tower, image processor or dtype is refused. Values come back exactly as the tower gave them.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qwen3_vlm.data.encode import SkippedRecord
from qwen3_vlm.data.images import load_image
from qwen3_vlm.data.records import ImageRef
from qwen3_vlm.errors import DataError, ImageError, StorageError
from qwen3_vlm.storage import atomic_write_json, read_json, storage_error

CACHE_FORMAT = 1
KEY_BYTES = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_MAX_PIXELS = 50_000_000

Pixels = Callable[[list[Image.Image]], Mapping[str, Tensor]]  # pictures → {"pixel_values": (I, C, H, W)}
Encode = Callable[..., Tensor]  # pixel_values=(I, C, H, W) → (I, P, D)


def feature_fingerprint(*parts: object) -> str:
    """One sha256 over whatever decides the features: the tower, the image processor, the dtype."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What one build did."""

    encoded: int
    already: int
    skipped: list[SkippedRecord] = field(default_factory=list)


class FeatureCache:
    """Tower outputs by picture. Opening an empty folder starts a new cache.

    Raises:
        DataError: the folder holds a cache with another fingerprint, or something else.
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self.shape: tuple[int, int] = (0, 0)  # patches, width
        self.dtype = torch.float32
        self.rows: dict[bytes, int] = {}  # sha256 of a picture's bytes → its block
        if self._description.exists():
            self._open()

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, ref: ImageRef) -> bool:
        return _key(ref.read_bytes()) in self.rows

    @property
    def bytes_per_image(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def read(self, refs: Sequence[ImageRef], max_pixels: int = DEFAULT_MAX_PIXELS) -> Tensor:
        """Features (I, P, D) of pictures.

        Raises:
            ImageError: a picture can't be read, or (`not_cached`) was not there when the cache was built.
        """
        return torch.stack([self._read_block(self._row(ref, max_pixels)) for ref in refs])

    def build(
        self,
        refs: Iterable[ImageRef],
        pixel_values: Pixels,
        encode: Encode,
        *,
        batch_size: int = 32,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        num_workers: int = 0,
        progress: bool = False,
    ) -> BuildReport:
        """Encode the pictures that are not there yet, each once; those that can't be read are listed.

        Raises:
            StorageError: the disk is full, or another process builds here. What is complete stays and is used later.
        """
        places = {ref.key: ref for ref in refs}
        skipped: list[SkippedRecord] = []
        before = len(self)
        with self._writing():
            for loaded in _batches(list(places.values()), self.rows, batch_size, max_pixels, num_workers, progress):
                skipped += loaded.skipped
                fresh = {key: picture for key, picture in loaded.pictures.items() if key not in self.rows}
                if fresh:
                    self._append(list(fresh), encode_pictures(list(fresh.values()), pixel_values, encode))
        encoded = len(self) - before
        return BuildReport(encoded, len(places) - encoded - len(skipped), skipped)

    @property
    def _description(self) -> Path:
        return self.folder / "cache.json"

    def _open(self) -> None:
        tree = read_json(self._description, error=DataError)
        if tree.get("format") != CACHE_FORMAT or tree.get("fingerprint") != self.fingerprint:
            raise DataError(
                f"The feature cache {self.folder} was made with another tower, image processor, dtype or format. "
                "Choose another folder for data.feature_cache, or remove this one."
            )
        try:
            self.shape = (int(tree["patches"]), int(tree["width"]))
            self.dtype = DTYPES[tree["dtype"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self._description} is damaged: {error}. Remove the folder and build it again."
            ) from error
        self._load_keys()

    def _load_keys(self) -> None:
        keys = self.folder / "keys.bin"
        data = keys.read_bytes() if keys.exists() else b""
        features = self.folder / "features.bin"
        complete = features.stat().st_size // max(1, self.bytes_per_image) if features.exists() else 0
        count = min(len(data) // KEY_BYTES, complete)
        self.rows = {data[row * KEY_BYTES : (row + 1) * KEY_BYTES]: row for row in range(count)}
        if len(self.rows) != count:
            raise DataError(f"{keys} is damaged: a picture is there twice. Remove {self.folder} and build it again.")

    def _row(self, ref: ImageRef, max_pixels: int) -> int:
        data = ref.read_bytes()
        row = self.rows.get(_key(data))
        if row is None:
            load_image(data, max_pixels=max_pixels, name=ref.name)  # says why, where the picture is the reason
            raise ImageError(f"The picture {ref.name} is not in the feature cache {self.folder}.", "not_cached")
        return row

    def _read_block(self, row: int) -> Tensor:
        try:
            with (self.folder / "features.bin").open("rb") as file:
                file.seek(row * self.bytes_per_image)
                block = bytearray(file.read(self.bytes_per_image))
        except OSError as error:
            raise DataError(f"The feature cache {self.folder} can't be read: {error.strerror or error}.") from error
        if len(block) != self.bytes_per_image:
            raise DataError(f"The feature cache {self.folder} is cut off. Remove it and build it again.")
        return torch.frombuffer(block, dtype=self.dtype).view(self.shape)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the folder's lock, cut a torn end off, and turn disk errors into sentences."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise StorageError(f"Another process is building the feature cache {self.folder}.") from error
                if self._description.exists():
                    self._open()
                    self._truncate()
                yield
        except OSError as error:
            raise storage_error(error, self.folder) or error from error

    def _truncate(self) -> None:
        for name, size in (("features.bin", self.bytes_per_image), ("keys.bin", KEY_BYTES)):
            if (self.folder / name).exists():
                os.truncate(self.folder / name, len(self) * size)

    def _append(self, keys: list[bytes], features: Tensor) -> None:
        """Features (I, P, D), then keys: a key never stands without its features."""
        features = features.detach().to("cpu").contiguous()
        if not self._description.exists():
            self._create(features)
        if tuple(features.shape) != (len(keys), *self.shape) or features.dtype != self.dtype:
            raise DataError(f"The tower gave {tuple(features.shape)} {features.dtype}; this cache holds {self.shape}.")
        if not bool(torch.isfinite(features).all()):
            raise DataError("The tower gave values that are not finite; they are not cached.")
        try:
            _append_bytes(self.folder / "features.bin", features.view(torch.uint8).numpy())
            _append_bytes(self.folder / "keys.bin", b"".join(keys))
        except OSError:
            self._truncate()
            raise
        self.rows.update({key: len(self.rows) + number for number, key in enumerate(keys)})

    def _create(self, features: Tensor) -> None:
        name = str(features.dtype).removeprefix("torch.")
        if name not in DTYPES or features.ndim != 3:
            raise DataError(f"Tower outputs of type {name} and {features.ndim} dimensions can't be cached.")
        self.shape, self.dtype = (features.shape[1], features.shape[2]), features.dtype
        tree = {"format": CACHE_FORMAT, "fingerprint": self.fingerprint, "dtype": name}
        atomic_write_json(self._description, tree | {"patches": self.shape[0], "width": self.shape[1]})


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Decoded pictures of one batch by key, and those that could not be decoded."""

    pictures: dict[bytes, Image.Image] = field(default_factory=dict)
    skipped: list[SkippedRecord] = field(default_factory=list)


class _Pictures(Dataset[_Loaded]):
    def __init__(self, refs: list[ImageRef], known: Mapping[bytes, int], batch_size: int, max_pixels: int) -> None:
        self.refs, self.known, self.max_pixels = refs, known, max_pixels
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.refs) // self.batch_size)

    def __getitem__(self, number: int) -> _Loaded:
        loaded = _Loaded()
        first = number * self.batch_size
        for index, ref in enumerate(self.refs[first : first + self.batch_size], start=first):
            try:
                data = ref.read_bytes()
                key = _key(data)
                if key not in self.known:
                    loaded.pictures[key] = load_image(data, max_pixels=self.max_pixels, name=ref.name)
            except ImageError as error:
                loaded.skipped.append(SkippedRecord(index, ref.name, ref.name, error.reason, str(error)))
        return loaded


def _batches(
    refs: list[ImageRef], known: Mapping[bytes, int], batch_size: int, max_pixels: int, num_workers: int, progress: bool
) -> Iterable[_Loaded]:
    dataset = _Pictures(refs, dict(known), batch_size, max_pixels)
    loader: DataLoader[_Loaded] = DataLoader(dataset, batch_size=None, collate_fn=_unchanged, num_workers=num_workers)
    if not progress:
        return loader
    from tqdm import tqdm

    return tqdm(loader, desc="caching tower outputs", unit="batches", leave=False)


@torch.no_grad()
def encode_pictures(pictures: list[Image.Image], pixel_values: Pixels, encode: Encode) -> Tensor:
    """Tower outputs (I, P, D) of pictures.

    Raises:
        DataError: the tower takes more than pixel values (NaFlex), which is not cached.
    """
    inputs = dict(pixel_values(pictures))
    if set(inputs) != {"pixel_values"}:
        raise DataError("Only towers with one fixed resolution can be cached; leave data.feature_cache empty.")
    return encode(**inputs)


def _append_bytes(path: Path, data: Any) -> None:
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _key(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _unchanged(loaded: Any) -> Any:
    return loaded

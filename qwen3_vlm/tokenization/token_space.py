"""The token space: which global id means what. Its hash is part of every model's and data set's ABI.

    TEXT        0 …                rows of the base model's embedding, unused padding rows included
    SPECIAL     next               boundaries and mode switches; unnamed ids are reserved
    IMAGE       next               codes of the image tokenizer
    AUDIO_CB0 … AUDIO_CB{K-1}      codes of the audio codec, one range per codebook

Ranges are contiguous, do not overlap, and are written with inclusive ends. An id outside the range it
is used for is an error, never clamped: a clamped id decodes to something that nobody encoded.

Shapes: R C rows and columns of an image's grid, K codebooks, F frames.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from qwen3_vlm.errors import TokenError, TokenSpaceError
from qwen3_vlm.storage import atomic_write_text, read_bytes
from qwen3_vlm.tokenization.id_arrays import as_integers, require_between, stack_last, swap_last
from qwen3_vlm.tokenization.strict_json import parse_strict, tree_differences
from qwen3_vlm.tokenization.token_space_schema import (
    VERSION,
    AudioIdentity,
    ImageIdentity,
    TextIdentity,
    check_name,
    parse_token_space,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "FILE_NAME",
    "HASH_NAME",
    "MODALITIES",
    "SPECIAL_TOKENS",
    "AudioIdentity",
    "Content",
    "IdRange",
    "ImageIdentity",
    "Modality",
    "TextIdentity",
    "TokenSpace",
]

FILE_NAME = "token_space.json"
HASH_NAME = "token_space.sha256"
SPECIAL_TOKENS = (
    "<|text_start|>",
    "<|text_end|>",
    "<|img_start|>",
    "<|img_end|>",
    "<|aud_start|>",
    "<|aud_end|>",
    "<|gen_text|>",
    "<|gen_img|>",
    "<|gen_aud|>",
    "<|pad_mm|>",
)
SPECIAL_COUNT = 64
MAX_FILE_BYTES = 1_000_000
MAX_IDS = 2**31 - 1  # ids are stored as int32

Modality = Literal["text", "special", "image", "audio"]
Content = Literal["text", "image", "audio"]  # what a record can hold
MODALITIES: tuple[Content, ...] = ("text", "image", "audio")  # in the order that records are stored in
Ids = TypeVar("Ids", int, npt.NDArray[Any], "torch.Tensor")


@dataclass(frozen=True, slots=True)
class IdRange:
    """Global ids from `first` to `last`, both included."""

    first: int
    last: int

    @property
    def size(self) -> int:
        return self.last - self.first + 1

    def __contains__(self, value: int) -> bool:
        return self.first <= value <= self.last

    def __str__(self) -> str:
        return f"{self.first:,}–{self.last:,}"


@dataclass(frozen=True)
class TokenSpace:
    """What the tokenizers are, and the ranges that follow from it. Make one with `build` or `load`."""

    text: TextIdentity
    image: ImageIdentity | None
    audio: AudioIdentity | None
    special_count: int
    extra_specials: tuple[str, ...]
    version: str = VERSION

    @classmethod
    def build(
        cls,
        text: TextIdentity,
        image: ImageIdentity | None = None,
        audio: AudioIdentity | None = None,
        *,
        special_count: int = SPECIAL_COUNT,
        extra_specials: tuple[str, ...] = (),
    ) -> "TokenSpace":
        """Lay out the ranges: text, specials, image, then each audio codebook.

        Raises:
            TokenSpaceError: a size or a name can't be used; the sentence names the field.
        """
        space = cls(text, image, audio, special_count, tuple(extra_specials))
        names = space.special_names
        if not len(names) <= special_count <= MAX_IDS:
            raise TokenSpaceError(
                f"ranges.SPECIAL has {special_count} ids; the {len(names)} special tokens need at least as many."
            )
        for name in names:
            check_name(name, "special_tokens")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise TokenSpaceError(f"special_tokens names {', '.join(repeated)} more than once.")
        if space.vocab_size_total > MAX_IDS:
            raise TokenSpaceError(
                f"vocab_size_total is {space.vocab_size_total:,}; ids are stored as int32, so at most {MAX_IDS:,} fit."
            )
        return space

    @property
    def special_names(self) -> tuple[str, ...]:
        """The named special tokens, in the order of their ids."""
        return SPECIAL_TOKENS + self.extra_specials

    @cached_property
    def ranges(self) -> dict[str, IdRange]:
        """Every range by name, in the order of the ids."""
        sizes = {"TEXT": self.text.vocab_size, "SPECIAL": self.special_count}
        if self.image is not None:
            sizes["IMAGE"] = self.image.codebook_size
        if self.audio is not None:
            sizes |= {f"AUDIO_CB{k}": size for k, size in enumerate(self.audio.codebook_sizes)}
        ends = np.cumsum(list(sizes.values()), dtype=object).tolist()
        return {name: IdRange(end - size, end - 1) for (name, size), end in zip(sizes.items(), ends, strict=True)}

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Global id of each named special token."""
        first = self.text.vocab_size
        return {name: first + index for index, name in enumerate(self.special_names)}

    @property
    def vocab_size_total(self) -> int:
        """All ids: rows of the base plus new rows."""
        return list(self.ranges.values())[-1].last + 1

    @cached_property
    def sha256(self) -> str:
        """Of the canonical JSON: the ABI's name."""
        return hashlib.sha256(self.canonical_json().encode("ascii")).hexdigest()

    def special(self, name: str) -> int:
        """Global id of a special token such as "<|img_start|>".

        Raises:
            TokenError: there is no such token in this space.
        """
        if name not in self.special_tokens:
            raise TokenError(f"There is no special token {name}; there are {', '.join(self.special_names)}.", "unknown")
        return self.special_tokens[name]

    def range_of(self, modality: Modality, codebook: int | None = None) -> IdRange:
        """The range of a modality; audio has one per codebook.

        Raises:
            TokenError: this space has no such modality or codebook.
        """
        name = f"AUDIO_CB{codebook}" if modality == "audio" else modality.upper()
        if (codebook is None) == (modality == "audio") or name not in self.ranges:
            wanted = modality if codebook is None else f"{modality}, codebook {codebook}"
            raise TokenError(f"This token space has no range for {wanted}; it has {', '.join(self.ranges)}.", "unknown")
        return self.ranges[name]

    # Ids --------------------------------------------------------------------------------------------------

    def to_global(self, local: Ids, modality: Modality, codebook: int | None = None) -> Ids:
        """Local codes (from 0) of one modality to global ids; same kind and shape, int64.

        Raises:
            TokenError: a code lies outside its codebook, or is no integer.
        """
        span = self.range_of(modality, codebook)
        codes = as_integers(local)
        require_between(codes, 0, span.size - 1, f"local {_title(modality, codebook)} codes")
        return codes + span.first

    def from_global(self, ids: Ids, modality: Modality, codebook: int | None = None) -> Ids:
        """Global ids of one modality to local codes (from 0); same kind and shape, int64.

        Raises:
            TokenError: an id lies outside the range, or is no integer.
        """
        span = self.range_of(modality, codebook)
        values = as_integers(ids)
        require_between(values, span.first, span.last, f"{_title(modality, codebook)} ids", self._belongs)
        return values - span.first

    def image_to_global(self, codes: Ids) -> Ids:
        """Codes (…, R, C) to ids (…, R·C), row by row.

        Raises:
            TokenError: another grid than this space's, or a code outside the codebook.
        """
        rows, columns = self._image().grid
        values = as_integers(codes)
        if tuple(values.shape[-2:]) != (rows, columns):
            raise TokenError(
                f"Image codes have the shape {tuple(values.shape)}; this space's grid is {rows} × {columns}.",
                "wrong_grid",
            )
        return self.to_global(values.reshape(*values.shape[:-2], rows * columns), "image")

    def image_from_global(self, ids: Ids) -> Ids:
        """Ids (…, R·C) to codes (…, R, C).

        Raises:
            TokenError: another number of ids than the grid has, or an id that is no image id.
        """
        rows, columns = self._image().grid
        values = as_integers(ids)
        if not values.ndim or values.shape[-1] != rows * columns:
            found = values.shape[-1] if values.ndim else "no list of"
            raise TokenError(
                f"An image of this space has {rows * columns} ids ({rows} × {columns}); there are {found} ids.",
                "wrong_grid",
            )
        return self.from_global(values, "image").reshape(*values.shape[:-1], rows, columns)

    def audio_to_global(self, codes: Ids) -> Ids:
        """Codes (…, K, F) to ids (…, F·K): frame by frame, the codebooks of a frame in order.

        Raises:
            TokenError: another number of codebooks, or a code outside its codebook.
        """
        sizes = self._audio().codebook_sizes
        values = as_integers(codes)
        if values.ndim < 2 or values.shape[-2] != len(sizes):
            raise TokenError(
                f"Audio codes have the shape {tuple(values.shape)}; (…, {len(sizes)} codebooks, frames) is needed.",
                "wrong_codebooks",
            )
        parts = [self.to_global(values[..., k, :], "audio", k) for k in range(len(sizes))]
        return stack_last(parts).reshape(*values.shape[:-2], -1)

    def audio_from_global(self, ids: Ids) -> Ids:
        """Ids (…, F·K) to codes (…, K, F).

        Raises:
            TokenError: the last frame is short, a codebook is out of order, or an id is no audio id.
        """
        count = len(self._audio().codebook_sizes)
        values = as_integers(ids)
        if not values.ndim or values.shape[-1] % count:
            found = values.shape[-1] if values.ndim else "a single"
            raise TokenError(
                f"A frame of sound has {count} ids, one per codebook; {found} ids end inside a frame.", "short_frame"
            )
        frames = values.reshape(*values.shape[:-1], values.shape[-1] // count, count)
        parts = [self.from_global(frames[..., k], "audio", k) for k in range(count)]
        return swap_last(stack_last(parts))

    def require_content(self, ids: Ids, modality: Content) -> None:
        """Refuse ids (n,) that are not whole content of one modality: text, one picture, or whole frames of sound.

        Raises:
            TokenError: an id is another modality's, or the number does not fit.
        """
        if modality == "image":
            self.image_from_global(ids)
        elif modality == "audio":
            self.audio_from_global(ids)
        else:
            self.from_global(ids, modality)

    def locate(self, ids: Ids) -> tuple[Ids, Ids]:
        """For each id the number of its range (in the order of `ranges`) and its local code.

        Raises:
            TokenError: an id lies outside the token space.
        """
        values = as_integers(ids)
        require_between(values, 0, self.vocab_size_total - 1, "ids")
        spans = list(self.ranges.values())
        number = sum((values >= span.first) * 1 for span in spans[1:])
        first = sum((number == index) * span.first for index, span in enumerate(spans))
        return number, values - first

    def modality_of(self, value: int) -> tuple[str, int]:
        """The name of the range that one id lies in, and its local code."""
        number, local = self.locate(int(value))
        return list(self.ranges)[number], local

    def _belongs(self, value: int) -> str:
        """What an id is that stands in the wrong place."""
        inside = 0 <= value < self.vocab_size_total
        return f"; {value:,} belongs to {self.modality_of(value)[0]}" if inside else ""

    def _image(self) -> ImageIdentity:
        if self.image is None:
            raise TokenError("This token space has no images.", "no_image")
        return self.image

    def _audio(self) -> AudioIdentity:
        if self.audio is None:
            raise TokenError("This token space has no audio.", "no_audio")
        return self.audio

    # Files ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-serialisable mapping: exactly what token_space.json holds."""
        return {
            "version": self.version,
            "base_text_model": self.text.name,
            "text_vocab_size": self.text.vocab_size,
            "text_tokenizer_size": self.text.tokenizer_size,
            "text_tokenizer_sha256": self.text.tokenizer_sha256,
            "special_tokens": dict(self.special_tokens),
            "ranges": {name: [span.first, span.last] for name, span in self.ranges.items()},
            "image_tokenizer": _plain(asdict(self.image)) if self.image else None,
            "audio_codec": _plain({**asdict(self.audio), **self.audio.derived()}) if self.audio else None,
            "vocab_size_total": self.vocab_size_total,
        }

    @classmethod
    def from_dict(cls, tree: Any) -> "TokenSpace":
        """Read what `to_dict` gave, strictly: everything that follows from something else must agree with it.

        Raises:
            TokenSpaceError: a field is missing, unknown, of the wrong type or inconsistent; it is named.
        """
        fields = parse_token_space(tree)
        tokens, ranges = tree["special_tokens"], tree["ranges"]
        names = sorted(tokens, key=lambda name: tokens[name])
        space = cls.build(
            fields.text,
            fields.image,
            fields.audio,
            special_count=ranges["SPECIAL"][1] - ranges["SPECIAL"][0] + 1,
            extra_specials=tuple(name for name in names if name not in SPECIAL_TOKENS),
        )
        lines = tree_differences(tree, space.to_dict())
        if lines:
            raise TokenSpaceError("The token space contradicts itself:\n  " + "\n  ".join(lines))
        return space

    def canonical_json(self) -> str:
        """Sorted keys, no spaces, ASCII, no time stamp: the bytes that are hashed."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)

    def save(self, folder: str | Path) -> None:
        """Write token_space.json and token_space.sha256 into `folder`.

        Raises:
            StorageError: the folder can't be written.
        """
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        atomic_write_text(Path(folder) / FILE_NAME, text)
        atomic_write_text(Path(folder) / HASH_NAME, f"{self.sha256}\n")

    @classmethod
    def load(cls, path: str | Path) -> "TokenSpace":
        """Read a token_space.json, or the one in a folder; a token_space.sha256 beside it must agree.

        Raises:
            TokenSpaceError: it can't be read, is not valid, or is not what was hashed.
        """
        file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        try:
            space = cls.from_json(_read(file))
        except TokenSpaceError as error:
            raise TokenSpaceError(f"{file}: {error}") from error
        hash_file = file.with_name(HASH_NAME)
        if hash_file.is_file():
            expected = _read(hash_file).decode("ascii", "replace").strip()
            if expected != space.sha256:
                raise TokenSpaceError(
                    f"{file} has the sha256 {space.sha256}, {HASH_NAME} beside it says {expected[:64]!r}: one of them "
                    "was changed. Take both again from where they were built."
                )
        return space

    @classmethod
    def from_json(cls, data: bytes | str) -> "TokenSpace":
        """Read the text of a token_space.json; keys may not repeat.

        Raises:
            TokenSpaceError: it is not valid JSON or not a valid token space.
        """
        return cls.from_dict(parse_strict(data))

    # People -----------------------------------------------------------------------------------------------

    def differences(self, other: "TokenSpace") -> list[str]:
        """One line per field in which the two differ: this one's value first."""
        return tree_differences(self.to_dict(), other.to_dict())

    def require_same(self, other: "TokenSpace", what: str) -> None:
        """Refuse `what`, made with `other`, where this space is needed.

        Raises:
            TokenSpaceError: with one line per difference.
        """
        lines = self.differences(other)
        if lines:
            raise TokenSpaceError(
                f"{what} has another token space, so its ids mean something else (needed, found):\n  "
                + "\n  ".join(lines)
            )

    def describe(self) -> str:
        """A picture of the ranges for people."""
        notes = {"TEXT": f"{self.text.name}; its tokenizer uses {self.text.tokenizer_size:,}"}
        notes["SPECIAL"] = f"{len(self.special_names)} named, {self.special_count - len(self.special_names)} reserved"
        if self.image is not None:
            height, width = self.image.resolution
            rows, columns = self.image.grid
            notes["IMAGE"] = (
                f"{self.image.name}: {width} × {height} pixels → {columns} × {rows} = {self.image.num_ids} ids"
            )
        if self.audio is not None:
            notes["AUDIO_CB0"] = (
                f"{self.audio.name}: {self.audio.sampling_rate_hz:,} Hz → {self.audio.frame_rate_hz:g} frames/s"
                f" × {self.audio.num_codebooks} = {self.audio.ids_per_second:g} ids/s"
            )
        lines = [f"token space {self.version}: {self.vocab_size_total:,} ids, sha256 {self.sha256}"]
        for name, span in self.ranges.items():
            bar = "█" * round(30 * span.size / self.vocab_size_total) or "▏"
            note = f"  {notes[name]}" if name in notes else ""
            lines.append(f"  {name:<10} {span.first:>9,} – {span.last:>9,}  {span.size:>9,}  {bar:<30}{note}".rstrip())
        lines += [f"  {value:>9,}  {name}" for name, value in self.special_tokens.items()]
        return "\n".join(lines)


def _read(file: Path) -> bytes:
    return read_bytes(file, MAX_FILE_BYTES, error=TokenSpaceError, name="It")


def _plain(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in tree.items()}


def _title(modality: str, codebook: int | None) -> str:
    return modality if codebook is None else f"{modality} codebook {codebook}"

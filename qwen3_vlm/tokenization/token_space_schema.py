"""The fields of token_space.json: what the tokenizers are, and the strict reading of their types.

Whether the fields fit each other is `TokenSpace.from_dict`'s question.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from qwen3_vlm.errors import TokenSpaceError

VERSION = "uti_v1"
SERIALIZATION = "flatten_by_time_interleaved_codebooks"
MAX_SIZE = 2**31 - 1
MAX_NAME = 200
MAX_CODEBOOKS = 256


@dataclass(frozen=True, slots=True)
class TextIdentity:
    """The base model's vocabulary."""

    name: str  # hub id or a name of the user's; never a path
    vocab_size: int  # rows of the embedding, padding rows included
    tokenizer_size: int  # ids that the tokenizer can give: 0 … tokenizer_size − 1
    tokenizer_sha256: str

    def __post_init__(self) -> None:
        check_name(self.name, "base_text_model")
        _whole(self.vocab_size, "text_vocab_size")
        _whole(self.tokenizer_size, "text_tokenizer_size")
        _digest(self.tokenizer_sha256, "text_tokenizer_sha256")
        if self.tokenizer_size > self.vocab_size:
            raise TokenSpaceError(
                f"text_tokenizer_size is {self.tokenizer_size:,}, more than the base has rows (text_vocab_size "
                f"{self.vocab_size:,}): the tokenizer does not belong to this base."
            )


@dataclass(frozen=True, slots=True)
class ImageIdentity:
    """The image tokenizer and the one picture size that it is used with."""

    name: str
    type: str
    codebook_size: int
    resolution: tuple[int, int]  # height, width in pixels
    grid: tuple[int, int]  # rows, columns of ids
    weights_sha256: str

    def __post_init__(self) -> None:
        key = "image_tokenizer"
        check_name(self.name, f"{key}.name")
        check_name(self.type, f"{key}.type")
        _whole(self.codebook_size, f"{key}.codebook_size")
        _pair(self.resolution, f"{key}.resolution")
        _pair(self.grid, f"{key}.grid")
        _digest(self.weights_sha256, f"{key}.weights_sha256")
        if self.grid[0] > self.resolution[0] or self.grid[1] > self.resolution[1]:
            raise TokenSpaceError(f"{key}.grid {self.grid} is finer than {key}.resolution {self.resolution}.")

    @property
    def num_ids(self) -> int:
        """Ids per picture."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, slots=True)
class AudioIdentity:
    """The audio codec and how many of its codebooks are used."""

    name: str
    type: str
    codebook_sizes: tuple[int, ...]
    sampling_rate_hz: int
    channels: int
    samples_per_frame: int
    clip_seconds: float  # a longer sound becomes several clips
    weights_sha256: str

    def __post_init__(self) -> None:
        key = "audio_codec"
        check_name(self.name, f"{key}.name")
        check_name(self.type, f"{key}.type")
        if not isinstance(self.codebook_sizes, tuple) or not 1 <= len(self.codebook_sizes) <= MAX_CODEBOOKS:
            _refuse(f"{key}.codebook_sizes", self.codebook_sizes, f"a list of 1 to {MAX_CODEBOOKS} sizes")
        for index, size in enumerate(self.codebook_sizes):
            _whole(size, f"{key}.codebook_sizes[{index}]")
        for name in ("sampling_rate_hz", "channels", "samples_per_frame"):
            _whole(getattr(self, name), f"{key}.{name}")
        if type(self.clip_seconds) is not float or not 0 < self.clip_seconds <= 86_400:
            _refuse(f"{key}.clip_seconds", self.clip_seconds, "a number of seconds such as 10.0, at most a day")
        if not self.frames_per_clip:
            raise TokenSpaceError(f"{key}.clip_seconds is {self.clip_seconds}, shorter than one frame.")
        _digest(self.weights_sha256, f"{key}.weights_sha256")

    @property
    def num_codebooks(self) -> int:
        return len(self.codebook_sizes)

    @property
    def frame_rate_hz(self) -> float:
        return self.sampling_rate_hz / self.samples_per_frame

    @property
    def ids_per_second(self) -> float:
        return self.frame_rate_hz * self.num_codebooks

    @property
    def frames_per_clip(self) -> int:
        """Frames of the longest clip."""
        return round(self.clip_seconds * self.sampling_rate_hz) // self.samples_per_frame

    def derived(self) -> dict[str, Any]:
        """What token_space.json says beside the fields, for readers without this package."""
        return {"num_codebooks": self.num_codebooks, "serialization": SERIALIZATION}


@dataclass(frozen=True, slots=True)
class ParsedFields:
    """The parts of a token_space.json that others follow from."""

    text: TextIdentity
    image: ImageIdentity | None
    audio: AudioIdentity | None


KEYS = (
    "version", "base_text_model", "text_vocab_size", "text_tokenizer_size", "text_tokenizer_sha256", "special_tokens",
    "ranges", "image_tokenizer", "audio_codec", "vocab_size_total",
)  # fmt: skip
IMAGE_KEYS = ("name", "type", "codebook_size", "resolution", "grid", "weights_sha256")
AUDIO_KEYS = (
    "name", "type", "codebook_sizes", "sampling_rate_hz", "channels", "samples_per_frame", "clip_seconds",
    "weights_sha256", "num_codebooks", "serialization",
)  # fmt: skip


def parse_token_space(tree: Any) -> ParsedFields:
    """Check every field's presence and type.

    Raises:
        TokenSpaceError: a field is missing, unknown or of the wrong type; it is named.
    """
    if not isinstance(tree, Mapping):
        raise TokenSpaceError(f"A token space is a JSON object, not {_kind(tree)}.")
    if "version" in tree and tree["version"] != VERSION:
        _refuse("version", tree["version"], f'"{VERSION}", the only version that this release reads')
    _exact_keys(tree, KEYS, "")
    _whole(tree["vocab_size_total"], "vocab_size_total")
    _special_tokens(tree["special_tokens"])
    _ranges(tree["ranges"])
    text = TextIdentity(
        tree["base_text_model"],
        tree["text_vocab_size"],
        tree["text_tokenizer_size"],
        tree["text_tokenizer_sha256"],
    )
    return ParsedFields(text, _image(tree["image_tokenizer"]), _audio(tree["audio_codec"]))


def check_name(value: Any, key: str) -> None:
    """A short printable text.

    Raises:
        TokenSpaceError: it is none; `key` is named.
    """
    if type(value) is not str or not 0 < len(value) <= MAX_NAME or not value.isprintable():
        _refuse(key, value, f"a printable text of 1 to {MAX_NAME} characters")


def shown(value: Any) -> str:
    """A key or value of a foreign file as it can stand in a sentence: short, and printable anywhere."""
    text = str(value)[:MAX_NAME]
    return text if text.isprintable() else ascii(text)[1:-1]


def _image(tree: Any) -> ImageIdentity | None:
    if tree is None:
        return None
    _exact_keys(tree, IMAGE_KEYS, "image_tokenizer")
    values = {**tree, **{name: _list(tree[name], f"image_tokenizer.{name}") for name in ("resolution", "grid")}}
    return ImageIdentity(**values)


def _audio(tree: Any) -> AudioIdentity | None:
    if tree is None:
        return None
    _exact_keys(tree, AUDIO_KEYS, "audio_codec")
    _whole(tree["num_codebooks"], "audio_codec.num_codebooks")
    if tree["serialization"] != SERIALIZATION:
        _refuse("audio_codec.serialization", tree["serialization"], f'"{SERIALIZATION}"')
    values = {key: value for key, value in tree.items() if key not in ("num_codebooks", "serialization")}
    return AudioIdentity(**{**values, "codebook_sizes": _list(tree["codebook_sizes"], "audio_codec.codebook_sizes")})


def _special_tokens(tree: Any) -> None:
    if not isinstance(tree, Mapping):
        _refuse("special_tokens", tree, "an object of names and ids")
    for name, value in tree.items():
        check_name(name, f"special_tokens.{shown(name)}")
        _natural(value, f"special_tokens.{name}")


def _ranges(tree: Any) -> None:
    if not isinstance(tree, Mapping):
        _refuse("ranges", tree, "an object of names and [first, last]")
    for name in ("TEXT", "SPECIAL"):
        if name not in tree:
            raise TokenSpaceError(f"ranges.{name} is missing.")
    for name, span in ((shown(name), span) for name, span in tree.items()):
        if type(span) is not list or len(span) != 2:
            _refuse(f"ranges.{name}", span, "[first, last]")
        for value in span:
            _natural(value, f"ranges.{name}")
        if span[1] < span[0]:
            _refuse(f"ranges.{name}", span, "[first, last] with first ≤ last")


def _exact_keys(tree: Any, keys: tuple[str, ...], prefix: str) -> None:
    if not isinstance(tree, Mapping):
        _refuse(prefix, tree, "an object or null")
    dotted: Callable[[str], str] = lambda name: f"{prefix}.{name}" if prefix else name  # noqa: E731
    for name in tree:
        if name not in keys:
            raise TokenSpaceError(f"{dotted(shown(name))} is not a field of a token space.")
    for name in keys:
        if name not in tree:
            raise TokenSpaceError(f"{dotted(name)} is missing.")


def _list(value: Any, key: str) -> tuple[Any, ...]:
    if type(value) is not list:
        _refuse(key, value, "a list")
    return tuple(value)


def _pair(value: Any, key: str) -> None:
    if type(value) is not tuple or len(value) != 2:
        _refuse(key, value, "two whole numbers")
    for index, part in enumerate(value):
        _whole(part, f"{key}[{index}]")


def _whole(value: Any, key: str) -> None:
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        _refuse(key, value, f"a whole number from 1 to {MAX_SIZE:,}")


def _natural(value: Any, key: str) -> None:
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        _refuse(key, value, f"a whole number from 0 to {MAX_SIZE:,}")


def _digest(value: Any, key: str) -> None:
    if type(value) is not str or re.fullmatch(r"[0-9a-f]{64}", value) is None:
        _refuse(key, value, "a sha256 of 64 lower-case hexadecimal digits")


def _refuse(key: str, value: Any, wanted: str) -> NoReturn:
    text = repr(value)
    raise TokenSpaceError(f"{key} is {shown(text[:80])}{'…' if len(text) > 80 else ''}; it must be {wanted}.")


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"

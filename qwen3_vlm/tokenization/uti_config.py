"""What a user writes in `uti.yaml`: which tokenizers, and how text, pictures and sounds are prepared for them.

What follows from the tokenizers themselves (codebook sizes, grids, frame rates) is read from them; a value that
is given here too must agree. Knows nothing of torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qwen3_vlm.config import parse_as, read_yaml, require, require_positive

__all__ = ["AudioConfig", "ImageConfig", "SpecialConfig", "TextConfig", "UTIConfig", "load_uti_config"]

CONFIG_NAME = "uti.yaml"
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The base model whose tokenizer and vocabulary are used."""

    tokenizer: str = "Qwen/Qwen3-0.6B-Base"  # hub id or local folder
    name: str | None = None  # in token_space.json; None: the hub id, or the folder's own name
    vocab_size: int | None = None  # rows of the base's embedding; None: from its config.json
    trust_remote_code: bool = False  # run code that comes with the tokenizer

    def __post_init__(self) -> None:
        require(self.vocab_size is None or self.vocab_size > 0, "vocab_size", self.vocab_size, "must be above 0")


@dataclass(frozen=True, slots=True)
class SpecialConfig:
    """Ids for boundaries and mode switches."""

    count: int = 64  # ids set aside; those without a name are reserved
    extra: tuple[str, ...] = ()  # names of your own, after the ten built-in ones

    def __post_init__(self) -> None:
        require_positive(self, "count")


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """An image tokenizer and how pictures are made to fit it."""

    type: str = "janus_vqvae"  # janus_vqvae, emu3_vqvae, diffusers_vq, or an entry point's name
    source: str = ""  # hub id or local folder
    subfolder: str | None = None  # of the source, where the tokenizer is part of a larger model
    name: str | None = None  # in token_space.json; None: the hub id, or the folder's own name
    codebook_size: int | None = None  # None: what the tokenizer says
    resolution: int | None = None  # pixels, both sides; None: what the tokenizer says
    fit: Literal["crop", "pad"] = "crop"  # how a picture becomes square: cut the centre out, or add borders
    pad_color: tuple[int, ...] = (255, 255, 255)  # red, green, blue of the borders
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    batch_size: int = 1  # pictures per call; 1 gives the same ids alone and in a batch by construction
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps, …
    dtype: Dtype = "float32"  # ids depend on it

    def __post_init__(self) -> None:
        require(bool(self.source), "source", self.source, "must name a hub id or a folder")
        for name in ("codebook_size", "resolution"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be above 0")
        good = len(self.pad_color) == 3 and all(0 <= value <= 255 for value in self.pad_color)
        require(good, "pad_color", list(self.pad_color), "must be three numbers from 0 to 255")
        require_positive(self, "batch_size")


@dataclass(frozen=True, slots=True)
class AudioConfig:
    """An audio codec and how sounds are made to fit it."""

    type: str = "encodec"  # encodec, dac, mimi, or an entry point's name
    source: str = ""  # hub id or local folder
    subfolder: str | None = None
    name: str | None = None  # in token_space.json; None: the hub id, or the folder's own name
    num_codebooks: int | None = None  # the first so many of the codec's; None: all
    codebook_size: int | None = None  # None: what the codec says
    sampling_rate_hz: int | None = None  # None: what the codec says; sounds are resampled to it
    channels: int | None = None  # 1 mono, 2 stereo; None: what the codec says; sounds are mixed to it
    clip_seconds: float = 10.0  # the longest clip that is encoded at once
    long_audio: Literal["chunk", "crop", "refuse"] = "chunk"  # beyond a clip: more clips, its start alone, or an error
    max_seconds: float = 600.0  # a longer sound is refused
    pad_to_clip: bool = False  # true: every sound is filled up with silence to whole clips
    silence: Literal["keep", "refuse"] = "keep"  # what to do with a sound that has nothing in it
    silence_dbfs: float = -60.0  # root mean square below this, relative to full scale, is silence
    clipping: Literal["clip", "scale", "refuse"] = "clip"  # of samples beyond ±1: cut them, scale all, or an error
    batch_size: int = 1  # clips per call; 1 gives the same ids alone and in a batch by construction
    device: str = "auto"
    dtype: Dtype = "float32"  # ids depend on it

    def __post_init__(self) -> None:
        require(bool(self.source), "source", self.source, "must name a hub id or a folder")
        for name in ("num_codebooks", "codebook_size", "sampling_rate_hz", "channels"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be above 0")
        require(0 < self.clip_seconds <= 86_400, "clip_seconds", self.clip_seconds, "must be above 0, at most a day")
        require(self.silence_dbfs <= 0, "silence_dbfs", self.silence_dbfs, "must be 0 or less")
        require_positive(self, "batch_size", "max_seconds")


@dataclass(frozen=True, slots=True)
class UTIConfig:
    """All of `uti.yaml`. A modality that is left out has no ids."""

    text: TextConfig = field(default_factory=TextConfig)
    special: SpecialConfig = field(default_factory=SpecialConfig)
    image: ImageConfig | None = None
    audio: AudioConfig | None = None


def load_uti_config(path: str | Path, overrides: Sequence[str] = ()) -> UTIConfig:
    """Read a uti.yaml, or the one in a folder, and apply dotted `key=value` overrides.

    Raises:
        ConfigError: it can't be read, a key is unknown, a value is of the wrong type or out of range.
    """
    file = Path(path) / CONFIG_NAME if Path(path).is_dir() else Path(path)
    return parse_as(UTIConfig, read_yaml(file), overrides, source=str(file))

"""The Unified Token Interface: text, pictures and sounds to global ids of one token space, and back.

Ids that leave here are global, so no caller can forget an offset. Metadata is plain JSON and says all that decoding
needs beside the tokenizers themselves. The same input gives the same ids, one at a time or in a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from qwen3_vlm.config import dump_yaml, parse_as, to_dict
from qwen3_vlm.errors import ConfigError, TokenError
from qwen3_vlm.storage import atomic_write_text
from qwen3_vlm.tokenization.audio_codecs import AudioCodec, open_audio_codec
from qwen3_vlm.tokenization.image_tokenizers import ImageTokenizer, open_image_tokenizer
from qwen3_vlm.tokenization.pictures import FittedPicture, Pixels, fit_picture
from qwen3_vlm.tokenization.text import LosslessText, open_text, public_name
from qwen3_vlm.tokenization.token_space import FILE_NAME, AudioIdentity, ImageIdentity, TokenSpace
from qwen3_vlm.tokenization.uti_config import CONFIG_NAME, AudioConfig, ImageConfig, UTIConfig, load_uti_config
from qwen3_vlm.tokenization.waveforms import PreparedSound, Waveform, prepare_sound

__all__ = ["Encoded", "Sound", "UnifiedTokenizer"]

IdArray = npt.NDArray[np.int64]
Sound = tuple[Any, int]  # waveform (S,) or (A, S), sampling rate in Hz


@dataclass(frozen=True, slots=True)
class Encoded:
    """One picture or sound as ids."""

    ids: IdArray  # global, (n,)
    metadata: dict[str, Any]  # plain JSON; what decoding needs to know


class UnifiedTokenizer:
    """Three tokenizers behind one token space. Open one with `open`, or give the parts yourself.

    Args:
        config: the policies for pictures and sounds; sections of absent tokenizers are not read.
        text_tokenizer, image_tokenizer, audio_codec: None for a modality that the space shall not have.

    Raises:
        TokenSpaceError: the parts do not make a valid space.
    """

    def __init__(
        self,
        config: UTIConfig,
        text_tokenizer: LosslessText,
        image_tokenizer: ImageTokenizer | None = None,
        audio_codec: AudioCodec | None = None,
    ) -> None:
        self.config = config
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer
        self.audio_codec = audio_codec
        self.token_space = TokenSpace.build(
            text_tokenizer.identity,
            _image_identity(image_tokenizer, config.image) if image_tokenizer is not None else None,
            _audio_identity(audio_codec, config.audio) if audio_codec is not None else None,
            special_count=config.special.count,
            extra_specials=config.special.extra,
        )

    @classmethod
    def open(
        cls, source: str | Path | UTIConfig, overrides: Sequence[str] = (), *, download: bool = True
    ) -> "UnifiedTokenizer":
        """Load the tokenizers that a uti.yaml names.

        Args:
            source: the file, or a folder with it (a token_space.json beside it must be the tokenizers' own), or what
                `load_uti_config` read.
            overrides: `key=value`, such as "image.source=/data/codec" where a folder was moved.
            download: false looks on this machine only.

        Raises:
            ConfigError: the file can't be used, or contradicts what a tokenizer says of itself.
            ModelError: a tokenizer can't be loaded.
            TokenSpaceError: the tokenizers are not those of the token_space.json; one line per difference.
        """
        if isinstance(source, UTIConfig):
            return cls._load(parse_as(UTIConfig, to_dict(source), overrides, CONFIG_NAME), download)
        uti = cls._load(load_uti_config(source, overrides), download)
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        if (folder / FILE_NAME).is_file():
            TokenSpace.load(folder).require_same(uti.token_space, f"What {source} loads")
        return uti

    @classmethod
    def _load(cls, config: UTIConfig, download: bool) -> "UnifiedTokenizer":
        return cls(
            config,
            open_text(config.text, download=download),
            open_image_tokenizer(config.image, download=download) if config.image else None,
            open_audio_codec(config.audio, download=download) if config.audio else None,
        )

    def save(self, folder: str | Path) -> None:
        """Write uti.yaml, token_space.json and token_space.sha256 into `folder`.

        Raises:
            StorageError: it can't be written.
        """
        atomic_write_text(Path(folder) / CONFIG_NAME, dump_yaml(self.config))
        self.token_space.save(folder)

    @property
    def sha256(self) -> str:
        """The token space's hash."""
        return self.token_space.sha256

    # Text -------------------------------------------------------------------------------------------------

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text; `decode_text` gives exactly the same string back.

        Raises:
            TokenError: the text can't be kept whole, such as one with a lone surrogate.
        """
        return self.text_tokenizer.encode(text)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode_text(text) for text in texts]

    def decode_text(self, ids: Sequence[int] | IdArray) -> str:
        """The text of text ids.

        Raises:
            TokenError: an id is no text id.
        """
        return self.text_tokenizer.decode(_id_array(ids).tolist())

    # Pictures ---------------------------------------------------------------------------------------------

    def encode_image(self, image: Image.Image | Pixels) -> Encoded:
        """Ids of a picture (PIL image or uint8 (H, W, 3)).

        Raises:
            TokenError: it is no picture, or this space has none.
        """
        return self.encode_images([image])[0]

    def encode_images(self, images: Sequence[Image.Image | Pixels]) -> list[Encoded]:
        """Ids of each picture: the same as one at a time."""
        return self.encode_fitted([self.fit_image(image) for image in images])

    def fit_image(self, image: Image.Image | Pixels) -> FittedPicture:
        """The picture as the tokenizer will see it: the first half of `encode_image`.

        Raises:
            TokenError: it is no picture, or this space has none.
        """
        tokenizer, config = self._image_parts()
        return fit_picture(image, tokenizer.resolution, config)

    def encode_fitted(self, pictures: Sequence[FittedPicture]) -> list[Encoded]:
        """Ids of pictures that `fit_image` gave: the second half of `encode_images`."""
        tokenizer, config = self._image_parts()
        codes = _in_fixed_calls([picture.pixels for picture in pictures], config.batch_size, tokenizer.encode)
        return [
            Encoded(self.token_space.image_to_global(code), self._image_metadata(picture, config))
            for picture, code in zip(pictures, codes, strict=True)
        ]

    def decode_image(
        self, ids: Sequence[int] | IdArray, metadata: Mapping[str, Any] | None = None, *, borders: bool = False
    ) -> Image.Image:
        """The picture of image ids.

        Args:
            metadata: what `encode_image` gave; None for generated ids.
            borders: true keeps borders that were added to make the picture square.

        Raises:
            TokenError: an id is no image id, their number is wrong, or the metadata is of another space.
        """
        return self.decode_images([ids], [metadata], borders=borders)[0]

    def decode_images(
        self,
        ids: Sequence[Sequence[int] | IdArray],
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        borders: bool = False,
    ) -> list[Image.Image]:
        """The picture of each list of ids; see `decode_image`."""
        tokenizer, config = self._image_parts()
        notes = metadata or [None] * len(ids)
        boxes = [self._content_box(note) for note in notes]
        codes = [self.token_space.image_from_global(_id_array(values)) for values in ids]
        pixels = _in_fixed_calls(codes, config.batch_size, tokenizer.decode)
        pictures = [Image.fromarray(picture) for picture in pixels]
        return [
            picture.crop(box) if box and not borders else picture for picture, box in zip(pictures, boxes, strict=True)
        ]

    def _image_parts(self) -> tuple[ImageTokenizer, ImageConfig]:
        if self.image_tokenizer is None or self.config.image is None:
            raise TokenError("This token space has no images: uti.yaml has no `image` section.", "no_image")
        return self.image_tokenizer, self.config.image

    def _image_metadata(self, picture: FittedPicture, config: ImageConfig) -> dict[str, Any]:
        height, width, _ = picture.pixels.shape
        policy = {"fit": config.fit, "interpolation": config.interpolation, "pad_color": list(config.pad_color)}
        return {
            "modality": "image",
            "token_space_sha256": self.sha256,
            "resolution": [height, width],
            "grid": list(self.token_space.image.grid) if self.token_space.image else [],
            "content_box": list(picture.content_box),
            "original_size": list(picture.original_size),
            "policy": policy,
        }

    def _content_box(self, metadata: Mapping[str, Any] | None) -> tuple[int, int, int, int] | None:
        """Left, top, right, bottom of the picture within its borders; None: all of it."""
        if metadata is None:
            return None
        self._check_metadata(metadata, "image")
        height, width = self._image_parts()[0].resolution
        box = metadata.get("content_box")
        if not (isinstance(box, (list, tuple)) and len(box) == 4 and all(type(edge) is int for edge in box)):
            raise TokenError(f"The metadata's content_box is {box!r}; it must be four whole numbers.", "bad_metadata")
        left, top, right, bottom = box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise TokenError(
                f"The metadata's content_box {box} lies outside {width} × {height} pixels.", "bad_metadata"
            )
        return (left, top, right, bottom)

    # Sounds -----------------------------------------------------------------------------------------------

    def encode_audio(self, waveform: Any, sampling_rate_hz: int) -> Encoded:
        """Ids of a sound (S,) or (A, S), floating point at ±1 full scale or int16.

        Raises:
            TokenError: it is no sound, the policy refuses it, or this space has no audio.
        """
        return self.encode_audios([(waveform, sampling_rate_hz)])[0]

    def encode_audios(self, sounds: Sequence[Sound]) -> list[Encoded]:
        """Ids of each (waveform, sampling rate): the same as one at a time."""
        return self.encode_prepared([self.prepare_audio(waveform, rate) for waveform, rate in sounds])

    def prepare_audio(self, waveform: Any, sampling_rate_hz: int) -> PreparedSound:
        """The clips as the codec will hear them: the first half of `encode_audio`.

        Raises:
            TokenError: it is no sound, the policy refuses it, or this space has no audio.
        """
        _, config, identity = self._audio_parts()
        return prepare_sound(waveform, sampling_rate_hz, identity, config)

    def encode_prepared(self, sounds: Sequence[PreparedSound]) -> list[Encoded]:
        """Ids of sounds that `prepare_audio` gave: the second half of `encode_audios`."""
        codec, config, _ = self._audio_parts()
        codes = iter(
            _in_fixed_calls([clip for sound in sounds for clip in sound.clips], config.batch_size, codec.encode)
        )
        encoded = []
        for sound in sounds:
            clips = [next(codes) for _ in sound.clips]
            ids = np.concatenate([self.token_space.audio_to_global(clip) for clip in clips])
            encoded.append(Encoded(ids, self._audio_metadata(sound, clips)))
        return encoded

    def decode_audio(
        self, ids: Sequence[int] | IdArray, metadata: Mapping[str, Any] | None = None
    ) -> tuple[Waveform, int]:
        """The sound of audio ids: float32 (A, S) and its sampling rate in Hz.

        Args:
            metadata: what `encode_audio` gave; None for generated ids, which are then taken as one clip after another.

        Raises:
            TokenError: an id is no audio id or out of order, a frame is short, or the metadata does not fit.
        """
        codec, config, identity = self._audio_parts()
        codes = self.token_space.audio_from_global(_id_array(ids))
        frames, samples = self._clip_frames(metadata, codes.shape[1], identity)
        if not frames:
            return np.zeros((identity.channels, 0), dtype=np.float32), identity.sampling_rate_hz
        clips = np.split(codes, np.cumsum(frames)[:-1], axis=1)
        sounds = _in_fixed_calls(clips, config.batch_size, codec.decode)
        return np.concatenate(sounds, axis=1)[:, :samples], identity.sampling_rate_hz

    def _audio_parts(self) -> tuple[AudioCodec, AudioConfig, AudioIdentity]:
        if self.audio_codec is None or self.config.audio is None or self.token_space.audio is None:
            raise TokenError("This token space has no audio: uti.yaml has no `audio` section.", "no_audio")
        return self.audio_codec, self.config.audio, self.token_space.audio

    def _audio_metadata(self, sound: PreparedSound, clips: Sequence[IdArray]) -> dict[str, Any]:
        _, config, identity = self._audio_parts()
        names = ("clip_seconds", "long_audio", "pad_to_clip", "silence", "silence_dbfs", "clipping")
        return {
            "modality": "audio",
            "token_space_sha256": self.sha256,
            "sampling_rate_hz": identity.sampling_rate_hz,
            "channels": identity.channels,
            "num_codebooks": identity.num_codebooks,
            "clip_frames": [int(clip.shape[1]) for clip in clips],
            "samples": sound.samples,
            "clipped_samples": sound.clipped_samples,
            "gain": sound.gain,
            "cropped": sound.cropped,
            "silent": sound.silent,
            "source": dict(sound.source),
            "policy": {name: getattr(config, name) for name in names},
        }

    def _clip_frames(
        self, metadata: Mapping[str, Any] | None, frames: int, identity: AudioIdentity
    ) -> tuple[list[int], int]:
        """Frames of each clip, and how many samples are sound; the metadata must account for every frame."""
        if metadata is None:
            whole, rest = divmod(frames, identity.frames_per_clip)
            return [identity.frames_per_clip] * whole + [rest] * bool(rest), frames * identity.samples_per_frame
        self._check_metadata(metadata, "audio")
        counts, samples = metadata.get("clip_frames"), metadata.get("samples")
        if not isinstance(counts, (list, tuple)) or not all(type(n) is int and n > 0 for n in counts):
            raise TokenError(f"The metadata's clip_frames is {counts!r}; it must be whole numbers.", "bad_metadata")
        if sum(counts) != frames:
            raise TokenError(f"The metadata tells of {sum(counts):,} frames, the ids make {frames:,}.", "short_frame")
        if type(samples) is not int or not 0 <= samples <= frames * identity.samples_per_frame:
            raise TokenError(f"The metadata's samples is {samples!r}; {frames:,} frames hold at most "
                             f"{frames * identity.samples_per_frame:,}.", "bad_metadata")  # fmt: skip
        return list(counts), samples

    def _check_metadata(self, metadata: Mapping[str, Any], modality: str) -> None:
        if not isinstance(metadata, Mapping) or metadata.get("modality") != modality:
            raise TokenError(f"The metadata is not that of an encoded {modality}.", "bad_metadata")
        found = metadata.get("token_space_sha256")
        if found != self.sha256:
            raise TokenError(
                f"The {modality} was encoded in the token space {found}; this one is {self.sha256}, so its ids mean "
                "something else.", "other_token_space",
            )  # fmt: skip


def _in_fixed_calls(
    items: Sequence[npt.NDArray[Any]], batch_size: int, call: Callable[[Any], npt.NDArray[Any]]
) -> list[npt.NDArray[Any]]:
    """Run a codec over items of any shapes, in calls of exactly `batch_size` items of one shape.

    A short last call is filled with repeats. Convolutions may round differently for another number of items
    (measured: 5e-7 between 1 and more), which can turn an id; with calls of one shape the number of items given
    here does not matter.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.shape, []).append(index)
    results: dict[int, npt.NDArray[Any]] = {}
    for members in groups.values():
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            filled = chosen + [chosen[-1]] * (batch_size - len(chosen))
            output = call(np.stack([items[index] for index in filled]))
            results |= {index: output[place] for place, index in enumerate(chosen)}
    return [results[index] for index in range(len(items))]


def _id_array(ids: Sequence[int] | IdArray) -> IdArray:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TokenError(f"Ids are one list of whole numbers, not {array.dtype} {array.shape}.", "not_integer")
    return array.astype(np.int64)


def _image_identity(tokenizer: ImageTokenizer, config: ImageConfig | None) -> ImageIdentity:
    if config is None:
        raise ConfigError("An image tokenizer was given, but the configuration has no `image` section.")
    height, width = tokenizer.resolution
    rows, columns = tokenizer.grid
    return ImageIdentity(
        name=config.name or public_name(config.source),
        type=config.type,
        codebook_size=_agreed(config.codebook_size, tokenizer.codebook_size, "image.codebook_size"),
        resolution=(_agreed(config.resolution, height, "image.resolution"), width),
        grid=(rows, columns),
        weights_sha256=tokenizer.weights_sha256,
    )


def _audio_identity(codec: AudioCodec, config: AudioConfig | None) -> AudioIdentity:
    if config is None:
        raise ConfigError("An audio codec was given, but the configuration has no `audio` section.")
    for size in codec.codebook_sizes:
        _agreed(config.codebook_size, size, "audio.codebook_size")
    _agreed(config.num_codebooks, len(codec.codebook_sizes), "audio.num_codebooks")
    return AudioIdentity(
        name=config.name or public_name(config.source),
        type=config.type,
        codebook_sizes=tuple(codec.codebook_sizes),
        sampling_rate_hz=_agreed(config.sampling_rate_hz, codec.sampling_rate_hz, "audio.sampling_rate_hz"),
        channels=_agreed(config.channels, codec.channels, "audio.channels"),
        samples_per_frame=codec.samples_per_frame,
        clip_seconds=float(config.clip_seconds),
        weights_sha256=codec.weights_sha256,
    )


def _agreed(given: int | None, found: int, key: str) -> int:
    """What the tokenizer says of itself, which a value in uti.yaml must not contradict."""
    if given not in (None, found):
        raise ConfigError(f"{key} is {given:,} in uti.yaml, but the tokenizer says {found:,}.")
    return found

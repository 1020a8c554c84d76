"""One sound file, however awkward, to float samples.

Sounds from the web are cut off, empty, hours long, mislabelled, or hold NaN. Each becomes a waveform at its
own rate or an AudioError with a countable reason: `missing_audio`, `unreadable_audio`, `truncated_audio`,
`empty_audio`, `audio_too_long`, `audio_not_finite`. Resampling, channels and silence are the tokenizer's
business.

Shapes: A channels, S samples.
"""

import io
import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qwen3_vlm.errors import AudioError

if TYPE_CHECKING:
    from soundfile import SoundFile

AUDIO_SUFFIXES = (
    ".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".aiff", ".aif", ".au", ".caf", ".w64",
)  # fmt: skip
MAX_AUDIO_BYTES = 1024**3  # of the encoded file
MAX_VALUES = 100_000_000  # samples of all channels after decoding: 400 MB
MAX_CHANNELS = 16
UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # what programs that write to a pipe put into a WAV header

Waveform = npt.NDArray[np.float32]  # (A, S)


def load_sound(source: Path | bytes, *, max_seconds: float, name: str) -> tuple[Waveform, int]:
    """Decode one sound completely → float32 (A, S), nominally within ±1, and its sampling rate in Hz.

    WAV, FLAC, Ogg (Vorbis, Opus), MP3, AIFF and whatever else libsndfile reads. `name` is what error messages
    call the sound.

    Raises:
        AudioError: see above.
    """
    data = source if isinstance(source, bytes) else _read(source, name)
    _check_is_whole(data, name)
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            waveform, rate = _decode(file, max_seconds, name), int(file.samplerate)
    except AudioError:
        raise
    except Exception as error:  # decoders fed with damaged bytes raise nearly anything
        raise AudioError(f"The sound {name} can't be read: {_first_line(error)}.", "unreadable_audio") from error
    if not np.isfinite(waveform).all():
        raise AudioError(f"The sound {name} holds samples that are not finite numbers.", "audio_not_finite")
    return np.ascontiguousarray(waveform.T), rate


def _decode(file: "SoundFile", max_seconds: float, name: str) -> Waveform:
    """Samples (S, A). The length that the header claims is checked before anything is unpacked."""
    if file.samplerate <= 0 or not 1 <= file.channels <= MAX_CHANNELS:
        raise AudioError(
            f"The sound {name} has {file.channels} channels at {file.samplerate} Hz; at most {MAX_CHANNELS} are read.",
            "unreadable_audio",
        )
    most = min(int(max_seconds * file.samplerate), MAX_VALUES // file.channels)
    claimed = file.frames
    if claimed > most and file.format not in ("OGG", "MP3", "MPEG"):  # whose lengths are estimates: they are read
        raise _too_long(name, claimed / file.samplerate, max_seconds)
    waveform = file.read(frames=most + 1, dtype="float32", always_2d=True)
    if len(waveform) > most:
        raise _too_long(name, max(claimed, len(waveform)) / file.samplerate, max_seconds)
    if len(waveform) < claimed and file.format in ("WAV", "WAVEX", "FLAC", "AIFF", "AU", "RF64", "W64", "CAF"):
        raise AudioError(
            f"The sound {name} is cut off: {len(waveform):,} of {claimed:,} samples are there.", "truncated_audio"
        )
    if not len(waveform):
        raise AudioError(f"The sound {name} is empty.", "empty_audio")
    return np.asarray(waveform, dtype=np.float32)


def _check_is_whole(data: bytes, name: str) -> None:
    """libsndfile shortens what is cut off without a word, so the sizes in a header are compared with the file."""
    if data[:4] == b"FORM" and len(data) >= 8:  # AIFF
        _check_size(8 + struct.unpack_from(">I", data, 4)[0], data, name)
    if data[:4] == b"RF64" and len(data) >= 28:  # the 64-bit size stands in the ds64 chunk (EBU Tech 3306)
        _check_size(8 + struct.unpack_from("<Q", data, 20)[0], data, name)
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return
    position = 12
    while position + 8 <= len(data):
        kind, size = data[position : position + 4], struct.unpack_from("<I", data, position + 4)[0]
        if kind == b"data" and size in UNKNOWN_SIZES:
            return
        _check_size(position + 8 + size, data, name)
        position += 8 + size + size % 2
        if kind == b"data":
            return
    raise AudioError(f"The sound {name} is cut off before its samples.", "truncated_audio")


def _check_size(expected: int, data: bytes, name: str) -> None:
    if expected > len(data):
        missing = expected - len(data)
        raise AudioError(f"The sound {name} is cut off: {missing:,} bytes are missing.", "truncated_audio")


def _read(path: Path, name: str) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise AudioError(f"The sound {name} is not a regular file.", "unreadable_audio")
        if status.st_size > MAX_AUDIO_BYTES:
            raise AudioError(
                f"The sound {name} has {status.st_size:,} bytes; at most {MAX_AUDIO_BYTES:,} are read.",
                "audio_too_long",
            )
        with open(path, "rb") as file:
            return file.read(MAX_AUDIO_BYTES)
    except FileNotFoundError as error:
        raise AudioError(f"The sound {name} does not exist.", "missing_audio") from error
    except (OSError, ValueError) as error:
        raise AudioError(f"The sound {name} can't be read: {_first_line(error)}.", "unreadable_audio") from error


def _too_long(name: str, seconds: float, max_seconds: float) -> AudioError:
    return AudioError(
        f"The sound {name} lasts {seconds:,.1f} s; at most {max_seconds:g} s and {MAX_VALUES:,} values are read.",
        "audio_too_long",
    )


def _first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or getattr(error, "error_string", None) or str(error)
    return " ".join((text or type(error).__name__).split())[:200].rstrip(".")

"""Pictures and sounds of a golden set as data URIs: what the report shows and plays.

Only what is what its name says is taken: a PNG, or a plain WAV. So much of it is read that the page stays one that a
browser opens; the rest is left out.
"""

import base64
import io
import wave
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_vlm.evaluate.token_golden import ENDINGS
from qwen3_vlm.tokenization.audit_page import spectrogram_png

MAX_FILE_BYTES = 4_000_000
MAX_TOTAL_BYTES = 40_000_000
MAX_DRAWN_SECONDS = 30  # of a sound, in its spectrogram
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class Media:
    """One file for the page: a picture, or a sound with the picture of its spectrum."""

    uri: str  # data:image/png or data:audio/wav
    spectrum: str = ""  # data:image/png; "" for a picture


def read_media(folder: Path, names: Iterable[str]) -> dict[str, Media]:
    """Name → media, of those names ("step-000123/x.png") that can be shown."""
    found: dict[str, Media] = {}
    left = MAX_TOTAL_BYTES
    for name in dict.fromkeys(names):
        data = _read(folder, name)
        media = _media(data, Path(name).suffix) if len(data) <= left else None
        if media is not None:
            found[name] = media
            left -= len(data)
    return found


def _read(folder: Path, name: str) -> bytes:
    """The bytes of a file within `folder`; none where there is no such file or it is too large."""
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        if not inside or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            return b""
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError):
        return b""


def _media(data: bytes, ending: str) -> Media | None:
    if ending == ENDINGS["image"]:
        return Media(_uri("image/png", data)) if data.startswith(_PNG) else None
    try:
        sound, rate = _samples(data)
        return Media(_uri("audio/wav", data), _uri("image/png", spectrogram_png(sound, rate)))
    except (wave.Error, EOFError, ValueError, ZeroDivisionError):
        return None


def _samples(data: bytes) -> tuple[NDArray[Any], int]:
    """(A, S) and the rate of a 16-bit WAV."""
    with wave.open(io.BytesIO(data)) as file:
        rate, channels = file.getframerate(), file.getnchannels()
        if file.getsampwidth() != 2 or not 1_000 <= rate <= 200_000:
            raise ValueError("not a 16-bit sound of a usual rate")
        frames = file.readframes(min(file.getnframes(), MAX_DRAWN_SECONDS * rate))
    if not frames:
        raise ValueError("an empty sound")
    samples = np.frombuffer(frames, "<i2").reshape(-1, channels).T
    return samples.astype(np.float32) / np.float32(32768), rate


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"

"""The demo's voices: text to 16 kHz speech by espeak-ng, inside this process.

The package `espeakng-loader` brings the C library and its data; ctypes calls it. The library keeps its
state in C globals, and some of it (oscillator phase, flutter) can't be reset by any call; its noise is
seeded by the clock. The same sentence would sound a little different each time. So every utterance is
spoken by a freshly loaded and seeded library (2 ms), under a lock: the same request gives the same samples.

One voice and a tenth of all phrases (by hash) are held out: no trained part of the demo hears them.
"""

import ctypes
import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qwen3_vlm.errors import DataError

Wave = NDArray[np.float32]  # (samples,), mono, −1…1

SAMPLING_RATE = 16_000
HELD_OUT_TENTHS = 1
AUDIBLE = 0.01  # of full scale
ACROSS = 0.15  # how far words a minute and pitch vary around a voice's own
_RETRIEVAL, _CHARS_UTF8, _POSITION_CHARACTER = 1, 1, 1
_PHONEME_EVENTS, _DO_NOT_EXIT = 0x0001, 0x8000
_RATE, _PITCH = 1, 3
_EVENT_LIST_TERMINATED, _EVENT_PHONEME = 0, 7
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Voice:
    """One speaker: espeak-ng's language + variant, words a minute, and pitch (0…99)."""

    name: str
    espeak: str
    words_per_minute: int
    pitch: int


VOICES: dict[str, Voice] = {
    voice.name: voice
    for voice in (
        Voice("amy", "en-us+f3", 150, 55),
        Voice("ben", "en-us+m3", 145, 45),
        Voice("clara", "gmw/en+f2", 140, 50),
        Voice("duncan", "en-gb-scotland+m2", 140, 40),
        Voice("emma", "en-us+f4", 140, 45),
        Voice("frank", "gmw/en+m7", 145, 50),
        Voice("grace", "en-gb-x-rp+f1", 145, 60),
        Voice("henry", "en-us+m1", 155, 35),
        Voice("iris", "en-gb-x-rp+f5", 145, 50),
    )
}
HELD_OUT_VOICE = VOICES["iris"]
TRAINING_VOICES: tuple[Voice, ...] = tuple(voice for voice in VOICES.values() if voice != HELD_OUT_VOICE)


@dataclass
class Utterance:
    """Speech, and where each of espeak-ng's phonemes begins: (sample at 16 kHz, mnemonic), in order."""

    wave: Wave
    phonemes: list[tuple[int, str]]


@dataclass(frozen=True)
class Line:
    """Something to say, and how."""

    text: str
    voice: Voice
    words_per_minute: int
    pitch: int

    def speak(self) -> Utterance:
        """The same line always gives the same samples; errors as `speak_aligned`."""
        return speak_aligned(self.text, self.voice, words_per_minute=self.words_per_minute, pitch=self.pitch)


def vary(text: str, voice: Voice, rng: random.Random) -> Line:
    """`text` in a voice, a little faster or slower, higher or lower than it usually speaks."""
    rate, pitch = (
        round(value * rng.uniform(1 - ACROSS, 1 + ACROSS)) for value in (voice.words_per_minute, voice.pitch)
    )
    return Line(text, voice, rate, pitch)


def phrase_is_held_out(phrase: str) -> bool:
    """A tenth of all phrases, by hash: the same on every machine."""
    digest = hashlib.sha256(f"spoken {phrase}".encode()).digest()
    return digest[0] % 10 < HELD_OUT_TENTHS


def telling_is_held_out(phrase: str, voice: Voice) -> bool:
    """A tenth of all phrases in a voice, by hash: both are known, but not together."""
    digest = hashlib.sha256(f"{phrase} {voice.name}".encode()).digest()
    return digest[0] % 10 < HELD_OUT_TENTHS


def trimmed(wave: Wave) -> Wave:
    """Without the silence around it, but for 20 ms before and 40 ms after."""
    loud = np.flatnonzero(np.abs(wave) > AUDIBLE)
    if not len(loud):
        return wave
    return wave[max(0, loud[0] - SAMPLING_RATE // 50) : loud[-1] + SAMPLING_RATE // 25]


def speak(text: str, voice: Voice, *, words_per_minute: int | None = None, pitch: int | None = None) -> Wave:
    """`text` as 16 kHz mono; the same arguments give the same samples.

    Raises:
        DataError: there is nothing to say, or espeak-ng is missing or can't say it.
    """
    return speak_aligned(text, voice, words_per_minute=words_per_minute, pitch=pitch).wave


def speak_aligned(
    text: str, voice: Voice, *, words_per_minute: int | None = None, pitch: int | None = None
) -> Utterance:
    """`speak` with the phonemes' places."""
    if not text.strip():
        raise DataError("There is nothing to say: the text is empty. Give at least one word.")
    with _LOCK, _fresh_espeak() as espeak:
        espeak.set_voice(voice, words_per_minute or voice.words_per_minute, voice.pitch if pitch is None else pitch)
        recording = espeak.say(text)
    return _at_sampling_rate(recording, text)


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    """`espeak_EVENT` of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass
class _Recording:
    rate: int
    pcm: list[bytes] = field(default_factory=list)  # int16
    phonemes: list[tuple[float, str]] = field(default_factory=list)  # (second, mnemonic)


class _Espeak:
    """One loaded copy of the library."""

    def __init__(self, library: ctypes.CDLL, data: str) -> None:
        self._library = library
        options = _PHONEME_EVENTS | _DO_NOT_EXIT
        self._rate: int = library.espeak_Initialize(_RETRIEVAL, 0, data.encode(), options)
        if self._rate <= 0:
            raise DataError(
                f"espeak-ng can't read its data in {data!r}: a path of over 150 characters is one cause. "
                "Reinstall the package espeakng-loader, in a folder with a shorter path."
            )
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # the clock's, otherwise

    def set_voice(self, voice: Voice, words_per_minute: int, pitch: int) -> None:
        """Raises DataError where this espeak-ng has no such voice."""
        if self._library.espeak_SetVoiceByName(voice.espeak.encode()):
            raise DataError(f"espeak-ng has no voice {voice.espeak!r}. Known voices of the demo: {', '.join(VOICES)}.")
        self._library.espeak_SetParameter(_RATE, words_per_minute, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)

    def say(self, text: str) -> _Recording:
        """16-bit samples at the library's own rate, and phonemes with the second each begins at.

        Raises:
            DataError: it can't say this text.
        """
        recording = _Recording(self._rate)
        callback = _Callback(_collector(recording))
        self._library.espeak_SetSynthCallback(callback)
        spoken = text.encode()
        status = self._library.espeak_Synth(
            spoken, ctypes.c_size_t(len(spoken) + 1), 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        self._library.espeak_Synchronize()
        if status or not recording.pcm:
            raise DataError(f"espeak-ng can't say {text!r} (status {status}). Use words of letters a to z.")
        return recording


def _collector(recording: _Recording) -> Callable[..., int]:
    """What espeak-ng calls with each piece of sound and the events in it; 0 = go on."""

    def collect(samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: "ctypes._Pointer[_Event]") -> int:
        """Keep `count` samples and the phonemes among the events (espeak-ng's speak_lib.h, t_espeak_callback)."""
        if samples and count > 0:
            recording.pcm.append(ctypes.string_at(samples, 2 * count))
        index = 0
        while events and events[index].type != _EVENT_LIST_TERMINATED:
            event = events[index]
            if event.type == _EVENT_PHONEME:
                mnemonic = bytes(event.id.string).decode("utf-8", "replace")
                recording.phonemes.append((event.audio_position / 1000, mnemonic))
            index += 1
        return 0

    return collect


@contextmanager
def _fresh_espeak() -> Iterator[_Espeak]:
    """A newly loaded library, unloaded afterwards: its globals start over."""
    try:
        import espeakng_loader
    except ImportError:
        raise DataError("Speech needs the package espeakng-loader: pip install 'qwen3-vlm[demo]'.") from None
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        yield _Espeak(library, os.path.dirname(espeakng_loader.get_data_path()))
    finally:
        library.espeak_Terminate()
        _unload(library)


def _unload(library: ctypes.CDLL) -> None:
    if os.name == "posix":
        close = ctypes.CDLL(None).dlclose
        close.argtypes = (ctypes.c_void_p,)
        close(library._handle)


def _at_sampling_rate(recording: _Recording, text: str) -> Utterance:
    import soxr

    pcm = np.frombuffer(b"".join(recording.pcm), dtype=np.int16)
    wave = soxr.resample(pcm.astype(np.float32) / 32768, recording.rate, SAMPLING_RATE)
    if not np.isfinite(wave).all() or not wave.any():
        raise DataError(f"espeak-ng said nothing for {text!r}. Use words of letters a to z.")
    places = [(round(second * SAMPLING_RATE), mnemonic) for second, mnemonic in recording.phonemes]
    return Utterance(np.clip(wave, -1, 1).astype(np.float32), places)

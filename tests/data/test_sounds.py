"""Sounds from real files in the formats that people have, and every way in which they are broken."""

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from qwen3_vlm.data import sounds
from qwen3_vlm.data.sounds import load_sound
from qwen3_vlm.errors import AudioError

RATE = 16_000
SOUND = (0.4 * np.sin(np.arange(RATE)[:, None] * [0.05, 0.07])).astype(np.float32)  # (S, A)


def encode(form: str, subtype: str | None = None, sound: np.ndarray = SOUND) -> bytes:  # type: ignore[type-arg]
    stream = io.BytesIO()
    soundfile.write(stream, sound, RATE, format=form, subtype=subtype)
    return stream.getvalue()


def reason_of(source: bytes | Path, max_seconds: float = 10.0) -> str:
    with pytest.raises(AudioError) as error:
        load_sound(source, max_seconds=max_seconds, name="x.wav")
    assert str(error.value).startswith("The sound x.wav ")
    return error.value.reason


@pytest.mark.parametrize(
    ("form", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 1 / 32768),
        ("WAV", "FLOAT", 0),
        ("WAVEX", "PCM_24", 1e-6),
        ("RF64", "PCM_16", 1 / 32768),
        ("AIFF", "PCM_16", 1 / 32768),
        ("FLAC", "PCM_16", 1 / 32768),
        ("OGG", "VORBIS", 0.05),
        ("MP3", "MPEG_LAYER_III", 0.1),
    ],
)
def test_samples_come_out_as_they_went_in(form: str, subtype: str, tolerance: float, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encode(form, subtype))
    waveform, rate = load_sound(tmp_path / "x", max_seconds=1.5, name="x")
    assert (waveform.shape, waveform.dtype, rate) == ((2, RATE), np.float32, RATE)
    assert waveform.flags.c_contiguous
    assert np.abs(waveform.T - SOUND).max() <= tolerance


@pytest.mark.parametrize("form", ["WAV", "RF64", "AIFF", "FLAC"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.999])
def test_what_is_cut_off_is_never_taken_for_whole(form: str, share: float) -> None:
    data = encode(form, "PCM_16")
    assert reason_of(data[: int(share * len(data))]) in ("truncated_audio", "unreadable_audio")


def test_a_cut_wav_says_so() -> None:
    data = encode("WAV", "PCM_16")
    for size in (13, 30, 44, 45, 1000, len(data) - 1):
        assert reason_of(data[:size]) == "truncated_audio"


def test_wav_from_a_pipe_has_no_sizes() -> None:
    data = bytearray(encode("WAV", "PCM_16"))
    place = data.index(b"data") + 4
    for unknown in (0xFFFFFFFF,):
        struct.pack_into("<I", data, place, unknown)
        struct.pack_into("<I", data, 4, unknown)
        assert load_sound(bytes(data), max_seconds=2, name="x")[0].shape == (2, RATE)


def test_every_kind_of_bad_sound_has_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = SOUND.copy()
    bad[500, 1] = np.nan
    assert reason_of(encode("WAV", "FLOAT", bad)) == "audio_not_finite"
    bad[500, 1] = np.inf
    assert reason_of(encode("WAV", "FLOAT", bad)) == "audio_not_finite"
    assert reason_of(encode("WAV", "PCM_16", SOUND[:0])) == "empty_audio"
    assert reason_of(b"") == "unreadable_audio"
    assert reason_of(b"RIFF1234WAVE") == "truncated_audio"
    assert reason_of(b"no sound at all" * 100) == "unreadable_audio"
    assert reason_of(encode("WAV"), max_seconds=0.99) == "audio_too_long"
    assert reason_of(encode("MP3"), max_seconds=0.5) == "audio_too_long"
    assert reason_of(encode("OGG"), max_seconds=0.5) == "audio_too_long"
    assert reason_of(encode("WAV", "PCM_16", np.zeros((10, 17)))) == "unreadable_audio"
    assert reason_of(tmp_path / "none.wav") == "missing_audio"
    assert reason_of(tmp_path) == "unreadable_audio"
    os.mkfifo(tmp_path / "pipe")
    assert reason_of(tmp_path / "pipe") == "unreadable_audio"  # and does not wait for a writer
    (tmp_path / "x.wav").write_bytes(encode("WAV"))
    monkeypatch.setattr(sounds, "MAX_AUDIO_BYTES", 1000)
    assert reason_of(tmp_path / "x.wav") == "audio_too_long"


def test_a_header_that_lies_allocates_nothing() -> None:
    data = bytearray(encode("FLAC", "PCM_16"))
    data[21] |= 0x0F  # STREAMINFO: total samples, 36 bits
    data[22:26] = b"\xff" * 4
    assert reason_of(bytes(data)) == "audio_too_long"


@given(
    st.binary(max_size=300) | st.binary(max_size=60).map(lambda tail: encode("WAV", "PCM_16", SOUND[:40])[:44] + tail)
)
def test_no_bytes_can_do_worse_than_a_reason(data: bytes) -> None:
    try:
        waveform, _ = load_sound(data, max_seconds=1, name="x")
    except AudioError as error:
        assert error.reason
    else:
        assert np.isfinite(waveform).all()

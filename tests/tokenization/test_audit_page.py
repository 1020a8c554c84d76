"""The files of an audit: complete, the same every time, readable anywhere, and never running anything."""

import base64
import io
import json
import re
import wave
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen3_vlm.errors import StorageError
from qwen3_vlm.tokenization import audit_page
from qwen3_vlm.tokenization.audit import UTIAudit, audit_uti
from qwen3_vlm.tokenization.audit_page import (
    code_colours,
    number,
    picture_sheet,
    render_audit,
    sound_reel,
    spectrogram_png,
    wav_bytes,
    waveform_path,
    write_audit,
)
from tests.tokenization.plain_codecs import RATE, Worse, plain_pictures, plain_sounds, plain_uti

FILES = {"report.json", "recon.png", "recon.wav", "index.html"}


@pytest.fixture(scope="module")
def audit() -> UTIAudit:
    return audit_uti(plain_uti(), images=plain_pictures(), sounds=plain_sounds(), texts=["a"], reopen=plain_uti)


def read_wav(data: bytes) -> tuple[np.ndarray, int]:
    with wave.open(io.BytesIO(data)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
        return samples.T / 32767, file.getframerate()


def test_four_files_and_the_same_every_time(audit: UTIAudit, tmp_path: Path) -> None:
    assert write_audit(audit, tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "index.html"
    first = {path.name: path.read_bytes() for path in (tmp_path / "new" / "folder").iterdir()}
    assert set(first) == FILES
    again = audit_uti(plain_uti(), images=plain_pictures(), sounds=plain_sounds(), texts=["a"], reopen=plain_uti)
    write_audit(again, tmp_path / "other")
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()} == first
    assert json.loads(first["report.json"]) == audit.report


def test_a_full_disk_leaves_no_report(audit: UTIAudit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """report.json is written last: one that is there belongs to whole files."""

    def full(path: Path, text: str) -> None:
        raise StorageError(f"{path} could not be written because the disk is full.")

    monkeypatch.setattr(audit_page, "atomic_write_text", full)
    with pytest.raises(StorageError):
        write_audit(audit, tmp_path)
    assert not (tmp_path / "report.json").exists()


def test_what_an_earlier_audit_left_is_not_mistaken(audit: UTIAudit, tmp_path: Path) -> None:
    write_audit(audit, tmp_path)
    silent = audit_uti(plain_uti(), images=plain_pictures())
    write_audit(silent, tmp_path)
    assert not (tmp_path / "recon.wav").exists()
    assert (tmp_path / "recon.png").exists()


def test_originals_stand_above_reconstructions(audit: UTIAudit) -> None:
    items = [item for item in audit.items if item.modality == "image"]
    sheet = np.asarray(Image.open(io.BytesIO(picture_sheet(items))))
    scale, margin = 8, audit_page.MARGIN  # 16 pixels are shown as 128
    for column, item in enumerate(items):
        left = margin + column * (128 + margin)
        for top, pixels in ((margin, item.original), (margin + 128 + margin // 2, item.decoded)):
            shown = sheet[top : top + 128, left : left + 128]
            assert (shown == pixels.repeat(scale, 0).repeat(scale, 1)).all()


def test_more_pictures_than_a_row_holds(audit: UTIAudit) -> None:
    items = [item for item in audit.items if item.modality == "image"][:1] * 19
    width, height = Image.open(io.BytesIO(picture_sheet(items))).size
    assert width < 9 * (128 + audit_page.MARGIN)
    assert height > 3 * 2 * 128


def test_the_reel_plays_original_gap_reconstruction(audit: UTIAudit) -> None:
    items = [item for item in audit.items if item.modality == "audio"][:2]
    reel = sound_reel(items, RATE)
    samples, rate = read_wav(wav_bytes(reel, RATE))
    assert rate == RATE
    assert samples.shape[0] == 1
    start = 0
    for sound, gap in ((items[0].original, 0.25), (items[0].decoded, 0.75), (items[1].original, 0.25)):
        length = sound.shape[1]
        assert np.abs(samples[:, start : start + length] - sound).max() < 1e-4
        silence = samples[:, start + length : start + length + round(gap * RATE)]
        assert silence.shape[1] == round(gap * RATE)
        assert not silence.any()
        start += length + round(gap * RATE)
    assert samples.shape[1] == start + items[1].decoded.shape[1]


def test_wav_of_two_channels_beyond_full_scale() -> None:
    samples, rate = read_wav(wav_bytes(np.array([[0.5, 2.0, -3.0], [0.0, -0.25, 0.25]]), 44_100))
    assert rate == 44_100
    assert samples == pytest.approx(np.array([[0.5, 1, -1], [0, -0.25, 0.25]]), abs=1e-4)


def test_spectrogram_has_low_sounds_at_the_bottom() -> None:
    """A low tone lights up the lower half, and louder is brighter."""
    time = np.arange(RATE) / RATE
    loud, soft = (level * np.sin(2 * np.pi * 300 * time)[None] for level in (0.9, 0.01))
    pictures = [np.asarray(Image.open(io.BytesIO(spectrogram_png(s, RATE))).convert("L"), float) for s in (loud, soft)]
    assert pictures[0].shape[0] == 80
    assert pictures[0][40:].mean() > 2 * pictures[0][:40].mean()
    assert pictures[0].max() > pictures[1].max()


def test_the_same_code_has_the_same_colour() -> None:
    codes = np.array([[0, 1, 2], [2, 1, 0]])
    picture = np.asarray(Image.open(io.BytesIO(code_colours(codes))))
    assert picture.shape == (2, 3, 3)
    assert (picture[0] == picture[1, ::-1]).all()
    many = np.asarray(Image.open(io.BytesIO(code_colours(np.arange(1024).reshape(32, 32))))).reshape(-1, 3)
    assert len(np.unique(many, axis=0)) > 900


def test_waveforms_of_any_length_have_a_path() -> None:
    for length in (1, 2, 319, 320, 321, 50_000):
        path = waveform_path(np.sin(np.arange(length))[None])
        assert re.fullmatch(r"M(-?\d+ -?\d\.\d\d(L|Z))+", path)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(None, "dB", "–"), (100.0, "dB", "equal"), (22.345, "dB", "22.34 dB"), (0.5, "%", "50 %"), (0.125, "", "0.12")],
)
def test_figures_for_people(value: float | None, unit: str, text: str) -> None:
    assert number(value, unit) == text


class Tags(HTMLParser):
    """All tags with their attributes, and that every one is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "path", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(audit: UTIAudit) -> None:
    page = render_audit(audit)
    tags = Tags(page).tags
    sources = [attributes["src"] for tag, attributes in tags if "src" in attributes]
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?://|<script|javascript:|\son\w+=", page)
    names = [tag for tag, _ in tags]
    assert names.count("audio") == 2 * 5
    assert names.count("img") == 3 * 3 + 3 * 5
    assert "viewport" in page
    assert "prefers-color-scheme: dark" in page
    assert "default-src 'none'" in page


def test_pictures_and_sounds_are_inside_the_page(audit: UTIAudit) -> None:
    tags = Tags(render_audit(audit)).tags
    payloads = [attributes["src"].split(",", 1) for tag, attributes in tags if "src" in attributes]
    pictures = [base64.b64decode(data) for kind, data in payloads if "image/png" in kind]
    first = next(item for item in audit.items if item.modality == "image")
    assert (np.asarray(Image.open(io.BytesIO(pictures[0]))) == first.original).all()
    assert (np.asarray(Image.open(io.BytesIO(pictures[1]))) == first.decoded).all()
    sounds = [base64.b64decode(data) for kind, data in payloads if "audio/wav" in kind]
    heard = next(item for item in audit.items if item.modality == "audio")
    assert np.abs(read_wav(sounds[1])[0] - heard.decoded).max() < 1e-4


def test_the_verdict_stands_at_the_top(audit: UTIAudit) -> None:
    assert "All 30 checks pass" in render_audit(audit)
    assert "No baseline was given" in render_audit(audit)
    worse = audit_uti(
        plain_uti(image=Worse()),
        images=plain_pictures(),
        sounds=plain_sounds(),
        texts=["a"],
        baseline=json.loads(json.dumps(audit.report)),
    )
    page = render_audit(worse)
    assert "of 34 checks and gates fail" in page
    assert page.index("PSNR: ") < page.index("<h2>Gates</h2>") < page.index("<h2>Pictures</h2>")


def test_names_can_not_break_the_page() -> None:
    nasty = '<script>alert(1)</script>\x1b[31m & \u202e".png'
    sounds = {nasty: plain_sounds()["short.wav"], "silent": plain_sounds()["silent.wav"]}
    uti = plain_uti(silence="refuse")
    result = audit_uti(uti, images={nasty: plain_pictures()["wide.png"]}, sounds=sounds)
    page = render_audit(result)
    assert "<script" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;" in page
    assert "Refused sounds" in page
    Tags(page)


def test_long_lists_and_long_sounds_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_page, "SHOWN", {"image": 2, "audio": 1})
    monkeypatch.setattr(audit_page, "MAX_SECONDS", 0.1)
    sounds = {"long.wav": plain_sounds()["long.wav"]}
    result = audit_uti(plain_uti(), images=plain_pictures(), sounds=sounds)
    page = render_audit(result)
    assert "The first 2 of 3 are shown." in page
    assert "its beginning" in page
    clips = [attributes["src"] for tag, attributes in Tags(page).tags if tag == "audio"]
    assert read_wav(base64.b64decode(clips[0].split(",")[1]))[0].shape == (1, 800)
    assert len(result.report["items"]) == 4, "the report has all"


def test_a_space_without_sound_or_pictures() -> None:
    from qwen3_vlm.tokenization.text import LosslessText
    from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
    from qwen3_vlm.tokenization.uti_config import TextConfig, UTIConfig
    from tests.tiny import tiny_tokenizer

    uti = UnifiedTokenizer(UTIConfig(text=TextConfig(tokenizer="tiny")), LosslessText(tiny_tokenizer(), 384, "tiny"))
    page = render_audit(audit_uti(uti))
    assert "<h2>Pictures</h2>" not in page
    assert "AUDIO_CB0" not in page

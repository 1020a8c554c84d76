"""An audit as files: report.json, recon.png, recon.wav and index.html, where one sees and hears what comes back.

The page is one self-contained file for any screen, without scripts; pictures and sounds are inside it.
"""

import base64
import io
import wave
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from qwen3_vlm.storage import atomic_write_bytes, atomic_write_json, atomic_write_text
from qwen3_vlm.tokenization.audit import UTIAudit
from qwen3_vlm.tokenization.audit_checks import Item
from qwen3_vlm.tokenization.quality import MAX_DB, MEL_FLOOR, log_mel
from qwen3_vlm.tokenization.token_space import TokenSpace

__all__ = ["PAGE_FILE", "REPORT_FILE", "write_audit"]

REPORT_FILE, PAGE_FILE = "report.json", "index.html"
PICTURES_FILE, SOUND_FILE = "recon.png", "recon.wav"
TEMPLATE = "audit_page.html"
SHOWN = {"image": 24, "audio": 8}  # items on the page, in recon.png and recon.wav; the report has all
MAX_SECONDS = 12.0  # of a sound that is shown
SHORT_GAP, LONG_GAP = 0.25, 0.75  # seconds, in recon.wav between the two of a pair and after it
TILE, COLUMNS, MARGIN = 128, 8, 6  # pixels of recon.png: smallest picture, pictures a row, space between
ENVELOPE = 320  # columns of a waveform's drawing
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}  # HTML has no ESC
_HEAT = ((0, 0, 4), (60, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191))


def write_audit(audit: UTIAudit, folder: str | Path) -> Path:
    """Write the four files, each complete or not at all, report.json last; returns the page.

    A modality without items has no recon file, and one that an earlier audit left is removed.

    Raises:
        StorageError: the folder can't be written.
    """
    folder = Path(folder)
    pictures, sounds = (_shown(audit, modality) for modality in ("image", "audio"))
    rate = audit.token_space.audio.sampling_rate_hz if audit.token_space.audio else 0
    contents = {
        PICTURES_FILE: picture_sheet(pictures) if pictures else None,
        SOUND_FILE: wav_bytes(sound_reel(sounds, rate), rate) if sounds else None,
    }
    for name, content in contents.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            atomic_write_bytes(folder / name, content)
    atomic_write_text(folder / PAGE_FILE, render_audit(audit))
    atomic_write_json(folder / REPORT_FILE, audit.report)
    return folder / PAGE_FILE


def render_audit(audit: UTIAudit) -> str:
    """The page as text."""
    template = resources.files("qwen3_vlm.tokenization").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["number"] = number
    report = audit.report
    counts = {modality: sum(item.modality == modality for item in audit.items) for modality in SHOWN}
    page = environment.from_string(template).render(
        report=report,
        space=audit.token_space,
        failures=audit.failures,
        tiles=_tiles(report, audit.token_space),
        pictures=[_picture_card(item, audit.token_space) for item in _shown(audit, "image")],
        sounds=[_sound_card(item, audit.token_space) for item in _shown(audit, "audio")],
        counts=counts,
        ranges=_range_rows(audit.token_space, report),
        checks={name: [c for c in report["checks"] if c["modality"] == name] for name in ("text", "image", "audio")},
    )
    return page.translate(_CONTROL_PICTURES)


def number(value: float | None, unit: str = "", digits: int = 2) -> str:
    """A figure for people: "equal" at the end of the decibel scale, a dash where there is none."""
    if value is None:
        return "–"
    if unit == "dB" and value >= MAX_DB:
        return "equal"
    text = f"{100 * value:.0f} %" if unit == "%" else f"{value:.{digits}f}"
    return f"{text} {unit}" if unit not in ("", "%") else text


def picture_sheet(items: Sequence[Item]) -> bytes:
    """PNG: rows of originals, and under each its reconstruction."""
    height, width = items[0].original.shape[:2]
    scale = max(1, -(-TILE // max(height, width)))
    rows, columns = -(-len(items) // COLUMNS), min(len(items), COLUMNS)
    step = (height * scale + MARGIN // 2, width * scale + MARGIN)
    sheet = np.full((rows * (2 * step[0] + 2 * MARGIN), columns * step[1] + MARGIN, 3), 255, np.uint8)
    for index, item in enumerate(items):
        top = index // COLUMNS * (2 * step[0] + 2 * MARGIN) + MARGIN
        left = index % COLUMNS * step[1] + MARGIN
        for half, pixels in enumerate((item.original, item.decoded)):
            large = np.kron(pixels, np.ones((scale, scale, 1), np.uint8))
            start = top + half * step[0]
            sheet[start : start + large.shape[0], left : left + large.shape[1]] = large
    return png_bytes(Image.fromarray(sheet))


def sound_reel(items: Sequence[Item], sampling_rate_hz: int) -> NDArray[Any]:
    """(A, S): each original, a short gap, what came back, a longer gap."""
    channels = items[0].original.shape[0]
    parts = []
    for item in items:
        for sound, gap in ((item.original, SHORT_GAP), (item.decoded, LONG_GAP)):
            parts += [_beginning(sound, sampling_rate_hz), np.zeros((channels, round(gap * sampling_rate_hz)))]
    return np.concatenate(parts[:-1], axis=1)


def wav_bytes(sound: NDArray[Any], sampling_rate_hz: int) -> bytes:
    """(A, S) within ±1 as 16-bit WAV; what lies beyond is cut off."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(sound.shape[0])
        file.setsampwidth(2)
        file.setframerate(sampling_rate_hz)
        file.writeframes((np.clip(sound.T, -1, 1) * 32767).round().astype("<i2").tobytes())
    return stream.getvalue()


def png_bytes(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def spectrogram_png(sound: NDArray[Any], sampling_rate_hz: int) -> bytes:
    """Log-mel magnitudes of the first channel, low sounds at the bottom, −80 dB to full scale."""
    floor = np.log10(MEL_FLOOR)
    level = np.clip(1 - log_mel(sound[0], sampling_rate_hz)[::-1] / floor, 0, 1)
    stops = np.linspace(0, 1, len(_HEAT))
    palette = [
        [np.interp(value, stops, channel) for channel in zip(*_HEAT, strict=True)] for value in np.linspace(0, 1, 256)
    ]
    picture = Image.fromarray((level * 255).astype(np.uint8), "L")
    picture.putpalette(np.array(palette).round().astype(np.uint8).tobytes())
    return png_bytes(picture)


def code_colours(codes: NDArray[np.int64]) -> bytes:
    """PNG with a pixel per code (rows, columns): the same code has the same colour, neighbours differ clearly."""
    hue = (codes * 0.618034 % 1 * 255).astype(np.uint8)
    value = 150 + codes * 0.754878 % 1 * 105
    picture = np.stack([hue, np.full_like(hue, 150), value.astype(np.uint8)], axis=-1)
    return png_bytes(Image.fromarray(picture, "HSV").convert("RGB"))


def waveform_path(sound: NDArray[Any]) -> str:
    """SVG path of the first channel's envelope, 0 … `ENVELOPE` across, −1 … 1 upside down."""
    samples = sound[0].astype(np.float64)
    edges = np.linspace(0, len(samples), min(ENVELOPE, len(samples)) + 1).astype(int)[:-1]
    high, low = np.maximum.reduceat(samples, edges), np.minimum.reduceat(samples, edges)
    across = np.linspace(0, ENVELOPE, len(edges))
    upper = [f"{x:.0f} {-y:.2f}" for x, y in zip(across, np.clip(high, 0.01, 1), strict=True)]
    lower = [f"{x:.0f} {-y:.2f}" for x, y in zip(across[::-1], np.clip(low, -1, -0.01)[::-1], strict=True)]
    return "M" + "L".join(upper + lower) + "Z"


def _shown(audit: UTIAudit, modality: str) -> list[Item]:
    return [item for item in audit.items if item.modality == modality][: SHOWN[modality]]


def _beginning(sound: NDArray[Any], sampling_rate_hz: int) -> NDArray[Any]:
    return sound[:, : round(MAX_SECONDS * sampling_rate_hz)]


def _uri(kind: str, data: bytes) -> Markup:
    return Markup(f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}")


def _picture_card(item: Item, space: TokenSpace) -> dict[str, Any]:
    codes = space.image_from_global(item.ids)
    pictures = [png_bytes(Image.fromarray(pixels)) for pixels in (item.original, item.decoded)]
    return {
        "item": item,
        "original": _uri("image/png", pictures[0]),
        "decoded": _uri("image/png", pictures[1]),
        "codes": _uri("image/png", code_colours(codes)),
        "pixelated": max(item.original.shape[:2]) < TILE,
        "first_ids": _first_ids(item),
    }


def _sound_card(item: Item, space: TokenSpace) -> dict[str, Any]:
    audio = space.audio
    rate = audio.sampling_rate_hz if audio else 0
    seconds = item.original.shape[1] / rate
    codes = space.audio_from_global(item.ids)
    sides = []
    for label, sound in (("original", item.original), (f"from {len(item.ids):,} ids", item.decoded)):
        part = _beginning(sound, rate)
        sides.append(
            {
                "label": label,
                "wave": waveform_path(part),
                "spectrogram": _uri("image/png", spectrogram_png(part, rate)),
                "sound": _uri("audio/wav", wav_bytes(part, rate)),
            }
        )
    shown = codes[:, : int(min(seconds, MAX_SECONDS) * audio.frame_rate_hz) + 1] if audio else codes
    return {
        "item": item,
        "seconds": seconds,
        "cut": seconds > MAX_SECONDS,
        "sides": sides,
        "codes": _uri("image/png", code_colours(shown)),
        "codebooks": len(codes),
        "envelope": ENVELOPE,
        "first_ids": _first_ids(item),
    }


def _first_ids(item: Item) -> str:
    more = " …" if len(item.ids) > 24 else ""
    return " ".join(map(str, item.ids[:24].tolist())) + more


def _tiles(report: dict[str, Any], space: TokenSpace) -> list[tuple[str, str, str]]:
    """(value, label, note) of the figures at the top."""
    tiles = []
    for modality, figure, unit, label in (
        ("image", "psnr_db", "dB", "PSNR"),
        ("image", "ssim", "", "SSIM"),
        ("audio", "snr_db", "dB", "SNR, sample by sample"),
        ("audio", "log_mel_l1", "", "log-mel L1, lower is better"),
    ):
        summary = report["figures"].get(modality, {}).get(figure)
        if summary and summary["mean"] is not None:
            note = f"p10 {number(summary['p10'], unit)}, median {number(summary['p50'], unit)}"
            tiles.append((number(summary["mean"], unit), label, note))
    if space.image is not None:
        height, width = space.image.resolution
        tiles.append((f"{space.image.num_ids:,}", "ids per picture", f"{width} × {height} pixels"))
    if space.audio is not None:
        note = f"{space.audio.num_codebooks} codebooks × {space.audio.frame_rate_hz:g} frames"
        tiles.append((f"{space.audio.ids_per_second:g}", "ids per second of sound", note))
    return tiles


def _range_rows(space: TokenSpace, report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per range; bars by the logarithm of the size, as text is ten times all the rest."""
    used: dict[str, int] = {}
    for modality in ("image", "audio"):
        names = [name for name in space.ranges if name.startswith(modality.upper())]
        if modality in report["figures"]:  # it is not where no item of that kind was audited
            entries = report["figures"][modality]["codes_used"]
            used |= {name: entry["used"] for name, entry in zip(names, entries, strict=True)}
    top = max(np.log2(span.size + 1) for span in space.ranges.values())
    return [
        {"name": name, "span": span, "used": used.get(name), "bar": round(100 * float(np.log2(span.size + 1) / top))}
        for name, span in space.ranges.items()
    ]

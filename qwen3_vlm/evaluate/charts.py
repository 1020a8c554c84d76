"""Charts as inline SVG: small, sharp in print, and coloured by the page, so they follow dark mode.

They know nothing of runs: numbers in, markup out. All text is escaped here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

WIDTH, HEIGHT = 372, 208  # pixels at full size: three charts side by side
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 40
_ROW = 34  # of an interval chart
_LETTER = 6  # of its labels, about
STYLES = 6  # colours that the page has
_MAX_POINTS = 400  # per series; more are averaged in runs
_LOG_RATIO = 20.0  # a series that spans more than this is drawn on a logarithmic axis


@dataclass(frozen=True, slots=True)
class Series:
    """One line: (x, y) points by x. `style` is the number of its colour; `dots` marks single measurements."""

    label: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of an interval chart."""

    label: str
    value: float
    low: float
    high: float
    good: bool | None = None  # None: neither


@dataclass(frozen=True, slots=True)
class _Axis:
    """Maps values to pixels, straight or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) for v in (self.low, self.high, value)) if self.log else (
            self.low, self.high, value)  # fmt: skip
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def line_chart(series: Sequence[Series], x_label: str, y_label: str, title: str, *, straight: bool = False) -> Markup:
    """Lines over a common x axis; empty markup where there is no point to draw.

    Values that span more than a factor of 20 get a logarithmic axis, unless it is to be `straight`.
    """
    drawn = [Series(s.label, _thin(s.points), s.style, s.dots) for s in series if s.points]
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points]
    if not xs:
        return Markup("")
    log = not straight and min(ys) > 0 and max(ys) / min(ys) > _LOG_RATIO
    x_axis = _Axis(*_padded(min(xs), max(xs), 0.0), _LEFT, WIDTH - _RIGHT)
    y_axis = _Axis(*(_log_limits(ys) if log else _padded(min(ys), max(ys), 0.06)), HEIGHT - _BOTTOM, _TOP, log)
    parts = [_frame(x_axis, y_axis, x_label, (y_label + " (log)" if log else y_label).strip())]
    parts += [_line(s, x_axis, y_axis) for s in drawn]
    return _figure("".join(parts), HEIGHT, title, [(s.label, s.style) for s in drawn])


def interval_chart(bars: Sequence[Bar], x_label: str, title: str, threshold: float | None = None) -> Markup:
    """A dot and its interval per row, over an axis that begins at zero or below."""
    if not bars:
        return Markup("")
    height, left = _ROW * len(bars) + _BOTTOM + _TOP, max(76, 22 + _LETTER * max(len(bar.label) for bar in bars))
    ends = [bar.low for bar in bars] + [bar.high for bar in bars] + ([threshold] if threshold is not None else [])
    low, high = _padded(min(0.0, *ends), max(ends), 0.05)
    axis = _Axis(min(0.0, *ends) if min(ends) >= 0 else low, high, left, WIDTH - _RIGHT - 46)
    parts = [_x_ticks(axis, height), _x_title(x_label, left, height)]
    parts.append(_vertical(axis(0.0), height, "zero", ""))
    if threshold is not None:
        parts.append(_vertical(axis(threshold), height, "threshold", f"threshold {threshold:g}"))
    parts += [_interval_row(bar, axis, _TOP + _ROW * row + _ROW // 2, left) for row, bar in enumerate(bars)]
    return _figure("".join(parts), height, title, [])


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values within low…high: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about _MAX_POINTS points: means of equal runs."""
    run = math.ceil(len(points) / _MAX_POINTS)
    runs = [points[start : start + run] for start in range(0, len(points), run)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in runs]


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    """Limits a little wider than the data; quantities that are never negative do not get a negative axis."""
    margin = (high - low) * share if high > low else abs(low) * 0.1 or 1.0
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def _log_limits(values: Sequence[float]) -> tuple[float, float]:
    return min(values) / 1.1, max(values) * 1.1


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 2_000 else (1,)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
    ticks = _log_ticks(y_axis.low, y_axis.high) if y_axis.log else nice_ticks(y_axis.low, y_axis.high)
    lines = "".join(
        f'<line class="grid" x1="{x_axis.start}" x2="{x_axis.stop}" y1="{y_axis(t):.1f}" y2="{y_axis(t):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 8}" y="{y_axis(t) + 4:.1f}" text-anchor="end">{_number(t)}</text>'
        for t in ticks
    )
    middle, height = (y_axis.start + y_axis.stop) / 2, y_axis.start + _BOTTOM
    label = (
        f'<text class="axis" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{escape(y_label)}</text>"
    )
    return lines + label + _x_ticks(x_axis, height) + _x_title(x_label, _LEFT, height)


def _x_ticks(axis: _Axis, height: float) -> str:
    return "".join(
        f'<text class="tick" x="{axis(t):.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle">{_number(t)}</text>'
        for t in nice_ticks(axis.low, axis.high, 4)
    )


def _x_title(label: str, left: float, height: float) -> str:
    middle = (left + WIDTH - _RIGHT) / 2
    return f'<text class="axis" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(label)}</text>'


def _line(series: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    places = [(x_axis(x), y_axis(y)) for x, y in series.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    markup = f'<path class="line s{series.style}" d="{path}"/>'
    if series.dots or len(places) == 1:
        markup += "".join(
            f'<circle class="dot s{series.style}" cx="{px:.1f}" cy="{py:.1f}" r="2.6">'
            f"<title>{escape(series.label)}: {_number(y)} at {_number(x)}</title></circle>"
            for (px, py), (x, y) in zip(places, series.points, strict=True)
        )
    return markup


def _vertical(x: float, height: float, kind: str, label: str) -> str:
    text = f'<text class="tick" x="{x + 4:.1f}" y="{_TOP + 2}">{escape(label)}</text>' if label else ""
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{height - _BOTTOM}"/>{text}'


def _interval_row(bar: Bar, axis: _Axis, y: float, left: float) -> str:
    kind = {True: "good", False: "bad", None: "plain"}[bar.good]
    low, value, high = axis(bar.low), axis(bar.value), axis(bar.high)
    caps = "".join(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 5}" y2="{y + 5}"/>' for x in (low, high))
    return (
        f'<text class="axis" x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(bar.label)}</text>'
        f'<g class="interval {kind}"><line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>{caps}'
        f'<circle cx="{value:.1f}" cy="{y}" r="4.5"/></g>'
        f'<text class="value" x="{max(high, value) + 10:.1f}" y="{y + 4}">{bar.value:.3f}</text>'
    )


def _figure(body: str, height: float, title: str, legend: list[tuple[str, int]]) -> Markup:
    keys = "".join(f'<span><i class="s{style}"></i>{escape(label)}</span>' for label, style in legend)
    return Markup(
        f'<figure class="chart"><figcaption>{escape(title)}<span class="legend">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{body}</svg></figure>'
    )


def _number(value: float) -> str:
    """Short: 12,000 → 12k, 0.00010 → 1e-4."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"

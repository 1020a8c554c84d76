"""Charts are well-formed, drawn to scale and hold no unescaped text."""

import itertools
import math
import re
from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.evaluate.charts import Bar, Series, interval_chart, line_chart, nice_ticks


@settings(deadline=None, max_examples=100)
@given(st.floats(-1e6, 1e6), st.floats(1e-5, 1e6))
def test_ticks_are_round_and_inside(low: float, span: float) -> None:
    high = low + span
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 6
    slack = span * 1e-6
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    for first, second in itertools.pairwise(ticks):
        step = second - first
        digits = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(digits - nice) for nice in (1, 2, 5, 10)) < 0.05


points = st.lists(st.tuples(st.integers(0, 10_000), st.floats(-1e4, 1e4)), min_size=1, max_size=30)


@settings(deadline=None, max_examples=50)
@given(points)
def test_lines_stay_inside_the_frame(values: list[tuple[int, float]]) -> None:
    chart = line_chart([Series("s", values)], "x", "y", "t")
    ElementTree.fromstring(str(chart))
    path = re.search(r' d="M([^"]*)"', chart)
    assert path is not None
    for pair in path.group(1).split("L"):
        x, y = map(float, pair.split())
        assert 55.9 <= x <= 358.1
        assert 11.9 <= y <= 168.1


def test_a_logarithmic_axis_puts_equal_factors_at_equal_distances() -> None:
    chart = line_chart([Series("s", [(0, 10.0), (1, 1.0), (2, 0.1)])], "x", "y", "t")
    path = re.search(r' d="M([^"]*)"', chart)
    assert path is not None
    heights = [float(pair.split()[1]) for pair in path.group(1).split("L")]
    assert abs((heights[1] - heights[0]) - (heights[2] - heights[1])) < 0.2
    assert "(log)" in chart


def test_many_points_are_averaged() -> None:
    chart = line_chart([Series("s", [(x, float(x % 2)) for x in range(10_000)])], "x", "y", "t")
    assert chart.count("L") <= 401


def test_text_is_escaped() -> None:
    evil = "<script>alert('x')</script>"
    for chart in (
        line_chart([Series(evil, [(0, 1.0), (1, 2.0)], dots=True)], evil, evil, evil),
        interval_chart([Bar(evil, 1.0, 0.5, 1.5, True)], evil, evil, threshold=0.1),
    ):
        assert "<script" not in chart
        ElementTree.fromstring(str(chart))


def test_nothing_to_draw_is_nothing() -> None:
    assert not line_chart([Series("s", [])], "x", "y", "t")
    assert not interval_chart([], "x", "t")


def test_intervals_are_drawn_to_scale() -> None:
    chart = interval_chart([Bar("a", 2.0, 1.0, 3.0, True), Bar("b", -1.0, -2.0, 0.0, False)], "x", "t", threshold=1.0)
    centers = [float(x) for x in re.findall(r'circle cx="([\d.]+)"', chart)]
    zero, threshold = (
        float(re.search(rf'class="{kind}" x1="([\d.]+)"', chart).group(1))  # type: ignore[union-attr]
        for kind in ("zero", "threshold")
    )
    unit = threshold - zero
    assert abs((centers[0] - zero) - 2 * unit) < 0.3
    assert abs((centers[1] - zero) + unit) < 0.3

"""Charts say in their shapes and words what the figures are."""

from itertools import pairwise
from xml.etree import ElementTree as Xml

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_msr.report.charts import (
    WIDTH,
    Bin,
    Estimate,
    choose_ticks,
    draw_histograms,
    draw_intervals,
    draw_lines,
    spread,
)

numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 3))


def shapes(drawing: str, tag: str, shade: str) -> list[Xml.Element]:
    found = Xml.fromstring(drawing).iter(tag)
    return [shape for shape in found if shade in shape.get("class", "").split()]


def words(drawing: str) -> list[str]:
    return [text.text or "" for text in Xml.fromstring(drawing).iter("text")]


@given(numbers, numbers)
def test_ticks_ascend_and_reach_around_what_is_drawn(one, other):
    low, high = sorted((one, other))
    ticks = choose_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert all(before < after for before, after in pairwise(ticks))
    tiny = 1e-6 * max(high - low, 1e-3)
    assert ticks[0] <= low + tiny
    assert ticks[-1] >= high - tiny


def test_ticks_are_round():
    assert choose_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert choose_ticks(1, 10, inside=True) == [2, 4, 6, 8, 10]
    assert choose_ticks(0.478, 0.985) == [0.4, 0.6, 0.8, 1.0]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=6))
def test_labels_keep_their_distance_where_there_is_room(wanted):
    places = spread(wanted, 15, 0, 100)
    assert all(after - before >= 15 - 1e-9 for before, after in pairwise(sorted(places)))
    assert min(places) >= -1e-9
    assert max(places) <= 100
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    assert [places[number] for number in order] == sorted(places)


def test_labels_that_are_far_apart_stay_where_they_are():
    assert spread([50, 10, 90], 15, 0, 100) == [50, 10, 90]


def test_an_interval_lies_between_its_ends_on_the_axis():
    drawing = draw_intervals("AUC", [Estimate("model", 0.5, 0.0, 1.0)], 0.5, leads=1)
    (line,) = shapes(drawing, "line", "interval")
    (dot,) = shapes(drawing, "circle", "dot")
    assert (line.get("x1"), line.get("x2")) == ("10", f"{WIDTH - 10}")
    assert dot.get("cx") == f"{WIDTH / 2:g}"
    assert {"model", "0.500"} <= set(words(drawing))


def test_lines_start_and_end_where_their_points_do():
    drawing = draw_lines("HR", {"up": [(1, 0.0), (3, 1.0)], "flat": [(1, 0.0), (3, 0.0)]}, "k")
    up, flat = (shape.get("points", "").split() for shape in shapes(drawing, "polyline", "line"))
    assert up[0] == flat[0]
    assert float(up[-1].split(",")[1]) < float(flat[-1].split(",")[1])  # upward is less
    assert {"up", "flat", "k"} <= set(words(drawing))


def test_a_line_of_one_point_is_drawn():
    assert shapes(draw_lines("loss", {"valid": [(0, 3.0)]}, "step"), "polyline", "line")


def test_bars_are_as_high_as_their_shares():
    bins = [Bin(0, 0.5, 0.2), Bin(0.5, 1, 0.8)]
    bars = shapes(draw_histograms("p", {"targets": bins}, "p(yes)"), "rect", "bar")
    low, high = (float(bar.get("height", "")) for bar in bars)
    assert high == pytest.approx(4 * low, rel=0.02)


def test_names_from_the_catalogue_are_escaped():
    name = '</svg><script>alert("x")</script>'
    drawing = draw_intervals(name, [Estimate(name, 0.5, 0.4, 0.6)], 0.5, leads=1)
    assert "<script" not in drawing
    assert words(drawing).count(name) == 1
    assert Xml.fromstring(drawing).get("aria-label") == name

"""Charts say in their shapes and words what the figures are."""

from itertools import pairwise
from xml.etree import ElementTree as Xml

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_msr.report.charts import (
    BOLD,
    ROW,
    WIDTH,
    Bin,
    Estimate,
    choose_ticks,
    draw_histograms,
    draw_intervals,
    draw_lines,
    draw_reliability,
    measure,
    space_out,
    wrap,
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
    positions = space_out(wanted, 15, 0, 100)
    assert all(after - before >= 15 - 1e-9 for before, after in pairwise(sorted(positions)))
    assert min(positions) >= -1e-9
    assert max(positions) <= 100
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    assert [positions[number] for number in order] == sorted(positions)


def test_labels_that_are_far_apart_stay_where_they_are():
    assert space_out([50, 10, 90], 15, 0, 100) == [50, 10, 90]


def test_an_interval_lies_between_its_ends_on_the_axis():
    drawing = draw_intervals("AUC", [Estimate("model", 0.5, 0.0, 1.0)], 0.5, leads={"model"})
    (line,) = shapes(drawing, "line", "interval")
    (dot,) = shapes(drawing, "circle", "dot")
    start, end = float(line.get("x1", "")), float(line.get("x2", ""))
    assert (start, end) == (pytest.approx(WIDTH - end), pytest.approx(WIDTH - start))
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


def test_a_calibrated_probability_lies_on_the_diagonal():
    drawing = draw_reliability("p", {"raw": [(0.1, 0.5), (1.0, 0.5)], "true": [(0.5, 0.5)]}, "p")
    (diagonal,) = shapes(drawing, "line", "mark")
    (true,) = shapes(drawing, "circle", "s1")
    middle = [
        (float(diagonal.get(f"{axis}1", "")) + float(diagonal.get(f"{axis}2", ""))) / 2
        for axis in "xy"
    ]
    assert [float(true.get(name, "")) for name in ("cx", "cy")] == pytest.approx(middle, abs=0.1)
    assert len(shapes(drawing, "circle", "s0")) == 2
    assert {"raw", "true", "p", "0%", "100%"} <= set(words(drawing))


def test_bars_are_as_high_as_their_shares():
    bins = [Bin(0, 0.5, 0.2), Bin(0.5, 1, 0.8)]
    bars = shapes(draw_histograms("p", {"targets": bins}, "p(yes)"), "rect", "bar")
    low, high = (float(bar.get("height", "")) for bar in bars)
    assert high == pytest.approx(4 * low, rel=0.02)


def test_names_from_the_catalogue_are_escaped():
    name = '</svg><script>alert("x")</script>'
    drawing = draw_intervals(name, [Estimate(name, 0.5, 0.4, 0.6)], 0.5, leads={name})
    assert "<script" not in drawing
    assert words(drawing).count(name) == 1
    assert Xml.fromstring(drawing).get("aria-label") == name


@given(st.text(alphabet="abcWM .,'@", max_size=60), st.floats(20, 300))
def test_a_wrapped_label_has_all_its_letters_and_no_line_wider_than_the_room(label, room):
    lines = wrap(label, room, BOLD)
    assert "".join(lines).replace(" ", "") == "".join(label.split())
    assert all(measure(line, BOLD) <= room for line in lines)


def test_a_label_breaks_between_words():
    assert wrap("GRU4Rec on summaries", measure("GRU4Rec on ")) == ["GRU4Rec on", "summaries"]
    assert wrap("SASRec", 300) == ["SASRec"]


def test_a_long_name_makes_its_row_higher():
    long = Estimate("TALLRec's recipe: titles only, fine-tuned, text-only", 0.5, 0.4, 0.6)
    rows = [long, Estimate("chance", 0.5, 0.5, 0.5)]
    drawing = draw_intervals("AUC", rows, 0.5, leads=set())
    first, second = (float(dot.get("cy", "")) for dot in shapes(drawing, "circle", "dot"))
    assert second - first == ROW
    assert first > ROW
    assert {"chance", "0.500"} <= set(words(drawing))


def test_an_axis_reaches_what_it_is_to_be_compared_with():
    rows = [Estimate("model", 0.6, 0.55, 0.65)]
    drawing = draw_intervals("AUC", rows, 0.5, leads=set(), extent=(0.1, 0.9))
    ticks = [float(text.text or "") for text in shapes(drawing, "text", "tick")]
    assert (ticks[0], ticks[-1]) == (0, 1)

"""Small charts as inline SVG: intervals, lines, histograms and reliability diagrams.

Colours are classes of the page's style sheet, so that a chart follows light and dark mode. No
meaning depends on colour alone: lines end in their name and differ in dashes. A chart is drawn for
a width of 340 pixels, so that its text stays readable on a phone. Labels are measured and wrapped
here, because an SVG does neither.
"""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple
from xml.etree import ElementTree as Xml

from markupsafe import Markup
from PIL import ImageFont

WIDTH = 340
ROW = 34  # height of a row of an interval chart
LINE = 15  # least distance of two labels
SERIES = 6  # colours and dashes; the first is reserved for the first series
TOP, BOTTOM = 30, 38  # margins of a chart with axes
EDGE = 10  # margin without labels
PLOT = 180  # height between the axes
PANEL = 80  # height of each histogram between the axes
ROOM = 0.42 * WIDTH  # greatest width of the names of lines
FONT = 12.5  # pixels; as in the style sheet
# Width of DejaVu Sans, the widest font that the style sheet names, relative to Pillow's own font.
PLAIN, BOLD = 1.18, 1.35


class Estimate(NamedTuple):
    """A figure and its interval."""

    name: str
    value: float
    low: float
    high: float


class Bin(NamedTuple):
    """A bar of a histogram."""

    start: float
    end: float
    share: float


Line = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels.

    Attributes:
        low: The value at ``start``.
        high: The value at ``end``.
        start: In pixels.
        end: In pixels; less than ``start`` on an upward axis.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value, to a tenth."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def draw_intervals(
    label: str,
    estimates: Sequence[Estimate],
    mark: float,
    leads: Container[str],
    extent: Sequence[float] = (),
) -> Markup:
    """Draw estimates below each other on one axis, each a dot on the line of its interval.

    Args:
        label: Text alternative of the chart.
        estimates: From top to bottom.
        mark: A value to draw a line at, such as chance's.
        leads: Names of the estimates to emphasize.
        extent: Further values that the axis covers, such as those of a chart to compare with.
    """
    ends = [mark, *extent, *(end for row in estimates for end in (row.low, row.high))]
    steps = choose_ticks(min(ends), max(ends))
    across = Scale(steps[0], steps[-1], EDGE + measure("0.0"), WIDTH - EDGE - measure("0.0"))
    room = WIDTH - 3 * EDGE - measure("0.000", BOLD)
    names = [wrap(row.name, room, BOLD if row.name in leads else PLAIN) for row in estimates]
    heights = [ROW + LINE * (len(lines) - 1) for lines in names]
    height = sum(heights)
    svg = _open(label, height + 30)
    for step in steps:
        _line(svg, across(step), 0, across(step), height, "grid")
        _text(svg, across(step), height + 18, f"{step:g}", "tick", "middle")
    _line(svg, across(mark), 0, across(mark), height, "mark")
    for number, (row, lines) in enumerate(zip(estimates, names, strict=True)):
        shade = "lead" if row.name in leads else "rest"
        _draw_estimate(svg, across, row, lines, sum(heights[:number]), shade)
    return _close(svg)


def draw_lines(label: str, lines: Mapping[str, Line], x: str) -> Markup:
    """Draw named lines over a common axis, each name at the end of its line.

    Args:
        label: Text alternative of the chart.
        lines: Points (x, y) of each line, ascending in x; none is empty.
        x: Name of the horizontal axis.
    """
    points = [point for line in lines.values() for point in line]
    first, last = min(p[0] for p in points), max(p[0] for p in points)
    steps = choose_ticks(min(0, *(p[1] for p in points)), max(p[1] for p in points))
    names = [wrap(name, ROOM) for name in lines]
    end = _end_before(names)
    bottom = EDGE + max(PLOT, _spacing_of(names) * len(lines))
    left = _make_room(steps, "g")
    across = Scale(first, max(last, first + 1e-9), left, end)
    up = Scale(steps[0], steps[-1], bottom, EDGE)
    svg = _open(label, bottom + BOTTOM)
    _draw_levels(svg, up, steps, (left, end), "g")
    _draw_base(svg, across, choose_ticks(first, last, inside=True), bottom, x)
    for number, line in enumerate(lines.values()):
        _draw_line(svg, [(across(a), up(b)) for a, b in line], _shade(number))
    _write_names(svg, names, [up(line[-1][1]) for line in lines.values()], end, bottom)
    return _close(svg)


def draw_reliability(label: str, lines: Mapping[str, Line], x: str) -> Markup:
    """Draw reliability diagrams over each other: shares over probabilities, and the diagonal.

    Args:
        label: Text alternative of the chart.
        lines: Points (probability, share) of each, ascending in the probability; none is empty.
        x: Name of the horizontal axis.
    """
    names = [wrap(name, ROOM) for name in lines]
    steps = choose_ticks(0, 1)
    left, end, bottom = _make_room(steps, ".0%"), _end_before(names), EDGE + PLOT
    across, up = Scale(0, 1, left, end), Scale(0, 1, bottom, EDGE)
    svg = _open(label, bottom + BOTTOM)
    _draw_levels(svg, up, steps, (left, end), ".0%")
    _draw_base(svg, across, steps, bottom, x)
    _line(svg, across(0), up(0), across(1), up(1), "mark")
    for number, line in enumerate(lines.values()):
        positions = [(across(a), up(b)) for a, b in line]
        _draw_line(svg, positions, _shade(number))
        for a, b in positions[:-1]:
            _add(svg, "circle", f"dot {_shade(number)}", cx=a, cy=b, r=2)
    _write_names(svg, names, [up(line[-1][1]) for line in lines.values()], end, bottom)
    return _close(svg)


def draw_histograms(label: str, histograms: Mapping[str, Sequence[Bin]], x: str) -> Markup:
    """Draw histograms below each other, on the same axes.

    Args:
        label: Text alternative of the chart.
        histograms: Bins of each, ascending and side by side.
        x: Name of the horizontal axis.
    """
    bins = [bar for bars in histograms.values() for bar in bars]
    highest = choose_ticks(0, max(0.01, *(bar.share for bar in bins)))[-1]
    left = _make_room((0, highest), ".0%")
    across = Scale(bins[0].start, bins[-1].end, left, WIDTH - EDGE)
    bottom = len(histograms) * (PANEL + TOP)
    svg = _open(label, bottom + BOTTOM)
    for number, (name, bars) in enumerate(histograms.items()):
        base = (number + 1) * (PANEL + TOP)
        up = Scale(0, highest, base, base - PANEL)
        _draw_levels(svg, up, (0, highest), (left, WIDTH - EDGE), ".0%")
        _text(svg, left, base - PANEL - 9, name, f"name {_shade(number)}")
        _draw_bars(svg, across, up, bars, _shade(number))
    _draw_base(svg, across, choose_ticks(bins[0].start, bins[-1].end), bottom, x)
    return _close(svg)


def measure(text: str, weight: float = PLAIN) -> float:
    """Return the width of a label in pixels, in the widest font that may show it.

    Args:
        text: The label.
        weight: ``PLAIN`` or ``BOLD``.
    """
    return weight * _font().getlength(text)


def wrap(text: str, room: float, weight: float = PLAIN) -> list[str]:
    """Break a label into lines that are no wider than ``room`` pixels.

    Lines break between words, and inside words that are wider than that.

    Args:
        text: The label.
        room: In pixels; a single character may be wider.
        weight: As of :func:`measure`.
    """
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if measure(joined, weight) <= room:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and measure(lines[-1] + character, weight) > room:
                lines.append("")
            lines[-1] += character
    return lines


def choose_ticks(low: float, high: float, inside: bool = False) -> list[float]:
    """Choose three to seven round values that reach from ``low`` to ``high``.

    Args:
        low: The least value to be drawn.
        high: The greatest.
        inside: Whether ticks beyond these two are left out.
    """
    width = (high - low) or abs(high) or 1
    power = 10.0 ** math.floor(math.log10(width / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if width / (power * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]
    return [tick for tick in ticks if low <= tick <= high] if inside else ticks


def space_out(wanted: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Move positions until neighbours have a least distance, as little as one pass can.

    Args:
        wanted: Positions in pixels, in any order.
        least: Least distance of two positions, in pixels.
        low: Least position, unless there is no room.
        high: Greatest position.
    """
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    positions = [max(wanted[number], low) for number in order]
    for before, after in pairwise(range(len(positions))):
        positions[after] = max(positions[after], positions[before] + least)
    limit = high
    for number in reversed(range(len(positions))):
        positions[number] = min(positions[number], limit)
        limit = positions[number] - least
    found = dict(zip(order, positions, strict=True))
    return [found[number] for number in range(len(wanted))]


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT)


def _make_room(steps: Sequence[float], form: str) -> float:
    """Return the left margin, in pixels, that the values of an upward axis need."""
    return 2 * EDGE + max(measure(f"{step:{form}}") for step in steps)


def _write_lines(svg: Xml.Element, x: float, y: float, lines: Sequence[str], shade: str) -> None:
    """Write the lines of a label, the first at ``y``."""
    for number, line in enumerate(lines):
        _text(svg, x, y + LINE * number, line, shade)


def _spacing_of(names: Sequence[Sequence[str]]) -> float:
    """Return the least distance of two names, each wrapped into lines, in pixels."""
    return LINE * max(map(len, names))


def _end_before(names: Sequence[Sequence[str]]) -> float:
    """Return where lines end, in pixels, so that their names have room to the right."""
    return WIDTH - 2 * EDGE - max(measure(part) for parts in names for part in parts)


def _write_names(
    svg: Xml.Element,
    names: Sequence[Sequence[str]],
    wanted: Sequence[float],
    end: float,
    bottom: float,
) -> None:
    """Write the names of lines to their right, as near to the wanted heights as they fit."""
    apart = _spacing_of(names)
    middles = space_out(wanted, apart, EDGE + apart / 2 - LINE / 2, bottom)
    for number, (parts, middle) in enumerate(zip(names, middles, strict=True)):
        top = middle + 4 - LINE * (len(parts) - 1) / 2
        _write_lines(svg, end + EDGE, top, parts, f"name {_shade(number)}")


def _draw_estimate(
    svg: Xml.Element,
    across: Scale,
    row: Estimate,
    name: Sequence[str],
    top: float,
    shade: str,
) -> None:
    """Draw a row: the lines of its name and the figure above, dot and interval below."""
    _write_lines(svg, EDGE, top + 14, name, f"name {shade}")
    _text(svg, WIDTH - EDGE, top + 14, f"{row.value:.3f}", f"value {shade}", "end")
    middle = top + 24 + LINE * (len(name) - 1)
    _line(svg, across(row.low), middle, across(row.high), middle, f"interval {shade}")
    _add(svg, "circle", f"dot {shade}", cx=across(row.value), cy=middle, r=4.5)


def _draw_levels(
    svg: Xml.Element,
    up: Scale,
    steps: Sequence[float],
    ends: tuple[float, float],
    form: str,
) -> None:
    """Draw the grid lines of an upward axis, between two ends, and their values."""
    for step in steps:
        _line(svg, ends[0], up(step), ends[1], up(step), "grid")
        _text(svg, ends[0] - 6, up(step) + 4, f"{step:{form}}", "tick", "end")


def _draw_base(
    svg: Xml.Element, across: Scale, steps: Sequence[float], bottom: float, name: str
) -> None:
    """Write the values and the name of a horizontal axis."""
    for step in steps:
        _text(svg, across(step), bottom + 17, f"{step:g}", "tick", "middle")
    _text(svg, (across.start + across.end) / 2, bottom + 34, name, "axis", "middle")


def _draw_line(svg: Xml.Element, positions: Sequence[tuple[float, float]], shade: str) -> None:
    _add(svg, "polyline", f"line {shade}", points=" ".join(f"{a:g},{b:g}" for a, b in positions))
    _add(svg, "circle", f"dot {shade}", cx=positions[-1][0], cy=positions[-1][1], r=3)


def _draw_bars(svg: Xml.Element, across: Scale, up: Scale, bars: Sequence[Bin], shade: str) -> None:
    for bar in bars:
        left, right, top = across(bar.start) + 0.5, across(bar.end) - 0.5, up(bar.share)
        size = {"width": round(right - left, 1), "height": round(up.start - top, 1)}
        _add(svg, "rect", f"bar {shade}", x=left, y=top, **size)


def _shade(number: int) -> str:
    """Return the class of a series: the first has its own, the others share the rest in turn."""
    return f"s{1 + (number - 1) % (SERIES - 1) if number else 0}"


def _open(label: str, height: float) -> Xml.Element:
    size = {"viewBox": f"0 0 {WIDTH} {height:g}", "class": "chart"}
    return Xml.Element("svg", size | {"role": "img", "aria-label": label})


def _close(svg: Xml.Element) -> Markup:
    return Markup(Xml.tostring(svg, encoding="unicode"))  # noqa: S704 - Xml has escaped all texts


def _line(svg: Xml.Element, x1: float, y1: float, x2: float, y2: float, shade: str) -> None:
    _add(svg, "line", shade, x1=x1, y1=y1, x2=x2, y2=y2)


def _text(
    svg: Xml.Element, x: float, y: float, text: str, shade: str, anchor: str = "start"
) -> None:
    _add(svg, "text", shade, x=x, y=y, text_anchor=anchor).text = text


def _add(svg: Xml.Element, tag: str, shade: str, **attributes: float | str) -> Xml.Element:
    texts = {
        name.replace("_", "-"): value if isinstance(value, str) else f"{value:g}"
        for name, value in attributes.items()
    }
    return Xml.SubElement(svg, tag, {"class": shade, **texts})

"""Figures of studies in one style: points with their intervals, readable in greyscale.

Differences are shown by position, marker and line, never by colour alone. pyplot is not used, since
it has global state and opens windows. Equal data give equal bytes, with one version of Matplotlib.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, FAINT = "#1a1a1a", "#8c8c8c"
MARKERS = "osD^vPX<>"  # a group of rows each
LINES = ("-", "--", ":", "-.")  # a line of a sweep each
STYLE: Any = {  # Matplotlib types the keys one by one
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.titlesize": 9,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "svg.hashsalt": "mllm-msr",  # Matplotlib draws ids at random without one
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0,
}
STEPS = [1, 2, 2.5, 5, 10]  # between ticks
PANEL, ROW, SWEEP = 1.75, 0.24, 2.5  # inches: a panel's width, a row's height, a sweep's height


class Estimate(NamedTuple):
    """A figure with its interval; the bounds are NaN if there is none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Mark:
    """One experiment or scorer of a figure.

    Attributes:
        label: Label of the row, or the value on the axis of a sweep.
        estimates: Figure in each panel, by title of the panel.
        group: Title above the rows of its group, or name of its line in a sweep; empty for none.
        published: Published figure, drawn faintly, by title of the panel.
        filled: Whether it is the one that the others are compared with.
    """

    label: str
    estimates: Mapping[str, Estimate]
    group: str = ""
    published: Mapping[str, float] = field(default_factory=dict)
    filled: bool = False


def draw_rows(
    marks: Sequence[Mark], titles: Sequence[str], *, note: str, published: str, chance: str = ""
) -> Figure:
    """Draw a row for each mark and a panel for each title.

    Args:
        marks: The rows from the top; rows of a group are adjacent.
        titles: Titles of the panels.
        note: Text below the figure.
        published: Legend of the faint marks.
        chance: Label of the row whose figures are drawn as a line.
    """
    positions = _row_positions(marks)
    with rc_context(STYLE):
        height = ROW * (positions[-1] + 1) + 1.1
        figure = Figure((2.1 + PANEL * len(titles), height), layout="constrained")
        panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
        for panel, title in zip(panels, titles, strict=True):
            _draw_panel_of_rows(panel, marks, title, positions)
            level = next((mark.estimates[title] for mark in marks if mark.label == chance), None)
            if level:
                panel.axvline(level.value, color=FAINT, linestyle=":", linewidth=0.8, zorder=1)
        _name_rows(panels[0], marks, positions)
        _finish(figure, panels, marks, note, published)
    return figure


def draw_sweep(
    marks: Sequence[Mark], titles: Sequence[str], *, varied: str, note: str, published: str
) -> Figure:
    """Draw a panel for each title over the values of one setting, which are the marks' labels.

    The values of several lines stand at equal distances, since they often grow by factors.

    Args:
        marks: A line for each group, its values ascending; the first line has all values.
        titles: Titles of the panels.
        varied: Label of the axis.
        note: Text below the figure.
        published: Legend of the faint marks.
    """
    with rc_context(STYLE):
        figure = Figure((0.6 + (PANEL + 0.2) * len(titles), SWEEP), layout="constrained")
        panels = figure.subplots(1, len(titles), squeeze=False)[0]
        for panel, title in zip(panels, titles, strict=True):
            _draw_panel_of_sweep(panel, marks, title, named=panel is panels[0])
            panel.set_xlabel(varied)
        _finish(figure, panels, marks, note, published)
    return figure


def save_figure(figure: Figure, folder: Path) -> None:
    """Write ``figure.svg`` and ``figure.png``, the same bytes for the same figure."""
    with rc_context(STYLE):
        figure.savefig(folder / "figure.svg", metadata={"Date": None})
        figure.savefig(folder / "figure.png", dpi=200, metadata={"Software": None})


def _row_positions(marks: Sequence[Mark]) -> list[int]:
    """Return each row's position from the top; the title of each group has a line of its own."""
    positions, position, group = [], 0, ""
    for mark in marks:
        if mark.group != group:
            group, position = mark.group, position + 1
        positions.append(position)
        position += 1
    return positions


def _draw_panel_of_rows(
    panel: Axes, marks: Sequence[Mark], title: str, positions: Sequence[int]
) -> None:
    groups = list(dict.fromkeys(mark.group for mark in marks))
    for mark, position in zip(marks, positions, strict=True):
        estimate = mark.estimates[title]
        marker = MARKERS[groups.index(mark.group) % len(MARKERS)]
        panel.errorbar(
            [estimate.value],
            [position],
            xerr=_reach([estimate]),
            **_point_style(marker, mark.filled),
        )
        if title in mark.published:
            _draw_faint(panel, [mark.published[title]], [position + 0.3])  # beside ours
    panel.set_title(title)
    panel.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS, min_n_ticks=3))
    panel.grid(axis="x")
    panel.set_ylim(positions[-1] + 0.6, -0.6)  # the first row on top


def _name_rows(panel: Axes, marks: Sequence[Mark], positions: Sequence[int]) -> None:
    """Write the rows' labels, and the groups' titles in the lines above them."""
    rows = list(zip(positions, marks, strict=True))
    titles = {mark.group: position - 1 for position, mark in reversed(rows) if mark.group}
    named = [(position, mark.label) for position, mark in rows]
    named += [(position, group) for group, position in titles.items()]
    panel.set_yticks([position for position, _ in named], [name for _, name in named])
    for text in panel.get_yticklabels()[len(rows) :]:
        text.set_fontstyle("italic")
        text.set_color("#555555")


def _draw_panel_of_sweep(panel: Axes, marks: Sequence[Mark], title: str, *, named: bool) -> None:
    """Draw a line for each group of marks; if ``named``, the legend names them by this panel."""
    groups = list(dict.fromkeys(mark.group for mark in marks))
    labels = list(dict.fromkeys(mark.label for mark in marks))
    several = len(groups) > 1
    places = {label: float(labels.index(label)) if several else float(label) for label in labels}
    for number, group in enumerate(groups):
        line = [mark for mark in marks if mark.group == group]
        shift = 0.12 * (number - (len(groups) - 1) / 2)  # so that the bars do not overlap
        values = [places[mark.label] + shift for mark in line]
        label = group if several and named else None
        _draw_line(panel, line, title, values, style=number, label=label)
    known = [mark for mark in marks if title in mark.published]
    across, up = [places[mark.label] for mark in known], [mark.published[title] for mark in known]
    _draw_faint(panel, across, up, linestyle="--")
    panel.set_title(title)
    panel.set_xticks([places[label] for label in labels], labels)
    panel.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS, min_n_ticks=3))
    panel.grid(axis="y")


def _draw_line(
    panel: Axes,
    line: Sequence[Mark],
    title: str,
    values: Sequence[float],
    *,
    style: int,
    label: str | None,
) -> None:
    """Draw one line of a sweep.

    Args:
        panel: Where to draw.
        line: The marks of the line.
        title: Title of the panel, which chooses the figure of each mark.
        values: Where they stand on the axis.
        style: Number of the line's style.
        label: Its name in the legend; None leaves it out.
    """
    marker = MARKERS[style % len(MARKERS)]
    estimates = [mark.estimates[title] for mark in line]
    figures = [each.value for each in estimates]
    panel.plot(
        values,
        figures,
        color=INK,
        linewidth=0.9,
        linestyle=LINES[style % len(LINES)],
        marker=marker,
        markersize=4.5,
        markerfacecolor="white",
        label=label,
        zorder=2,
    )
    for value, mark, estimate in zip(values, line, estimates, strict=True):
        point = _point_style(marker, mark.filled)
        panel.errorbar([value], [estimate.value], yerr=_reach([estimate]), **point)


def _point_style(marker: str, filled: bool) -> dict[str, Any]:
    """Return the style of a point: filled with black or white."""
    return {
        "fmt": marker,
        "color": INK,
        "markersize": 4.5,
        "markerfacecolor": INK if filled else "white",
        "markeredgewidth": 0.9,
        "elinewidth": 0.9,
        "capsize": 2,
        "zorder": 3,
    }


def _draw_faint(
    panel: Axes, across: Sequence[float], up: Sequence[float], linestyle: str = ""
) -> None:
    """Draw published figures."""
    panel.plot(
        across,
        up,
        color="#b0b0b0",
        marker="x",
        markersize=5,
        linestyle=linestyle,
        linewidth=0.8,
        zorder=2,
    )


def _reach(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Return the distances from figures to their lower and upper bounds, [2, estimates]."""
    below = [max(0.0, each.value - each.low) for each in estimates]
    above = [max(0.0, each.high - each.value) for each in estimates]
    return [below, above]


def _finish(
    figure: Figure, panels: Sequence[Axes], marks: Sequence[Mark], note: str, published: str
) -> None:
    """Write the note, and a legend if there are published figures or several lines."""
    if any(mark.published for mark in marks):
        panels[0].plot([], [], color="#b0b0b0", marker="x", linestyle="", label=published)
    if panels[0].get_legend_handles_labels()[1]:
        figure.legend(loc="outside upper right", ncols=4)
    figure.supxlabel(note, fontsize=7.5, color="#555555", x=0.01, ha="left")

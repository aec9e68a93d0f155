"""Figures: what stands in them, that nothing overlaps, and that equal data give equal bytes."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from mllm_msr.study.figures import Estimate, Mark, draw_rows, draw_sweep, save_figure

TITLES = ["AUC, uniform", "HR@5"]
NAN = float("nan")


def mark(label: str, value: float, **more: object) -> Mark:
    figures = {title: Estimate(value, value - 0.1, value + 0.05) for title in TITLES}
    return Mark(label, figures, **more)


def rows() -> Figure:
    marks = [
        mark("MLLM-MSR", 0.9, group="ours", published={"AUC, uniform": 0.83}, filled=True),
        mark("SASRec", 0.7, group="sequential"),
        mark("GRU4Rec", 0.6, group="sequential"),
        mark("chance", 0.5, group="simple"),
    ]
    return draw_rows(marks, TITLES, note="a toy", published="somebody else's", chance="chance")


def sweep() -> Figure:
    marks = [mark(str(value), 0.8, published={"AUC, uniform": 0.7}) for value in (1, 2, 4)]
    return draw_sweep(marks, TITLES, varied="items", note="a toy", published="somebody else's")


def lines() -> Figure:
    marks = [mark(value, 0.8, group="MLLM-MSR") for value in ("0", "64", "1024")]
    marks += [mark(value, 0.6, group="SASRec") for value in ("64", "1024")]
    return draw_sweep(marks, TITLES, varied="training sequences", note="a toy", published="")


def texts(figure: Figure) -> set[str]:
    labels = {text.get_text() for axes in figure.axes for text in axes.get_yticklabels()}
    labels |= {axes.get_title() for axes in figure.axes}
    legends = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    return labels | legends | {figure.get_supxlabel()}


def drawn_labels(axes: Axes) -> list[Text]:
    """Return the title and the ticks' labels, without those of ticks outside the panel."""
    (left, right), (low, high) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    across = [text for text in axes.get_xticklabels() if left <= text.get_position()[0] <= right]
    up = [text for text in axes.get_yticklabels() if low <= text.get_position()[1] <= high]
    shown = axes.yaxis.get_tick_params()["labelleft"]
    return [axes.title, *across, *(up if shown else [])]


def test_rows_are_named_with_their_groups_and_the_note():
    shown = texts(rows())
    assert {"MLLM-MSR", "SASRec", "chance", "sequential", "AUC, uniform", "HR@5"} <= shown
    assert {"a toy", "somebody else's"} <= shown


def test_a_sweep_of_several_scorers_has_a_named_line_for_each():
    figure = lines()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["MLLM-MSR", "SASRec"]
    for panel in figure.axes:
        assert [tick.get_text() for tick in panel.get_xticklabels()] == ["0", "64", "1024"]
        ours, sasrec = (line for line in panel.get_lines() if len(line.get_xdata()) > 1)
        assert len(ours.get_xdata()) == 3
        assert [round(value) for value in sasrec.get_xdata()] == [1, 2]


def test_a_figure_without_figures_of_others_has_no_legend():
    plain = draw_rows([mark("a", 0.5)], TITLES, note="", published="somebody else's")
    assert plain.legends == []


def test_groups_differ_in_their_markers_and_not_in_their_colours():
    lines = [line for line in rows().axes[0].lines if line.get_marker() in "osD^"]
    assert {line.get_marker() for line in lines} == {"o", "s", "D"}
    assert len({line.get_color() for line in lines}) == 1


def test_a_sweep_is_drawn_at_its_values():
    axes = sweep().axes[0]
    assert axes.get_xticks().tolist() == [1, 2, 4]
    assert axes.lines[0].get_xdata().tolist() == [1.0, 2.0, 4.0]
    assert axes.get_xlabel() == "items"


def test_rows_with_equal_labels_have_separate_positions():
    marks = [mark("SASRec", 0.9, group="ours"), mark("SASRec", 0.7, group="theirs")]
    figure = draw_rows(marks, TITLES, note="", published="")
    places = [point.get_ydata()[0] for point in figure.axes[0].lines if point.get_marker() in "os"]
    assert places == [1, 3]
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert sorted(zip(figure.axes[0].get_yticks(), names, strict=True)) == [
        (0, "ours"),
        (1, "SASRec"),
        (2, "theirs"),
        (3, "SASRec"),
    ]


@pytest.mark.parametrize("high", [0.61, 0.75, 0.98])
@pytest.mark.parametrize("low", [0.1, 0.24, 0.5])
def test_every_panel_has_three_ticks_or_more(low: float, high: float):
    many = [mark("1", low), mark("2", high)]
    by_row = draw_rows(many, [*TITLES], note="", published="")
    by_value = draw_sweep(many, [*TITLES], varied="items", note="", published="")
    for panel in [*(axes.xaxis for axes in by_row.axes), *(axes.yaxis for axes in by_value.axes)]:
        first, last = sorted(panel.get_view_interval())
        assert sum(first <= tick <= last for tick in panel.get_majorticklocs()) >= 3


def test_a_missing_interval_is_not_drawn(tmp_path: Path):
    unknown = Mark("mean of 1", {"AUC": Estimate(0.9, NAN, NAN)})
    save_figure(draw_rows([unknown], ["AUC"], note="", published=""), tmp_path)
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize("draw", [rows, sweep])
def test_no_two_labels_overlap(draw):
    figure = draw()
    figure.draw_without_rendering()
    shown = [text for axes in figure.axes for text in drawn_labels(axes)]
    boxes = [text.get_window_extent() for text in shown]
    inside = figure.bbox
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 + 1 for box in boxes)
    overlaps = [
        (one.get_text(), other.get_text())
        for i, one in enumerate(shown)
        for j, other in enumerate(shown[:i])
        if boxes[i].overlaps(boxes[j])
    ]
    assert overlaps == []


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_figure(rows(), tmp_path / name)
    for file in ("figure.svg", "figure.png"):
        one, two = ((tmp_path / name / file).read_bytes() for name in ("one", "two"))
        assert one == two
    assert b"<dc:date>" not in one


def test_a_figure_is_vector_and_pixels_of_a_light_page(tmp_path: Path):
    save_figure(sweep(), tmp_path)
    assert (tmp_path / "figure.svg").read_text(encoding="utf-8").startswith("<?xml")
    pixels = np.asarray(Image.open(tmp_path / "figure.png").convert("L"))
    assert pixels.min() < 60  # something is dark
    assert np.median(pixels) == 255

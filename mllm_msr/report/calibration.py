"""Calibration in the report: what a displayed probability means, and how far off it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from mllm_msr.evaluation.calibration import BINS
from mllm_msr.evaluation.evaluation import Metrics
from mllm_msr.evaluation.results import samplings_of
from mllm_msr.report.charts import draw_reliability
from mllm_msr.report.inputs import Inputs, read_csv
from mllm_msr.report.settings import CANDIDATES, Settings

Figures = Mapping[str, float]
Records = Sequence[Mapping[str, str]]  # rows of a CSV file
RAW, CALIBRATED = "p(yes)", "calibrated"  # what tables and charts call the two probabilities
METHODS = {"temperature": "temperature scaling", "platt": "Platt scaling"}


class Errors(NamedTuple):
    """Errors of a probability on the test candidates of a protocol."""

    ece: float  # expected calibration error
    brier: float


@dataclass(frozen=True)
class ProtocolCalibration:
    """The calibration in one sampling of negatives.

    Attributes:
        title: The sampling in words.
        errors: Of ``RAW`` and, if a scaling was fitted, of ``CALIBRATED``.
        baseline: Brier score of a probability that is the share of targets for every candidate.
        text: What was measured, in plain words.
        chart: The reliability diagram.
    """

    title: str
    errors: dict[str, Errors]
    baseline: float
    text: str
    chart: Markup


@dataclass(frozen=True)
class CalibrationSection:
    """The section of the report.

    Attributes:
        probabilities: Names of the table's rows.
        protocols: The samplings, in the order of tables.
        bins: Number of bins of the expected calibration error.
    """

    probabilities: list[str]
    protocols: list[ProtocolCalibration]
    bins: int = BINS


def describe_calibration(
    inputs: Inputs, metrics: Metrics, settings: Settings
) -> CalibrationSection | None:
    """Describe the calibration in each sampling; None where no model was scored.

    Args:
        inputs: Where the plots are.
        metrics: From :func:`mllm_msr.evaluation.results.read_metrics`.
        settings: How p(yes) was calibrated.

    Raises:
        DataError: A file of ``evaluate`` is missing.
    """
    measured = [each for each in samplings_of(metrics) if "calibration" in metrics[each]]
    if not measured:
        return None
    bins = read_csv(inputs.evaluated / "plots" / "reliability.csv")
    protocols = [
        _describe_protocol(
            sampling,
            metrics[sampling]["calibration"],
            [each for each in bins if each["sampling"] == sampling],
            settings.evaluate.calibration,
        )
        for sampling in measured
    ]
    names = [name for name in (RAW, CALIBRATED) if any(name in each.errors for each in protocols)]
    return CalibrationSection(names, protocols)


def _describe_protocol(
    sampling: str, figures: Figures, bins: Records, method: str
) -> ProtocolCalibration:
    errors = {RAW: Errors(figures["ece"], figures["brier"])}
    if "slope" in figures:
        errors[CALIBRATED] = Errors(figures["ece_calibrated"], figures["brier_calibrated"])
    title, share = CANDIDATES[sampling], figures["target_share"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for each in bins:
        point = float(each["p_yes"]), float(each["target_share"])
        lines.setdefault(RAW if each["scaling"] == "none" else CALIBRATED, []).append(point)
    label = f"Share of targets over the probability, {title}"
    return ProtocolCalibration(
        title=title,
        errors=errors,
        baseline=share * (1 - share),
        text=f"{_say_error(figures, bins)} {_say_scaling(figures, method)}",
        chart=draw_reliability(label, lines, "probability"),
    )


def _say_error(figures: Figures, bins: Records) -> str:
    """Say how far p(yes) is off, on average and at its highest."""
    highest = max(
        (each for each in bins if each["scaling"] == "none"), key=lambda each: float(each["p_yes"])
    )
    return (
        f"p(yes) is off by {_points(figures['ece'])} on average: the"
        f" {int(highest['candidates']):,} candidates with the highest p(yes) have a mean of"
        f" {float(highest['p_yes']):.0%}, and {float(highest['target_share']):.0%} of them are"
        " targets."
    )


def _say_scaling(figures: Figures, method: str) -> str:
    """Say what became of p(yes)."""
    if method == "none":
        return "It is shown as it is (evaluate.calibration: none)."
    if "slope" not in figures:
        return "It is shown as it is: without validation candidates no scaling can be fitted."
    text = (
        f"The calibrated probability is off by {_points(figures['ece_calibrated'])}. It is"
        f" {METHODS[method]}, fitted on the validation candidates: the sigmoid of"
        f" {figures['slope']:.3f} times the log-odds {figures['intercept']:+.3f}."
    )
    if figures["slope"] == 0:
        text += (
            " There a higher score did not go with more targets, so it is the same for every"
            " candidate."
        )
    return text


def _points(share: float) -> str:
    return f"{100 * share:.1f} percentage points"

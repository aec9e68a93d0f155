"""The fine-tuning: loss and validation AUC over the steps."""

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from mllm_msr.report.charts import draw_lines
from mllm_msr.report.inputs import Inputs, read_csv, read_json

CURVES = {"loss": {"training": "train/loss", "validation": "valid/loss"}}
CURVES |= {"AUC": {"validation": "valid/auc"}}


@dataclass(frozen=True)
class Training:
    """The section of the report.

    Attributes:
        steps: Optimizer steps of the whole training; 0: zero-shot.
        epoch: The selected epoch.
        auc: AUC of the selected epoch on validation sequences; None if it was not measured.
        charts: One for each measure that was recorded.
    """

    steps: int
    epoch: int
    auc: float | None
    charts: dict[str, Markup]


def describe_training(inputs: Inputs) -> Training:
    """Read the report of the training and draw the curves that were recorded.

    Raises:
        DataError: The report is missing.
    """
    found = read_json(inputs.trained / "training.json", "sft")
    folder = inputs.trained / "curves" / "plots" / "metrics"
    charts = {}
    for measure, files in CURVES.items():
        lines = {name: _read_curve(folder / f"{file}.tsv") for name, file in files.items()}
        lines = {name: line for name, line in lines.items() if line}
        if lines:
            label = f"{measure} over the steps of the training"
            charts[measure] = draw_lines(label, lines, "optimizer step")
    return Training(found["steps"], found["epoch"], found.get("valid_auc"), charts)


def _read_curve(path: Path) -> list[tuple[float, float]]:
    """Read the points of a curve; none if it was not recorded."""
    if not path.is_file():
        return []
    return [(float(row["step"]), float(row[path.stem])) for row in read_csv(path, "\t")]

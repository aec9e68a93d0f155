"""How the fine-tuning went: loss and validation AUC over the steps."""

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from mllm_msr.report.charts import draw_lines
from mllm_msr.report.inputs import Inputs, read_csv, read_json

CURVES = {"loss": {"training": "train/loss", "validation": "valid/loss"}}
CURVES |= {"AUC": {"validation": "valid/auc"}}


@dataclass(frozen=True)
class Training:
    """What the section shows.

    Attributes:
        steps: Optimizer steps of the whole training; 0: zero-shot.
        epoch: The one that is kept.
        auc: Of the kept epoch on validation sequences, None where it was not measured.
        charts: One per measure that was recorded.
    """

    steps: int
    epoch: int
    auc: float | None
    charts: dict[str, Markup]


def describe_training(inputs: Inputs) -> Training:
    """Read the report of the training and draw its curves, those that there are.

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
    """Read the steps of a curve; none where none was recorded."""
    if not path.is_file():
        return []
    return [(float(row["step"]), float(row[path.stem])) for row in read_csv(path, "\t")]

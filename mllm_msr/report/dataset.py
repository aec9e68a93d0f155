"""The dataset's counts, and the paper's if it is one of the paper's datasets."""

from dataclasses import dataclass
from typing import NamedTuple

from mllm_msr.core.tables import count_rows
from mllm_msr.report.inputs import Inputs, read_json
from mllm_msr.report.settings import Settings


class PaperCounts(NamedTuple):
    """A column of the paper's table of datasets, as others transcribed it."""

    users: int
    items: int
    interactions: int
    printed_length: float  # contradicts interactions / users
    sparsity: float


# Paper, table of datasets; second-hand.
PAPER = {
    "MicroLens": PaperCounts(25_411, 20_276, 223_263, 11.35, 0.9996),
    "Amazon Baby Products": PaperCounts(41_081, 14_393, 400_876, 13.65, 0.9993),
    "Amazon Video Games": PaperCounts(38_808, 13_379, 352_136, 13.23, 0.9993),
}


class Count(NamedTuple):
    """A row of the table: a name, this run's figure, and the paper's or an empty text."""

    name: str
    here: str
    paper: str


@dataclass(frozen=True)
class Dataset:
    """The section of the report.

    Attributes:
        counts: Rows of the table.
        compared: Whether the paper has this dataset.
        size: Users, items and interactions in a line.
        images: Number of items with an image.
        dropped: Number of dropped rows by reason, first those of ``preprocess``; only reasons that
            occurred.
    """

    counts: list[Count]
    compared: bool
    size: str
    images: int
    dropped: dict[str, int]


def describe_dataset(inputs: Inputs, settings: Settings) -> Dataset:
    """Read the statistics and the dropped rows, and add the paper's statistics.

    Raises:
        DataError: The statistics or the dropped rows are missing.
    """
    found = read_json(inputs.filtered / "statistics.json", "filter_sequences")
    paper = PAPER.get(settings.dataset)
    counts = [
        Count(name.capitalize(), f"{found[name]:,}", f"{getattr(paper, name):,}" if paper else "")
        for name in ("users", "items", "interactions")
    ]
    counts.append(Count("Interactions per user", f"{found['average_length']:.2f}", _length(paper)))
    sparsity = f"{paper.sparsity:.2%}" if paper else ""
    counts.append(Count("Sparsity", f"{found['sparsity']:.2%}", sparsity))
    images = count_rows(inputs.images)
    counts.append(Count("Items with an image", f"{images:,}", ""))
    for split, number in found["sequences"].items():
        counts.append(Count(f"{split} sequences".capitalize(), f"{number:,}", ""))
        if (used := found["used_sequences"][split]) < number:
            counts.append(Count(f"{split} sequences used".capitalize(), f"{used:,}", ""))
    if withheld := found["withheld_items"]:
        counts.append(Count("Items withheld from training", f"{withheld:,}", ""))
    if ties := found["targets_tied_in_time"]:
        counts.append(Count("Targets at the time of another interaction", f"{ties:,}", ""))
    reasons = read_json(inputs.dropped, "preprocess") | found["dropped"]
    dropped = {reason.replace("_", " "): n for reason, n in reasons.items() if n}
    size = ", ".join(f"{found[name]:,} {name}" for name in ("users", "items", "interactions"))
    return Dataset(counts, paper is not None, size, images, dropped)


def _length(paper: PaperCounts | None) -> str:
    """Return the paper's average length, computed and as printed."""
    if paper is None:
        return ""
    return f"{paper.interactions / paper.users:.2f}; printed as {paper.printed_length}"

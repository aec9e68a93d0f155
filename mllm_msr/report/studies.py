"""The studies: tables and figures from their folders."""

from dataclasses import dataclass
from pathlib import Path

from mllm_msr.report.thumbnails import make_data_uri


@dataclass(frozen=True)
class Study:
    """The outputs of a study, as ``python -m mllm_msr.study`` writes them.

    Attributes:
        name: Name of the study.
        about: The question of the study, from above the table in ``table.md``.
        table: Rows of cells, the head first.
        notes: Lines below the table.
        figure: Its figure as a data URI, if any.
    """

    name: str
    about: str
    table: list[list[str]]
    notes: list[str]
    figure: str | None


def read_studies(folder: Path) -> list[Study]:
    """Read every study that has a table; none if the folder is missing."""
    return [_read_study(path.parent) for path in sorted(folder.glob("*/table.md"))]


def _read_study(folder: Path) -> Study:
    lines = [line for line in (folder / "table.md").read_text("utf-8").splitlines() if line]
    inside = [number for number, line in enumerate(lines) if line.startswith("|")]
    start, end = (inside[0], inside[-1] + 1) if inside else (len(lines), len(lines))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start:end]]
    figure = folder / "figure.svg"
    return Study(
        name=folder.name.replace("-", " ").capitalize(),
        about=" ".join(lines[:start]),
        table=_name_first([row for number, row in enumerate(rows) if number != 1]),  # no rule
        notes=[line.removeprefix("- ") for line in lines[end:]],
        figure=make_data_uri(figure.read_bytes(), "image/svg+xml") if figure.is_file() else None,
    )


def _name_first(table: list[list[str]]) -> list[list[str]]:
    """Move the column of names before the column of groups, if there is one."""
    if table and table[0][0] == "group":
        return [[name, group, *cells] for group, name, *cells in table]
    return table

"""The studies: tables and figures from their folders."""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from mllm_msr.report.thumbnails import make_data_uri


@dataclass(frozen=True)
class Study:
    """The outputs of a study, as ``python -m mllm_msr.study`` writes them.

    Attributes:
        name: Name of the study.
        about: The question of the study, from above the tables in ``table.md``.
        tables: Tables as rows of cells, the head first.
        notes: Lines below the tables.
        figure: Its figure as a data URI, if any.
    """

    name: str
    about: str
    tables: list[list[list[str]]]
    notes: list[str]
    figure: str | None


def read_studies(folder: Path) -> list[Study]:
    """Read every study that has a table; none if the folder is missing."""
    return [_read_study(path.parent) for path in sorted(folder.glob("*/table.md"))]


def _read_study(folder: Path) -> Study:
    lines = (folder / "table.md").read_text("utf-8").splitlines()
    runs = [(is_row, list(run)) for is_row, run in groupby(lines, _is_row)]
    tables = [_read_table(run) for is_row, run in runs if is_row]
    texts = [line for is_row, run in runs if not is_row for line in run if line]
    notes = [line for line in texts if line.startswith("- ")] if tables else []
    figure = folder / "figure.svg"
    return Study(
        name=folder.name.replace("-", " ").capitalize(),
        about=" ".join(line for line in texts if line not in notes),
        tables=tables,
        notes=[line.removeprefix("- ") for line in notes],
        figure=make_data_uri(figure.read_bytes(), "image/svg+xml") if figure.is_file() else None,
    )


def _is_row(line: str) -> bool:
    return line.startswith("|")


def _read_table(lines: list[str]) -> list[list[str]]:
    """Return the cells of a Markdown table, without the rule below its head."""
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return _name_first([head, *rows])


def _name_first(table: list[list[str]]) -> list[list[str]]:
    """Move the column of names before the column of groups, if there is one."""
    if table and table[0][0] == "group":
        return [[name, group, *cells] for group, name, *cells in table]
    return table

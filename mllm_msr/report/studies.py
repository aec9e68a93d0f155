"""Studies beside the pipeline: the figures and tables that lie in their folders."""

from dataclasses import dataclass
from pathlib import Path

from mllm_msr.report.inputs import read_csv, read_json
from mllm_msr.report.thumbnails import make_data_uri

MOST_ROWS = 60  # of a table; a page is no place for more


@dataclass(frozen=True)
class Study:
    """What was found in the folder of a study.

    Attributes:
        name: The folder's, in words.
        figure: Its figure as a data URI, if any.
        rows: Its table's rows, if any.
        more: Rows of the table that are not shown.
        text: The Markdown of a study without a table, if any.
        notes: What ``study.json`` says, numbers and short texts only.
    """

    name: str
    figure: str | None
    rows: list[dict[str, str]]
    more: int
    text: str
    notes: dict[str, str]


def read_studies(folder: Path) -> list[Study]:
    """Read every study that has a figure or a table; none where the folder is missing.

    Raises:
        DataError: A ``study.json`` is no JSON object.
    """
    folders = sorted(path for path in folder.glob("*") if path.is_dir())
    studies = map(_read_study, folders)
    return [study for study in studies if study.figure or study.rows or study.text]


def _read_study(folder: Path) -> Study:
    figure, table, text, about = (
        folder / name for name in ("figure.svg", "table.csv", "table.md", "study.json")
    )
    rows = read_csv(table) if table.is_file() else []
    notes = read_json(about, f"study {folder.name}") if about.is_file() else {}
    return Study(
        name=folder.name.replace("_", " ").capitalize(),
        figure=make_data_uri(figure.read_bytes(), "image/svg+xml") if figure.is_file() else None,
        rows=rows[:MOST_ROWS],
        more=len(rows[MOST_ROWS:]),
        text=text.read_text(encoding="utf-8") if text.is_file() and not rows else "",
        notes={
            key.replace("_", " "): str(value)
            for key, value in notes.items()
            if isinstance(value, str | int | float) and len(str(value)) <= 100
        },
    )

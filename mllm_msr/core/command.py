"""Run a stage as a command: shared options, one-line errors, opening and closing messages."""

import atexit
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from mllm_msr.core.errors import INTERRUPT_EXIT_CODE, INTERRUPT_MESSAGE, UserError
from mllm_msr.core.pipeline import describe_stage

if TYPE_CHECKING:
    from mllm_msr.core.schemas import AnyTable

Params = Annotated[Path, typer.Option(help="File with the settings.")]
Prompts = Annotated[Path, typer.Option(help="File with the prompt templates.")]
ItemsPath = Annotated[Path, typer.Option(help="Table of items.")]
ImagesPath = Annotated[Path, typer.Option(help="Table of images.")]
SummariesPath = Annotated[Path, typer.Option(help="Table of the items' summaries.")]
PreferencesPath = Annotated[Path, typer.Option(help="Table of preferences.")]
FilteredPath = Annotated[Path, typer.Option(help="Folder of filter_sequences.")]
TrainedPath = Annotated[Path, typer.Option(help="Folder of sft: adapter and training.json.")]
OutPath = Annotated[Path, typer.Option(help="Folder to write.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print the first prompt and the number of model calls; write nothing."
    ),
]


def run(command: Callable[..., None]) -> None:
    """Run a stage's function as a command, then end the process.

    A :class:`UserError` is printed on one line and ends it with exit code 1, Ctrl-C with 130.
    ``--debug`` keeps the traceback.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    code: int | str | None = 0
    try:
        if line := describe_stage():
            typer.echo(line)
        app()
    except SystemExit as end:
        code = end.code
        if code == INTERRUPT_EXIT_CODE:  # Typer turns Ctrl-C into this code and prints nothing
            typer.echo(INTERRUPT_MESSAGE, err=True)
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        tqdm.write(f"error: {error}", sys.stderr)  # on a line of its own, below no progress bar
        code = 1
    _exit(code if isinstance(code, int) else bool(code))


def _exit(code: int) -> None:
    """Run the exit handlers and end the process without finalizing the interpreter.

    With torch loaded, DuckDB's Python bindings (2.0) print a page of warnings about leaked types
    while the interpreter is finalized. This is the only place that skips it; remove it once a
    release of DuckDB stays silent.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def print_dry_run(prompt: str, calls: int) -> None:
    """Print the result of a dry run.

    Args:
        prompt: The first prompt, rendered as the model would get it.
        calls: Model calls of a full run, stored responses included.
    """
    typer.echo(f"--- first prompt\n{prompt}\n---")
    typer.echo(f"{calls:,} model calls; what is already in the response store is not asked again")
    typer.echo("dry run: nothing was written")


def write_empty_table(setting: str, table: "AnyTable", path: Path, dry_run: bool = False) -> None:
    """Write a table without rows for a stage whose model is null, and print why.

    Args:
        setting: The setting that is null, such as ``recommender.model``.
        table: The table's model.
        path: The Parquet file to write.
        dry_run: Only print what would be written.
    """
    from mllm_msr.core.tables import write_rows  # slow to import, and few commands need it

    if not dry_run:
        write_rows(table, [], path)
    verb = "would write" if dry_run else "wrote"
    typer.echo(f"{setting} is null: {verb} {path} without rows")


def report_written(path: Path, rows: int, what: str) -> None:
    """Print a stage's closing message: the path, the number of rows and what they are."""
    typer.echo(f"wrote {path}: {rows:,} {what}")

"""What all stages share as commands: options, one-line errors, opening and closing lines."""

import atexit
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.errors import INTERRUPTED, INTERRUPTION, UserError
from mllm_msr.core.pipeline import describe_stage
from mllm_msr.core.tables import AnyTable, write_rows

Params = Annotated[Path, typer.Option(help="The file with this stage's section of settings.")]
Prompts = Annotated[Path, typer.Option(help="The file with this stage's section of prompts.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the first prompt and the model calls; write nothing."),
]


def run(command: Callable[..., None]) -> None:
    """Run a stage's command.

    An error meant for users becomes one line and exit code 1, Ctrl-C one line and 130.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    code: int | str | None = 0
    try:
        if line := describe_stage():
            typer.echo(line)
        app()
    except SystemExit as ending:
        code = ending.code
        if code == INTERRUPTED:  # Typer's word for Ctrl-C
            typer.echo(INTERRUPTION, err=True)
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"error: {error}", err=True)
        code = 1
    _leave(code if isinstance(code, int) else bool(code))


def _leave(code: int) -> None:
    """End the process without tearing Python down.

    With torch loaded, DuckDB 2.0's bindings would print a page on leaked types at that point.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def show_plan(prompt: str, calls: int) -> None:
    """Print what a dry run found: the first prompt as the model gets it, and the model calls."""
    typer.echo(f"--- first prompt\n{prompt}\n---")
    typer.echo(f"{calls:,} model calls; what is already in the response store is not asked again")
    typer.echo("dry run: nothing was written")


def leave_out(setting: str, table: AnyTable, path: Path, dry_run: bool = False) -> None:
    """Write an empty table in place of what a stage without a model would write, and say so."""
    if not dry_run:
        write_rows(table, [], path)
    verb = "would write" if dry_run else "wrote"
    typer.echo(f"{setting} is null: {verb} {path} without rows")


def wrote(path: Path, rows: int, what: str) -> None:
    """Print the closing line of a stage: what was written and how many rows."""
    typer.echo(f"wrote {path}: {rows:,} {what}")

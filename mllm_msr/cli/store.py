"""``mllm-msr store``: show what the response store holds, back it up, and prune it.

mllm-msr store show
mllm-msr store backup responses-backup.sqlite
mllm-msr store prune --model mllm_msr/pocket/model
mllm-msr store prune --older-than 90
"""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.errors import DataError, ParamsError, report_errors_on_one_line
from mllm_msr.engines.response_store import ResponseStore, store_path

DAY = 86_400  # seconds
UNNOTED = "(model not noted)"  # of responses that a store of an earlier release kept

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Show what the response store holds, back it up, and prune it by model or age.",
)


@app.command()
def show() -> None:
    """Print the number of responses of each model, and the size of the file with its log.

    Example: mllm-msr store show
    """
    path = store_path()
    if not path.is_file():
        typer.echo(f"{path}: no responses yet")
        return
    with ResponseStore(path) as store:
        typer.echo(f"{path}: {len(store):,} responses, {store.bytes / 1e6:,.1f} MB")
        for holding in store.holdings():
            typer.echo(
                f"{holding.responses:>12,}  {holding.characters / 1e6:8,.1f} MB of text"
                f"  {_describe_date(holding.newest)}  {holding.model or UNNOTED}"
            )


@app.command()
def backup(file: Annotated[Path, typer.Argument(help="A new file.")]) -> None:
    """Copy the store to one file, also while stages write to it.

    Example: mllm-msr store backup responses-backup.sqlite
    """
    _check_exists()
    with ResponseStore(store_path(), read_only=True) as store:
        store.copy_to(file)
    with ResponseStore(file, read_only=True) as copy:
        typer.echo(f"wrote {file}: {len(copy):,} responses, {copy.bytes / 1e6:,.1f} MB")


@app.command()
def prune(
    model: Annotated[
        str | None, typer.Option(help="Only responses of this model, as named by store show.")
    ] = None,
    older_than: Annotated[
        float | None, typer.Option(help="Only responses older than this many days.", min=0)
    ] = None,
) -> None:
    """Remove responses of one model, or old ones; a stage that needs one asks the model again.

    Example: mllm-msr store prune --older-than 90
    """
    if model is None and older_than is None:
        fix = "to remove everything, delete the file"
        raise ParamsError(
            expected="--model or --older-than", got="neither", where=str(store_path()), fix=fix
        )
    _check_exists()
    with ResponseStore(store_path()) as store:
        held = [holding.model or UNNOTED for holding in store.holdings()]
        if model is not None and model not in held:
            fix = "use a name that mllm-msr store show prints"
            raise ParamsError(
                expected=f"a model among {', '.join(held) or 'none'}",
                got=model,
                where="--model",
                fix=fix,
            )
        before = None if older_than is None else time.time() - older_than * DAY  # noqa: TID251
        removed = store.prune("" if model == UNNOTED else model, before)
        typer.echo(f"removed {removed:,} responses, {len(store):,} are left")
        store.shrink()


def _describe_date(seconds: float) -> str:
    """Describe when a model's last response was added; the time is not part of its digest."""
    if not seconds:
        return "date not noted"
    try:
        return f"last on {datetime.fromtimestamp(seconds, UTC).date()}"
    except (ValueError, OverflowError, OSError):
        return "date damaged"


def _check_exists() -> None:
    """Raise an error if there is no store.

    Raises:
        DataError: There is none.
    """
    if not store_path().is_file():
        raise DataError(
            expected="a response store",
            got="no such file",
            where=str(store_path()),
            fix="run a stage that asks a model first",
        )


def main() -> None:
    """Run the commands."""
    with report_errors_on_one_line():
        app()


if __name__ == "__main__":
    main()

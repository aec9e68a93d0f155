"""``mllm-msr data``: check tables that another program wrote against the pipeline's contract.

mllm-msr data check data/raw/prepared
"""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.errors import report_errors_on_one_line
from mllm_msr.core.tables import open_database
from mllm_msr.data.sources.contract import TABLES, find_violations

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Check tables that your own Spark or warehouse wrote.",
)


@app.callback()
def _group() -> None:
    """Keep the name of the command; Typer drops that of an only one."""


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the tables.")],
) -> None:
    """Print all that is wrong with the tables of a folder; exit with 1 if anything is.

    The memory is limited by MLLM_MSR_MEMORY; the rest is spilled to the system's temporary folder.

    Example: mllm-msr data check data/raw/prepared
    """
    with (
        tempfile.TemporaryDirectory() as spill,
        open_database(Path(spill), ordered=False) as connection,
    ):
        violations = find_violations(connection, folder)
        if violations:
            for violation in violations:
                typer.echo(str(violation))
            raise typer.Exit(1)
        counts = [
            f"{connection.execute(f'SELECT count(*) FROM {table}').fetchall()[0][0]:,} {table}"
            for table in TABLES
        ]
    typer.echo(f"{folder} keeps the contract: {', '.join(counts)}".replace("_", " "))


def main() -> None:
    """Run the commands."""
    with report_errors_on_one_line():
        app()


if __name__ == "__main__":
    main()

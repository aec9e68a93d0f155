"""``mllm-msr export``: write a finished run as a bundle that another machine loads.

mllm-msr export bundles/pocket --with-base
"""

from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import Params, Prompts
from mllm_msr.core.errors import report_errors_on_one_line

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(no_args_is_help=True)
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The bundle to write, a new folder.")
    ],
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Copy the base models, which are local folders.")
    ] = False,
    merged: Annotated[
        bool,
        typer.Option(
            "--merged", help="Add base model and adapter as one model, for inference servers."
        ),
    ] = False,
    data: Annotated[Path, typer.Option(help="Folder of the stages' outputs.")] = Path("data"),
    params: Params = Path("params.yaml"),
    prompts: Prompts = Path("prompts.yaml"),
) -> None:
    """Write adapter, trained retrievers, tables, settings and prompts of a run as one folder.

    bundle.json has the SHA-256 of every file, which loading verifies, and names the base models.
    The bundle has the interactions of every user; responses are not in it.

    Example: mllm-msr export bundles/pocket --with-base
    """
    from mllm_msr.recommendation.bundle import export as export_bundle  # loads torch

    written = export_bundle(data, params, prompts, folder, with_base=with_base, merged=merged)
    typer.echo(f"wrote {folder}: {written.files:,} files, {written.size / 1e6:,.1f} MB")
    typer.echo(f"retrievers: popularity, {', '.join(written.retrievers)}")
    for name in written.left_out:
        typer.echo(f"not in it: the base model {name}; copy it with --with-base", err=True)


def main() -> None:
    """Run the command."""
    with report_errors_on_one_line():
        app()


if __name__ == "__main__":
    main()

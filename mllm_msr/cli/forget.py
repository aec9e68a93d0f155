"""``mllm-msr forget``: remove a user's responses from the store, and list what else holds the user.

mllm-msr forget --user u00021 --dry-run
"""

from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.cli.run_options import DATA_HELP, RunParams, RunPrompts
from mllm_msr.core.errors import report_errors_on_one_line
from mllm_msr.engines.response_store import store_path

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(no_args_is_help=True)
def forget(
    user: Annotated[str, typer.Option(help="A user of the run.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be removed; remove nothing.")
    ] = False,
    data: Annotated[Path, typer.Option(help=DATA_HELP)] = Path("data"),
    params: RunParams = None,
    prompts: RunPrompts = None,
) -> None:
    """Remove the responses to a user's prompts, and list the files that still hold the user.

    The prompts are those of the present settings and adapter. Summaries are of items and stay.

    Example: mllm-msr forget --user u00021 --dry-run
    """
    # Imported here, since they load torch.
    from mllm_msr.recommendation.bundle import open_run
    from mllm_msr.recommendation.forgetting import ErasableStore, find_responses, list_holders

    run = open_run(data, params, prompts)
    found = find_responses(user, data, run)
    keys = found.preferences | found.scores
    if not dry_run and keys:
        with ErasableStore(store_path()) as store:
            store.remove(keys)
    verb = "would remove" if dry_run else "removed"
    typer.echo(
        f"{verb} {len(keys):,} responses of user {user} from {store_path()}:"
        f" {len(found.preferences):,} preferences, {len(found.scores):,} scores"
    )
    typer.echo("still held by:")
    raw = data / "raw" / run.settings.preprocess.source
    for holder in list_holders(user, data, raw):
        typer.echo(f"  {holder.path}: {holder.content}")
    typer.echo(
        "not looked for: responses under other settings, prompts, models or adapters, which"
        " mllm-msr store prune removes by model or age; responses about items new to the"
        " catalogue; copies elsewhere, as in DVC's remotes or a cache outside the project"
    )


def main() -> None:
    """Run the command."""
    with report_errors_on_one_line():
        app()


if __name__ == "__main__":
    main()

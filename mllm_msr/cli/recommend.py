"""``mllm-msr recommend``: recommend items of the whole catalogue by a finished run.

mllm-msr recommend --user u00021 --k 5 --explain
"""

from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.cli.run_options import (
    DATA_HELP,
    ProposedItems,
    RetrieverName,
    RunParams,
    RunPrompts,
)
from mllm_msr.core.errors import DataError, ParamsError, report_errors_on_one_line
from mllm_msr.recommendation.output import Format, write

SUFFIXES = {".jsonl": Format.JSONL, ".csv": Format.CSV, ".parquet": Format.PARQUET}
LONGEST_HISTORY_FILE = 10_000_000  # bytes

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback(invoke_without_command=True)
def recommend(
    user: Annotated[str | None, typer.Option(help="A user of the run.")] = None,
    history: Annotated[
        str | None, typer.Option(help="Items, oldest first, joined by commas; '' for none.")
    ] = None,
    history_file: Annotated[
        Path | None, typer.Option(help="A file with an item on each line, oldest first.")
    ] = None,
    all_users: Annotated[
        bool, typer.Option("--all-users", help="Recommend to every user of the run.")
    ] = False,
    new_items: Annotated[
        Path | None,
        typer.Option(help="A file of items new to the catalogue: item, title, description, image."),
    ] = None,
    k: Annotated[int, typer.Option("--k", help="How many items.")] = 10,
    keep_seen: Annotated[
        bool, typer.Option("--keep-seen", help="Recommend items of the history too.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the history and the preference by block.")
    ] = False,
    retriever: RetrieverName = "item_knn",
    candidates: ProposedItems = 100,
    form: Annotated[
        Format | None,
        typer.Option("--format", help="Output format.", show_default="by --out, else table"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write.", show_default="standard output")
    ] = None,
    data: Annotated[Path, typer.Option(help=DATA_HELP)] = Path("data"),
    params: RunParams = None,
    prompts: RunPrompts = None,
) -> None:
    """Recommend items of the whole catalogue to a user, for a history, or to every user.

    A retriever proposes items that the user has not seen, and the fine-tuned model ranks them by
    p(yes). Without a model (recommender.model: null) the retriever ranks alone.

    Example: mllm-msr recommend --user u00021 --k 5 --explain
    """
    given = [user is not None, history is not None, history_file is not None, all_users]
    if sum(given) != 1:
        raise ParamsError(
            expected="one of --user, --history, --history-file and --all-users",
            got=str(sum(given)),
            where="recommend",
            fix="name one",
        )
    if new_items and all_users:
        raise ParamsError(
            expected="--new-items for one user or history",
            got="--all-users",
            where="recommend",
            fix="name a user, or leave the new items out",
        )
    chosen = _choose_format(form, out)
    items = _read_history(history, history_file)
    # Imported here: they load DuckDB and torch.
    from mllm_msr.recommendation.new_items import read_new_items
    from mllm_msr.recommendation.recommender import Recommender

    with Recommender.load(
        data, params=params, prompts=prompts, retriever=retriever, candidates=candidates
    ) as recommender:
        if all_users:
            found = recommender.recommend_all(k=k, keep_seen=keep_seen, show_progress=True)
            written = write(found, chosen, out, explain=explain)
        else:
            answer = recommender.recommend(
                user=user,
                history=items,
                k=k,
                keep_seen=keep_seen,
                new_items=read_new_items(new_items) if new_items else (),
            )
            written = write([answer], chosen, out, explain=explain)
            if not answer.history:
                typer.echo("no history: the most popular items", err=True)
    if out:
        typer.echo(f"wrote {out}: {written:,} recommendations")


def _choose_format(form: Format | None, out: Path | None) -> Format:
    """Return the format that is named, or that of the file's name.

    Raises:
        ParamsError: Parquet for standard output.
    """
    chosen = form or (SUFFIXES.get(out.suffix, Format.TABLE) if out else Format.TABLE)
    if chosen is Format.PARQUET and out is None:
        raise ParamsError(
            expected="a file for Parquet", got="none", where="--out", fix="name one with --out"
        )
    return chosen


def _read_history(text: str | None, path: Path | None) -> list[str] | None:
    """Return the items of an option or a file, None where neither is given.

    Raises:
        DataError: The file cannot be read as text, or is too long for one.
    """
    if text is not None:
        return [item for item in (part.strip() for part in text.split(",")) if item]
    if path is None:
        return None
    try:
        if path.stat().st_size > LONGEST_HISTORY_FILE:
            raise DataError(
                expected=f"at most {LONGEST_HISTORY_FILE:,} bytes",
                got=f"{path.stat().st_size:,}",
                where=str(path),
                fix="give one item on each line",
            )
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            expected="a text file with an item on each line",
            got=str(error),
            where=str(path),
            fix="correct the path or the file",
        ) from error
    return [item for item in map(str.strip, lines) if item]


def main() -> None:
    """Run the command."""
    with report_errors_on_one_line():
        app()


if __name__ == "__main__":
    main()

"""``mllm-msr study``: run a series of DVC experiments. ``python -m mllm_msr.study`` is the same."""

import shlex
from collections.abc import Mapping, Set
from pathlib import Path
from typing import IO, Annotated, NamedTuple

import typer

from mllm_msr.core.errors import INTERRUPT_EXIT_CODE, DataError, report_errors_on_one_line
from mllm_msr.core.params import read_yaml
from mllm_msr.evaluation.scorers import MODEL
from mllm_msr.study import plans
from mllm_msr.study.experiments import (
    check_raw_data,
    check_sources,
    describe_other_source,
    experiment_command,
    find_experiments,
    head_commit,
    name_experiments,
    read_rankings,
)
from mllm_msr.study.full_ranking import (
    format_full_ranking,
    gather_retrievals,
    write_full_ranking,
)
from mllm_msr.study.plans import PARAMS, Study, Variant
from mllm_msr.study.results import compare_rankings, gather_results
from mllm_msr.study.running import lock_studies, remove_leftovers, run_experiment
from mllm_msr.study.writing import format_comparison, format_results, write_results

FOLDER = Path("data/studies")

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the commands; run nothing.")]
Revision = Annotated[str, typer.Argument(help="A commit, or an experiment's name.")]


class Workspace(NamedTuple):
    """The state that a study starts from: the commit, and the names of its experiments."""

    commit: str
    experiments: Set[str]


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Series of DVC experiments with a table and a figure of each, in data/studies. "
    "Finished experiments are not run again, so a study that was stopped resumes.",
)


@app.command("list")
def list_studies() -> None:
    """Print each study, how many of its experiments are finished, and its question.

    Example: mllm-msr study list
    """
    finished, settings = find_experiments(), _settings()
    if plans.look_up(settings, "recommender.model") is None:
        typer.echo(
            "recommender.model is null: studies that compare MLLM-MSR are refused; folds runs",
            err=True,
        )
    for study in plans.plan_all(settings):
        names = name_experiments(study)
        count = f"{len(names.keys() & finished)} of {len(names)} done"
        typer.echo(f"{study.name:14}  {count:12}  {study.about}")


@app.command()
def table(
    text_model: Annotated[
        str | None,
        typer.Option(help="A text-only LLM for TALLRec's row.", show_default="recommender.model"),
    ] = None,
    text_revision: Annotated[
        str | None, typer.Option(help="Its commit, if it is a model of a hub.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Make the main table: MLLM-MSR beside other LLMs, baselines, popularity and chance.

    Example: mllm-msr study table
    """
    _make(plans.plan_table(text_model, text_revision), dry_run)


@app.command()
def ablation(dry_run: DryRun = False) -> None:
    """Measure what each part contributes: the method without one part at a time.

    Example: mllm-msr study ablation --dry-run
    """
    _make(plans.ABLATION, dry_run)


@app.command("block-size")
def block_size(dry_run: DryRun = False) -> None:
    """Vary the number of items in a block of the recurrent preference, 1 to 5.

    Example: mllm-msr study block-size
    """
    _make(plans.plan_block_size(), dry_run)


@app.command("summary-length")
def summary_length(
    values: Annotated[
        str | None,
        typer.Option(
            help="Maximum new tokens of a preference, comma-separated.",
            show_default="8,16,24,32,48 in the pocket world, else 50,100,150,200,250",
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Vary the maximum length of a preference.

    Example: mllm-msr study summary-length --values 50,100,200
    """
    lengths = plans.parse_values(values) if values else None
    _make(plans.plan_summary_length(lengths or plans.default_lengths(_settings())), dry_run)


@app.command("image-summary")
def image_summary(dry_run: DryRun = False) -> None:
    """Compare summaries with images: GRU4Rec on features of each.

    Example: mllm-msr study image-summary
    """
    _make(plans.IMAGE_SUMMARY, dry_run)


@app.command()
def loss(dry_run: DryRun = False) -> None:
    """Compare the paper's loss with one over the list of a sequence's candidates.

    Example: mllm-msr study loss
    """
    _make(plans.LOSS, dry_run)


@app.command()
def seeds(
    count: Annotated[
        int, typer.Option(min=1, help="Number of consecutive seeds, starting at sft.seed.")
    ] = 3,
    dry_run: DryRun = False,
) -> None:
    """Repeat the fine-tuning with several seeds; only sft.seed varies; the split stays the same.

    Example: mllm-msr study seeds --count 5
    """
    _make(plans.plan_seeds(plans.look_up(_settings(), "sft.seed"), count), dry_run)


@app.command("cold-items")
def cold_items(dry_run: DryRun = False) -> None:
    """Withhold a share of the items from training; AUC of every row on cold, rare and warm items.

    Example: mllm-msr study cold-items
    """
    _make(plans.COLD_ITEMS, dry_run)


@app.command()
def folds(
    count: Annotated[
        int,
        typer.Option(min=2, max=20, help="Number of folds; each user is tested in exactly one."),
    ] = 5,
    dry_run: DryRun = False,
) -> None:
    """Repeat the ID-based and feature baselines on several folds of users, without the model.

    Example: mllm-msr study folds --count 5
    """
    _make(plans.plan_folds(_settings(), count), dry_run)


@app.command("learning-curve")
def learning_curve(
    values: Annotated[
        str, typer.Option(help="Numbers of training sequences, joined by commas; 0 is added.")
    ] = ",".join(map(str, plans.BUDGETS)),
    dry_run: DryRun = False,
) -> None:
    """Vary the number of training sequences, for MLLM-MSR, SASRec and GRU4Rec_F alike.

    Example: mllm-msr study learning-curve --values 64,256,1024,4096
    """
    _make(plans.plan_learning_curve(_settings(), plans.parse_values(values)), dry_run)


@app.command("full-ranking")
def full_ranking(dry_run: DryRun = False) -> None:
    """Rank the whole catalogue: retrievers' candidates, reranked by MLLM-MSR.

    Example: mllm-msr study full-ranking
    """
    _make(plans.plan_full_ranking(_settings()), dry_run)


@app.command()
def compare(revision: Revision, other: Revision) -> None:
    """Compare MLLM-MSR at two revisions, paired over the test sequences.

    Example: mllm-msr study compare HEAD block-5
    """
    check_sources((revision, other))
    ours, others = read_rankings(revision), read_rankings(other)
    compared = compare_rankings(ours, others)
    sequences = {each: len(ours.ranks[each, MODEL].sequences) for each in compared}
    typer.echo(format_comparison((revision, other), compared, sequences))
    if note := describe_other_source(revision):
        typer.echo(note, err=True)


def _make(study: Study, dry_run: bool) -> None:
    """Run the missing experiments of a study, and write the results."""
    params = _settings()
    plans.check_study(study, params)
    variants = name_experiments(study)
    if dry_run:
        _print_commands(variants)
        return
    check_raw_data()
    with lock_studies(study.name) as lock:
        remove_leftovers()
        start = Workspace(head_commit(), variants.keys())
        _run_missing(study, variants, start, lock)
        _refuse_change(study, start)
        text = _write(study, params, variants, start.commit)
    typer.echo(f"\n{text}")
    typer.echo(f"wrote {FOLDER / study.name}: table.md, table.csv, figure.svg, figure.png")


def _write(
    study: Study, params: Mapping[str, object], variants: Mapping[str, Variant], commit: str
) -> str:
    """Write the results of finished experiments, and return the table."""
    folder, finished = FOLDER / study.name, find_experiments()
    if study.kind == "retrievers":
        found = gather_retrievals(variants, finished)
        write_full_ranking(study, found, params, commit, folder)
        return format_full_ranking(study, found, params, commit)
    results = gather_results(study, params, variants, finished)
    write_results(results, params, commit, folder)
    return format_results(results, params, commit)


def _run_missing(
    study: Study, variants: Mapping[str, Variant], start: Workspace, lock: IO[str]
) -> None:
    """Run the missing experiments one after the other, and print a line for each.

    Raises:
        DataError: One failed, or the workspace changed.
        typer.Exit: The study was interrupted.
    """
    finished = find_experiments()
    for number, (name, variant) in enumerate(variants.items(), start=1):
        typer.echo(f"[{number}/{len(variants)}] {name}: ", nl=False)
        if name in finished:
            typer.echo("already done")
            continue
        _refuse_change(study, start)
        try:
            seconds = run_experiment(name, variant.settings, lock)
        except KeyboardInterrupt:
            typer.echo("stopped")
            raise typer.Exit(INTERRUPT_EXIT_CODE) from None
        typer.echo(f"{seconds:,.0f} s")


def _refuse_change(study: Study, start: Workspace) -> None:
    """Refuse to continue in a workspace that changed: names of experiments would be wrong."""
    if Workspace(head_commit(), name_experiments(study).keys()) != start:
        got, fix = "another commit, other settings, prompts or code", "run the study again"
        raise DataError(
            expected="the workspace as it was when the study began", got=got, where=".", fix=fix
        )


def _print_commands(variants: Mapping[str, Variant]) -> None:
    finished = find_experiments()
    for name, variant in variants.items():
        command = shlex.join(experiment_command(name, variant.settings))
        typer.echo(command + ("  # already done" if name in finished else ""))


def _settings() -> dict[str, object]:
    return read_yaml(Path(PARAMS))


def main() -> None:
    """Run the commands."""
    with report_errors_on_one_line():
        app()


if __name__ == "__main__":
    main()

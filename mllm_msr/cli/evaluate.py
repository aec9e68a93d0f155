"""Commands that print tables of an evaluation and write nothing.

The stage ``evaluate`` computes and writes the evaluation itself (``stages/evaluate.py``).
"""

from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import Params
from mllm_msr.core.errors import report_errors_on_one_line
from mllm_msr.core.params import load_all_params
from mllm_msr.evaluation.evaluation import evaluate
from mllm_msr.evaluation.results import read_comparisons, read_metrics
from mllm_msr.evaluation.table import format_table
from mllm_msr.pocket.identity import warn_of_pocket_model

Data = Annotated[Path, typer.Option(help="Folder of the stages' outputs.")]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Print tables of an evaluation; write nothing.",
)


@app.command()
def show(data: Data = Path("data")) -> None:
    """Print the table of the last evaluation.

    Example: mllm-msr evaluate show
    """
    metrics = read_metrics(data / "evaluate" / "metrics.json")
    comparisons = read_comparisons(data / "evaluate" / "comparisons.parquet")
    typer.echo(format_table(metrics, comparisons))


@app.command()
def baselines(params: Params = Path("params.yaml"), data: Data = Path("data")) -> None:
    """Print the metrics table without the model, of the baselines whose scores exist.

    Example: mllm-msr evaluate baselines
    """
    settings = load_all_params(params)
    stages = (settings.baselines, settings.feature_baselines, settings.text_baselines)
    tables = {
        name: data / section.stage / f"{name}.parquet"
        for section in stages
        for name in section.models
    }
    scored = {name: path for name, path in tables.items() if path.is_file()}
    missing = [name for name in tables if name not in scored]
    typer.echo(f"without scores: {', '.join(missing) or 'none'}\n", err=True)
    oracle = data / "pocket_world" / "oracle.parquet"
    result = evaluate(
        None,
        data / "filter_sequences",
        oracle if settings.preprocess.source == "pocket" else None,
        scored,
        **settings.evaluate.model_dump(),
        only_used=settings.filter_sequences.budget.interactions == "used",
    )
    result.metrics["warnings"] = warn_of_pocket_model(settings.preprocess.source, settings.models)
    typer.echo(format_table(result.metrics, result.comparisons))


def main() -> None:
    """Run the commands; an error meant for users is one line."""
    with report_errors_on_one_line():
        app()


if __name__ == "__main__":
    main()

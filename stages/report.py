"""One HTML file that shows the run: data, results, training, scores, studies and stories."""

import os
from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import (
    Debug,
    FilteredPath,
    ImagesPath,
    OutPath,
    Params,
    PreferencesPath,
    SummariesPath,
    TrainedPath,
    report_written,
    run,
)
from mllm_msr.core.files import find_experiment_project
from mllm_msr.core.params import load_all_params
from mllm_msr.pocket.identity import warn_of_pocket_model


def report(
    dropped: Annotated[Path, typer.Option(help="dropped.json of preprocess.")] = Path(
        "data/preprocess/dropped.json"
    ),
    filtered: FilteredPath = Path("data/filter_sequences"),
    images: ImagesPath = Path("data/fetch_images/images.parquet"),
    summaries: SummariesPath = Path("data/summarize_items/summaries.parquet"),
    preferences: PreferencesPath = Path("data/infer_preferences/preferences.parquet"),
    trained: TrainedPath = Path("data/sft"),
    scores: Annotated[Path, typer.Option(help="Table of the candidates' log-odds.")] = Path(
        "data/score/scores.parquet"
    ),
    evaluated: Annotated[Path, typer.Option(help="Folder of evaluate.")] = Path("data/evaluate"),
    studies: Annotated[
        Path, typer.Option(help="Folder of the studies' tables and figures.")
    ] = Path("data/studies"),
    out: OutPath = Path("data/report"),
    params: Params = Path("params.yaml"),
    debug: Debug = False,
) -> None:
    """Write one page that needs no network: open it in a browser, or send it to someone.

    Example: python -m stages.report --out data/report
    """
    from mllm_msr.report.inputs import Inputs
    from mllm_msr.report.page import write_report
    from mllm_msr.report.settings import Settings

    settings = Settings(**dict(load_all_params(params)))
    inputs = Inputs(
        dropped, filtered, images, summaries, preferences, trained, scores, evaluated, studies
    )
    path = out / "report.html"
    warnings = warn_of_pocket_model(settings.preprocess.source, settings.models)
    size = write_report(inputs, settings, path, warnings)
    if find_experiment_project(Path.cwd()):  # which DVC removes in a moment
        name = os.environ.get("DVC_EXP_NAME", "NAME")
        typer.echo(f"the report is the experiment's: dvc exp apply {name}, then open {path}")
    else:
        typer.echo(f"open {path.resolve().as_uri()}")
    report_written(path, size, "bytes")


if __name__ == "__main__":
    run(report)

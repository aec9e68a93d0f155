"""Score every validation and test candidate by a baseline that reads ids or titles."""

from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import Debug, Params, report_written, run
from mllm_msr.core.params import BaselinesParams, FilterSequencesParams, load_params


def baselines(
    model: Annotated[str, typer.Argument(help="A baseline, by its name in the settings.")],
    interactions: Annotated[Path, typer.Option(help="Table of interactions.")] = Path(
        "data/preprocess/interactions.parquet"
    ),
    filtered: Annotated[
        Path, typer.Option(help="Folder of filter_sequences; content_knn reads its items.")
    ] = Path("data/filter_sequences"),
    out: Annotated[Path, typer.Option(help="Folder of the baselines' scores.")] = Path(
        "data/baselines"
    ),
    params: Params = Path("params.yaml"),
    debug: Debug = False,
) -> None:
    """Train one baseline on the interactions before the held-out targets and score the candidates.

    Example: python -m stages.baselines item_knn
    """
    from mllm_msr.baselines.discovery import Inputs

    settings = load_params(BaselinesParams, params).of(model)
    filters = load_params(FilterSequencesParams, params)
    inputs = Inputs(items=filtered / "items.parquet")
    # Imported here, since it loads what reads tables: --help need not wait for it.
    from mllm_msr.baselines.task import run_baseline

    path, rows = run_baseline(model, settings, filters, interactions, filtered, inputs, out)
    report_written(path, rows, "scores")


if __name__ == "__main__":
    run(baselines)

"""Score every validation and test candidate by a baseline that reads item features."""

from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import Debug, Params, report_written, run
from mllm_msr.core.params import FeatureBaselinesParams, FilterSequencesParams, load_params


def feature_baselines(
    model: Annotated[str, typer.Argument(help="A baseline, by its name in the settings.")],
    interactions: Annotated[Path, typer.Option(help="Table of interactions.")] = Path(
        "data/preprocess/interactions.parquet"
    ),
    filtered: Annotated[
        Path, typer.Option(help="Folder with sequences, histories, candidates and popularity.")
    ] = Path("data/filter_sequences"),
    features: Annotated[Path, typer.Option(help="Table of the items' vectors.")] = Path(
        "data/encode_items/features.parquet"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the baselines' scores.")] = Path(
        "data/feature_baselines"
    ),
    params: Params = Path("params.yaml"),
    debug: Debug = False,
) -> None:
    """Train one baseline on interactions and item features, and score the candidates.

    Example: python -m stages.feature_baselines gru4rec_f
    """
    from mllm_msr.baselines.discovery import Inputs

    settings = load_params(FeatureBaselinesParams, params).of(model)
    filters = load_params(FilterSequencesParams, params)
    inputs = Inputs(features=features)
    # Imported here, since it loads what reads tables: --help need not wait for it.
    from mllm_msr.baselines.task import run_baseline

    path, rows = run_baseline(model, settings, filters, interactions, filtered, inputs, out)
    report_written(path, rows, "scores")


if __name__ == "__main__":
    run(feature_baselines)

"""Scores every valid and test candidate by a baseline that reads the items' features."""

from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.baselines import sequential
from mllm_msr.baselines.features import read_columns, standardise
from mllm_msr.baselines.task import Floats, Task, read_task, write_scores
from mllm_msr.core.command import Debug, Params, report_written, run
from mllm_msr.core.params import (
    FeatureBaselinesParams,
    FilterSequencesParams,
    Section,
    SequentialParams,
    load_params,
)


def feature_baselines(
    model: Annotated[str, typer.Argument(help="A baseline, by its name in the settings.")],
    interactions: Annotated[Path, typer.Option(help="Table of who took what, when.")] = Path(
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
    """Train one baseline on what may be known and what items are, and score the candidates.

    Example: python -m stages.feature_baselines gru4rec_f
    """
    settings = load_params(FeatureBaselinesParams, params).of(model)
    filters = load_params(FilterSequencesParams, params)
    task = read_task(
        interactions,
        filtered,
        min_user_interactions=filters.min_user_interactions,
        by_time=filters.split == "time",
    )
    path = out / f"{model}.parquet"
    report_written(path, write_scores(task, score(model, task, features, settings), path), "scores")


def score(model: str, task: Task, features: Path, settings: Section) -> Floats:
    """Score the candidates by the network or by VBPR, whichever the settings are of."""
    if isinstance(settings, SequentialParams):
        columns = read_columns(features, task.items, settings.features, model)
        return sequential.score(task, columns, settings)
    (images,) = read_columns(features, task.items, ["image"], model)
    # Only here: it needs an extra package.
    from mllm_msr.baselines.collaborative import vbpr

    return vbpr(task, standardise(images), **settings.model_dump())


if __name__ == "__main__":
    run(feature_baselines)

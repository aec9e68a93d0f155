"""Score every validation and test candidate by a baseline that compares generated texts."""

from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import (
    Debug,
    FilteredPath,
    Params,
    report_written,
    run,
)
from mllm_msr.core.params import FilterSequencesParams, TextBaselinesParams, load_params


def text_baselines(
    model: Annotated[str, typer.Argument(help="A baseline, by its name in the settings.")],
    interactions: Annotated[Path, typer.Option(help="Table of interactions.")] = Path(
        "data/preprocess/interactions.parquet"
    ),
    filtered: FilteredPath = Path("data/filter_sequences"),
    summaries: Annotated[Path, typer.Option(help="Table of the items' summaries.")] = Path(
        "data/summarize_items/summaries.parquet"
    ),
    preferences: Annotated[Path, typer.Option(help="Table of the users' preferences.")] = Path(
        "data/infer_preferences/preferences.parquet"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the baselines' scores.")] = Path(
        "data/text_baselines"
    ),
    params: Params = Path("params.yaml"),
    debug: Debug = False,
) -> None:
    """Score the candidates by their texts, without a model and without training.

    Example: python -m stages.text_baselines word_overlap
    """
    from mllm_msr.baselines.discovery import Inputs

    settings = load_params(TextBaselinesParams, params).of(model)
    filters = load_params(FilterSequencesParams, params)
    inputs = Inputs(items=filtered / "items.parquet", summaries=summaries, preferences=preferences)
    # Imported here, since it loads what reads tables: --help need not wait for it.
    from mllm_msr.baselines.task import run_baseline

    path, rows = run_baseline(model, settings, filters, interactions, filtered, inputs, out)
    report_written(path, rows, "scores")


if __name__ == "__main__":
    run(text_baselines)

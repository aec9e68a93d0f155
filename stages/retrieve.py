"""Retrieve candidates of the whole catalogue for every valid and test sequence."""

from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import Debug, Params, report_written, run, write_empty_table
from mllm_msr.core.params import (
    BaselinesParams,
    FeatureBaselinesParams,
    FilterSequencesParams,
    RetrieveParams,
    load_params,
)
from mllm_msr.core.schemas import FirstItems, Retrieved
from mllm_msr.core.tables import write_rows


def retrieve(
    interactions: Annotated[Path, typer.Option(help="Table of interactions.")] = Path(
        "data/preprocess/interactions.parquet"
    ),
    filtered: Annotated[Path, typer.Option(help="Folder of filter_sequences.")] = Path(
        "data/filter_sequences"
    ),
    features: Annotated[Path, typer.Option(help="Vectors of the items.")] = Path(
        "data/encode_items/features.parquet"
    ),
    out: Annotated[Path, typer.Option(help="Folder of both tables.")] = Path("data/retrieve"),
    params: Params = Path("params.yaml"),
    debug: Debug = False,
) -> None:
    """Propose candidates of the whole catalogue, and the first items by each other baseline.

    Example: python -m stages.retrieve
    """
    settings = load_params(RetrieveParams, params)
    by_stage = {
        "baselines": load_params(BaselinesParams, params),
        "feature_baselines": load_params(FeatureBaselinesParams, params),
    }
    filters = load_params(FilterSequencesParams, params)
    candidates, baselines = out / "candidates.parquet", out / "baselines.parquet"
    if settings.retriever is None:
        write_empty_table("retrieve.retriever", Retrieved, candidates)
        write_empty_table("retrieve.retriever", FirstItems, baselines)
        return
    # Imported here, since they load what reads tables: --help need not wait for it.
    from mllm_msr.baselines.discovery import Learner, find_baseline
    from mllm_msr.baselines.task import read_task
    from mllm_msr.recommendation.full_catalogue import (
        POPULARITY,
        list_retrievers,
        load_learner,
        retrieve_first,
    )

    task = read_task(
        interactions,
        filtered,
        min_user_interactions=filters.min_user_interactions,
        by_time=filters.split == "time",
        only_used=filters.budget.interactions == "used",
    )

    def load(name: str) -> Learner | None:
        if name == POPULARITY:
            return None
        own = by_stage[find_baseline(name).stage].of(name)
        return load_learner(name, own, task, filtered, features)

    number, retriever = settings.candidates, settings.retriever
    rows = retrieve_first(task, retriever, load(retriever), number, ("valid", "test"))
    report_written(candidates, write_rows(Retrieved, rows, candidates), f"items by {retriever}")
    others = [name for name in list_retrievers(by_stage.values()) if name != retriever]
    firsts = (
        {"scorer": name, **row}
        for name in others
        for row in retrieve_first(task, name, load(name), number, ("test",))
    )
    written = write_rows(FirstItems, firsts, baselines)
    report_written(baselines, written, f"items by {', '.join(others)}")


if __name__ == "__main__":
    run(retrieve)

"""Retrieve candidates of the whole catalogue for every valid and test sequence."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import duckdb
import pyarrow as arrow
import typer

from mllm_msr.core.command import (
    Debug,
    FilteredPath,
    OutPath,
    Params,
    PreferencesPath,
    SummariesPath,
    report_written,
    run,
    write_empty_table,
)
from mllm_msr.core.params import (
    BaselinesParams,
    FeatureBaselinesParams,
    FilterSequencesParams,
    RetrieveParams,
    TextBaselinesParams,
    load_params,
)


def retrieve(
    interactions: Annotated[Path, typer.Option(help="Table of interactions.")] = Path(
        "data/preprocess/interactions.parquet"
    ),
    filtered: FilteredPath = Path("data/filter_sequences"),
    features: Annotated[Path, typer.Option(help="Vectors of the items.")] = Path(
        "data/encode_items/features.parquet"
    ),
    summaries: SummariesPath = Path("data/summarize_items/summaries.parquet"),
    preferences: PreferencesPath = Path("data/infer_preferences/preferences.parquet"),
    out: OutPath = Path("data/retrieve"),
    params: Params = Path("params.yaml"),
    debug: Debug = False,
) -> None:
    """Retrieve candidates from the whole catalogue, and the top items of every other baseline.

    Example: python -m stages.retrieve
    """
    from mllm_msr.core.schemas import FirstItems, Retrieved
    from mllm_msr.core.tables import write_query

    settings = load_params(RetrieveParams, params)
    by_stage = {
        "baselines": load_params(BaselinesParams, params),
        "feature_baselines": load_params(FeatureBaselinesParams, params),
        "text_baselines": load_params(TextBaselinesParams, params),
    }
    filters = load_params(FilterSequencesParams, params)
    candidates, baselines = out / "candidates.parquet", out / "baselines.parquet"
    if settings.retriever is None:
        write_empty_table("retrieve.retriever", Retrieved, candidates)
        write_empty_table("retrieve.retriever", FirstItems, baselines)
        return
    # Imported here, since they load what reads tables: --help need not wait for it.
    from mllm_msr.baselines.discovery import find_baseline
    from mllm_msr.baselines.task import read_task
    from mllm_msr.recommendation.full_catalogue import (
        POPULARITY,
        TARGET_POPULARITY,
        choose_questions,
        find_inputs,
        list_rows,
        retrieve_first,
        score_by_baseline,
        score_by_popularity,
    )

    only_used = filters.budget.interactions == "used"
    task = read_task(
        interactions,
        filtered,
        min_user_interactions=filters.min_user_interactions,
        by_time=filters.split == "time",
        only_used=only_used,
    )

    def rank_all(name: str, splits: Collection[str]) -> arrow.Table:
        asked = choose_questions(task, splits)
        if name in (POPULARITY, TARGET_POPULARITY):
            scores = score_by_popularity(name, asked, filtered, only_used=only_used)
        else:
            baseline = find_baseline(name)
            inputs = find_inputs(baseline, filtered, features, summaries, preferences)
            own = by_stage[baseline.stage].of(name)
            scores = score_by_baseline(baseline, task, asked, own, inputs)
        return retrieve_first(task, name, asked, scores, settings.candidates)

    retriever = settings.retriever
    others = [name for name in list_rows(by_stage.values()) if name != retriever]
    with duckdb.connect() as connection:
        connection.register("candidates", rank_all(retriever, ("valid", "test")))
        query = "FROM candidates ORDER BY sequence, rank"
        written = write_query(Retrieved, connection, query, candidates)
        report_written(candidates, written, f"items by {retriever}")
        for name in others:
            connection.register(name, rank_all(name, ("test",)))
        tables = " UNION ALL ".join(f"SELECT '{name}' AS scorer, * FROM {name}" for name in others)
        query = f"FROM ({tables}) ORDER BY scorer, sequence, rank"
        written = write_query(FirstItems, connection, query, baselines)
    report_written(baselines, written, f"items by {', '.join(others)}")


if __name__ == "__main__":
    run(retrieve)

"""Evaluate how each scorer ranks the targets: the model, baselines, popularity and chance."""

from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import Debug, Params, report_written, run
from mllm_msr.core.params import (
    BaselinesParams,
    EncodeItemsParams,
    EvaluateParams,
    FeatureBaselinesParams,
    FilterSequencesParams,
    InferPreferencesParams,
    PreprocessParams,
    RecommenderParams,
    RetrieveParams,
    SummarizeItemsParams,
    TextBaselinesParams,
    load_params,
)
from mllm_msr.pocket.identity import warn_of_pocket_model


def evaluate(
    params: Params = Path("params.yaml"),
    scores: Annotated[Path, typer.Option(help="Table of the candidates' log-odds.")] = Path(
        "data/score/scores.parquet"
    ),
    filtered: Annotated[
        Path, typer.Option(help="Folder with sequences, candidates and popularity.")
    ] = Path("data/filter_sequences"),
    oracle: Annotated[
        Path, typer.Option(help="True utilities; read when preprocess.source is pocket.")
    ] = Path("data/pocket_world/oracle.parquet"),
    baselines: Annotated[
        Path, typer.Option(help="Folder with the scores of each of baselines.models.")
    ] = Path("data/baselines"),
    feature_baselines: Annotated[
        Path, typer.Option(help="Folder with the scores of each of feature_baselines.models.")
    ] = Path("data/feature_baselines"),
    text_baselines: Annotated[
        Path, typer.Option(help="Folder with the scores of each of text_baselines.models.")
    ] = Path("data/text_baselines"),
    retrieved: Annotated[
        Path, typer.Option(help="Folder of the retrieved candidates; may have no rows.")
    ] = Path("data/retrieve"),
    reranked: Annotated[
        Path, typer.Option(help="Table of their log-odds; may have no rows.")
    ] = Path("data/rerank/scores.parquet"),
    out: Annotated[Path, typer.Option(help="Folder of the metrics and plots.")] = Path(
        "data/evaluate"
    ),
    debug: Debug = False,
) -> None:
    """Compute AUC, HR@k, NDCG@k and MRR@k of every scorer, with intervals and paired tests.

    Example: python -m stages.evaluate --scores data/score/scores.parquet --out data/evaluate
    """
    from mllm_msr.evaluation import evaluation
    from mllm_msr.evaluation.results import write_evaluation
    from mllm_msr.evaluation.retrieved_lists import read_lists
    from mllm_msr.evaluation.table import format_table

    source = load_params(PreprocessParams, params).source
    named = {
        baselines: load_params(BaselinesParams, params).models,
        feature_baselines: load_params(FeatureBaselinesParams, params).models,
        text_baselines: load_params(TextBaselinesParams, params).models,
    }
    models = {
        "summarize_items.model": load_params(SummarizeItemsParams, params).model,
        "encode_items.model": load_params(EncodeItemsParams, params).model,
        "infer_preferences.model": load_params(InferPreferencesParams, params).model,
        "recommender.model": load_params(RecommenderParams, params).model,
    }
    retriever = load_params(RetrieveParams, params).retriever
    result = evaluation.evaluate(
        scores,
        filtered,
        oracle if source == "pocket" else None,
        {name: folder / f"{name}.parquet" for folder, names in named.items() for name in names},
        **load_params(EvaluateParams, params).model_dump(),
        only_used=load_params(FilterSequencesParams, params).budget.interactions == "used",
        retriever=retriever or "",
        lists=read_lists(retrieved, reranked, filtered) if retriever else None,
    )
    if warnings := warn_of_pocket_model(source, models):
        result.metrics["warnings"] = warnings
    typer.echo(format_table(result.metrics, result.comparisons))
    for path, rows in write_evaluation(result, out).items():
        report_written(path, rows, "samplings" if path.suffix == ".json" else "rows")


if __name__ == "__main__":
    run(evaluate)

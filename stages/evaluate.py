"""Measures how well the scores rank each target among its candidates, beside chance and others."""

from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import Debug, Params, report_written, run
from mllm_msr.core.params import (
    BaselinesParams,
    EncodeItemsParams,
    EvaluateParams,
    FeatureBaselinesParams,
    InferPreferencesParams,
    PreprocessParams,
    RecommenderParams,
    SummarizeItemsParams,
    TextBaselinesParams,
    load_params,
)
from mllm_msr.evaluation import evaluation
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
        Path, typer.Option(help="Folder of the scores of those that baselines.models names.")
    ] = Path("data/baselines"),
    feature_baselines: Annotated[
        Path, typer.Option(help="The same of those that feature_baselines.models names.")
    ] = Path("data/feature_baselines"),
    text_baselines: Annotated[
        Path, typer.Option(help="The same of those that text_baselines.models names.")
    ] = Path("data/text_baselines"),
    out: Annotated[Path, typer.Option(help="Folder of the metrics and plots.")] = Path(
        "data/evaluate"
    ),
    show: Annotated[
        bool, typer.Option("--show", help="Print the table of the last evaluation; measure none.")
    ] = False,
    baselines_only: Annotated[
        bool,
        typer.Option(
            "--baselines-only",
            help="Print the table of all but the model, of those that have scores; write none.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Compute AUC, HR@k, NDCG@k and MRR@k with intervals, and those of other scorers.

    Example: python -m stages.evaluate --scores data/score/scores.parquet --out data/evaluate
    """
    if show:
        metrics = evaluation.read_metrics(out / "metrics.json")
        comparisons = evaluation.read_comparisons(out / "comparisons.parquet")
        typer.echo(evaluation.format_table(metrics, comparisons, warn(params)))
        return
    settings = load_params(EvaluateParams, params)
    pocket = load_params(PreprocessParams, params).source == "pocket"
    models = {
        baselines: load_params(BaselinesParams, params).models,
        feature_baselines: load_params(FeatureBaselinesParams, params).models,
        text_baselines: load_params(TextBaselinesParams, params).models,
    }
    named = {name: path / f"{name}.parquet" for path, names in models.items() for name in names}
    if baselines_only:
        missing = [name for name, path in named.items() if not path.is_file()]
        named = {name: path for name, path in named.items() if name not in missing}
        typer.echo(f"without scores: {', '.join(missing) or 'none'}\n", err=True)
    result = evaluation.evaluate(
        None if baselines_only else scores,
        filtered,
        oracle if pocket else None,
        named,
        **settings.model_dump(),
    )
    typer.echo(evaluation.format_table(result.metrics, result.comparisons, warn(params)))
    if not baselines_only:
        for path, rows in evaluation.write_evaluation(result, out).items():
            report_written(path, rows, "samplings" if path.suffix == ".json" else "rows")


def warn(params: Path) -> list[str]:
    """Return what stands above the table: that the pocket model read other data."""
    models = {
        "summarize_items.model": load_params(SummarizeItemsParams, params).model,
        "encode_items.model": load_params(EncodeItemsParams, params).model,
        "infer_preferences.model": load_params(InferPreferencesParams, params).model,
        "recommender.model": load_params(RecommenderParams, params).model,
    }
    return warn_of_pocket_model(load_params(PreprocessParams, params).source, models)


if __name__ == "__main__":
    run(evaluate)

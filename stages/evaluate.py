"""Measures how well the scores rank each target among its candidates, beside chance and others."""

from pathlib import Path
from typing import Annotated

import typer

from mllm_msr import evaluation
from mllm_msr.params import (
    BaselinesParams,
    EvaluateParams,
    FeatureBaselinesParams,
    PreprocessParams,
    load_params,
)
from stages.command import Debug, Params, run, wrote


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
    out: Annotated[Path, typer.Option(help="Folder of the metrics and plots.")] = Path(
        "data/evaluate"
    ),
    show: Annotated[
        bool, typer.Option("--show", help="Print the table of the last evaluation; measure none.")
    ] = False,
    rivals: Annotated[
        bool, typer.Option("--rivals", help="Print the table of all but the model; write none.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Compute AUC, HR@k, NDCG@k and MRR@k with intervals, and those of its rivals.

    Example: python -m stages.evaluate --scores data/score/scores.parquet --out data/evaluate
    """
    if show:
        typer.echo(evaluation.format_table(evaluation.read_metrics(out / "metrics.json")))
        return
    settings = load_params(EvaluateParams, params)
    pocket = load_params(PreprocessParams, params).source == "pocket"
    models = {baselines: load_params(BaselinesParams, params).models}
    models[feature_baselines] = load_params(FeatureBaselinesParams, params).models
    named = {name: path / f"{name}.parquet" for path, names in models.items() for name in names}
    others, how = (filtered, oracle if pocket else None, named), settings.model_dump()
    if rivals:
        present = {name: path for name, path in named.items() if path.is_file()}
        missing = [name for name in named if name not in present]
        typer.echo(f"without scores: {', '.join(missing) or 'none'}\n", err=True)
        metrics, differences = evaluation.measure_rivals(*others[:2], present, **how)
        typer.echo(evaluation.format_table(metrics))
        if differences:
            shown = evaluation.format_differences(differences, metrics["confidence"])
            typer.echo(f"\n{shown}")
        return
    result = evaluation.evaluate(scores, *others, **how)
    written = evaluation.write_evaluation(result, out)
    typer.echo(evaluation.format_table(result.metrics))
    for path, rows in written.items():
        wrote(path, rows, "test sequences" if path.suffix == ".json" else "rows")


if __name__ == "__main__":
    run(evaluate)

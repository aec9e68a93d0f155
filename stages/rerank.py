"""Score the retrieved candidates by the log-odds of yes against no."""

import time
from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import (
    Debug,
    DryRun,
    ImagesPath,
    ItemsPath,
    OutPath,
    Params,
    PreferencesPath,
    Prompts,
    TrainedPath,
    print_dry_run,
    report_written,
    run,
    write_empty_table,
)
from mllm_msr.core.params import PreprocessParams, RecommenderParams, load_params
from mllm_msr.pocket.identity import refuse_pocket_model


def rerank(
    retrieved: Annotated[Path, typer.Option(help="Table of the retrieved candidates.")] = Path(
        "data/retrieve/candidates.parquet"
    ),
    preferences: PreferencesPath = Path("data/infer_preferences/preferences.parquet"),
    items: ItemsPath = Path("data/filter_sequences/items.parquet"),
    images: ImagesPath = Path("data/fetch_images/images.parquet"),
    trained: TrainedPath = Path("data/sft"),
    out: OutPath = Path("data/rerank"),
    params: Params = Path("params.yaml"),
    prompts: Prompts = Path("prompts.yaml"),
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Compute the log-odds of each retrieved candidate by the fine-tuned model.

    Example: python -m stages.rerank --dry-run
    """
    from mllm_msr.core.schemas import Retrieved, Scores
    from mllm_msr.core.tables import read_rows, write_rows
    from mllm_msr.method.prompts import load_prompts

    shared = load_params(RecommenderParams, params)
    templates, path = load_prompts("recommender", prompts), out / "scores.parquet"
    if shared.model is None:
        write_empty_table("recommender.model", Scores, path, dry_run)
        return
    rows = list(read_rows(Retrieved, retrieved, order="split DESC, sequence, rank"))
    if not rows:
        write_empty_table("retrieve.retriever", Scores, path, dry_run)
        return
    refuse_pocket_model("recommender.model", shared.model, load_params(PreprocessParams, params))
    # Imported here, since they load torch.
    from mllm_msr.engines.response_store import open_store
    from mllm_msr.method.examples import group_retrieved, open_recommender
    from mllm_msr.method.inference import CountingEngine
    from mllm_msr.method.scoring import open_scoring_model, score_examples, scoring_engine

    with open_recommender(shared, templates, preferences, items, images) as inputs:
        builder = inputs.builder
        if not dry_run:
            recommender = open_scoring_model(inputs, trained)
        examples = {
            split: [builder.build(question) for question in questions]
            for split, questions in group_retrieved(rows).items()
        }
        if dry_run:
            counting = CountingEngine(builder.encoder, builder.limit, placeholder="0")
            score_examples(examples, counting)
            print_dry_run(*counting.plan())
            return
        with open_store() as store:
            engine, begun = (
                scoring_engine(recommender, store, builder.limit, shared.engine, spread=True),
                time.monotonic(),
            )
            scores = score_examples(examples, engine)
            seconds = time.monotonic() - begun
    written = write_rows(Scores, (row._asdict() for row in scores), path)
    typer.echo(
        f"asked {engine.computed:,} of {written:,} pairs in {seconds:,.1f} s,"
        f" {engine.computed / seconds:,.1f} pairs per second;"
        f" {builder.shortened:,} prompts shortened"
    )
    report_written(path, written, "scores")


if __name__ == "__main__":
    run(rerank)

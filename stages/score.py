"""Score the candidates of valid and test sequences by the log-odds of yes against no."""

from pathlib import Path

import typer

from mllm_msr.core.command import (
    Debug,
    DryRun,
    FilteredPath,
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


def score(
    filtered: FilteredPath = Path("data/filter_sequences"),
    preferences: PreferencesPath = Path("data/infer_preferences/preferences.parquet"),
    items: ItemsPath = Path("data/filter_sequences/items.parquet"),
    images: ImagesPath = Path("data/fetch_images/images.parquet"),
    trained: TrainedPath = Path("data/sft"),
    out: OutPath = Path("data/score"),
    params: Params = Path("params.yaml"),
    prompts: Prompts = Path("prompts.yaml"),
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Compute the log-odds of each candidate by the fine-tuned model.

    Example: python -m stages.score --dry-run
    """
    from mllm_msr.core.schemas import Scores
    from mllm_msr.core.tables import write_rows
    from mllm_msr.method.prompts import load_prompts

    shared = load_params(RecommenderParams, params)
    templates = load_prompts("recommender", prompts)
    if shared.model is None:
        write_empty_table("recommender.model", Scores, out / "scores.parquet", dry_run)
        return
    refuse_pocket_model("recommender.model", shared.model, load_params(PreprocessParams, params))
    # Imported here, since they load torch.
    from mllm_msr.engines.response_store import open_store
    from mllm_msr.method.examples import open_recommender, read_questions
    from mllm_msr.method.inference import CountingEngine
    from mllm_msr.method.scoring import open_scoring_model, score_examples, scoring_engine

    questions = {
        split: read_questions(filtered / f"{split}_candidates.parquet")
        for split in ("valid", "test")
    }
    with open_recommender(shared, templates, preferences, items, images) as inputs:
        builder = inputs.builder
        if not dry_run:
            recommender = open_scoring_model(inputs, trained)
        examples = {split: list(map(builder.build, asked)) for split, asked in questions.items()}
        if dry_run:
            counting = CountingEngine(builder.encoder, builder.limit, placeholder="0")
            score_examples(examples, counting)
            print_dry_run(*counting.plan())
            return
        with open_store() as store:
            engine = scoring_engine(recommender, store, builder.limit, shared.engine, spread=True)
            scores = score_examples(examples, engine)
    written = write_rows(Scores, (row._asdict() for row in scores), out / "scores.parquet")
    typer.echo(f"asked {engine.computed:,} pairs; {builder.shortened:,} prompts shortened")
    report_written(out / "scores.parquet", written, "scores")


if __name__ == "__main__":
    run(score)

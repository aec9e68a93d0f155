"""Fine-tune the recommender with LoRA (paper, section Method, step 3)."""

from dataclasses import asdict
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
    print_dry_run,
    report_written,
    run,
)
from mllm_msr.core.files import file_digest, state_dir
from mllm_msr.core.params import PreprocessParams, RecommenderParams, SftParams, load_params
from mllm_msr.pocket.identity import refuse_pocket_model
from mllm_msr.training.files import write_no_training, write_report
from mllm_msr.training.launching import launch_processes


def sft(
    train: Annotated[Path, typer.Option(help="Table of the training pairs.")] = Path(
        "data/filter_sequences/train_candidates.parquet"
    ),
    selection: Annotated[
        Path, typer.Option(help="Table of the validation candidates that choose the epoch.")
    ] = Path("data/filter_sequences/selection_candidates.parquet"),
    preferences: PreferencesPath = Path("data/infer_preferences/preferences.parquet"),
    items: ItemsPath = Path("data/filter_sequences/items.parquet"),
    images: ImagesPath = Path("data/fetch_images/images.parquet"),
    out: OutPath = Path("data/sft"),
    params: Params = Path("params.yaml"),
    prompts: Prompts = Path("prompts.yaml"),
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train an adapter on yes/no questions, and select the best epoch on validation sequences.

    Example: python -m stages.sft --dry-run
    """
    from mllm_msr.method.prompts import load_prompts

    settings, shared = load_params(SftParams, params), load_params(RecommenderParams, params)
    templates = load_prompts("recommender", prompts)
    if shared.model is None:
        if not dry_run:
            write_no_training(out)
        verb = "would write" if dry_run else "wrote"
        typer.echo(f"recommender.model is null: {verb} {out} without an adapter")
        return
    refuse_pocket_model("recommender.model", shared.model, load_params(PreprocessParams, params))
    launch_processes("stages.sft")
    # Imported here, since they load torch.
    from accelerate import PartialState

    from mllm_msr.engines.response_store import response_key
    from mllm_msr.method.adapters import record_adapter
    from mllm_msr.method.examples import open_recommender, read_questions
    from mllm_msr.training.finetuning import FineTuning, sample_sequences

    questions = read_questions(train)
    checks = sample_sequences(
        read_questions(selection), settings.validation_sequences, settings.seed
    )
    with open_recommender(shared, templates, preferences, items, images) as recommender:
        builder = recommender.builder
        inputs = (train, selection, preferences, items, images)
        key = response_key(  # its names and values identify the checkpoints of earlier releases
            settings=f"{settings.by_steps()!r} {shared!r} {templates!r}",
            model=builder.encoder.identity,
            dtype=recommender.model.precision,
            **{path.stem: file_digest(path) for path in inputs},
        )
        work = state_dir() / "sft" / key
        training = FineTuning(recommender.model, recommender.answer_token_ids, settings, work, out)
        examples = [builder.build(question) for question in questions]
        validation = [builder.build(question) for question in checks]
        if dry_run:
            pairs = sum(len(one.examples) for one in training.schedule(examples, validation))
            print_dry_run(builder.encoder.render([*examples, *validation][0].prompt), pairs)
            return
        report = training.run(examples, validation)
    if PartialState().is_main_process:
        record = record_adapter(out / "adapter", builder.encoder.identity, settings.lora)
        write_report(out, **asdict(report), **record)
        training.finish()
        typer.echo(f"kept {report}; {builder.shortened:,} prompts shortened")
        report_written(out / "adapter", len(questions), "training pairs")


if __name__ == "__main__":
    run(sft)

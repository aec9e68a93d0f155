"""Infer each user's preference, block by block (paper, section Method, step 2)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mllm_msr.core.command import (
    Debug,
    DryRun,
    ItemsPath,
    OutPath,
    Params,
    Prompts,
    SummariesPath,
    print_dry_run,
    report_written,
    run,
    write_empty_table,
)
from mllm_msr.core.params import InferPreferencesParams, PreprocessParams, load_params
from mllm_msr.pocket.identity import refuse_pocket_model

if TYPE_CHECKING:
    from mllm_msr.method.prompts import Templates


def infer_preferences(
    histories: Annotated[Path, typer.Option(help="Table of histories, without targets.")] = Path(
        "data/filter_sequences/histories.parquet"
    ),
    summaries: SummariesPath = Path("data/summarize_items/summaries.parquet"),
    items: ItemsPath = Path("data/filter_sequences/items.parquet"),
    out: OutPath = Path("data/infer_preferences"),
    params: Params = Path("params.yaml"),
    prompts: Prompts = Path("prompts.yaml"),
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Generate an evolving preference text from each history, which never contains its target.

    Example: python -m stages.infer_preferences --dry-run
    """
    from mllm_msr.core.schemas import Preferences
    from mllm_msr.core.tables import write_rows
    from mllm_msr.method.prompts import load_prompts

    settings = load_params(InferPreferencesParams, params)
    templates = load_prompts("infer_preferences", prompts)
    path = out / "preferences.parquet"
    if settings.mode == "none":
        _list_titles(histories, items, templates, path, dry_run)
        return
    if settings.model is None:
        write_empty_table("infer_preferences.model", Preferences, path, dry_run)
        return
    preprocess = load_params(PreprocessParams, params)
    refuse_pocket_model("infer_preferences.model", settings.model, preprocess)
    # Imported here, since they load torch.
    from mllm_msr.engines.encoding import Encoder
    from mllm_msr.engines.response_store import open_store
    from mllm_msr.method import preferences
    from mllm_msr.method.inference import CountingEngine, greedy_engine, open_generator

    texts = preferences.read_histories(histories, items, summaries)
    encoder = Encoder(settings.model, settings.revision, None, settings.system_message)
    with open_store(read_only=dry_run) as store:
        model = open_generator(encoder, "infer_preferences", settings.engine)
        engine = greedy_engine(model, store, settings.max_new_tokens, spread=not dry_run)
        counting = CountingEngine(encoder, engine.limit, engine.find_stored)
        inferrer = preferences.PreferenceInferrer(counting if dry_run else engine, templates)
        rows = inferrer.infer(texts, settings.mode, settings.block_size)
    if dry_run:
        print_dry_run(*counting.plan())
        return
    written = write_rows(Preferences, (row._asdict() for row in rows), path)
    typer.echo(
        f"asked {engine.computed:,} prompts; {inferrer.shortened:,} shortened,"
        f" {engine.truncated:,} responses truncated at {settings.max_new_tokens} tokens"
    )
    report_written(path, written, f"preferences of {len(texts):,} sequences")


def _list_titles(
    histories: Path, items: Path, templates: "Templates", path: Path, dry: bool
) -> None:
    """Write the titles of each history in place of preferences, without a model."""
    from mllm_msr.core.schemas import Preferences
    from mllm_msr.core.tables import write_rows
    from mllm_msr.method import preferences

    titles = preferences.read_histories(histories, items)
    rows = preferences.list_titles(titles, templates)
    if dry:
        print_dry_run(next(rows).preference, calls=0)
        return
    written = write_rows(Preferences, (row._asdict() for row in rows), path)
    report_written(path, written, "lists of titles in place of preferences")


if __name__ == "__main__":
    run(infer_preferences)

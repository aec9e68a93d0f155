"""Summarize every item: text summary, image description, fusion (paper, section Method, step 1)."""

from pathlib import Path

import typer

from mllm_msr.core.command import (
    Debug,
    DryRun,
    ImagesPath,
    ItemsPath,
    OutPath,
    Params,
    Prompts,
    print_dry_run,
    report_written,
    run,
    write_empty_table,
)
from mllm_msr.core.params import PreprocessParams, SummarizeItemsParams, load_params
from mllm_msr.pocket.identity import refuse_pocket_model


def summarize_items(
    items: ItemsPath = Path("data/filter_sequences/items.parquet"),
    images: ImagesPath = Path("data/fetch_images/images.parquet"),
    out: OutPath = Path("data/summarize_items"),
    params: Params = Path("params.yaml"),
    prompts: Prompts = Path("prompts.yaml"),
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Generate one summary of each item's text and image.

    Example: python -m stages.summarize_items --dry-run
    """
    from mllm_msr.core.schemas import Summaries
    from mllm_msr.core.tables import write_rows
    from mllm_msr.images.gallery import Gallery
    from mllm_msr.method.prompts import load_prompts

    settings = load_params(SummarizeItemsParams, params)
    templates = load_prompts("summarize_items", prompts)
    path = out / "summaries.parquet"
    if settings.copies_texts:
        _copy_texts(items, settings.missing, path, dry_run)
        return
    if settings.model is None:
        write_empty_table("summarize_items.model", Summaries, path, dry_run)
        return
    preprocess = load_params(PreprocessParams, params)
    refuse_pocket_model("summarize_items.model", settings.model, preprocess)
    # Imported here, since they load torch.
    from mllm_msr.engines.encoding import Encoder
    from mllm_msr.engines.response_store import open_store
    from mllm_msr.method import summaries
    from mllm_msr.method.inference import CountingEngine, greedy_engine, open_generator

    raw_text = settings.text == "raw"
    with Gallery(images) as gallery:
        encoder = Encoder(settings.model, settings.revision, gallery, settings.system_message)
        catalogue = summaries.choose_inputs(
            summaries.read_items(items, gallery),
            settings.text != "none",
            settings.image,
            settings.missing,
        )
        with open_store(read_only=dry_run) as store:
            model = open_generator(encoder, "summarize_items", settings.engine)
            engine = greedy_engine(model, store, settings.max_new_tokens, spread=not dry_run)
            counting = CountingEngine(encoder, engine.limit, engine.find_stored)
            chosen = counting if dry_run else engine
            summarizer = summaries.Summarizer(chosen, templates, settings.fusion, raw_text=raw_text)
            rows = summarizer.summarize(catalogue)
    if dry_run:
        print_dry_run(*counting.plan())
        return
    written = write_rows(Summaries, (row._asdict() for row in rows), path)
    without = sum(not (item.text and item.image_ref) for item in catalogue)
    typer.echo(
        f"asked {engine.computed:,} prompts; {summarizer.shortened:,} shortened,"
        f" {engine.truncated:,} responses truncated at {settings.max_new_tokens} tokens;"
        f" {without:,} items lack a text or an image"
    )
    report_written(path, written, "summaries")


def _copy_texts(items: Path, missing: str, path: Path, dry_run: bool) -> None:
    """Write the items' texts as their summaries, without a model."""
    from mllm_msr.core.schemas import Summaries
    from mllm_msr.core.tables import write_rows
    from mllm_msr.method import summaries

    catalogue = summaries.read_items(items, gallery=None)
    rows = summaries.copy_texts(
        summaries.choose_inputs(catalogue, text=True, image=False, missing=missing)
    )
    if dry_run:
        print_dry_run(rows[0].summary, calls=0)
        return
    written = write_rows(Summaries, (row._asdict() for row in rows), path)
    report_written(path, written, "texts as summaries, without a model")


if __name__ == "__main__":
    run(summarize_items)

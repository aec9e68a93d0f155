"""From files and URLs to one table of small images, of the items that are kept."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import Debug, Params, report_written, run
from mllm_msr.core.files import atomic_write_all, state_dir
from mllm_msr.core.params import FetchImagesParams, PreprocessParams, load_params
from mllm_msr.core.tables import FailedImages, ImageSources, read_rows, write_rows
from mllm_msr.fetching.fetch import FetchOptions, locate
from mllm_msr.images.decoding import Failures, write_images


def fetch_images(
    image_sources: Annotated[Path, typer.Option(help="Table of where the images are.")] = Path(
        "data/filter_sequences/image_sources.parquet"
    ),
    raw: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the raw files; no image is read elsewhere.",
            show_default="data/raw/<preprocess.source>",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("data/fetch_images"),
    params: Params = Path("params.yaml"),
    connections: Annotated[int, typer.Option(min=1, help="Downloads at once.")] = 16,
    per_host: Annotated[int, typer.Option(min=1, help="Downloads at once from one host.")] = 4,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Fetch from private addresses too.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Read, check, shrink and store each image once; list those that could not be had.

    What comes from the web is kept beside the answers of models, and asked for only once.

    Example: python -m stages.fetch_images --connections 64 --per-host 16
    """
    settings = load_params(FetchImagesParams, params)
    folder = raw or Path("data/raw") / load_params(PreprocessParams, params).source
    rows = list(read_rows(ImageSources, image_sources, order="item"))
    failures = Failures(len(rows), settings.failed_share)
    options = FetchOptions(
        connections, per_host, max_failed_share=settings.failed_share, allow_private=allow_private
    )
    kept = state_dir() / "images"
    with failures.saved_on_error(kept / "failures.parquet"):
        located = locate(rows, kept, options, failures, folder)
        with atomic_write_all(out) as new:
            images = write_images(located, new / "images.parquet", settings.image_side, failures)
            failed = write_rows(FailedImages, failures.rows, new / "failures.parquet")
            counts = {"sources": len(rows), "images": images, "failed": failed}
            (new / "fetched.json").write_text(json.dumps(counts, indent=2) + "\n")
    report_written(out, images, f"images; {failed:,} images could not be had")


if __name__ == "__main__":
    run(fetch_images)

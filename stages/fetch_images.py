"""Fetch and decode the images of all items into one table of small images."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import Debug, Params, report_written, run
from mllm_msr.core.files import atomic_write_all, state_dir
from mllm_msr.core.params import FetchImagesParams, PreprocessParams, load_params


def fetch_images(
    image_sources: Annotated[Path, typer.Option(help="Table of image sources.")] = Path(
        "data/filter_sequences/image_sources.parquet"
    ),
    raw: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the raw files, in which local images must lie.",
            show_default="data/raw/<preprocess.source>",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("data/fetch_images"),
    params: Params = Path("params.yaml"),
    connections: Annotated[int, typer.Option(min=1, help="Maximum simultaneous downloads.")] = 16,
    per_host: Annotated[
        int, typer.Option(min=1, help="Maximum simultaneous downloads per host.")
    ] = 4,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Allow private addresses.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Download, decode and shrink each image, and list the images that failed.

    Downloads are cached in the state directory (.mllm_msr/images).

    Example: python -m stages.fetch_images --connections 64 --per-host 16
    """
    from mllm_msr.core.schemas import FailedImages, ImageSources
    from mllm_msr.core.tables import read_rows, write_rows
    from mllm_msr.fetching.fetch import FetchOptions, locate
    from mllm_msr.images.decoding import Failures, write_images

    settings = load_params(FetchImagesParams, params)
    folder = raw or Path("data/raw") / load_params(PreprocessParams, params).source
    rows = list(read_rows(ImageSources, image_sources, order="item"))
    failures = Failures(len(rows), settings.failed_share)
    options = FetchOptions(
        connections, per_host, max_failed_share=settings.failed_share, allow_private=allow_private
    )
    cache = state_dir() / "images"
    with failures.saved_on_error(cache / "failures.parquet"):
        located = locate(rows, cache, options, failures, folder)
        with atomic_write_all(out) as new:
            images = write_images(located, new / "images.parquet", settings.image_side, failures)
            failed = write_rows(FailedImages, failures.rows, new / "failures.parquet")
            counts = {"sources": len(rows), "images": images, "failed": failed}
            (new / "fetched.json").write_text(json.dumps(counts, indent=2) + "\n")
    report_written(out, images, f"images; {failed:,} failed")


if __name__ == "__main__":
    run(fetch_images)

"""From files and URLs to one table of small pictures, of the items that are kept."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.files import written_together
from mllm_msr.images import Failures, Located, write_images
from mllm_msr.params import FetchImagesParams, load_params
from mllm_msr.tables import FailedPictures, Pictures, read_rows, write_rows
from stages.command import Debug, Params, run, wrote


def fetch_images(
    pictures: Annotated[Path, typer.Option(help="Where the pictures are.")] = Path(
        "data/filter_sequences/pictures.parquet"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("data/fetch_images"),
    params: Params = Path("params.yaml"),
    debug: Debug = False,
) -> None:
    """Read, check, shrink and store each picture once; list those that could not be had.

    Example: python -m stages.fetch_images --pictures data/filter_sequences/pictures.parquet
    """
    settings = load_params(FetchImagesParams, params)
    rows = list(read_rows(Pictures, pictures, order="item"))
    failures = Failures(len(rows), settings.failed_share)
    located = [Located(row["item"], Path(row["file"]), row["member"]) for row in rows]
    with written_together(out) as new:
        images = write_images(located, new / "images.parquet", settings.image_side, failures)
        failed = write_rows(FailedPictures, failures.rows, new / "failures.parquet")
        counts = {"pictures": len(rows), "images": images, "failed": failed}
        (new / "fetched.json").write_text(json.dumps(counts, indent=2) + "\n")
    wrote(out, images, f"images; {failed:,} pictures failed")


if __name__ == "__main__":
    run(fetch_images)

"""Read a publisher's raw files into three checked tables: interactions, items, image sources."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import Debug, Params, report_written, run
from mllm_msr.core.errors import DataError
from mllm_msr.core.files import atomic_write_all, find_experiment_project
from mllm_msr.core.params import PreprocessParams, load_params

Raw = Annotated[
    Path | None,
    typer.Option(help="Folder of the raw files.", show_default="data/raw/<preprocess.source>"),
]
Out = Annotated[Path, typer.Option(help="Folder of the tables.")]


def preprocess(
    raw: Raw = None,
    out: Out = Path("data/preprocess"),
    params: Params = Path("params.yaml"),
    debug: Debug = False,
) -> None:
    """Write the tables of interactions, items and image sources from raw files, atomically.

    Dropped rows are counted by reason in dropped.json.

    Example: python -m stages.preprocess --raw data/raw/tables
    """
    from mllm_msr.core.schemas import ImageSources, Interactions, Items
    from mllm_msr.core.tables import open_database, write_query
    from mllm_msr.data.sources import SOURCES
    from mllm_msr.data.sources.cleaning import IMAGES, INTERACTIONS, ITEMS, clean
    from mllm_msr.data.sources.contract import read_prepared

    settings = load_params(PreprocessParams, params)
    folder = raw or Path("data/raw") / settings.source
    if not folder.is_dir() and find_experiment_project(Path.cwd()):
        fix = f"run in the project itself: dvc add {folder} and git add {folder}.dvc"
        expected = "raw files tracked by DVC, because an experiment runs in a copy of the project"
        raise DataError(expected=expected, got="no such folder", where=str(folder), fix=fix)
    tables = {"interactions": Interactions, "items": Items, "image_sources": ImageSources}
    with atomic_write_all(out) as new, open_database(new / "spill") as connection:
        dropped: dict[str, int] = {}
        known = None
        if settings.source == "prepared":
            queries = read_prepared(connection, folder)
        else:
            files = SOURCES[settings.source](connection, folder, settings)
            known, unknown = clean(connection, files, settings.unknown_items)
            dropped, queries = files.dropped | unknown, (INTERACTIONS, ITEMS, IMAGES)
        interactions, items, images = (
            write_query(model, connection, query, new / f"{name}.parquet")
            for (name, model), query in zip(tables.items(), queries, strict=True)
        )
        if known is not None:
            dropped["repeated_interactions"] = known - interactions
        (new / "dropped.json").write_text(json.dumps(dropped, indent=2) + "\n")
    for reason, count in dropped.items():
        typer.echo(f"dropped {count:,} {reason.replace('_', ' ')}")
    report_written(out, interactions, f"interactions, {items:,} items, {images:,} images")


if __name__ == "__main__":
    run(preprocess)

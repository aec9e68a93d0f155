"""Generate the pocket world, a small dataset with known tastes: its raw files and the oracle."""

from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import Debug, Params, report_written, run
from mllm_msr.core.params import PocketWorldParams, PreprocessParams, load_params


def pocket_world(
    params: Params = Path("params.yaml"),
    raw: Annotated[Path, typer.Option(help="Folder of the raw files.")] = Path("data/raw/pocket"),
    oracle: Annotated[
        Path, typer.Option(help="Table of the true utilities of items for users.")
    ] = Path("data/pocket_world/oracle.parquet"),
    debug: Debug = False,
) -> None:
    """Generate a small catalogue with images, and users who choose by a drifting taste.

    Writes files without rows if preprocess.source is another dataset.

    Example: python -m stages.pocket_world --raw data/raw/pocket
    """
    from mllm_msr.pocket.empty import write_empty_world

    settings = load_params(PocketWorldParams, params)
    source = load_params(PreprocessParams, params).source
    if source != "pocket":
        write_empty_world(raw, oracle)
        typer.echo(f"preprocess.source is {source}: wrote {raw} and {oracle} without rows")
        return
    # Imported here, since a run on other data need not wait for them.
    from mllm_msr.pocket.raw import write_oracle, write_raw
    from mllm_msr.pocket.world import make_world

    world = make_world(settings.seed, settings.users, settings.items)
    interactions = write_raw(world, raw)
    pairs = write_oracle(world, oracle)
    undescribed = sum(item.description is None for item in world.items)
    typer.echo(f"{len(world.items):,} items, {undescribed} without a description")
    report_written(oracle, pairs, "utilities")
    report_written(raw, interactions, "interactions")


if __name__ == "__main__":
    run(pocket_world)

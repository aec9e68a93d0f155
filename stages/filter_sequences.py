"""Filter interactions to the k-core, and write sequences, histories and candidates."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import Debug, Params, report_written, run
from mllm_msr.core.files import atomic_write_all
from mllm_msr.core.params import BudgetParams, FilterSequencesParams, load_params


def filter_sequences(
    interactions: Annotated[Path, typer.Option(help="Table of interactions.")] = Path(
        "data/preprocess/interactions.parquet"
    ),
    items: Annotated[Path, typer.Option(help="Table of items.")] = Path(
        "data/preprocess/items.parquet"
    ),
    image_sources: Annotated[Path, typer.Option(help="Table of image sources.")] = Path(
        "data/preprocess/image_sources.parquet"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path(
        "data/filter_sequences"
    ),
    params: Params = Path("params.yaml"),
    debug: Debug = False,
) -> None:
    """Write sequences, histories, candidates, and the catalogue of the k-core, atomically.

    Example: python -m stages.filter_sequences --interactions data/preprocess/interactions.parquet
    """
    from mllm_msr.core.schemas import SPLITS, ImageSources, Interactions, Items
    from mllm_msr.core.tables import open_database, read_table, write_query
    from mllm_msr.data import candidates, sequences

    filters = load_params(FilterSequencesParams, params)
    settings = filters.model_dump(exclude={"budget"})
    core = {key: settings.pop(key) for key in ("min_user_interactions", "min_item_interactions")}
    draw = {key: settings.pop(key) for key in ("train_sampling", "evaluation_sampling")}
    negatives = {split: settings.pop(f"{split}_negatives") for split in SPLITS}
    with atomic_write_all(out) as new, open_database(new / "spill", ordered=False) as connection:
        read_table(Interactions, connection, interactions, "interactions")
        read_table(Items, connection, items, "catalogue")
        read_table(ImageSources, connection, image_sources, "image_sources")
        dropped = sequences.filter_k_core(connection, **core)
        sequences.refuse_unknown_items(connection)
        dropped |= sequences.make_sequences(connection, budget=filters.budget, **settings)
        dropped |= candidates.make_candidates(
            connection, negatives=negatives, seed=settings["seed"], **draw
        )
        tables = sequences.TABLES | candidates.TABLES | sequences.CATALOGUE_TABLES
        rows = {
            name: write_query(model, connection, query, new / f"{name}.parquet")
            for name, (model, query) in tables.items()
        }
        statistics = {**sequences.compute_statistics(connection), "dropped": dropped}
        (new / "statistics.json").write_text(json.dumps(statistics, indent=2) + "\n")
    for reason, count in dropped.items():
        typer.echo(f"dropped {count:,} {reason.replace('_', ' ')}")
    _report_budget(filters.budget, statistics["sequences"], statistics["used_sequences"])
    asked = sum(rows[table] for table in candidates.TABLES)
    report_written(
        out, rows["sequences"], f"sequences, {asked:,} candidates, {rows['popularity']:,} items"
    )


def _report_budget(
    budget: BudgetParams, sequences_of: Mapping[str, int], used: Mapping[str, int]
) -> None:
    """Print how many sequences of a split with a budget are used."""
    from mllm_msr.core.schemas import SPLITS

    for split in SPLITS:
        limit = getattr(budget, split)
        if limit is not None:
            excess = f", fewer than the budget of {limit:,}" if limit > used[split] else ""
            typer.echo(f"used {used[split]:,} of {sequences_of[split]:,} {split} sequences{excess}")


if __name__ == "__main__":
    run(filter_sequences)

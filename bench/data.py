"""Speed and memory of the data stages, from raw interactions to candidates.

    python -m bench.data --millions 1 --millions 10

Prints one JSON line per size: seconds, peak memory and disk of ``preprocess`` and
``filter_sequences``, each run as a process of its own, as in the pipeline. With ``--release``, the
folder of a MicroLens release, an additional line compares k-core and sampling with a reference
implementation, both in this process.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import duckdb
import typer
import yaml

from bench import reference_candidates
from bench.interactions import ITEMS_PER_MILLION, MEAN_LENGTH, write_interactions
from mllm_msr.core.command import run
from mllm_msr.core.params import MicroLensParams, PreprocessParams, load_params
from mllm_msr.data import candidates, sequences
from mllm_msr.data.sources import SOURCES
from mllm_msr.data.sources.cleaning import INTERACTIONS, clean

CORE = {"min_user_interactions": 6, "min_item_interactions": 5}
SEED = 0
SAMPLED_SECONDS = 0.5  # between looks at the disk
WAITED_SECONDS = 0.01  # between looks at the process


def main(
    millions: Annotated[list[float], typer.Option(help="Million interactions.")] = [1, 10],  # noqa: B006
    release: Annotated[Path | None, typer.Option(help="Folder of a MicroLens release.")] = None,
    memory: Annotated[str, typer.Option(help="DuckDB's memory limit.")] = "7GB",
    mean_length: Annotated[int, typer.Option(help="Interactions per user.")] = MEAN_LENGTH,
    items_per_million: Annotated[
        int, typer.Option(help="Items per million interactions.")
    ] = ITEMS_PER_MILLION,
    form: Annotated[str, typer.Option(help="Of the raw files: parquet, csv or jsonl.")] = "parquet",
) -> None:
    """Print one JSON line per size, and one for the comparison."""
    os.environ["MLLM_MSR_MEMORY"] = memory
    if release:
        typer.echo(json.dumps(compare(release)))
    for size in millions:
        with tempfile.TemporaryDirectory() as folder:
            rows = int(size * 1_000_000)
            write_interactions(Path(folder) / "raw", rows, SEED, mean_length, items_per_million)
            if form != "parquet":
                write_as_text(Path(folder) / "raw", form)
            typer.echo(json.dumps({"interactions": rows, "form": form} | measure(Path(folder))))


def write_as_text(folder: Path, form: str) -> None:
    """Replace the Parquet files of a folder by CSV or JSON Lines."""
    option = {"csv": "FORMAT csv, HEADER", "jsonl": "FORMAT json"}[form]
    for file in sorted(folder.glob("*.parquet")):
        with duckdb.connect() as connection:
            connection.execute(
                f"COPY (FROM '{file}') TO '{file.with_suffix(f'.{form}')}' ({option})"
            )
        file.unlink()


def measure(folder: Path) -> dict[str, Any]:
    """Run both stages on the interactions in a folder."""
    settings = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    settings["preprocess"]["source"] = "tables"
    settings["filter_sequences"] |= CORE
    (folder / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    tables = {
        n: str(folder / f"preprocess/{n}.parquet")
        for n in ("interactions", "items", "image_sources")
    }
    read = run_stage(folder, "preprocess", raw=str(folder / "raw"))
    filtered = run_stage(folder, "filter_sequences", **tables)
    statistics = json.loads((folder / "filter_sequences/statistics.json").read_text())
    return {
        "case": "preprocess + filter_sequences",
        "raw_gb": round(gigabytes(folder / "raw"), 2),
        "users_kept": statistics["users"],
        "items_kept": statistics["items"],
        "preprocess": read,
        "filter_sequences": filtered,
    }


def run_stage(folder: Path, stage: str, **options: str) -> dict[str, float]:
    """Run a stage as a process.

    Returns:
        Its seconds, those on a CPU, peak memory in megabytes, the gigabytes of its tables, and the
        most that its folder held meanwhile: tables, and what DuckDB spilled to disk.
    """
    options |= {"out": str(folder / stage), "params": str(folder / "params.yaml")}
    names = {key: f"--{key.replace('_', '-')}" for key in options}
    words = [word for key, value in options.items() for word in (names[key], value)]
    start, before, most = time.perf_counter(), gigabytes(folder), 0.0
    process = subprocess.Popen(  # noqa: S603  # our own stage
        [sys.executable, "-m", f"stages.{stage}", *words], stdout=subprocess.DEVNULL
    )
    ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    looked = 0.0
    while not ended:
        if time.perf_counter() > looked + SAMPLED_SECONDS:
            most = max(most, gigabytes(folder) - before)
            looked = time.perf_counter()
        time.sleep(WAITED_SECONDS)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    if status:
        raise SystemExit(f"{stage} failed")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss * 1024 / 1e6),
        "tables_gb": round(gigabytes(folder / stage), 2),
        "peak_disk_gb": round(most, 2),
    }


def gigabytes(folder: Path) -> float:
    """Return the size of a folder's files; those that are removed meanwhile do not count."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size / 1e9


def compare(release: Path) -> dict[str, Any]:
    """Time k-core and sampling, ours and the reference, on the same interactions."""
    options = {"source": "microlens", "microlens": MicroLensParams(covers="optional")}
    settings = load_params(PreprocessParams).model_copy(update=options)
    with duckdb.connect() as connection:
        files = SOURCES["microlens"](connection, release, settings)
        clean(connection, files, "error")
        table = connection.sql(INTERACTIONS).to_arrow_table()
    frame = table.select(["user", "item", "position"]).to_pandas()
    with duckdb.connect() as connection:
        connection.register("published", table)
        connection.execute("CREATE TABLE interactions AS FROM published")
        ours, core = timed(lambda: make_candidates_in_sql(connection))
    reference, (users, items, _) = timed(
        lambda: reference_candidates.make_candidates(frame, **CORE, seed=SEED)
    )
    if (users, items) != core:
        raise SystemExit("the two implementations differ in their users or items")
    return {
        "case": "core + negatives, MicroLens",
        "users_kept": len(users),
        "items_kept": len(items),
        "reference_seconds": round(reference, 2),
        "our_seconds": round(ours, 2),
        "ratio": round(reference / ours, 1),
    }


def make_candidates_in_sql(connection: duckdb.DuckDBPyConnection) -> tuple[set[str], set[str]]:
    """Run k-core, sequences and sampling in SQL; return the users and items of the k-core."""
    sequences.filter_k_core(connection, **CORE)
    sequences.make_sequences(
        connection,
        **{"min_history": 3, "max_history": 9, "history": "recent", "target": "last"},  # type: ignore[arg-type]
        **{"split": "users", "cold_share": 0.1, "seed": SEED},  # type: ignore[arg-type]
        **{"valid_share": 0.1, "test_share": 0.1},  # type: ignore[arg-type]
    )
    candidates.make_candidates(
        connection,
        train_sampling="uniform",
        evaluation_sampling=["uniform"],
        negatives={"train": 1, "valid": 20, "test": 20},
        seed=SEED,
    )
    users = {user for (user,) in connection.execute("SELECT user FROM users").fetchall()}
    items = {item for (item,) in connection.execute("SELECT item FROM items").fetchall()}
    return users, items


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a function takes, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    run(main)

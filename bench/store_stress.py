"""Several processes that write one response store at once, and one that reads and backs it up.

    python -m bench.store_stress --seconds 60

Writers add small batches as stages do: each has batches of its own, and every fourth batch is one
that all writers add. One JSON line counts what was acknowledged, the responses of it that are lost
or wrong in the end, and those that are lost or wrong in backups made meanwhile.
"""

import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from mllm_msr.engines.response_store import Response, ResponseStore, response_key

BATCH = 8  # responses that a step of decoding finishes, at most
SHARED = 4  # every so many batches are of all writers
BACKUPS = 5


def main(
    seconds: Annotated[float, typer.Option(help="How long to write.")] = 60,
    writers: Annotated[int, typer.Option(help="Processes that write.")] = 4,
) -> None:
    """Print one JSON line."""
    with TemporaryDirectory() as folder:
        typer.echo(json.dumps(stress(Path(folder), seconds, writers)))


def stress(folder: Path, seconds: float, writers: int) -> dict[str, Any]:
    """Let processes write a store for some seconds, then look for each acknowledged response."""
    path, context = folder / "responses.sqlite", multiprocessing.get_context("spawn")
    with context.Pool(writers) as pool:
        running = pool.starmap_async(write, [(path, number, seconds) for number in range(writers)])
        backups = list(back_up(path, folder, seconds))
        counts = running.get()
    batches = {key for number, count in enumerate(counts) for key in list_batches(number, count)}
    expected = {key: text for batch in batches for key, text in make_batch(batch).items()}
    with ResponseStore(path) as store:
        found, rows = store.find(expected), len(store)
    return {
        "writers": writers,
        "seconds": seconds,
        "acknowledged": sum(counts) * BATCH,
        "rows": rows,
        "rows_per_second": round(rows / seconds),
        "lost": len(expected.keys() - found.keys()),
        "wrong": sum(found[key] != expected[key] for key in found),
        "too_many": rows - len(expected),
        "backups": len(backups),
        "lost_in_backups": sum(lost for lost, _ in backups),
        "wrong_in_backups": sum(wrong for _, wrong in backups),
    }


def write(path: Path, writer: int, seconds: float) -> int:
    """Add batches for some seconds; return how many were acknowledged."""
    stop, count = time.monotonic() + seconds, 0
    with ResponseStore(path) as store:
        while time.monotonic() < stop:
            store.add(make_batch(name_batch(writer, count)), "model")
            count += 1
    return count


def back_up(path: Path, folder: Path, seconds: float) -> Iterator[tuple[int, int]]:
    """Back a store up some times; yield how many responses of it are lost and wrong in the copy."""
    for number in range(BACKUPS):
        time.sleep(seconds / (BACKUPS + 1))
        if not path.is_file():
            continue
        with ResponseStore(path) as store:
            before = _read_all(store)
            store.copy_to(folder / f"{number}.sqlite")
        with ResponseStore(folder / f"{number}.sqlite") as copy:
            found = copy.find(before)
        yield len(before) - len(found), sum(found[key] != before[key] for key in found)


def _read_all(store: ResponseStore) -> dict[str, Response]:
    keys = [key.decode() for (key,) in store._database.execute("SELECT key FROM answers")]
    return store.find(keys)


def list_batches(writer: int, count: int) -> Iterator[str]:
    """Yield the names of a writer's first batches."""
    yield from (name_batch(writer, number) for number in range(count))


def name_batch(writer: int, number: int) -> str:
    """Return the name of a writer's batch; some are those of all writers."""
    return f"all/{number}" if number % SHARED == 0 else f"{writer}/{number}"


def make_batch(name: str) -> dict[str, Response]:
    """Return the responses of a batch, which follow from its name."""
    prompts = [f"{name}/{number}" for number in range(BATCH)]
    return {
        response_key(prompt=prompt): Response(f"response to {prompt} " * 10, len(prompt) % 2 == 0)
        for prompt in prompts
    }


if __name__ == "__main__":
    typer.run(main)

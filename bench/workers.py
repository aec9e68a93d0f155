"""The overhead of a pool of workers: recurrent preferences in this process, and by a pool.

One worker has what this process has, so the ratio of both is the price of the pool. Starting the
workers and loading their weights is reported apart: it happens once. Both sides run alternately,
with an empty response store each time.

    python -m bench.workers --workers 1 --sequences 600
"""

import json
import os
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import typer

from bench.preferences import Histories, open_histories
from mllm_msr.core.command import run
from mllm_msr.engines.response_store import ResponseStore
from mllm_msr.method.inference import StoringEngine, greedy_engine
from mllm_msr.method.inference.pooled import PooledEngine
from mllm_msr.method.inference.workers import CLUSTER, WORKERS
from mllm_msr.method.preferences import PreferenceInferrer


def workers(
    model: str | None = None, sequences: int = 600, workers: int = 1, repetitions: int = 3
) -> None:
    """Print the seconds of both sides and their ratio as one line of JSON."""
    histories = open_histories(model, sequences)
    os.environ[CLUSTER], os.environ[WORKERS] = "local", str(workers)
    with TemporaryDirectory() as folder:
        begun = time.perf_counter()
        pooled = open_engine(histories, Path(folder) / "start.sqlite", spread=True)
        assert isinstance(pooled, PooledEngine)
        first = next(iter(histories.texts.items()))
        infer(histories, pooled, dict([first]))  # loads the weights
        start = time.perf_counter() - begun
        seconds: dict[str, list[float]] = {"process": [], "pool": []}
        for number in range(repetitions):
            single = open_engine(histories, Path(folder) / f"process{number}.sqlite", spread=False)
            expected, taken = infer(histories, single, histories.texts)
            seconds["process"].append(taken)
            pooled.store = ResponseStore(Path(folder) / f"pool{number}.sqlite")
            found, taken = infer(histories, pooled, histories.texts)
            seconds["pool"].append(taken)
            assert found == expected, "the pool's texts are those of one process"
    alone, pool = median(seconds["process"]), median(seconds["pool"])
    rows = {
        "workers": workers,
        "prompts": len(expected),
        "start_seconds": round(start, 1),
        "process_seconds": round(alone, 2),
        "pool_seconds": round(pool, 2),
        "ratio": round(pool / alone, 3),
        "runs": {side: [round(one, 2) for one in some] for side, some in seconds.items()},
    }
    typer.echo(json.dumps(rows))


def open_engine(histories: Histories, path: Path, *, spread: bool) -> StoringEngine:
    """Open an engine with an empty response store."""
    tokens = histories.settings.max_new_tokens
    return greedy_engine(histories.model, ResponseStore(path), tokens, spread=spread)


def infer(
    histories: Histories, engine: StoringEngine, texts: dict[int, list[str]]
) -> tuple[list[str], float]:
    """Return the preferences of some sequences, and the seconds that they took."""
    begun = time.perf_counter()
    rows = PreferenceInferrer(engine, histories.templates).infer(
        texts, "recurrent", histories.settings.block_size, show_progress=False
    )
    return [row.preference for row in rows], time.perf_counter() - begun


if __name__ == "__main__":
    run(workers)

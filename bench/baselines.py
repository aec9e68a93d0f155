"""A small grid over the settings of each baseline, by the AUC of the validation split.

    python -m bench.baselines item_knn markov

Prints one line of JSON per setting, with the seconds of one core; what the grid does not name is as
in ``params.yaml``. Test is not looked at. Needs the tables of preprocess and filter_sequences.
"""

import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import typer

from mllm_msr import metrics
from mllm_msr.baselines.models import score_candidates
from mllm_msr.baselines.task import Floats, Task, read_task
from mllm_msr.params import BaselinesParams, FilterSequencesParams, load_params

GRID: dict[str, dict[str, list[Any]]] = {
    "recent_popularity": {"days": [1, 3, 7, 30, 90, 365]},
    "item_knn": {"neighbours": [50, 200, 1000, 5000], "shrinkage": [0.0, 10.0, 100.0, 1000.0]},
    "markov": {"smoothing": [10.0, 1000.0, 3000.0, 10_000.0, 30_000.0, 100_000.0]},
    "fpmc": {"loss": ["bpr", "cross-entropy"], "learning_rate": [0.1, 0.3]},
    "gru4rec": {"dropout": [0.0, 0.3], "popularity_exponent": [0.0, 0.5], "epochs": [5, 10]},
    "sasrec": {"learning_rate": [0.001, 0.003]},
    "bert4rec": {"learning_rate": [0.001, 0.003]},
}


def settings_of(model: str, baselines: BaselinesParams) -> Iterator[dict[str, Any]]:
    """Yield the settings of the grid, and those of ``params.yaml`` for the rest."""
    grid = GRID[model]
    for values in product(*grid.values()):
        yield baselines.of(model).model_dump() | dict(zip(grid, values, strict=True))


def validate(task: Task, scores: Floats) -> dict[str, float]:
    """Give AUC, HR@5, NDCG@5 and MRR@5 of the validation split."""
    asked = task.candidates
    valid = task.questions.splits[asked.questions] == "valid"
    placed = metrics.place_targets(asked.questions[valid], scores[valid], asked.labels[valid])
    return {name: round(float(np.mean(v)), 4) for name, v in metrics.measure(placed, [5]).items()}


def main(models: list[str], params: Path = Path("params.yaml"), data: Path = Path("data")) -> None:
    """Score and validate every setting of the models named."""
    baselines = load_params(BaselinesParams, params)
    filters = load_params(FilterSequencesParams, params)
    task = read_task(
        data / "preprocess" / "interactions.parquet",
        data / "filter_sequences",
        min_user_interactions=filters.min_user_interactions,
        by_time=filters.split == "time",
    )
    for model in models:
        for settings in settings_of(model, baselines):
            start = time.process_time()
            figures = validate(task, score_candidates(model, task, settings))
            seconds = {"cpu_seconds": round(time.process_time() - start, 1)}
            print(json.dumps({"model": model} | settings | seconds | figures), flush=True)


if __name__ == "__main__":
    typer.run(main)

"""A small grid over the settings of each baseline, by the AUC of the validation split.

    python -m bench.baselines item_knn markov

Prints one line of JSON per setting, with the seconds of one core. A baseline's grid is in its own
file; what it does not name is as in ``params.yaml``, so apply the preset of the data first. Test is
not looked at. Needs the tables of preprocess and filter_sequences; vbpr, gru4rec_f and sasrec_f
that of encode_items too; word_overlap and content_knn_summary those of summarize_items and
infer_preferences.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from mllm_msr.baselines.discovery import Inputs, all_baselines, find_baseline
from mllm_msr.baselines.learning.trained import score_candidates
from mllm_msr.baselines.task import Task, read_task
from mllm_msr.core.arrays import Floats
from mllm_msr.core.command import run
from mllm_msr.core.errors import ParamsError
from mllm_msr.core.params import FilterSequencesParams, Section, load_all_params, load_params
from mllm_msr.evaluation import metrics
from mllm_msr.ranking import rank_targets


def settings_of(model: str, params: Path) -> Iterator[Section]:
    """Yield the settings of the grid, and those of ``params.yaml`` for the rest.

    Raises:
        ParamsError: There is no grid for the model.
    """
    grids = {baseline.name: baseline.grid for baseline in all_baselines() if baseline.grid}
    if model not in grids:
        raise ParamsError(
            expected=f"one of {', '.join(grids)}",
            got=model,
            where="bench/baselines.py",
            fix="name one of them, or give the baseline a grid in its file",
        )
    own = getattr(load_all_params(params), find_baseline(model).stage).of(model)
    for grid in grids[model]:
        for values in product(*grid.values()):
            changes = dict(zip(grid, values, strict=True))
            yield type(own).model_validate(own.model_dump() | changes)


def validate(task: Task, scores: Floats) -> dict[str, float]:
    """Return AUC, HR@5, NDCG@5 and MRR@5 on the candidates to choose a model by."""
    asked = task.selection
    placed = rank_targets(asked.questions, scores, asked.labels)
    return {name: round(float(np.mean(v)), 4) for name, v in metrics.measure(placed, [5]).items()}


def main(models: list[str], params: Path = Path("params.yaml"), data: Path = Path("data")) -> None:
    """Score and validate every setting of the models named."""
    tried = [(model, settings) for model in models for settings in settings_of(model, params)]
    filters = load_params(FilterSequencesParams, params)
    inputs = Inputs(
        items=data / "filter_sequences/items.parquet",
        features=data / "encode_items/features.parquet",
        summaries=data / "summarize_items/summaries.parquet",
        preferences=data / "infer_preferences/preferences.parquet",
    )
    task = read_task(
        data / "preprocess/interactions.parquet",
        data / "filter_sequences",
        min_user_interactions=filters.min_user_interactions,
        by_time=filters.split == "time",
        only_used=filters.budget.interactions == "used",
    )
    task = replace(task, candidates=task.selection)
    for model, settings in tried:
        start = time.process_time()
        scores = score_candidates(find_baseline(model), task, settings, inputs)
        seconds = {"cpu_seconds": round(time.process_time() - start, 1)}
        figures = validate(task, scores)
        line = {"model": model} | settings.model_dump() | seconds | figures
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run(main)

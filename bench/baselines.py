"""A small grid over the settings of each baseline, by the AUC of the validation split.

    python -m bench.baselines item_knn markov

Prints one line of JSON per setting, with the seconds of one core; what the grid does not name is as
in ``params.yaml``, so apply the preset of the data first. Test is not looked at. Needs the tables
of preprocess and filter_sequences; vbpr, gru4rec_f and sasrec_f that of encode_items too;
word_overlap and content_knn_summary those of summarize_items and infer_preferences.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mllm_msr.baselines.content import score_texts
from mllm_msr.baselines.models import score_candidates
from mllm_msr.baselines.task import Floats, Task, read_task
from mllm_msr.core.command import run
from mllm_msr.core.errors import ParamsError
from mllm_msr.core.params import (
    BaselinesParams,
    FeatureBaselinesParams,
    FilterSequencesParams,
    Section,
    TextBaselinesParams,
    load_params,
)
from mllm_msr.evaluation import metrics
from mllm_msr.ranking import rank_targets
from stages.feature_baselines import score

Grid = dict[str, list[Any]]  # every combination of these values is tried

NETWORK: Grid = {"learning_rate": [0.001, 0.003, 0.01], "dropout": [0.1, 0.3]}
WORDS: Grid = {"analyzer": ["word"], "min_ngram": [1], "max_ngram": [1, 2]}
CHARACTERS: Grid = {"analyzer": ["char_wb"], "min_ngram": [3, 4, 5], "max_ngram": [5]}
GRIDS: dict[str, list[Grid]] = {
    "recent_popularity": [{"days": [1, 3, 7, 30, 90, 365]}],
    "item_knn": [{"neighbours": [50, 200, 1000, 5000], "shrinkage": [0.0, 10.0, 100.0, 1000.0]}],
    "content_knn": [WORDS, CHARACTERS],
    "markov": [{"smoothing": [0.1, 1.0, 10.0, 1000.0, 3000.0, 10_000.0, 30_000.0, 100_000.0]}],
    "fpmc": [
        {"epochs": [10], "loss": ["bpr", "cross-entropy"], "learning_rate": [0.1, 0.3]},
        {"epochs": [20], "loss": ["bpr"], "learning_rate": [0.2, 0.5]},
    ],
    "gru4rec": [{"dropout": [0.0, 0.3], "popularity_exponent": [0.0, 0.5], "epochs": [5, 10]}],
    "sasrec": [{"learning_rate": [0.001, 0.003]}],
    "bert4rec": [{"learning_rate": [0.001, 0.003]}],
    "vbpr": [{"epochs": [20, 50], "learning_rate": [0.002, 0.005, 0.02]}],
    "gru4rec_f": [NETWORK],
    "sasrec_f": [NETWORK],
    "word_overlap": [{"idf": [False, True]}],
    "content_knn_summary": [WORDS, CHARACTERS],
}
SECTIONS = (BaselinesParams, FeatureBaselinesParams, TextBaselinesParams)
FILTERED = Path("filter_sequences")
FEATURES = Path("encode_items/features.parquet")
SUMMARIES = Path("summarize_items/summaries.parquet")
PREFERENCES = Path("infer_preferences/preferences.parquet")


def settings_of(model: str, params: Path) -> Iterator[Section]:
    """Yield the settings of the grid, and those of ``params.yaml`` for the rest.

    Raises:
        ParamsError: There is no grid for the model.
    """
    if model not in GRIDS:
        fix = "name one of them, or write a grid"
        raise ParamsError(
            expected=f"one of {', '.join(GRIDS)}", got=model, where="bench/baselines.py", fix=fix
        )
    section = next(section for section in SECTIONS if model in section.model_fields)
    own = load_params(section, params).of(model)
    for grid in GRIDS[model]:
        for values in product(*grid.values()):
            changes = dict(zip(grid, values, strict=True))
            yield type(own).model_validate(own.model_dump() | changes)


def score_model(model: str, task: Task, data: Path, settings: Section) -> Floats:
    """Score the candidates as the stage of the model does."""
    if model in BaselinesParams.model_fields:
        return score_candidates(model, task, settings.model_dump(), data / FILTERED)
    if model in TextBaselinesParams.model_fields:
        texts = (data / FILTERED, data / SUMMARIES, data / PREFERENCES)
        return score_texts(model, task, *texts, settings.model_dump())
    return score(model, task, data / FEATURES, settings)


def validate(task: Task, scores: Floats) -> dict[str, float]:
    """Return AUC, HR@5, NDCG@5 and MRR@5 on the candidates to choose a model by."""
    asked = task.selection
    placed = rank_targets(asked.questions, scores, asked.labels)
    return {name: round(float(np.mean(v)), 4) for name, v in metrics.measure(placed, [5]).items()}


def main(models: list[str], params: Path = Path("params.yaml"), data: Path = Path("data")) -> None:
    """Score and validate every setting of the models named."""
    tried = [(model, settings) for model in models for settings in settings_of(model, params)]
    filters = load_params(FilterSequencesParams, params)
    task = read_task(
        data / "preprocess" / "interactions.parquet",
        data / FILTERED,
        min_user_interactions=filters.min_user_interactions,
        by_time=filters.split == "time",
    )
    task = replace(task, candidates=task.selection)
    for model, settings in tried:
        start = time.process_time()
        scores = score_model(model, task, data, settings)
        seconds = {"cpu_seconds": round(time.process_time() - start, 1)}
        figures = validate(task, scores)
        line = {"model": model} | settings.model_dump() | seconds | figures
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run(main)

"""Feature baselines with the image vectors of one encoder beside those of another.

    python -m bench.feature_comparison data/encode_items/features.parquet data/real_features.parquet

Trains each baseline on both tables with several seeds. A sequence's AUC is the mean over the
seeds, and the difference between the tables is paired by sequence, with its interval and p value
(Holm-corrected over the baselines). Prints a JSON line for each baseline and sampling. Settings are
those of ``params.yaml``. No candidate's score is written.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer

from mllm_msr.baselines.registry import Baseline, Inputs, find_baseline
from mllm_msr.baselines.task import Task, read_task, write_scores
from mllm_msr.core.command import run
from mllm_msr.core.params import (
    FeatureBaselinesParams,
    FilterSequencesParams,
    Section,
    load_params,
)
from mllm_msr.evaluation.comparisons import compare_pairs
from mllm_msr.evaluation.metrics import bootstrap_interval
from mllm_msr.evaluation.scored_candidates import score_candidates
from mllm_msr.ranking import Floats, auc, rank_targets

CONFIDENCE, SAMPLES, SEED = 0.95, 10_000, 2026  # of the intervals

AucBySampling = dict[str, Floats]  # [test sequences] each


def main(
    tables: Annotated[list[Path], typer.Argument(help="Two tables Features.")],
    model: Annotated[list[str], typer.Option(help="Feature baselines.")] = [  # noqa: B006
        *("vbpr", "gru4rec_f", "sasrec_f", "gru4rec_image")
    ],
    seeds: Annotated[int, typer.Option(help="Seeds of training.")] = 3,
    params: Path = Path("params.yaml"),
    data: Path = Path("data"),
) -> None:
    """Train, score the candidates of test, and print the differences second minus first."""
    first, second = tables
    filters, filtered = load_params(FilterSequencesParams, params), data / "filter_sequences"
    task = read_task(
        data / "preprocess" / "interactions.parquet",
        filtered,
        min_user_interactions=filters.min_user_interactions,
        by_time=filters.split == "time",
    )
    settings = load_params(FeatureBaselinesParams, params)
    found = {
        (name, table): mean_auc(
            task, find_baseline(name), settings.of(name), Inputs(filtered, table), seeds
        )
        for name in model
        for table in (first, second)
    }
    for sampling in found[model[0], first]:
        pairs = [(found[name, second][sampling], found[name, first][sampling]) for name in model]
        differences = compare_pairs(pairs, confidence=CONFIDENCE)
        for name, pair, difference in zip(model, pairs, differences, strict=True):
            figures = difference._asdict()
            line: dict[str, Any] = {"model": name, "negatives": sampling, "seeds": seeds}
            line |= {"sequences": len(pair[0])}
            line |= {"second": interval(pair[0]), "first": interval(pair[1])}
            line |= {"difference": [round(figures[key], 3) for key in ("value", "low", "high")]}
            print(json.dumps(line | {"p": round(difference.p, 4)}), flush=True)


def mean_auc(
    task: Task, baseline: Baseline, settings: Section, inputs: Inputs, seeds: int
) -> AucBySampling:
    """Return each test sequence's AUC, the mean over the seeds, by sampling."""
    runs = [
        score_with_seed(task, baseline, settings.model_copy(update={"seed": SEED + seed}), inputs)
        for seed in range(seeds)
    ]
    return {sampling: np.mean([each[sampling] for each in runs], axis=0) for sampling in runs[0]}


def score_with_seed(
    task: Task, baseline: Baseline, settings: Section, inputs: Inputs
) -> AucBySampling:
    """Train once and return each test sequence's AUC by sampling."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{baseline.name}.parquet"
        write_scores(task, baseline.score(task, settings, inputs), path)
        scored = score_candidates({baseline.name: path}, inputs.filtered)
    return {
        sampling: auc(rank_targets(*rows))
        for (sampling, _, split), rows in scored.items()
        if split == "test"
    }


def interval(values: Floats) -> list[float]:
    """Return the mean of a metric over the sequences and its bounds, rounded."""
    low, high = bootstrap_interval(values[:, None], SAMPLES, CONFIDENCE, SEED)
    return [round(float(figure), 3) for figure in (values.mean(), low[0], high[0])]


if __name__ == "__main__":
    run(main)

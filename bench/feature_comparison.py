"""Differences in AUC between feature baselines that read two tables of features.

    python -m stages.feature_baselines vbpr --features data/real_features.parquet --out data/real
    python -m bench.feature_comparison --first data/feature_baselines --second data/real

The scores of a baseline lie in one folder for each table of features, or in one for each seed of
training: then repeat the options. A sequence's AUC is the mean over its folders, and differences
are paired by sequence: their interval, and p of the paired randomisation test, Holm-corrected over
the baselines. Prints a JSON line for each baseline and sampling. Baselines without scores in every
folder are left out.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from mllm_msr.baselines.discovery import baselines_of
from mllm_msr.core.arrays import Floats
from mllm_msr.core.command import run
from mllm_msr.core.errors import DataError
from mllm_msr.evaluation.comparisons import compare_pairs
from mllm_msr.evaluation.metrics import bootstrap_interval
from mllm_msr.evaluation.scored_candidates import score_candidates
from mllm_msr.ranking import auc, rank_targets

CONFIDENCE, SAMPLES, SEED = 0.95, 10_000, 2026  # of the intervals


def main(
    first: Annotated[list[Path], typer.Option(help="Folder of scores, one for each seed.")],
    second: Annotated[list[Path], typer.Option(help="Likewise, of the other features.")],
    filtered: Annotated[
        Path, typer.Option(help="Folder with sequences, candidates and popularity.")
    ] = Path("data/filter_sequences"),
) -> None:
    """Print the differences in AUC, second minus first, on the test sequences."""
    names = find_complete(first + second)
    of_first = [mean_auc(name, first, filtered) for name in names]
    of_second = [mean_auc(name, second, filtered) for name in names]
    for sampling in of_first[0]:
        pairs = [(b[sampling], a[sampling]) for a, b in zip(of_first, of_second, strict=True)]
        differences = compare_pairs(pairs, confidence=CONFIDENCE)
        for name, (later, earlier), difference in zip(names, pairs, differences, strict=True):
            value, low, high, p = difference
            line = {
                **{"model": name, "negatives": sampling, "sequences": len(later)},
                **{"first": interval(earlier), "second": interval(later)},
                "difference": [round(figure, 3) for figure in (value, low, high)],
                "p": round(p, 4),
            }
            print(json.dumps(line))


def find_complete(folders: list[Path]) -> list[str]:
    """Return the baselines whose scores every folder has; name the others on standard error.

    Raises:
        DataError: There is none.
    """
    names = []
    for name in (baseline.name for baseline in baselines_of("feature_baselines")):
        lacking = [str(each) for each in folders if not (each / f"{name}.parquet").is_file()]
        if lacking:
            print(f"left out {name}: no scores in {', '.join(lacking)}", file=sys.stderr)
        else:
            names.append(name)
    if not names:
        raise DataError(
            expected="scores of a feature baseline in every folder",
            got="none",
            where=", ".join(map(str, folders)),
            fix="correct the folders",
        )
    return names


def mean_auc(name: str, folders: list[Path], filtered: Path) -> dict[str, Floats]:
    """Return each test sequence's AUC by sampling: the mean over the folders, [sequences]."""
    runs = [read_auc(name, folder / f"{name}.parquet", filtered) for folder in folders]
    return {sampling: np.mean([run[sampling] for run in runs], axis=0) for sampling in runs[0]}


def read_auc(name: str, scores: Path, filtered: Path) -> dict[str, Floats]:
    """Return each test sequence's AUC by sampling, [sequences]."""
    scored = score_candidates({name: scores}, filtered)
    return {
        sampling: auc(rank_targets(*rows))
        for (sampling, _, split), rows in scored.items()
        if split == "test"
    }


def interval(values: Floats) -> list[float]:
    """Return the mean over the sequences and the bounds of its BCa interval, rounded."""
    low, high = bootstrap_interval(values[:, None], SAMPLES, CONFIDENCE, SEED)
    return [round(float(figure), 3) for figure in (values.mean(), low[0], high[0])]


if __name__ == "__main__":
    run(main)

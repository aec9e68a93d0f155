"""A data set of three items and four users, small enough to compute metrics by hand.

Sequence 0 is in train, 1 in valid, 2 and 3 in test. The model ranks a first in sequence 2 and ties
it with b in sequence 3; popularity ties b with c, both below a; the oracle ranks every target
first. Of the baselines, SASRec has the model's scores and Item-kNN their negatives.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mllm_msr.core.schemas import Candidates, Oracle, Popularity, Scores, Sequences
from mllm_msr.core.tables import write_rows
from mllm_msr.evaluation.evaluation import Evaluation, evaluate

TARGETS = {0: "a", 1: "c", 2: "a", 3: "b"}
SPLITS = {0: "train", 1: "valid", 2: "test", 3: "test"}
LOG_ODDS = {
    1: {"a": 1.0, "b": 2.0, "c": 0.0},
    2: {"a": 2.0, "b": 1.0, "c": 0.0},
    3: {"a": 1.0, "b": 1.0, "c": -1.0},
}
POPULARITY = {"a": 5, "b": 3, "c": 3}
SETTINGS: dict[str, Any] = {
    "ks": [1, 2],
    "bootstrap_samples": 50,
    "confidence": 0.9,
    "seed": 0,
    "calibration": "platt",
}
BASELINES = {"sasrec": 1, "item_knn": -1}  # sign of the model's log-odds


def score_rows(times: int = 1) -> list[dict[str, Any]]:
    """Return the rows of a table Scores: the model's scores times a number."""
    return [
        {
            "sequence": sequence,
            "item": item,
            "split": SPLITS[sequence],
            "log_odds": times * log_odds,
        }
        for sequence, scores in LOG_ODDS.items()
        for item, log_odds in scores.items()
    ]


def candidate_rows(split: str) -> list[dict[str, Any]]:
    """Return the rows of a split's table Candidates."""
    return [
        {"sampling": "uniform", "sequence": sequence, "position": position}
        | {"item": item, "label": item == TARGETS[sequence]}
        for sequence in LOG_ODDS
        if SPLITS[sequence] == split
        for position, item in enumerate(POPULARITY)
    ]


def popularity_rows(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the rows of a table Popularity."""
    return [
        {"item": item, "interactions": count, "withheld": False} for item, count in counts.items()
    ]


def write_world(folder: Path) -> None:
    """Write the inputs of the stage evaluate: scores, oracle, filtered tables and baselines."""
    sequences = [
        {"sequence": s, "user": f"u{s}", "split": SPLITS[s], "target": t}
        | {"history_length": 3, "used": True, "stratum": "rare"}
        for s, t in TARGETS.items()
    ]
    utilities = [
        {"user": f"u{sequence}", "item": item, "utility": float(item == target)}
        for sequence, target in TARGETS.items()
        for item in POPULARITY
    ]
    counts = popularity_rows(POPULARITY)
    filtered = folder / "filtered"
    write_rows(Sequences, sequences, filtered / "sequences.parquet")
    for split in ("valid", "test"):
        path = filtered / f"{split}_candidates.parquet"
        write_rows(Candidates, candidate_rows(split), path)
    write_rows(Popularity, counts, filtered / "popularity.parquet")
    write_rows(Oracle, utilities, folder / "oracle.parquet")
    write_rows(Scores, score_rows(), folder / "scores.parquet")
    for name, sign in BASELINES.items():
        write_rows(Scores, score_rows(sign), folder / "baselines" / f"{name}.parquet")


def evaluate_world(
    world: Path, oracle: bool = True, baselines: Iterable[str] = (), **changes: Any
) -> Evaluation:
    """Evaluate a world, with settings changed."""
    truth = world / "oracle.parquet" if oracle else None
    paths = {name: world / "baselines" / f"{name}.parquet" for name in baselines}
    settings = SETTINGS | changes
    return evaluate(world / "scores.parquet", world / "filtered", truth, paths, **settings)


def add_targets_sampling(world: Path) -> None:
    """Add a sampling whose negative is the target of the other test sequence; valid has none."""
    other = {2: "b", 3: "a"}
    rows = [
        {"sampling": "targets", "sequence": sequence, "position": position}
        | {"item": item, "label": item == target}
        for sequence, target in ((2, "a"), (3, "b"))
        for position, item in enumerate((target, other[sequence]))
    ]
    path = world / "filtered/test_candidates.parquet"
    write_rows(Candidates, [*candidate_rows("test"), *rows], path)

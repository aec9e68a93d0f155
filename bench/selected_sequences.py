"""SASRec that learns from the training sequences alone, as MLLM-MSR does, and not from whole logs.

    python -m mllm_msr.presets apply microlens_paper
    dvc repro filter_sequences
    python -m bench.selected_sequences --blocks 1

Where history and target are chosen by popularity, as in the paper's protocol, a model that learns
from whole logs is asked something other than what it learned. This one learns from what it is asked
about: each training user's chosen items, in order. Prints a line of JSON for each sampling.
"""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import numpy as np

from mllm_msr.baselines.discovery import Inputs, find_baseline
from mllm_msr.baselines.learning.trained import score_candidates
from mllm_msr.baselines.task import Known, Task, read_task, write_scores
from mllm_msr.core.command import run
from mllm_msr.core.params import BaselinesParams, EvaluateParams, FilterSequencesParams, load_params
from mllm_msr.core.schemas import Histories, Sequences
from mllm_msr.core.tables import read_table
from mllm_msr.evaluation.evaluation import evaluate
from mllm_msr.evaluation.results import samplings_of, shown_metrics


def read_training_sequences(filtered: Path, task: Task) -> Known:
    """Read the history and then the target of each training sequence, as what is known."""
    with duckdb.connect() as connection:
        read_table(Sequences, connection, filtered / "sequences.parquet", "sequences")
        read_table(Histories, connection, filtered / "histories.parquet", "histories")
        rows = connection.execute(
            """
            WITH steps AS (
                SELECT sequence, position, item FROM histories
                UNION ALL SELECT sequence, history_length + 1, target FROM sequences
            )
            SELECT user, item FROM steps JOIN sequences USING (sequence)
            WHERE split = 'train' AND used ORDER BY user, position
            """
        ).fetchall()
    users = {name: number for number, name in enumerate(task.users)}
    items = {name: number for number, name in enumerate(task.items)}
    known = np.array([(users[user], items[item]) for user, item in rows], dtype=np.int64)
    return Known(known[:, 0], known[:, 1], None)


def main(blocks: int = 1, params: Path = Path("params.yaml"), data: Path = Path("data")) -> None:
    """Train, score the candidates of valid and test, and print the figures of test."""
    filters, filtered = load_params(FilterSequencesParams, params), data / "filter_sequences"
    task = read_task(
        data / "preprocess" / "interactions.parquet",
        filtered,
        min_user_interactions=filters.min_user_interactions,
        by_time=filters.split == "time",
        only_used=filters.budget.interactions == "used",
    )
    sasrec = find_baseline("sasrec")
    own = load_params(BaselinesParams, params).of(sasrec.name).model_dump()
    settings = sasrec.params.model_validate(own | {"blocks": blocks})
    chosen = replace(task, known=read_training_sequences(filtered, task))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sasrec.parquet"
        write_scores(task, score_candidates(sasrec, chosen, settings, Inputs()), path)
        how = load_params(EvaluateParams, params).model_dump()
        metrics = evaluate(None, filtered, None, {"sasrec": path}, **how).metrics
    for sampling in samplings_of(metrics):
        figures = metrics[sampling]["sasrec"]
        shown = {name: round(figures[name], 3) for name in ("auc_low", "auc_high")}
        shown |= {name: round(figures[name], 3) for name in shown_metrics(metrics)}
        print(json.dumps({"negatives": sampling, "blocks": blocks} | shown))


if __name__ == "__main__":
    run(main)

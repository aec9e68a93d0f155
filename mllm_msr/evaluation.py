"""Scores joined with candidates, and the figures of the model beside those of its rivals.

Every scorer ranks the very same candidates:

- ``MLLM-MSR``, the scores under evaluation;
- ``oracle``, in the pocket world only: the log weights by which its users truly choose, so the
  best that any scorer can reach there;
- the baselines, each with scores of its own (:mod:`mllm_msr.baselines`);
- ``popularity``, how often an item was taken before any target of valid and test;
- ``chance``, one score for all. Metrics are expectations over the orders of ties, so its figures
  are chance's exact ones, and its interval has no width where all sequences have as many
  candidates.

The rivals' figures are those of the test split; ``per_sequence.parquet`` has both splits of all.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as arrow
import pyarrow.csv

from mllm_msr.comparisons import Difference, compare, correct, show_difference
from mllm_msr.errors import DataError
from mllm_msr.files import written_whole
from mllm_msr.metrics import Floats, Integers, Placements, auc, measure, place_targets, summarize
from mllm_msr.tables import (
    AnyTable,
    Candidates,
    Oracle,
    PerSequence,
    Popularity,
    Scores,
    Sequences,
    read_table,
    write_query,
)

MODEL = "MLLM-MSR"
BASELINES = {  # what tables call them, in the order of rows: by what they know, most first
    "sasrec_f": "SASRec_F",
    "gru4rec_f": "GRU4Rec_F",
    "gru4rec_summary": "GRU4Rec on summaries",
    "gru4rec_image": "GRU4Rec on images",
    "vbpr": "VBPR",
    "content_knn_summary": "content kNN on summaries",
    "word_overlap": "word overlap",
    "sasrec": "SASRec",
    "bert4rec": "BERT4Rec",
    "gru4rec": "GRU4Rec",
    "fpmc": "FPMC",
    "markov": "Markov chain",
    "item_knn": "Item-kNN",
    "content_knn": "content kNN",
    "recent_popularity": "recent popularity",
}


class Scorer(NamedTuple):
    """How a candidate comes by a scorer's score."""

    table: AnyTable | None  # the table read, if any
    name: str  # of that table in the queries
    score: str  # the column, or an expression
    join: str  # of the table to the candidates; never an inner one, which would drop


class Rows(NamedTuple):
    """A split's candidates with one scorer's scores, shape [rows] each."""

    sequences: Integers
    scores: Floats
    labels: npt.NDArray[np.bool_]


def _scored_in(name: str) -> Scorer:
    """Give a scorer whose scores are a table of that name."""
    return Scorer(Scores, name, "log_odds", f"LEFT JOIN {name} USING (split, sequence, item)")


SCORERS = {  # in the order of the metrics table
    MODEL: _scored_in("scores"),
    "oracle": Scorer(
        Oracle,
        "oracle",
        "utility",
        'LEFT JOIN sequences USING (split, sequence) LEFT JOIN oracle USING ("user", item)',
    ),
    **{name: _scored_in(name) for name in BASELINES},
    "popularity": Scorer(
        Popularity, "popularity", "interactions", "LEFT JOIN popularity USING (item)"
    ),
    "chance": Scorer(None, "", "0", ""),
}
EVALUATED = ("valid", "test")
BINS = 20  # of the histogram of p(yes)
POCKET_NOTE = "pocket world: an embedded toy, no claim about real data"

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What came of an evaluation, all of it computed before any of it is written.

    Attributes:
        metrics: The document ``metrics.json``.
        placements: Of each scorer and split.
        curves: Columns scorer, k, hr, ndcg, mrr of the test split.
        histogram: Columns label, p_yes, p_yes_end, share of the model's test scores.
    """

    metrics: Metrics
    placements: Mapping[tuple[str, str], Placements]
    curves: arrow.Table
    histogram: arrow.Table


def evaluate(
    scores: Path,
    filtered: Path,
    oracle: Path | None,
    baselines: Mapping[str, Path],
    *,
    ks: Sequence[int],
    bootstrap_samples: int,
    confidence: float,
    seed: int,
) -> Evaluation:
    """Measure the model and its rivals on the candidates of valid and test.

    Args:
        scores: A table Scores with the log-odds of every such candidate.
        filtered: Folder of ``filter_sequences``.
        oracle: The pocket world's table Oracle, or None for other data.
        baselines: Tables Scores by the names of baselines, those of ``BASELINES``.
        ks: Cut-offs, ascending; the curves go up to the last.
        bootstrap_samples: Resamples per interval.
        confidence: Coverage of the intervals, 0..1.
        seed: Of the resamples, the same for every scorer.

    Raises:
        DataError: A table is missing or breaks its model; a candidate has no score, NaN or
            several; a score has no candidate; a sequence lacks candidates, a negative or its
            one target.
    """
    rows = _score_all({MODEL: scores, **_rivals(filtered, oracle, baselines)}, filtered)
    placements = _place(rows)
    metrics: Metrics = {"confidence": confidence}
    for section, placed in _sections(placements).items():
        metrics[section] = summarize(
            placed, ks=ks, samples=bootstrap_samples, confidence=confidence, seed=seed
        )
    curves, histogram = _curves(placements, ks[-1]), _histogram(rows[MODEL]["test"])
    return Evaluation(metrics, placements, curves, histogram)


def measure_rivals(
    filtered: Path,
    oracle: Path | None,
    baselines: Mapping[str, Path],
    *,
    ks: Sequence[int],
    bootstrap_samples: int,
    confidence: float,
    seed: int,
) -> tuple[Metrics, dict[str, Difference]]:
    """Measure all but the model on test, for which no model has to have run.

    Arguments and errors are those of :func:`evaluate`.

    Returns:
        What ``metrics.json`` has of them; and of each baseline the difference of its AUC to
        popularity's over the same sequences, p corrected for their number.
    """
    placements = _place(_score_all(_rivals(filtered, oracle, baselines), filtered))
    metrics: Metrics = {"confidence": confidence}
    for (scorer, split), placed in placements.items():
        if split == "test":
            metrics[scorer] = summarize(
                placed, ks=ks, samples=bootstrap_samples, confidence=confidence, seed=seed
            )
    values = {name: auc(placements[name, "test"]) for name in (*baselines, "popularity")}
    differences = [
        compare(values[name], values["popularity"], confidence=confidence) for name in baselines
    ]
    return metrics, dict(zip(baselines, correct(differences), strict=True))


def write_evaluation(evaluation: Evaluation, out: Path) -> dict[Path, int]:
    """Write ``metrics.json``, ``per_sequence.parquet`` and ``plots/``, all of them or none.

    Returns:
        Rows of each file, metrics.json counted as the sequences of test.

    Raises:
        DataError: The disk is full.
    """
    metrics, per_sequence, plots = (
        out / name for name in ("metrics.json", "per_sequence.parquet", "plots")
    )
    with (
        written_whole(metrics) as metrics_file,
        written_whole(per_sequence) as per_sequence_file,
        written_whole(plots) as plots_folder,
    ):
        plots_folder.mkdir()
        arrow.csv.write_csv(evaluation.curves, plots_folder / "metrics_at_k.csv")
        arrow.csv.write_csv(evaluation.histogram, plots_folder / "probabilities.csv")
        rows = _write_per_sequence(evaluation.placements, per_sequence_file)
        metrics_file.write_text(json.dumps(evaluation.metrics, indent=2) + "\n", encoding="utf-8")
    return {
        plots / "metrics_at_k.csv": evaluation.curves.num_rows,
        plots / "probabilities.csv": evaluation.histogram.num_rows,
        per_sequence: rows,
        metrics: int(evaluation.metrics["test"]["sequences"]),
    }


def read_metrics(path: Path) -> Metrics:
    """Read a ``metrics.json``.

    Raises:
        DataError: It is missing or not what :func:`write_evaluation` writes.
    """
    where, remedy = str(path), "run the stage evaluate"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError("the metrics", "no such file", where, remedy) from error
    except ValueError as error:
        raise DataError("the metrics as JSON", str(error), where, remedy) from error
    if not isinstance(metrics, dict) or not {"test", "confidence"} <= set(metrics):
        raise DataError("the keys test and confidence", "other content", where, remedy)
    return metrics


def format_table(metrics: Metrics) -> str:
    """Lay out the test figures with their intervals as a Markdown table and its notes.

    The cut-off shown is 5, the paper's, or the smallest there is.
    """
    ks = [int(k) for k in re.findall(r"\bhr@(\d+)\b", " ".join(metrics["chance"]))]
    k = 5 if 5 in ks else min(ks)
    columns = ["auc", f"hr@{k}", f"ndcg@{k}", f"mrr@{k}"]
    lines = [["test", *(column.upper() for column in columns), "sequences"]]
    for scorer in SCORERS:
        figures = metrics.get("test" if scorer == MODEL else scorer)
        if figures:
            cells = [_cell(figures, column) for column in columns]
            lines.append([BASELINES.get(scorer, scorer), *cells, f"{figures['sequences']:,}"])
    note = f"in brackets: {metrics['confidence']:.0%} bootstrap intervals over sequences"
    notes = [note, *([POCKET_NOTE] if "oracle" in metrics else [])]
    return "\n".join([format_markdown(lines), "", *notes])


def format_differences(differences: Mapping[str, Difference], confidence: float) -> str:
    """Lay out differences in AUC to popularity as a Markdown table and its note."""
    lines = [["test", "AUC over popularity", "p"]]
    for scorer in SCORERS:
        if scorer in differences:
            lines.append([BASELINES[scorer], *show_difference(differences[scorer])])
    note = (
        f"difference in AUC to popularity, {confidence:.0%} paired bootstrap interval; p: two-sided"
        f" paired randomisation test over sequences, Holm-corrected for {len(differences)}"
    )
    return "\n".join([format_markdown(lines), "", note])


def format_markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lay out rows, the head first, as a Markdown table in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in ruled)


def _rivals(
    filtered: Path, oracle: Path | None, baselines: Mapping[str, Path]
) -> dict[str, Path | None]:
    """Give what each rival's scores are read from, None where there are none."""
    popularity = filtered / "popularity.parquet"
    return {"oracle": oracle, **baselines, "popularity": popularity, "chance": filtered}


def _score_all(paths: Mapping[str, Path | None], filtered: Path) -> dict[str, dict[str, Rows]]:
    """Give the rows of each scorer and split, in the order of ``SCORERS``."""
    with duckdb.connect() as connection:
        _open_candidates(connection, filtered)
        return {
            scorer: _score_candidates(connection, scorer, path)
            for scorer in SCORERS
            if (path := paths.get(scorer)) is not None
        }


def _place(rows: Mapping[str, Mapping[str, Rows]]) -> dict[tuple[str, str], Placements]:
    return {
        (scorer, split): place_targets(*scored)
        for scorer, splits in rows.items()
        for split, scored in splits.items()
    }


def _open_candidates(connection: duckdb.DuckDBPyConnection, filtered: Path) -> None:
    """Make one table ``candidates`` of valid's and test's and refuse unanswerable questions."""
    read_table(Sequences, connection, filtered / "sequences.parquet", "sequences")
    for split in EVALUATED:
        path = filtered / f"{split}_candidates.parquet"
        read_table(Candidates, connection, path, f"{split}_candidates")
    parts = (f"SELECT '{split}' AS split, * FROM {split}_candidates" for split in EVALUATED)
    connection.execute(f"CREATE TABLE candidates AS {' UNION ALL BY NAME '.join(parts)}")
    _refuse(
        connection,
        "SELECT split, sequence FROM sequences FULL JOIN"
        " (SELECT DISTINCT split, sequence, true AS asked FROM candidates)"
        " USING (split, sequence) WHERE split != 'train' AND (asked IS NULL OR target IS NULL)",
        "candidates for exactly the sequences of valid and test",
        "sequences without counterpart",
        filtered,
        "run the stage filter_sequences again",
    )
    _refuse(
        connection,
        "SELECT split, sequence, count(*) FILTER (label) AS targets, count(*) AS candidates"
        " FROM candidates GROUP BY ALL HAVING targets != 1 OR candidates < 2",
        "one target and at least one negative per sequence",
        "other sequences",
        filtered,
        "run the stage filter_sequences again",
    )


def _score_candidates(
    connection: duckdb.DuckDBPyConnection, scorer: str, path: Path
) -> dict[str, Rows]:
    """Give every candidate the scorer's one score; rows of each split."""
    table, name, score, join = SCORERS[scorer]
    if table:
        read_table(table, connection, path, name)
    if table is Scores:
        _refuse_strangers(connection, name, path)
    connection.execute(
        "CREATE OR REPLACE TABLE scored AS SELECT split, sequence, item, label,"
        f" {score}::DOUBLE AS score FROM candidates {join}"
    )
    # NaN is looked for here, since DuckDB 2.0 answers isnan() on a Parquet file from its minimum
    # and maximum, which leave NaN out: the check of the table may miss it.
    for problem, rows in (
        ("candidates without a score", "FROM scored WHERE score IS NULL"),
        ("candidates with the score NaN", "FROM scored WHERE isnan(score)"),
        ("candidates with several scores", "FROM scored GROUP BY ALL HAVING count(*) > 1"),
    ):
        select = f"SELECT split, sequence, item {rows}"
        remedy = "run the stage that writes it again on these candidates"
        _refuse(connection, select, "one number per candidate", problem, path, remedy)
    return {split: _rows(connection, split) for split in EVALUATED}


def _sections(placements: Mapping[tuple[str, str], Placements]) -> dict[str, Placements]:
    """Name the sections of ``metrics.json``: the model's by split, the rivals' of test by name."""
    model = {split: placements[MODEL, split] for split in EVALUATED}
    return model | {
        scorer: placed
        for (scorer, split), placed in placements.items()
        if scorer != MODEL and split == "test"
    }


def _refuse_strangers(connection: duckdb.DuckDBPyConnection, name: str, path: Path) -> None:
    """Refuse scores of anything but the candidates."""
    _refuse(
        connection,
        f"SELECT split, sequence, item FROM {name}"
        " ANTI JOIN candidates USING (split, sequence, item)",
        "scores of the candidates of valid and test only",
        "scores without a candidate",
        path,
        "run the stage that writes it again on these candidates, or leave a baseline out of models",
    )


def _refuse(
    connection: duckdb.DuckDBPyConnection,
    query: str,
    expected: str,
    problem: str,
    where: Path,
    remedy: str,
) -> None:
    """Raise a DataError with the number of a query's rows and the first of them, if any."""
    result = connection.execute(f"SELECT count(*) OVER (), * FROM ({query}) ORDER BY ALL LIMIT 1")
    names = [column[0] for column in result.description or ()]
    for row in result.fetchall():
        first = ", ".join(f"{name} {value}" for name, value in zip(names[1:], row[1:], strict=True))
        raise DataError(expected, f"{row[0]:,} {problem}, first: {first}", str(where), remedy)


def _rows(connection: duckdb.DuckDBPyConnection, split: str) -> Rows:
    """Fetch a split's scored candidates."""
    query = "SELECT sequence, score, label FROM scored WHERE split = ? ORDER BY sequence, item"
    columns = connection.execute(query, [split]).fetchnumpy()
    return Rows(columns["sequence"], columns["score"], columns["label"])


def _write_per_sequence(placements: Mapping[tuple[str, str], Placements], path: Path) -> int:
    """Write the table PerSequence; returns its rows."""
    parts = [
        arrow.table(
            {
                "sequence": placed.sequences,
                "split": [split] * len(placed.sequences),
                "scorer": [scorer] * len(placed.sequences),
                "candidates": placed.candidates,
                "above": placed.above,
                "tied": placed.tied,
            }
        )
        for (scorer, split), placed in placements.items()
    ]
    with duckdb.connect() as connection:
        connection.register("per_sequence", arrow.concat_tables(parts))
        query = "FROM per_sequence ORDER BY scorer, sequence"
        return write_query(PerSequence, connection, query, path)


def _curves(placements: Mapping[tuple[str, str], Placements], last: int) -> arrow.Table:
    """Average HR, NDCG and MRR of test at each k from 1 to ``last``, one row per scorer and k."""
    rows = []
    for (scorer, split), placed in placements.items():
        if split == "test":
            means = {name: v.mean() for name, v in measure(placed, range(1, last + 1)).items()}
            for k in range(1, last + 1):
                figures = {name: round(means[f"{name}@{k}"], 6) for name in ("hr", "ndcg", "mrr")}
                rows.append({"scorer": scorer, "k": k, **figures})
    return arrow.Table.from_pylist(rows)


def _histogram(scored: Rows) -> arrow.Table:
    """Spread p(yes) = 1 / (1 + exp(-log-odds)) over bins, as shares of each label."""
    edges = np.linspace(0, 1, BINS + 1).round(6)
    rows = []
    for name, chosen in (("negative", ~scored.labels), ("target", scored.labels)):
        shares = _share_per_bin(scored.scores[chosen], edges)
        for start, end, share in zip(edges[:-1], edges[1:], shares, strict=True):
            rows.append({"label": name, "p_yes": start, "p_yes_end": end, "share": share})
    return arrow.Table.from_pylist(rows)


def _share_per_bin(log_odds: Floats, edges: Floats) -> Floats:
    """Give the share of p(yes) between neighbouring edges; tanh, since exp would overflow."""
    counts, _ = np.histogram((1 + np.tanh(log_odds / 2)) / 2, edges)
    shares: Floats = (counts / len(log_odds)).round(6)
    return shares


def _cell(figures: Mapping[str, float], metric: str) -> str:
    """Format a figure and its interval, such as ``0.812 [0.790, 0.834]``."""
    low, high = figures[f"{metric}_low"], figures[f"{metric}_high"]
    return f"{figures[metric]:.3f} [{low:.3f}, {high:.3f}]"

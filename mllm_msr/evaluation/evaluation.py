"""Scores joined with candidates, and the figures of the model beside those of other scorers.

Every scorer ranks the very same candidates, once for each sampling of their negatives, which is an
evaluation protocol (:mod:`mllm_msr.data.candidates`):

- ``MLLM-MSR``, the scores under evaluation, where there are any;
- ``oracle``, in the pocket world only: the log weights by which its users truly choose, so the
  best that any scorer can reach there;
- the baselines, each with scores of its own (:mod:`mllm_msr.baselines`);
- ``target_popularity``, how often an item is the target of a training sequence, and among items
  that are so equally often the more popular: what the recommender's training labels tell of an item
  without knowing the user. Where targets are late interactions and negatives any, it is far above
  ``popularity``;
- ``popularity``, how often an item was taken, as far as is known when a model is trained
  (:mod:`mllm_msr.data.sequences`): of a user with a valid or test target only what came before it,
  of other users all; under the split by time nothing from the first valid target on;
- ``chance``, one score for all. Metrics are expectations over the orders of ties, so its figures
  are chance's exact ones, and its interval has no width where all sequences have as many
  candidates.

Every scorer that knows whom it is asked about is tested against each that does not: paired tests of
AUC over the test sequences, Holm-corrected for all tests of one sampling.

The figures of others than the model are those of the test split; ``per_sequence.parquet`` has both
splits of all.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as arrow
import pyarrow.csv

from mllm_msr.baselines.registry import all_baselines
from mllm_msr.core.errors import DataError
from mllm_msr.core.files import atomic_write
from mllm_msr.core.tables import (
    PARTIAL_SAMPLINGS,
    SAMPLINGS,
    AnyTable,
    Candidates,
    Comparisons,
    Oracle,
    PerSequence,
    Popularity,
    Scores,
    Sequences,
    read_rows,
    read_table,
    write_query,
    write_rows,
)
from mllm_msr.evaluation.comparisons import Difference, compare_pairs
from mllm_msr.evaluation.metrics import measure, summarize
from mllm_msr.ranking import Floats, Integers, Placements, auc, place_targets

MODEL = "MLLM-MSR"
# What tables call them, in the order of rows.
BASELINES = {baseline.name: baseline.label for baseline in all_baselines()}
LABELS = BASELINES | {"target_popularity": "target popularity"}
# Scorers that do not know whom they are asked about; chance stands beside them, untested.
NON_PERSONAL = (
    "target_popularity",
    *(baseline.name for baseline in all_baselines() if not baseline.personal),
    "popularity",
)
UNTESTED = ("oracle", "chance", *NON_PERSONAL)
LEVEL = 0.05  # of the tests


class Scorer(NamedTuple):
    """How a candidate comes by a scorer's score."""

    table: AnyTable | None  # the table read, if any
    name: str  # of that table in the queries
    score: str  # the column, or an expression
    join: str  # of the table to the candidates; never an inner one, which would drop


class Rows(NamedTuple):
    """The candidates of a sampling and split with one scorer's scores, shape [rows] each."""

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
    "target_popularity": Scorer(
        None, "", "target_popularity", "LEFT JOIN target_popularity USING (item)"
    ),
    "popularity": Scorer(
        Popularity, "popularity", "interactions", "LEFT JOIN popularity USING (item)"
    ),
    "chance": Scorer(None, "", "0", ""),
}
EVALUATED = ("valid", "test")
BINS = 20  # of the histogram of p(yes)
HISTOGRAM = arrow.schema(
    [
        ("sampling", arrow.string()),
        ("label", arrow.string()),
        *((name, arrow.float64()) for name in ("p_yes", "p_yes_end", "share")),
    ]
)
POCKET_NOTE = "pocket world: an embedded toy, no claim about real data"

Metrics = dict[str, Any]
Key = tuple[str, str, str]  # sampling, scorer, split


@dataclass(frozen=True)
class Comparison:
    """How far one scorer's AUC on test is above that of one that does not know the user."""

    sampling: str
    scorer: str
    baseline: str
    difference: Difference  # p is Holm-corrected

    @property
    def is_above(self) -> bool:
        """Tell whether the difference is shown to be above 0."""
        return self.difference.low > 0 and self.difference.p < LEVEL


@dataclass(frozen=True)
class Evaluation:
    """What came of an evaluation, all of it computed before any of it is written.

    Attributes:
        metrics: The document ``metrics.json``.
        comparisons: Of each scorer that knows the user with each that does not.
        placements: Of each sampling, scorer and split.
        curves: Columns sampling, scorer, k, hr, ndcg, mrr of the test split.
        histogram: Columns sampling, label, p_yes, p_yes_end, share of the model's test scores.
    """

    metrics: Metrics
    comparisons: Sequence[Comparison]
    placements: Mapping[Key, Placements]
    curves: arrow.Table
    histogram: arrow.Table


def evaluate(
    scores: Path | None,
    filtered: Path,
    oracle: Path | None,
    baselines: Mapping[str, Path],
    *,
    ks: Sequence[int],
    bootstrap_samples: int,
    confidence: float,
    seed: int,
) -> Evaluation:
    """Measure the model and the other scorers on the candidates of valid and test.

    Args:
        scores: A table Scores with the log-odds of every such candidate; one without rows, or None,
            leaves the model out.
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
    popularity = filtered / "popularity.parquet"
    paths = {
        MODEL: scores if scores and _has_rows(scores) else None,
        "oracle": oracle,
        **baselines,
        "target_popularity": popularity,
        "popularity": popularity,
        "chance": filtered,
    }
    rows = _score_all(paths, filtered)
    placements = {key: place_targets(*scored) for key, scored in rows.items()}
    metrics: Metrics = {"confidence": confidence}
    for (sampling, scorer, split), placed in placements.items():
        section = split if scorer == MODEL else scorer
        if scorer == MODEL or split == "test":
            metrics.setdefault(sampling, {})[section] = summarize(
                placed, ks=ks, samples=bootstrap_samples, confidence=confidence, seed=seed
            )
    histogram = _histogram(
        {
            sampling: scored
            for (sampling, scorer, split), scored in rows.items()
            if (scorer, split) == (MODEL, "test")
        }
    )
    compared = _compare_all(placements, confidence)
    return Evaluation(metrics, compared, placements, _curves(placements, ks[-1]), histogram)


def write_evaluation(evaluation: Evaluation, out: Path) -> dict[Path, int]:
    """Write ``metrics.json``, two tables and ``plots/``, all of them or none.

    Returns:
        Rows of each file, metrics.json counted as the samplings.

    Raises:
        DataError: The disk is full.
    """
    metrics, per_sequence, comparisons, plots = (
        out / name
        for name in ("metrics.json", "per_sequence.parquet", "comparisons.parquet", "plots")
    )
    with (
        atomic_write(metrics) as metrics_file,
        atomic_write(per_sequence) as per_sequence_file,
        atomic_write(comparisons) as comparisons_file,
        atomic_write(plots) as plots_folder,
    ):
        plots_folder.mkdir()
        arrow.csv.write_csv(evaluation.curves, plots_folder / "metrics_at_k.csv")
        arrow.csv.write_csv(evaluation.histogram, plots_folder / "probabilities.csv")
        rows = _write_per_sequence(evaluation.placements, per_sequence_file)
        tests = [_comparison_row(each) for each in evaluation.comparisons]
        write_rows(Comparisons, tests, comparisons_file)
        metrics_file.write_text(json.dumps(evaluation.metrics, indent=2) + "\n", encoding="utf-8")
    return {
        plots / "metrics_at_k.csv": evaluation.curves.num_rows,
        plots / "probabilities.csv": evaluation.histogram.num_rows,
        per_sequence: rows,
        comparisons: len(tests),
        metrics: len(samplings_of(evaluation.metrics)),
    }


def read_metrics(path: Path) -> Metrics:
    """Read a ``metrics.json``.

    Raises:
        DataError: It is missing or not what :func:`write_evaluation` writes.
    """
    where, fix = str(path), "run the stage evaluate"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(expected="the metrics", got="no such file", where=where, fix=fix) from error
    except ValueError as error:
        raise DataError(
            expected="the metrics as JSON", got=str(error), where=where, fix=fix
        ) from error
    if not isinstance(metrics, dict) or "confidence" not in metrics or not samplings_of(metrics):
        expected = f"the key confidence and one of {', '.join(SAMPLINGS)}"
        raise DataError(expected=expected, got="other content", where=where, fix=fix)
    return metrics


def read_comparisons(path: Path) -> list[Comparison]:
    """Read the table Comparisons, in the order of ``SCORERS`` and ``NON_PERSONAL``.

    Raises:
        DataError: It is missing or breaks its model.
    """
    rows = read_rows(Comparisons, path, order="sampling, scorer, baseline")
    compared = [
        Comparison(
            row["sampling"],
            row["scorer"],
            row["baseline"],
            Difference(row["difference"], row["low"], row["high"], row["p"]),
        )
        for row in rows
    ]
    scorers = list(SCORERS)
    return sorted(
        compared,
        key=lambda each: (
            SAMPLINGS.index(each.sampling),
            scorers.index(each.scorer),
            NON_PERSONAL.index(each.baseline),
        ),
    )


def samplings_of(metrics: Mapping[str, Any]) -> list[str]:
    """Return the samplings that the metrics have figures of, in the order of tables."""
    return [sampling for sampling in SAMPLINGS if sampling in metrics]


def shown_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Return the metrics that tables show: those at 5, the paper's cut-off, or at the smallest."""
    figures = metrics[samplings_of(metrics)[0]]["chance"]
    cutoffs = [int(k) for k in re.findall(r"\bhr@(\d+)\b", " ".join(figures))]
    k = 5 if 5 in cutoffs else min(cutoffs)
    return ["auc", f"hr@{k}", f"ndcg@{k}", f"mrr@{k}"]


def format_table(
    metrics: Metrics, comparisons: Sequence[Comparison], warnings: Sequence[str] = ()
) -> str:
    """Lay out the test figures as a Markdown table, the samplings side by side, and its notes.

    Args:
        metrics: As in ``metrics.json``.
        comparisons: Those of the same evaluation.
        warnings: Lines that stand above the table.
    """
    samplings, names = samplings_of(metrics), shown_metrics(metrics)
    head = ["test"]
    for sampling in samplings:
        head += [f"AUC, {sampling}", *(name.upper() for name in names[1:])]
    lines = [head]
    for scorer in SCORERS:
        sections = [metrics[each].get("test" if scorer == MODEL else scorer) for each in samplings]
        if all(sections):
            cells = [cell for figures in sections for cell in _cells(figures, names)]
            lines.append([LABELS.get(scorer, scorer), *cells])
    notes = [
        describe_samplings(count_sequences(metrics)),
        f"in brackets: {metrics['confidence']:.0%} bootstrap intervals over sequences; those of the"
        " other figures are in metrics.json",
        *_note_comparisons(comparisons, samplings),
        *([POCKET_NOTE] if "oracle" in metrics[samplings[0]] else []),
    ]
    return "\n".join([*warnings, *([""] if warnings else []), format_markdown(lines), "", *notes])


def count_sequences(metrics: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of test sequences of each sampling."""
    return {each: int(metrics[each]["chance"]["sequences"]) for each in samplings_of(metrics)}


def describe_samplings(sequences: Mapping[str, int]) -> str:
    """Say of what negatives figures are, and of how many test sequences."""
    asked = "; ".join(f"{sampling}: {count:,}" for sampling, count in sequences.items())
    return f"negatives: {' and '.join(sequences)}; test sequences: {asked}"


def format_markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lay out rows, the head first, as a Markdown table in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in ruled)


def describe_failures(comparisons: Sequence[Comparison], sampling: str) -> str:
    """Name the scorers, in order, not shown to be above those that do not know the user."""
    failed: dict[str, list[str]] = {}
    for each in comparisons:
        if each.sampling == sampling and not each.is_above:
            failed.setdefault(each.scorer, []).append(LABELS.get(each.baseline, each.baseline))
    named = (f"{LABELS.get(each, each)} ({', '.join(failed[each])})" for each in failed)
    return ", ".join(named) or "none"


def _note_comparisons(comparisons: Sequence[Comparison], samplings: Sequence[str]) -> list[str]:
    """Say which scorers that know the user are not above those that do not."""
    if not comparisons:
        return []
    note = (
        "not shown to be above the rows that do not know the user (difference in AUC, paired"
        f" randomisation tests, Holm-corrected, p < {LEVEL}):"
    )
    return [note, *(f"  {each}: {describe_failures(comparisons, each)}" for each in samplings)]


def _has_rows(path: Path) -> bool:
    """Tell whether a table Scores has a row.

    Raises:
        DataError: It is missing or breaks its model.
    """
    with duckdb.connect() as connection:
        read_table(Scores, connection, path, "scores")
        return bool(connection.execute("FROM scores LIMIT 1").fetchall())


def _score_all(paths: Mapping[str, Path | None], filtered: Path) -> dict[Key, Rows]:
    """Return the rows of each sampling, scorer and split, in the order of ``SCORERS``."""
    rows: dict[Key, Rows] = {}
    with duckdb.connect() as connection:
        _open_candidates(connection, filtered)
        found = connection.execute("SELECT DISTINCT sampling FROM candidates").fetchall()
        samplings = [sampling for sampling in SAMPLINGS if (sampling,) in found]
        for scorer in SCORERS:
            if (path := paths.get(scorer)) is None:
                continue
            _score_candidates(connection, scorer, path)
            for sampling, split in product(samplings, EVALUATED):
                scored = _rows(connection, sampling, split)
                if len(scored.sequences):  # a split may be empty
                    rows[sampling, scorer, split] = scored
    return rows


def _open_candidates(connection: duckdb.DuckDBPyConnection, filtered: Path) -> None:
    """Make one table ``candidates`` of valid's and test's and refuse unanswerable questions."""
    read_table(Sequences, connection, filtered / "sequences.parquet", "sequences")
    _count_target_popularity(connection, filtered)
    for split in EVALUATED:
        path = filtered / f"{split}_candidates.parquet"
        read_table(Candidates, connection, path, f"{split}_candidates")
    parts = (f"SELECT '{split}' AS split, * FROM {split}_candidates" for split in EVALUATED)
    connection.execute(f"CREATE TABLE candidates AS {' UNION ALL BY NAME '.join(parts)}")
    _refuse(
        connection,
        "SELECT 1 AS none WHERE NOT EXISTS (FROM candidates WHERE split = 'test')",
        "candidates of test",
        "splits without any",
        filtered / "test_candidates.parquet",
        "raise filter_sequences.test_share and run the stage filter_sequences again",
    )
    # A sampling that found too few items for a sequence left it out (mllm_msr/data/candidates.py).
    _refuse(
        connection,
        "SELECT split, sequence FROM sequences FULL JOIN"
        " (SELECT DISTINCT split, sequence, true AS asked FROM candidates)"
        " USING (split, sequence) WHERE split != 'train' AND"
        " (target IS NULL OR asked IS NULL AND EXISTS (FROM candidates WHERE sampling NOT IN"
        f" {PARTIAL_SAMPLINGS}))",
        "candidates for exactly the sequences of valid and test",
        "sequences without counterpart",
        filtered,
        "run the stage filter_sequences again",
    )
    _refuse(
        connection,
        "SELECT split, sequence, count(*) FILTER (label) AS targets, count(*) AS candidates"
        " FROM candidates GROUP BY split, sampling, sequence HAVING targets != 1 OR candidates < 2",
        "one target and at least one negative per sequence",
        "other sequences",
        filtered,
        "run the stage filter_sequences again",
    )


def _count_target_popularity(connection: duckdb.DuckDBPyConnection, filtered: Path) -> None:
    """Make ``target_popularity``: training targets per item, then popularity as a fraction."""
    read_table(Popularity, connection, filtered / "popularity.parquet", "popularity")
    connection.execute(
        """
        CREATE TABLE target_popularity AS
        WITH counts AS (
            SELECT target AS item, count(*) AS targets FROM sequences
            WHERE split = 'train' GROUP BY target
        )
        SELECT item, coalesce(targets, 0)
            + interactions / (max(interactions) OVER () + 1) AS target_popularity
        FROM popularity LEFT JOIN counts USING (item)
        """
    )


def _score_candidates(connection: duckdb.DuckDBPyConnection, scorer: str, path: Path) -> None:
    """Make ``scored``: every candidate with the scorer's one score."""
    table, name, score, join = SCORERS[scorer]
    if table:
        read_table(table, connection, path, name)
    if table is Scores:
        _refuse_other_scores(connection, name, path)
    connection.execute(
        "CREATE OR REPLACE TABLE scored AS SELECT sampling, split, sequence, item, label,"
        f" {score}::DOUBLE AS score FROM candidates {join}"
    )
    # NaN is looked for here, since DuckDB 2.0 answers isnan() on a Parquet file from its minimum
    # and maximum, which leave NaN out: the check of the table may miss it.
    for problem, rows in (
        ("candidates without a score", "FROM scored WHERE score IS NULL"),
        ("candidates with the score NaN", "FROM scored WHERE isnan(score)"),
        (
            "candidates with several scores",
            "FROM scored GROUP BY sampling, split, sequence, item HAVING count(*) > 1",
        ),
    ):
        select = f"SELECT DISTINCT split, sequence, item {rows}"
        fix = "run the stage that writes it again on these candidates"
        _refuse(connection, select, "one number per candidate", problem, path, fix)


def _compare_all(placements: Mapping[Key, Placements], confidence: float) -> list[Comparison]:
    """Compare each scorer that knows the user with each that does not, on test."""
    values = {
        (sampling, scorer): auc(placed)
        for (sampling, scorer, split), placed in placements.items()
        if split == "test"
    }
    compared: list[Comparison] = []
    for sampling in dict.fromkeys(sampling for sampling, _ in values):
        scorers = [scorer for each, scorer in values if each == sampling]
        pairs = [
            (scorer, baseline)
            for scorer in scorers
            if scorer not in UNTESTED
            for baseline in NON_PERSONAL
            if baseline in scorers
        ]
        differences = compare_pairs(
            [(values[sampling, scorer], values[sampling, baseline]) for scorer, baseline in pairs],
            confidence=confidence,
        )
        compared += [
            Comparison(sampling, *pair, difference)
            for pair, difference in zip(pairs, differences, strict=True)
        ]
    return compared


def _comparison_row(comparison: Comparison) -> dict[str, object]:
    """Return a row of the table Comparisons."""
    value, low, high, p = (round(figure, 6) for figure in comparison.difference)
    names = {name: getattr(comparison, name) for name in ("sampling", "scorer", "baseline")}
    return names | {"difference": value, "low": low, "high": high, "p": p}


def _refuse_other_scores(connection: duckdb.DuckDBPyConnection, name: str, path: Path) -> None:
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
    fix: str,
) -> None:
    """Raise a DataError with the number of a query's rows and the first of them, if any."""
    result = connection.execute(f"SELECT count(*) OVER (), * FROM ({query}) ORDER BY ALL LIMIT 1")
    names = [column[0] for column in result.description or ()]
    for row in result.fetchall():
        first = ", ".join(f"{name} {value}" for name, value in zip(names[1:], row[1:], strict=True))
        raise DataError(
            expected=expected,
            got=f"{row[0]:,} {problem}, first: {first}",
            where=str(where),
            fix=fix,
        )


def _rows(connection: duckdb.DuckDBPyConnection, sampling: str, split: str) -> Rows:
    """Fetch the scored candidates of a sampling and split."""
    query = (
        "SELECT sequence, score, label FROM scored WHERE sampling = ? AND split = ?"
        " ORDER BY sequence, item"
    )
    columns = connection.execute(query, [sampling, split]).fetchnumpy()
    return Rows(columns["sequence"], columns["score"], columns["label"])


def _write_per_sequence(placements: Mapping[Key, Placements], path: Path) -> int:
    """Write the table PerSequence; returns its rows."""
    parts = [
        arrow.table(
            {
                "sampling": [sampling] * len(placed.sequences),
                "sequence": placed.sequences,
                "split": [split] * len(placed.sequences),
                "scorer": [scorer] * len(placed.sequences),
                "candidates": placed.candidates,
                "above": placed.above,
                "tied": placed.tied,
            }
        )
        for (sampling, scorer, split), placed in placements.items()
    ]
    with duckdb.connect() as connection:
        connection.register("per_sequence", arrow.concat_tables(parts))
        query = "FROM per_sequence ORDER BY sampling, scorer, sequence"
        return write_query(PerSequence, connection, query, path)


def _curves(placements: Mapping[Key, Placements], last: int) -> arrow.Table:
    """Average HR, NDCG and MRR of test at each k from 1 to ``last``."""
    rows = []
    for (sampling, scorer, split), placed in placements.items():
        if split == "test":
            means = {name: v.mean() for name, v in measure(placed, range(1, last + 1)).items()}
            for k in range(1, last + 1):
                figures = {name: round(means[f"{name}@{k}"], 6) for name in ("hr", "ndcg", "mrr")}
                rows.append({"sampling": sampling, "scorer": scorer, "k": k, **figures})
    return arrow.Table.from_pylist(rows)


def _histogram(scored: Mapping[str, Rows]) -> arrow.Table:
    """Spread p(yes) = 1 / (1 + exp(-log-odds)) over bins, as shares of each label."""
    edges = np.linspace(0, 1, BINS + 1).round(6)
    rows = []
    for sampling, asked in scored.items():
        for name, chosen in (("negative", ~asked.labels), ("target", asked.labels)):
            shares = _share_per_bin(asked.scores[chosen], edges)
            for start, end, share in zip(edges[:-1], edges[1:], shares, strict=True):
                cells = {"p_yes": start, "p_yes_end": end, "share": share}
                rows.append({"sampling": sampling, "label": name, **cells})
    return arrow.Table.from_pylist(rows, HISTOGRAM)


def _share_per_bin(log_odds: Floats, edges: Floats) -> Floats:
    """Return the share of p(yes) between neighbouring edges; tanh, since exp would overflow."""
    counts, _ = np.histogram((1 + np.tanh(log_odds / 2)) / 2, edges)
    shares: Floats = (counts / len(log_odds)).round(6)
    return shares


def _cells(figures: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """Format figures, the first with its interval, such as ``0.812 [0.790, 0.834]``."""
    first, low, high = (figures[f"{names[0]}{end}"] for end in ("", "_low", "_high"))
    return [f"{first:.3f} [{low:.3f}, {high:.3f}]", *(f"{figures[name]:.3f}" for name in names[1:])]

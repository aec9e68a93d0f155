"""The files of an evaluation: write them, read them, and look up their keys."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as arrow
import pyarrow.csv

from mllm_msr.core.errors import DataError
from mllm_msr.core.files import atomic_write
from mllm_msr.core.schemas import SAMPLINGS, Comparisons, PerSequence
from mllm_msr.core.tables import read_rows, write_query, write_rows
from mllm_msr.evaluation.comparisons import Comparison, Difference
from mllm_msr.evaluation.evaluation import Evaluation, Metrics
from mllm_msr.evaluation.metrics import choose_cutoff, find_cutoffs, metric_keys
from mllm_msr.evaluation.scored_candidates import Key
from mllm_msr.evaluation.scorers import NON_PERSONAL, SCORERS
from mllm_msr.ranking import TargetRanks


def write_evaluation(evaluation: Evaluation, out: Path) -> dict[Path, int]:
    """Write ``metrics.json``, two tables and ``plots/``, all of them or none.

    Returns:
        Rows of each file; of metrics.json the number of samplings.

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
        arrow.csv.write_csv(evaluation.reliability, plots_folder / "reliability.csv")
        rows = _write_per_sequence(evaluation.ranks, per_sequence_file)
        tests = [_comparison_row(each) for each in evaluation.comparisons]
        write_rows(Comparisons, tests, comparisons_file)
        metrics_file.write_text(json.dumps(evaluation.metrics, indent=2) + "\n", encoding="utf-8")
    return {
        plots / "metrics_at_k.csv": evaluation.curves.num_rows,
        plots / "probabilities.csv": evaluation.histogram.num_rows,
        plots / "reliability.csv": evaluation.reliability.num_rows,
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
    return sorted(
        compared,
        key=lambda each: (
            SAMPLINGS.index(each.sampling),
            SCORERS.index(each.scorer),
            NON_PERSONAL.index(each.baseline),
        ),
    )


def samplings_of(metrics: Mapping[str, Any]) -> list[str]:
    """Return the samplings that the metrics have figures of, in the order of tables."""
    return [sampling for sampling in SAMPLINGS if sampling in metrics]


def shown_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Return the keys of the metrics that tables show: those at one cut-off, and those without."""
    figures = metrics[samplings_of(metrics)[0]]["chance"]
    shown = metric_keys(choose_cutoff(find_cutoffs(figures)))
    return [key for key in shown if key in figures]  # not what an earlier version did not measure


def count_sequences(metrics: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of test sequences of each sampling."""
    return {each: int(metrics[each]["chance"]["sequences"]) for each in samplings_of(metrics)}


def _write_per_sequence(ranks: Mapping[Key, TargetRanks], path: Path) -> int:
    """Write the table PerSequence; return its number of rows."""
    parts = [
        arrow.table(
            {
                "sampling": [sampling] * len(found.sequences),
                "sequence": found.sequences,
                "split": [split] * len(found.sequences),
                "scorer": [scorer] * len(found.sequences),
                "candidates": found.candidates,
                "above": found.above,
                "tied": found.tied,
            }
        )
        for (sampling, scorer, split), found in ranks.items()
    ]
    with duckdb.connect() as connection:
        connection.register("per_sequence", arrow.concat_tables(parts))
        query = "FROM per_sequence ORDER BY sampling, scorer, sequence"
        return write_query(PerSequence, connection, query, path)


def _comparison_row(comparison: Comparison) -> dict[str, object]:
    """Return a row of the table Comparisons."""
    value, low, high, p = (round(figure, 6) for figure in comparison.difference)
    names = {name: getattr(comparison, name) for name in ("sampling", "scorer", "baseline")}
    return names | {"difference": value, "low": low, "high": high, "p": p}

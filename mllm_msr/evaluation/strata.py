"""AUC by the stratum of the target: cold, rare or warm (:mod:`mllm_msr.data.sequences`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from mllm_msr.core.schemas import STRATA, Sequences
from mllm_msr.core.tables import read_table
from mllm_msr.evaluation.metrics import bootstrap_interval
from mllm_msr.evaluation.scored_candidates import Key
from mllm_msr.evaluation.scorers import section_of
from mllm_msr.ranking import TargetRanks, auc

ENOUGH = 20  # test sequences of a stratum, from which on tables show it

StrataMetrics = dict[str, dict[str, dict[str, dict[str, float]]]]


def measure_strata(
    ranks: Mapping[Key, TargetRanks],
    filtered: Path,
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> StrataMetrics:
    """Average the AUC of the test sequences of each stratum, with its interval.

    Args:
        ranks: By sampling, scorer and split.
        filtered: Folder of ``filter_sequences``.
        samples: Resamples per interval.
        confidence: Coverage of the intervals, 0..1.
        seed: Seed of the resamples.

    Returns:
        By sampling, section of the scorer and stratum: ``auc``, its bounds ``auc_low`` and
        ``auc_high``, and ``sequences``. Strata without a sequence are left out; empty if all test
        targets are of one stratum.
    """
    numbers = _read_strata(filtered)
    if len(set(numbers.values())) < 2:
        return {}
    found: StrataMetrics = {}
    for (sampling, scorer, split), ranked in ranks.items():
        if split != "test":
            continue
        values = auc(ranked)
        strata = np.array([numbers[sequence] for sequence in ranked.sequences.tolist()])
        by_stratum = found.setdefault(sampling, {}).setdefault(section_of(scorer), {})
        for stratum in STRATA:
            inside = values[strata == stratum]
            if len(inside):
                low, high = bootstrap_interval(inside[:, None], samples, confidence, seed)
                by_stratum[stratum] = {
                    "auc": round(float(inside.mean()), 6),
                    "auc_low": round(float(low[0]), 6),
                    "auc_high": round(float(high[0]), 6),
                    "sequences": len(inside),
                }
    return found


def shown_strata(metrics: Mapping[str, Any], sampling: str) -> dict[str, int]:
    """Return the number of test sequences of each stratum that tables of a sampling show.

    Empty unless at least two strata have :data:`ENOUGH` sequences.
    """
    counted = metrics.get("strata", {}).get(sampling, {}).get("chance", {})
    shown = {
        stratum: int(figures["sequences"])
        for stratum, figures in counted.items()
        if figures["sequences"] >= ENOUGH
    }
    return shown if len(shown) > 1 else {}


def _read_strata(filtered: Path) -> dict[int, str]:
    """Return the stratum of each used test sequence."""
    with duckdb.connect() as connection:
        read_table(Sequences, connection, filtered / "sequences.parquet", "sequences")
        rows = connection.execute(
            "SELECT sequence, stratum FROM sequences WHERE split = 'test' AND used"
        ).fetchall()
    return dict(rows)

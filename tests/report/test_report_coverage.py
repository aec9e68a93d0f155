"""Coverage and popularity bias against values computed by hand."""

import duckdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_world import make_settings
from three_items import write_world

from mllm_msr.core.schemas import Candidates, Popularity, Scores
from mllm_msr.core.tables import read_table
from mllm_msr.report.coverage import describe_coverage, gini, rank_percentiles


def test_coverage_and_bias_match_hand_computed_values(tmp_path):
    write_world(tmp_path)
    with duckdb.connect() as connection:
        for model, path, name in (
            (Candidates, tmp_path / "filtered/test_candidates.parquet", "candidates"),
            (Popularity, tmp_path / "filtered/popularity.parquet", "popularity"),
            (Scores, tmp_path / "scores.parquet", "scores"),
        ):
            read_table(model, connection, path, name)
        model, popularity, targets, candidates = describe_coverage(
            connection, make_settings(), scored=True
        )
    # The model has a first, then a level with b: 1.5, .5 and 0 times. Percentiles: 100, 25, 25.
    assert (model.items, model.share) == (2, pytest.approx(2 / 3))
    assert model.percentile.value == pytest.approx((100 + 62.5) / 2)
    assert model.gini == pytest.approx(0.5)
    assert (popularity.items, popularity.percentile.value) == (1, 100)
    assert popularity.gini == pytest.approx(2 / 3)
    assert (targets.items, targets.percentile.value) == (2, 62.5)
    assert (candidates.items, candidates.percentile.value) == (3, pytest.approx(50))
    assert candidates.gini == pytest.approx(0)


amounts = st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any).map(np.array)


@given(amounts)
def test_the_gini_coefficient_is_half_the_relative_mean_difference(counts):
    differences = np.abs(counts[:, None] - counts[None, :]).mean()
    assert gini(counts) == pytest.approx(differences / (2 * counts.mean()), abs=1e-9)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40).map(np.array))
def test_percentiles_average_to_50_and_follow_the_counts(counts):
    percentiles = rank_percentiles(counts)
    assert percentiles.mean() == pytest.approx(50)
    assert ((percentiles >= 0) & (percentiles <= 100)).all()
    order = np.argsort(counts, kind="stable")
    assert (np.diff(percentiles[order]) >= 0).all()

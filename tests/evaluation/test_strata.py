"""AUC by the stratum of the target, against values computed by hand."""

from pathlib import Path

import pytest
from three_items import evaluate_world

from mllm_msr.core.schemas import Sequences
from mllm_msr.core.tables import read_rows, write_rows
from mllm_msr.evaluation import strata
from mllm_msr.evaluation.table import format_table


@pytest.fixture
def mixed(world: Path) -> Path:
    """Return a world whose test target of sequence 2 is cold; that of 3 is rare."""
    path = world / "filtered/sequences.parquet"
    rows = list(read_rows(Sequences, path, "sequence"))
    cold = {2: "cold"}
    write_rows(Sequences, [r | {"stratum": cold.get(r["sequence"], "rare")} for r in rows], path)
    return world


def test_every_scorer_has_the_auc_of_each_stratum(mixed: Path) -> None:
    found = evaluate_world(mixed, baselines=["sasrec"]).metrics["strata"]["uniform"]
    assert {name: figures["auc"] for name, figures in found["test"].items()} == {
        "cold": 1.0,
        "rare": 0.75,
    }
    assert found["sasrec"] == found["test"]
    assert found["chance"]["cold"] == {
        **{"auc": 0.5, "auc_low": 0.5, "auc_high": 0.5},
        "sequences": 1,
    }
    assert found.keys() == {"test", "oracle", "sasrec", "target_popularity", "popularity", "chance"}


def test_strata_are_left_out_where_there_is_one(world: Path) -> None:
    assert "strata" not in evaluate_world(world).metrics


def test_the_table_shows_strata_with_enough_sequences(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = evaluate_world(mixed)
    assert "cold" not in format_table(result.metrics, result.comparisons)
    monkeypatch.setattr(strata, "ENOUGH", 1)
    shown = format_table(result.metrics, result.comparisons)
    assert "AUC, uniform, cold (1)" in shown
    row = next(line for line in shown.split("cold (1)")[1].splitlines() if "MLLM-MSR" in line)
    assert [cell.split()[0] for cell in row.split("|")[2:4]] == ["1.000", "0.750"]

"""The files of an evaluation."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
import yaml
from three_items import (
    evaluate_world,
)

from mllm_msr.core.errors import DataError
from mllm_msr.evaluation.metrics import measure, metrics_with_cutoff
from mllm_msr.evaluation.results import read_comparisons, read_metrics, write_evaluation
from mllm_msr.evaluation.scorers import MODEL
from mllm_msr.ranking import TargetRanks


def test_written_files_have_what_was_computed(world):
    result = evaluate_world(world)
    written = write_evaluation(result, world / "out")
    assert {path.relative_to(world / "out").as_posix(): rows for path, rows in written.items()} == {
        "plots/metrics_at_k.csv": 10,  # 5 scorers at 2 cut-offs
        "plots/probabilities.csv": 40,
        "plots/reliability.csv": 5,  # 4 log-odds before scaling, and 1 after: its slope is 0
        "per_sequence.parquet": 15,  # 5 scorers on 3 sequences
        "comparisons.parquet": 2,  # the model with both kinds of popularity
        "metrics.json": 1,
    }
    assert read_metrics(world / "out/metrics.json") == result.metrics
    compared = read_comparisons(world / "out/comparisons.parquet")
    assert compared == result.comparisons
    assert sorted(path.name for path in (world / "out").iterdir()) == [
        "comparisons.parquet",
        "metrics.json",
        "per_sequence.parquet",
        "plots",
    ]


def test_metrics_can_be_recomputed_from_per_sequence(world):
    result = evaluate_world(world)
    write_evaluation(result, world / "out")
    rows = pyarrow.parquet.read_table(world / "out/per_sequence.parquet").to_pylist()
    chosen = [row for row in rows if (row["scorer"], row["split"]) == (MODEL, "test")]
    names = {"sequences": "sequence", "candidates": "candidates", "above": "above", "tied": "tied"}
    columns = {name: np.array([row[key] for row in chosen]) for name, key in names.items()}
    means = {name: v.mean() for name, v in measure(TargetRanks(**columns), [1, 2]).items()}
    for name, mean in means.items():
        assert mean == pytest.approx(result.metrics["uniform"]["test"][name], abs=1e-6)


def test_plots_agree_with_the_metrics(world):
    result = evaluate_world(world)
    write_evaluation(result, world / "out")
    curves = pyarrow.csv.read_csv(world / "out/plots/metrics_at_k.csv").to_pylist()
    model = {row["k"]: row for row in curves if row["scorer"] == MODEL}
    assert model[2]["hr"] == result.metrics["uniform"]["test"]["hr@2"]
    assert model[2]["ndcg"] == result.metrics["uniform"]["test"]["ndcg@2"]
    bins = pyarrow.csv.read_csv(world / "out/plots/probabilities.csv").to_pylist()
    for label in ("target", "negative"):
        assert sum(row["share"] for row in bins if row["label"] == label) == pytest.approx(1)
    full = {(row["label"], row["p_yes"]): row["share"] for row in bins if row["share"]}
    # sigmoid(2) = .88, sigmoid(1) = .73; negatives at log-odds 1, 0, 1 and -1
    assert full == {
        ("target", 0.85): 0.5,
        ("target", 0.7): 0.5,
        ("negative", 0.7): 0.5,
        ("negative", 0.5): 0.25,
        ("negative", 0.25): 0.25,
    }


def test_the_reliability_diagram_agrees_with_the_metrics(world):
    result = evaluate_world(world)
    write_evaluation(result, world / "out")
    rows = pyarrow.csv.read_csv(world / "out/plots/reliability.csv").to_pylist()
    figures = result.metrics["uniform"]["calibration"]
    for scaling, key in (("none", "ece"), ("platt", "ece_calibrated")):
        bins = [row for row in rows if row["scaling"] == scaling]
        assert sum(row["candidates"] for row in bins) == figures["candidates"] == 6
        distances = [row["candidates"] * abs(row["p_yes"] - row["target_share"]) for row in bins]
        assert sum(distances) / 6 == pytest.approx(figures[key], abs=1e-5)


def test_a_failure_while_writing_leaves_the_earlier_files(world):
    result = evaluate_world(world)
    write_evaluation(result, world / "out")
    before = {path: path.read_bytes() for path in (world / "out").rglob("*") if path.is_file()}
    unwritable = replace(result, metrics=result.metrics | {"uniform": {"auc": object()}})
    with pytest.raises(TypeError):
        write_evaluation(unwritable, world / "out")
    after = {path: path.read_bytes() for path in (world / "out").rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("content", [None, "{", "[]", '{"test": {}}', '{"confidence": 0.9}'])
def test_unreadable_metrics_are_a_one_line_error(tmp_path, content):
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match="run the stage evaluate"):
        read_metrics(path)


def test_templates_of_plots_name_only_written_columns(world):
    result = evaluate_world(world)
    drawn = {
        "curves": (result.curves, {"scorer", "sampling"}),
        "histogram": (result.histogram, {"label", "sampling"}),
        "reliability": (result.reliability, {"scaling", "sampling"}),
    }
    for name, (table, needed) in drawn.items():
        template = (Path(__file__).parents[2] / f"plots/{name}.json").read_text()
        json.loads(template)
        fields = set(re.findall(r'"field": "(\w+)"', template)) - {"rev"}  # DVC's own
        assert needed <= fields <= set(table.column_names)


def test_plots_of_the_pipeline_name_metrics_of_the_list():
    pipeline = yaml.safe_load((Path(__file__).parents[2] / "dvc.yaml").read_text())
    drawn = {
        column
        for plot in pipeline["plots"]
        for entry in plot.values()
        for file, column in entry["y"].items()
        if file.endswith("metrics_at_k.csv")
    }
    assert drawn
    assert drawn <= {metric.name for metric in metrics_with_cutoff()}

"""The metric that docs/extending.md adds is in every output."""

import json
import re
from pathlib import Path

import pytest
from report_world import make_settings, write_report_world
from three_items import evaluate_world, write_world

from mllm_msr.evaluation import metrics
from mllm_msr.evaluation.metrics import Metric
from mllm_msr.evaluation.results import write_evaluation
from mllm_msr.evaluation.table import format_table
from mllm_msr.report.page import gather, render
from mllm_msr.study.dvc_internals import Finished
from mllm_msr.study.plans import plan_seeds
from mllm_msr.study.results import gather_results
from mllm_msr.study.writing import format_results

DOCUMENT = (Path(__file__).parents[2] / "docs/extending.md").read_text(encoding="utf-8")
SECTION = DOCUMENT.partition("\n## Metric\n")[2].partition("\n## ")[0]
PARAMS = {
    "preprocess": {"source": "pocket"},
    "filter_sequences": {"history": "recent", "target": "last", "test_negatives": 2},
}


@pytest.fixture(autouse=True)
def metric(monkeypatch: pytest.MonkeyPatch) -> Metric:
    """Add the metric of the example to the list, as the document says."""
    function, entry = (
        re.sub(r"^   ", "", block, flags=re.MULTILINE)
        for block in re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    )
    names = dict(vars(metrics))
    exec(function, names)
    added: Metric = eval(entry.strip(), names)
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, added))
    return added


def test_the_metric_is_in_the_files_and_tables_of_an_evaluation(tmp_path: Path) -> None:
    write_world(tmp_path)
    result = evaluate_world(tmp_path)
    write_evaluation(result, tmp_path / "out")
    written = json.loads((tmp_path / "out/metrics.json").read_text())["uniform"]["test"]
    # The target is first in one sequence, and tied for ranks 1 and 2 in the other.
    assert written["rbp@1"] == pytest.approx((1 + 0.5) / 2)
    assert written["rbp@2"] == pytest.approx((1 + (1 + 0.8) / 2) / 2)
    assert written["rbp@2_low"] <= written["rbp@2"] <= written["rbp@2_high"]
    curves = (tmp_path / "out/plots/metrics_at_k.csv").read_text().splitlines()
    assert curves[0].endswith('"hr","ndcg","mrr","rbp"')
    head = format_table(result.metrics, result.comparisons).splitlines()[0]
    assert head.split("|")[-2].strip() == "RBP@1"


def test_the_metric_is_in_the_table_of_a_study(tmp_path: Path) -> None:
    write_world(tmp_path)
    study = plan_seeds(7, 1)
    finished = Finished("seeds-7", "abc", evaluate_world(tmp_path).metrics)
    variants = {finished.name: study.variants[0]}
    results = gather_results(study, PARAMS, variants, {finished.name: finished})
    assert "| RBP@1 |" in format_results(results, PARAMS, "abc")


def test_the_metric_is_in_the_report(tmp_path: Path, metric: Metric) -> None:
    found = gather(write_report_world(tmp_path), make_settings())
    assert found["results"].metrics[-1] == "RBP@5"
    assert [curve.metric for curve in found["results"].protocols[0].curves][-1] == metric.label
    assert all("RBP@5" in each.metrics for each in found["distributions"].groupings)
    page = render(found)
    assert "RBP at k" in page
    assert metric.about in page

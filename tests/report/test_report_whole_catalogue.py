"""The report's section on the whole catalogue."""

import re

from report_world import add_whole_catalogue, make_settings

from mllm_msr.evaluation.results import read_metrics
from mllm_msr.report.inputs import Inputs
from mllm_msr.report.page import gather, render
from mllm_msr.report.whole_catalogue import describe_whole_catalogue

NAMES = [
    *("Item-kNN, the retriever", "Item-kNN, reranked by MLLM-MSR"),
    *("Item-kNN, fused with MLLM-MSR", "SASRec_F", "popularity"),
]


def page(inputs: Inputs) -> str:
    return render(gather(inputs, make_settings()))


def section(html: str) -> str:
    (found,) = re.findall(r'<section aria-labelledby="catalogue">.*?</section>', html, re.DOTALL)
    return found


def test_a_run_without_a_retriever_has_no_section(finished: Inputs) -> None:
    html = page(finished)
    assert "#catalogue" not in html
    assert "whole catalogue" not in html


def test_every_row_has_its_figures_with_intervals_and_properties(copy: Inputs) -> None:
    add_whole_catalogue(copy)
    metrics = read_metrics(copy.evaluated / "metrics.json")
    found = describe_whole_catalogue(metrics)
    assert found is not None
    assert [row.name for row in found.rows] == NAMES
    assert [row.lead for row in found.rows] == [False, True, True, False, False]
    rows = metrics["full_catalogue"]["rows"]
    assert found.metrics[0] == "NDCG@10"
    for row, figures in zip(found.rows, rows.values(), strict=True):
        shown = row.cells[0]
        wanted = [figures[f"ndcg@10{end}"] for end in ("", "_low", "_high")]
        assert [shown.value, shown.low, shown.high] == wanted
        assert row.properties[1] == f"{figures['popularity@10']:.1f}"
    html = section(page(copy))
    assert 'href="#catalogue"' in page(copy)
    assert all(html.count(f'<th scope="row">{name}</th>') for name in NAMES)
    weight = metrics["full_catalogue"]["weight"]
    assert f"{1 - weight:.2f} of the retriever's and {weight:.2f} of the model's" in html


def test_the_chart_and_its_table_have_each_number_of_candidates(copy: Inputs) -> None:
    add_whole_catalogue(copy)
    metrics = read_metrics(copy.evaluated / "metrics.json")
    found = describe_whole_catalogue(metrics)
    assert found is not None
    recall = metrics["full_catalogue"]["recall"]
    assert {size: cells[0].value for size, cells in found.sizes.items()} == {
        size: figures["recall"] for size, figures in recall.items()
    }
    assert "recall of" in found.chart
    assert "reranked" in found.chart


def test_a_difference_counts_as_shown_only_above_and_with_a_small_p(copy: Inputs) -> None:
    add_whole_catalogue(copy)
    metrics = read_metrics(copy.evaluated / "metrics.json")
    compared = metrics["full_catalogue"]["comparisons"]
    compared["reranked"]["retriever"] |= {"difference": 0.2, "p": 0.01}
    compared["reranked"]["sasrec_f"] |= {"difference": -0.2, "p": 0.01}
    compared["reranked"]["popularity"] |= {"difference": 0.2, "p": 0.2}
    found = describe_whole_catalogue(metrics)
    assert found is not None
    shown = {row.name: row.cells for row in found.tests}
    assert [shown[name][0][2] for name in (NAMES[0], *NAMES[3:])] == [True, False, False]
    assert shown[NAMES[1]][0] is None
    assert shown[NAMES[1]][1] is not None


def test_without_a_model_the_retriever_and_the_baselines_stand_alone(copy: Inputs) -> None:
    add_whole_catalogue(copy, scored=False)
    html = section(page(copy))
    assert "reranked by" not in html
    assert "fusion" not in html
    assert html.count("<table>") == 2
    assert "not above" not in html

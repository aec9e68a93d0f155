"""The study of the whole catalogue: its rows, notes, CSV and figure."""

import csv

import numpy as np
import pytest
from scipy import sparse

from mllm_msr.core.errors import DataError
from mllm_msr.evaluation.full_catalogue import (
    Catalogue,
    Lists,
    Reranked,
    measure_full_catalogue,
)
from mllm_msr.study.dvc_internals import Finished
from mllm_msr.study.full_ranking import (
    format_full_ranking,
    gather_retrievals,
    write_full_ranking,
)
from mllm_msr.study.plans import plan_full_ranking

ITEMS, SEQUENCES = 40, 30
PARAMS = {
    "preprocess": {"source": "pocket"},
    "baselines": {"models": ["item_knn", "sasrec"]},
    "feature_baselines": {"models": []},
}
STUDY = plan_full_ranking(PARAMS)


def draw(seed: int, number: int) -> Reranked:
    generator = np.random.default_rng(seed)
    order = np.argsort(generator.normal(size=(SEQUENCES, ITEMS)), axis=1)[:, :number]
    lists = Lists(
        sequences=np.arange(SEQUENCES),
        rows=np.repeat(np.arange(SEQUENCES), number),
        items=order.ravel(),
        scores=np.tile(-np.arange(number, dtype=float), SEQUENCES),
        labels=order.ravel() == 0,
        places=np.tile(np.arange(number) + 1, SEQUENCES),
    )
    return Reranked(lists, generator.normal(size=len(lists.rows)))


@pytest.fixture(scope="module")
def finished():
    """Return finished experiments by name; their retrievers propose 30, 30 and 20 items."""
    catalogue = Catalogue(np.arange(ITEMS), sparse.csr_array(np.eye(ITEMS)))
    found = {}
    for seed, (variant, number) in enumerate(zip(STUDY.variants, (30, 30, 20), strict=True)):
        retriever = variant.settings["retrieve.retriever"]
        others = {"popularity", "item_knn", "sasrec"} - {retriever}
        section = measure_full_catalogue(
            retriever,
            draw(seed, number),
            draw(seed + 10, number),
            {name: draw(20, number).lists for name in (*sorted(others), "bert4rec")},
            catalogue,
            samples=20,
            confidence=0.95,
            seed=0,
        )
        metrics = {"confidence": 0.95, "full_catalogue": section}
        found[f"full-ranking-{variant.name}"] = Finished(variant.name, f"rev-{seed}", metrics)
    return found


@pytest.fixture(scope="module")
def retrievals(finished):
    return gather_retrievals(dict(zip(finished, STUDY.variants, strict=True)), finished)


def test_the_retrievers_are_popularity_item_knn_and_one_network():
    retrievers = [each.settings["retrieve.retriever"] for each in STUDY.variants]
    assert retrievers == ["popularity", "item_knn", "sasrec"]
    features = PARAMS | {"feature_baselines": {"models": ["gru4rec_f"]}}
    last = plan_full_ranking(features).variants[-1]
    assert last.settings["retrieve.retriever"] == "gru4rec_f"
    none = PARAMS | {"baselines": {"models": []}}
    assert len(plan_full_ranking(none).variants) == 2


def test_the_number_of_candidates_is_that_of_the_settings_but_in_the_pocket_world():
    assert {each.settings["retrieve.candidates"] for each in STUDY.variants} == {30}
    other = PARAMS | {"preprocess": {"source": "tables"}}
    assert not any("retrieve.candidates" in v.settings for v in plan_full_ranking(other).variants)


def test_the_table_has_three_rows_of_each_retriever_and_each_other_baseline_once(retrievals):
    lines = format_full_ranking(STUDY, retrievals, PARAMS, "abc").splitlines()
    labels = [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:]
    assert labels == [
        *("popularity, the retriever", "popularity, reranked by MLLM-MSR"),
        *("popularity, fused with MLLM-MSR", "Item-kNN, the retriever"),
        *("Item-kNN, reranked by MLLM-MSR", "Item-kNN, fused with MLLM-MSR"),
        *("SASRec, the retriever", "SASRec, reranked by MLLM-MSR"),
        *("SASRec, fused with MLLM-MSR", "BERT4Rec"),
    ]
    assert " at 20 " in lines[10]
    weights = [line for line in lines if "chosen on validation sequences" in line]
    for line, name in zip(weights, ("popularity", "Item-kNN", "SASRec"), strict=True):
        assert f"standardized score of {name} and" in line
    assert "- pocket world: an embedded toy, no claim about real data" in lines


def test_all_files_are_written(retrievals, tmp_path):
    write_full_ranking(STUDY, retrievals, PARAMS, "abc", tmp_path / "study")
    names = {path.name for path in (tmp_path / "study").iterdir()}
    assert names == {"table.md", "table.csv", "figure.svg", "figure.png"}
    with (tmp_path / "study/table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    fused = rows[2]
    assert (fused["retriever"], fused["row"], fused["candidates"]) == ("popularity", "fusion", "30")
    section = retrievals[0].section
    assert float(fused["ndcg@10_low"]) == section["rows"]["fusion"]["ndcg@10_low"]
    assert float(fused["weight"]) == section["weight"]
    assert rows[-1]["recall"] == rows[-1]["retriever"] == ""


def test_an_experiment_without_figures_of_the_catalogue_is_named(finished):
    name = "full-ranking-popularity"
    without = finished | {name: finished[name]._replace(metrics={"confidence": 0.95})}
    with pytest.raises(DataError, match="full-ranking-popularity"):
        gather_retrievals(dict(zip(finished, STUDY.variants, strict=True)), without)

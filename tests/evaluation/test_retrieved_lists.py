"""Lists of the whole catalogue, read from tables of three items."""

import pytest
from three_items import POPULARITY, SPLITS, TARGETS, write_world

from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import FirstItems, Items, Retrieved, Scores
from mllm_msr.core.tables import write_rows
from mllm_msr.evaluation.retrieved_lists import read_lists

LISTS = {1: "cb", 2: "ba", 3: "ca"}  # the target of 3, b, is not retrieved


def candidate_rows(lists=LISTS):
    return [
        {"sequence": sequence, "split": SPLITS[sequence], "item": item}
        | {"rank": rank, "score": float(-rank)}
        for sequence, items in lists.items()
        for rank, item in enumerate(items, start=1)
    ]


def score_rows(lists=LISTS):
    names = ("sequence", "split", "item")
    return [
        {name: row[name] for name in names} | {"log_odds": float(row["rank"])}
        for row in candidate_rows(lists)
    ]


@pytest.fixture
def world(tmp_path):
    write_world(tmp_path)
    titles = ["red kettle", "red cup", None]
    rows = [
        {"item": item, "title": title, "description": None}
        for item, title in zip(POPULARITY, titles, strict=True)
    ]
    write_rows(Items, rows, tmp_path / "filtered/items.parquet")
    write_rows(Retrieved, candidate_rows(), tmp_path / "retrieve/candidates.parquet")
    others = [{"scorer": "sasrec", **row} for row in candidate_rows() if row["sequence"] > 1]
    write_rows(FirstItems, others, tmp_path / "retrieve/baselines.parquet")
    write_rows(Scores, score_rows(), tmp_path / "rerank/scores.parquet")
    return tmp_path


def read(world):
    return read_lists(world / "retrieve", world / "rerank/scores.parquet", world / "filtered")


def test_lists_are_read_by_split_with_their_targets(world):
    found = read(world)
    assert found.valid.lists.sequences.tolist() == [1]
    lists = found.test.lists
    assert lists.sequences.tolist() == [2, 3]
    assert lists.items.tolist() == [1, 0, 2, 0]
    assert lists.labels.tolist() == [False, True, False, False]
    assert found.test.scores.tolist() == [1, 2, 1, 2]
    assert list(found.baselines) == ["sasrec"]
    assert TARGETS[3] == "b"


def test_the_catalogue_has_known_interactions_and_title_vectors(world):
    catalogue = read(world).catalogue
    assert catalogue.interactions.tolist() == list(POPULARITY.values())
    cosines = (catalogue.titles @ catalogue.titles.T).toarray()
    assert cosines[0, 0] == pytest.approx(1)
    assert 0 < cosines[0, 1] < 1
    assert cosines[2].tolist() == [0, 0, 0]


def test_without_candidates_there_is_nothing(world):
    write_rows(Retrieved, [], world / "retrieve/candidates.parquet")
    assert read(world) is None


def test_without_scores_there_is_no_model(world):
    write_rows(Scores, [], world / "rerank/scores.parquet")
    assert read(world).test.scores is None


@pytest.mark.parametrize(
    ("lists", "scored", "said"),
    [
        ({1: "cb", 2: "ba"}, LISTS, "a list for each used sequence of valid and test"),
        (LISTS, {1: "cb", 2: "ba", 3: "c"}, "a score of the model for each candidate"),
        (LISTS, {**LISTS, 3: "cab"}, "a score of the model for each candidate"),
        ({**LISTS, 3: "cz"}, {**LISTS, 3: "cz"}, "items of the catalogue"),
    ],
)
def test_tables_of_other_runs_are_refused(world, lists, scored, said):
    write_rows(Retrieved, candidate_rows(lists), world / "retrieve/candidates.parquet")
    write_rows(Scores, score_rows(scored), world / "rerank/scores.parquet")
    with pytest.raises(DataError, match=said):
        read(world)

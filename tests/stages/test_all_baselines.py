"""All baselines through their stages: nothing planted is seen, and others measure the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pytest
import torch
import yaml
from questions import PLANTING, ask, plant, planted_users, write_questions
from ranx_figures import ranx_figures
from sklearn.metrics import roc_auc_score

from mllm_msr.core.schemas import Features, Histories, Items, Preferences, Summaries
from mllm_msr.core.tables import read_rows, write_rows
from mllm_msr.evaluation.results import read_metrics
from stages.baselines import baselines
from stages.evaluate import evaluate
from stages.feature_baselines import feature_baselines
from stages.text_baselines import text_baselines

IDS = ["recent_popularity", "item_knn", "markov", "fpmc", "gru4rec", "sasrec", "bert4rec"]
FEATURES = ["vbpr", "gru4rec_f", "sasrec_f", "gru4rec_image", "gru4rec_summary"]
TEXTS = ["word_overlap", "content_knn_summary"]
WORDS = ("red", "blue", "tin", "oak", "lamp", "rug", "vase")
CORNACS = {"fpmc", "gru4rec", "sasrec", "bert4rec", "vbpr"}
QUICK = {"width": 8, "epochs": 1}


class World(NamedTuple):
    """A log's tables in a folder."""

    folder: Path
    interactions: Path
    filtered: Path

    def score(self, model: str) -> None:
        """Run the stage of a baseline."""
        paths = {"interactions": self.interactions, "filtered": self.filtered}
        paths |= {"out": self.folder / "out", "params": self.folder / "params.yaml"}
        if model in FEATURES:
            feature_baselines(model, features=self.folder / "features.parquet", **paths)
        elif model in TEXTS:
            texts = {name: self.folder / f"{name}.parquet" for name in ("summaries", "preferences")}
            text_baselines(model, **texts, **paths)
        else:
            baselines(model, **paths)

    def candidates(self, model: str) -> list[tuple[str, str, bool, float]]:
        """Return user, item, label and score of each candidate of test, the target first."""
        return duckdb.sql(
            f"""
            SELECT user, item, label, log_odds
            FROM '{self.filtered}/test_candidates.parquet'
                 JOIN '{self.filtered}/sequences.parquet' USING (sequence)
                 JOIN '{self.folder}/out/{model}.parquet' USING (sequence, item)
            ORDER BY sequence, label DESC, item
            """
        ).fetchall()


def write(folder: Path, changed: list[str]) -> World:
    """Write the planted log's tables, features of its items, and settings of quick models."""
    world = World(folder, *write_questions(ask(plant(changed), **PLANTING), folder, negatives=8))
    draw = np.random.default_rng(5)
    rows = [
        {"item": f"i{item:02}"}
        | {kind: draw.normal(size=4).tolist() for kind in ("image", "summary")}
        for item in range(30)
    ]
    write_rows(Features, rows, folder / "features.parquet")
    write_texts(world)
    settings = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    settings["preprocess"]["source"] = "tables"
    settings["filter_sequences"]["min_user_interactions"] = 1
    settings["evaluate"]["bootstrap_samples"] = 10
    settings["baselines"]["models"], settings["feature_baselines"]["models"] = ["sasrec"], []
    settings["text_baselines"]["models"] = []
    for model in IDS[3:]:
        settings["baselines"][model] |= QUICK
    for model in FEATURES:
        settings["feature_baselines"][model] |= QUICK
    (folder / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return world


def write_texts(world: World) -> None:
    """Write titles and summaries, and preferences that list the words of the history."""
    texts = {f"i{item:02}": f"{WORDS[item % 7]} {WORDS[item % 5]}" for item in range(30)}
    rows = [{"item": item, "title": text, "description": None} for item, text in texts.items()]
    write_rows(Items, rows, world.filtered / "items.parquet")
    empty = {"text_summary": None, "image_description": None}
    rows = [{"item": item, "summary": text, **empty} for item, text in texts.items()]
    write_rows(Summaries, rows, world.folder / "summaries.parquet")
    read: dict[int, list[str]] = {}
    histories = read_rows(Histories, world.filtered / "histories.parquet", "sequence, position")
    for row in histories:
        read.setdefault(row["sequence"], []).append(texts[row["item"]])
    rows = [
        {"sequence": sequence, "block": 1, "items": len(words), "preference": " ".join(words)}
        for sequence, words in read.items()
    ]
    write_rows(Preferences, rows, world.folder / "preferences.parquet")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, World]:
    """Write the log as it is, and with other targets and later items of the users of test."""
    folder, changed = tmp_path_factory.mktemp("planted"), planted_users()
    return write(folder / "one", []), write(folder / "other", changed)


@pytest.fixture(autouse=True)
def _one_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MLLM_MSR_DEVICE", "cpu")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))  # whose state directory keeps trained baselines
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_target_and_an_item_after_it_are_planted(worlds: tuple[World, World]) -> None:
    log, other = plant(), plant(planted_users())
    assert len(planted_users()) == 6
    assert {row[1] for row in log} == {row[1] for row in other}  # so items have equal numbers
    for user in planted_users():
        mine, planted = ([item for who, item, _ in each if who == user] for each in (log, other))
        assert mine[:4] == planted[:4]
        assert not set(mine[4:]) & set(planted)
        for items, world in zip((mine, planted), worlds, strict=True):
            query = f"SELECT target FROM '{world.filtered}/sequences.parquet' WHERE user = '{user}'"
            assert duckdb.sql(query).fetchall() == [(items[4],)]


@pytest.mark.slow
@pytest.mark.parametrize("model", [*IDS, "content_knn", *FEATURES, *TEXTS])
def test_a_planted_target_and_what_comes_after_it_move_no_score(
    worlds: tuple[World, World], model: str
) -> None:
    if model in CORNACS:
        pytest.importorskip("cornac")
    scores = []
    for world in worlds:
        world.score(model)
        scores.append({row[:2]: row[3] for row in world.candidates(model)})
    one, other = scores
    both = one.keys() & other.keys()
    assert {user for user, _ in both} == set(planted_users())
    assert len(both) > 20
    assert all(one[key] == other[key] for key in both)


def test_scikit_learn_and_ranx_measure_a_baselines_scores_as_evaluate_does(
    worlds: tuple[World, World], tmp_path: Path
) -> None:
    pytest.importorskip("cornac")
    world, _ = worlds
    world.score("sasrec")
    out = world.folder / "out"
    evaluate(
        params=world.folder / "params.yaml",
        scores=out / "sasrec.parquet",
        filtered=world.filtered,
        baselines=out,
        out=tmp_path,
    )
    found = read_metrics(tmp_path / "metrics.json")["uniform"]["sasrec"]
    rows = world.candidates("sasrec")
    users = sorted({user for user, *_ in rows})
    asked = [[row for row in rows if row[0] == user] for user in users]
    aucs = [roc_auc_score([row[2] for row in each], [row[3] for row in each]) for each in asked]
    assert found["auc"] == pytest.approx(np.mean(aucs), abs=1e-6)  # as rounded
    scores = [[row[3] for row in each] for each in asked]
    assert all(len(set(each)) == 9 for each in scores)  # ranx would break ties by chance
    figures = ranx_figures(scores)
    for name in ("hr@5", "ndcg@5", "mrr@5"):
        assert found[name] == pytest.approx(figures[name].mean(), abs=1e-6), name

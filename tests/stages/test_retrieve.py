"""The stage retrieve as a person runs it, from tables to tables."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from questions import Log, ask, write_questions

from mllm_msr.baselines.discovery import find_baseline
from mllm_msr.core.schemas import (
    FirstItems,
    Histories,
    Items,
    Popularity,
    Preferences,
    Retrieved,
    Scores,
    Sequences,
    Summaries,
)
from mllm_msr.core.tables import read_rows, write_rows
from mllm_msr.recommendation import full_catalogue
from stages.baselines import baselines
from stages.text_baselines import text_baselines

ITEMS = 30
LOG: Log = [
    (f"u{user:02}", f"i{(user * (1 + user % 3) + 5 * step) % ITEMS:02}", 100 * step + user)
    for user in range(30)
    for step in range(6)
]

COUNTING = {
    "baselines": ["recent_popularity", "content_knn", "markov"],
    "text_baselines": ["word_overlap", "content_knn_summary"],
}

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_command: Callable[..., int]) -> Run:
    """Run the stage in this process on a log; gives the exit code."""
    monkeypatch.setenv("MLLM_MSR_DEVICE", "cpu")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))  # whose state directory keeps trained baselines

    def run_stage(
        log: Log = LOG,
        name: str = "world",
        split: str = "users",
        max_history: int = 9,
        models: Mapping[str, list[str]] = {"baselines": ["item_knn"]},
        **changes: Any,
    ) -> int:
        folder = tmp_path / name
        asked = ask(log, min_history=3, max_history=max_history, split=split)
        interactions, filtered = write_questions(asked, folder, negatives=8)
        write_texts(folder, filtered)
        settings = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
        settings["filter_sequences"]["min_user_interactions"] = 1
        for stage in ("baselines", "feature_baselines", "text_baselines"):
            settings[stage]["models"] = models.get(stage, [])
        settings["retrieve"] |= changes
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        options = {"interactions": interactions, "filtered": filtered, "out": folder / "out"}
        options |= {"features": folder / "none.parquet", "params": tmp_path / "params.yaml"}
        options |= {each: folder / f"{each}.parquet" for each in ("summaries", "preferences")}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        return run_command("retrieve", *words)

    return run_stage


def write_texts(folder: Path, filtered: Path) -> None:
    """Write titles and summaries of the items, and a preference of each sequence."""
    kinds = ("kettle", "lamp", "rug", "clock", "mug")
    titles = {f"i{number:02}": f"{kinds[number % 5]} {number % 7:02}" for number in range(ITEMS)}
    items = [{"item": item, "title": text, "description": None} for item, text in titles.items()]
    write_rows(Items, items, filtered / "items.parquet")
    empty = {"text_summary": None, "image_description": None}
    texts = [{"item": item, **empty, "summary": f"a {text}"} for item, text in titles.items()]
    write_rows(Summaries, texts, folder / "summaries.parquet")
    sequences = read_rows(Sequences, filtered / "sequences.parquet", "sequence")
    preferences = [
        {
            "sequence": row["sequence"],
            "block": 1,
            "items": 3,
            "preference": f"any {kinds[row['sequence'] % 5]}",
        }
        for row in sequences
    ]
    write_rows(Preferences, preferences, folder / "preferences.parquet")


def candidates(folder: Path) -> list[dict[str, Any]]:
    return list(read_rows(Retrieved, folder / "out/candidates.parquet", "sequence, rank"))


def test_without_a_retriever_both_tables_have_no_rows(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    assert capsys.readouterr().out.count("retrieve.retriever is null: wrote") == 2
    assert candidates(tmp_path / "world") == []
    assert list(read_rows(FirstItems, tmp_path / "world/out/baselines.parquet", "1")) == []


@pytest.mark.parametrize("retriever", ["popularity", "item_knn"])
def test_every_used_sequence_has_its_candidates_best_first(
    run: Run, tmp_path: Path, retriever: str
) -> None:
    assert run(retriever=retriever, candidates=7) == 0
    world = tmp_path / "world"
    sequences = read_rows(Sequences, world / "filtered/sequences.parquet", "sequence")
    used = {row["sequence"]: row["split"] for row in sequences if row["split"] != "train"}
    rows = candidates(world)
    assert {row["sequence"]: row["split"] for row in rows} == used
    for sequence in used:
        own = [row for row in rows if row["sequence"] == sequence]
        assert [row["rank"] for row in own] == list(range(1, 8))
        scores = [row["score"] for row in own]
        assert scores == sorted(scores, reverse=True)


def test_the_history_is_left_out_and_no_target_is_forced_in(run: Run, tmp_path: Path) -> None:
    assert run(retriever="popularity", candidates=ITEMS) == 0
    world = tmp_path / "world"
    taken: dict[int, set[str]] = {}
    for row in read_rows(Histories, world / "filtered/histories.parquet", "sequence"):
        taken.setdefault(row["sequence"], set()).add(row["item"])
    rows = candidates(world)
    assert not any(row["item"] in taken[row["sequence"]] for row in rows)
    counts = read_rows(Popularity, world / "filtered/popularity.parquet", "item")
    known = {row["item"]: row["interactions"] for row in counts}
    assert all(row["score"] == known[row["item"]] for row in rows)
    assert run(name="few", retriever="popularity", candidates=2) == 0
    sequences = read_rows(Sequences, world / "filtered/sequences.parquet", "sequence")
    targets = {row["sequence"]: row["target"] for row in sequences}
    found = {
        row["sequence"]
        for row in candidates(tmp_path / "few")
        if row["item"] == targets[row["sequence"]]
    }
    assert found < {row["sequence"] for row in rows}


def test_items_taken_before_the_target_are_left_out_even_where_no_baseline_knows_them(
    run: Run, tmp_path: Path
) -> None:
    assert run(retriever="popularity", candidates=ITEMS, split="time", max_history=3) == 0
    filtered = tmp_path / "world/filtered"
    sequences = list(read_rows(Sequences, filtered / "sequences.parquet", "sequence"))
    histories: dict[int, set[str]] = {}
    for row in read_rows(Histories, filtered / "histories.parquet", "sequence"):
        histories.setdefault(row["sequence"], set()).add(row["item"])
    order: dict[str, list[str]] = {}
    for user, item, _ in sorted(LOG, key=lambda row: row[2]):
        order.setdefault(user, []).append(item)
    found: dict[int, set[str]] = {}
    for row in candidates(tmp_path / "world"):
        found.setdefault(row["sequence"], set()).add(row["item"])
    beyond = 0
    for row in sequences:
        if row["split"] != "train":
            taken = set(order[row["user"]][: order[row["user"]].index(row["target"])])
            beyond += len(taken - histories[row["sequence"]])
            assert not found[row["sequence"]] & taken
    assert beyond > 0


@pytest.mark.parametrize("retriever", ["popularity", "item_knn"])
def test_held_out_interactions_move_no_candidate(run: Run, tmp_path: Path, retriever: str) -> None:
    assert run(retriever=retriever, candidates=9) == 0
    world = tmp_path / "world"
    sequences = read_rows(Sequences, world / "filtered/sequences.parquet", "sequence")
    held_out = {row["user"]: row["target"] for row in sequences if row["split"] != "train"}
    taken = {(user, item) for user, item, _ in LOG}
    swapped = {}
    for user, target in held_out.items():
        others = (f"i{number:02}" for number in range(ITEMS))
        swapped[user, target] = next(item for item in others if (user, item) not in taken)
    moved = [(user, swapped.get((user, item), item), time) for user, item, time in LOG]
    assert run(moved, "moved", retriever=retriever, candidates=9) == 0
    assert candidates(world) == candidates(tmp_path / "moved")


def firsts(folder: Path) -> dict[str, dict[tuple[int, str], float]]:
    """Return the score of each listed item of each test sequence, by scorer."""
    found: dict[str, dict[tuple[int, str], float]] = {}
    for row in read_rows(FirstItems, folder / "out/baselines.parquet", "scorer, sequence, rank"):
        assert row["split"] == "test"
        found.setdefault(row["scorer"], {})[row["sequence"], row["item"]] = row["score"]
    return found


def test_each_other_baseline_ranks_the_catalogue_for_test(run: Run, tmp_path: Path) -> None:
    models = COUNTING | {"baselines": [*COUNTING["baselines"], "item_knn"]}
    assert run(retriever="item_knn", candidates=5, models=models) == 0
    counting = [name for names in COUNTING.values() for name in names]
    found = firsts(tmp_path / "world")
    assert set(found) == {"popularity", "target_popularity", *counting}
    assert len({len(rows) for rows in found.values()}) == 1


@pytest.mark.slow
def test_a_baseline_that_counts_scores_all_items_as_it_scores_candidates(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_catalogue, "PAIRS_AT_ONCE", 2 * ITEMS + 1)  # two sequences at once
    assert run(retriever="popularity", candidates=ITEMS, models=COUNTING) == 0
    world, params = tmp_path / "world", tmp_path / "params.yaml"
    paths = [world / "interactions.parquet", world / "filtered"]
    texts = [world / "summaries.parquet", world / "preferences.parquet"]
    found = firsts(world)
    for name in [name for names in COUNTING.values() for name in names]:
        if find_baseline(name).stage == "baselines":
            baselines(name, *paths, world, params)
        else:
            text_baselines(name, *paths, *texts, world, params)
        compared = 0
        for row in read_rows(Scores, world / f"{name}.parquet", "sequence"):
            if (key := (row["sequence"], row["item"])) in found[name]:
                assert row["log_odds"] == pytest.approx(found[name][key], rel=1e-9), name
                compared += 1
        assert compared > len({sequence for sequence, _ in found[name]})


def test_target_popularity_counts_the_targets_of_training(run: Run, tmp_path: Path) -> None:
    assert run(retriever="item_knn", candidates=ITEMS) == 0
    world = tmp_path / "world"
    sequences = list(read_rows(Sequences, world / "filtered/sequences.parquet", "sequence"))
    targets = Counter(row["target"] for row in sequences if row["split"] == "train")
    scores = firsts(world)["target_popularity"]
    assert len(targets) > 1
    assert all(int(score) == targets[item] for (_, item), score in scores.items())


def test_content_knn_retrieves_cold_items(run: Run, tmp_path: Path) -> None:
    assert run(retriever="content_knn", candidates=5, split="cold_items") == 0
    world = tmp_path / "world"
    counts = read_rows(Popularity, world / "filtered/popularity.parquet", "item")
    withheld = {row["item"] for row in counts if row["withheld"]}
    sequences = read_rows(Sequences, world / "filtered/sequences.parquet", "sequence")
    targets = {(row["sequence"], row["target"]) for row in sequences}
    by_text = {(row["sequence"], row["item"]) for row in candidates(world) if row["score"] > 0}
    assert {item for _, item in by_text} & withheld
    assert {pair for pair in by_text & targets if pair[1] in withheld}
    known = {item for (_, item), score in firsts(world)["item_knn"].items() if score > 0}
    assert not known & withheld


def test_an_unknown_retriever_is_one_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(retriever="kettle_knn") == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "retrieve.retriever = 'kettle_knn'" in errors
    assert "a retriever is null or one of popularity, " in errors

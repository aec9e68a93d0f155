"""The stage retrieve as a person runs it, from tables to tables."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from questions import Log, ask, write_questions

from mllm_msr.core import command
from mllm_msr.core.schemas import FirstItems, Histories, Items, Popularity, Retrieved, Sequences
from mllm_msr.core.tables import read_rows, write_rows
from stages.retrieve import retrieve

ITEMS = 30
LOG: Log = [
    (f"u{user:02}", f"i{(user * (1 + user % 3) + 5 * step) % ITEMS:02}", 100 * step + user)
    for user in range(30)
    for step in range(6)
]

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the stage in this process on a log; gives the exit code."""
    monkeypatch.setenv("MLLM_MSR_DEVICE", "cpu")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))  # whose state directory keeps trained baselines

    def run_stage(log: Log = LOG, name: str = "world", **changes: Any) -> int:
        folder = tmp_path / name
        interactions, filtered = write_questions(ask(log, min_history=3), folder, negatives=8)
        rows = [
            {"item": f"i{number:02}", "title": f"kettle {number}", "description": None}
            for number in range(ITEMS)
        ]
        write_rows(Items, rows, filtered / "items.parquet")
        settings = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
        settings["filter_sequences"]["min_user_interactions"] = 1
        settings["baselines"]["models"] = ["markov", "item_knn"]
        settings["feature_baselines"]["models"] = []
        settings["retrieve"] |= changes
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        options = {"interactions": interactions, "filtered": filtered, "out": folder / "out"}
        options |= {"features": folder / "none.parquet", "params": tmp_path / "params.yaml"}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", ["retrieve", *words])
        with pytest.raises(SystemExit) as ending:
            command.run(retrieve)
        return int(ending.value.code or 0)

    return run_stage


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


def test_each_other_baseline_that_learns_ranks_the_catalogue_for_test(
    run: Run, tmp_path: Path
) -> None:
    assert run(retriever="item_knn", candidates=5) == 0
    rows = list(read_rows(FirstItems, tmp_path / "world/out/baselines.parquet", "1"))
    assert {(row["scorer"], row["split"]) for row in rows} == {("popularity", "test")}


def test_an_unknown_retriever_is_one_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(retriever="markov") == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "retrieve.retriever = 'markov'" in errors
    assert "a retriever is null or one of popularity, " in errors

"""Forgetting a user: which responses go, which stay, and what is listed."""

import contextlib
import sqlite3
from pathlib import Path

import duckdb
import pytest
from small_run import work_in
from typer.testing import CliRunner

from mllm_msr.cli.forget import app
from mllm_msr.core.errors import DataError
from mllm_msr.engines.response_store import Response, ResponseStore
from mllm_msr.recommendation.bundle import export, open_run
from mllm_msr.recommendation.forgetting import ErasableStore, find_responses


@pytest.fixture
def run(run_folder: Path, tmp_path: Path):
    """Work in the run with a store to forget from, a copy of the run's own."""
    path = tmp_path / "responses.sqlite"
    with work_in(run_folder, path):
        yield path


def query(text: str) -> list[tuple]:
    with duckdb.connect() as connection:
        return connection.execute(text).fetchall()


def first_test_user() -> tuple[str, int]:
    table = "data/filter_sequences/sequences.parquet"
    return query(f"SELECT user, sequence FROM '{table}' WHERE split = 'test' ORDER BY user")[0]


def texts(path: Path) -> dict[str, str]:
    with sqlite3.connect(path) as database:
        return dict(database.execute("SELECT key, text FROM answers"))


def call(*words: str) -> str:
    return CliRunner().invoke(app, words, catch_exceptions=False).stdout


def test_the_preferences_and_scores_of_a_user_go_and_summaries_stay(run: Path) -> None:
    user, sequence = first_test_user()
    before = texts(run)
    preferences = {
        text
        for (text,) in query(
            "SELECT preference FROM 'data/infer_preferences/preferences.parquet'"
            f" WHERE sequence = {sequence}"
        )
    }
    scores = query(f"SELECT log_odds FROM 'data/score/scores.parquet' WHERE sequence = {sequence}")
    planned = call("--user", user, "--dry-run")
    assert texts(run) == before
    found = find_responses(user, Path("data"), open_run(Path("data"), None, None))
    assert {before[key] for key in found.preferences} == preferences
    assert {repr(score) for (score,) in scores} <= {before[key] for key in found.scores}
    said = call("--user", user)
    assert said == planned.replace("would remove", "removed")
    assert texts(run).keys() == before.keys() - found.preferences - found.scores
    summaries = query("SELECT summary FROM 'data/summarize_items/summaries.parquet'")
    assert {text for (text,) in summaries} <= set(texts(run).values())
    assert f"removed 0 responses of user {user}" in call("--user", user)


@pytest.mark.usefixtures("run")
def test_a_user_of_a_bundle_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user, _ = first_test_user()
    bundle = tmp_path / "bundle"
    export(Path("data"), Path("params.yaml"), Path("prompts.yaml"), bundle, with_base=True)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with contextlib.chdir(tmp_path):
        said = call("--user", user, "--data", str(bundle), "--dry-run")
    assert f"would remove 0 responses of user {user}" not in said
    assert f"  {bundle}/preprocess/interactions.parquet: " in said


@pytest.mark.usefixtures("run")
def test_what_else_holds_the_user_is_listed() -> None:
    user, _ = first_test_user()
    said = call("--user", user, "--dry-run")
    for path in (
        "data/preprocess/interactions.parquet",
        "data/filter_sequences/sequences.parquet",
        "data/filter_sequences/histories.parquet",
        "data/infer_preferences/preferences.parquet",
        "data/pocket_world/oracle.parquet",
        "data/score/scores.parquet",
        "data/sft/adapter",
        "data/raw/pocket",
    ):
        assert f"  {path}: " in said
    assert "items.parquet" not in said
    assert "not looked for: responses under other settings" in said


@pytest.mark.usefixtures("run")
def test_an_unknown_user_is_refused_with_the_closest_one() -> None:
    user, _ = first_test_user()
    message = rf"--user: expected a user of .*; got '{user}x'; the closest one is '{user}'"
    with pytest.raises(DataError, match=message):
        call("--user", f"{user}x")


def test_no_removed_text_is_left_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    with ErasableStore(path) as store:
        store.add({"a": Response("a secret taste", True), "b": Response("another", True)})
        assert store.remove(["a", "none"]) == 1
    left = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"secret" not in left
    assert b"another" in left
    with ResponseStore(path) as store:
        assert store.find(["a", "b"]) == {"b": Response("another", True)}

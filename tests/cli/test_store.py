"""The store's commands: what it holds, and pruning by model or age."""

import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mllm_msr.cli.store import app
from mllm_msr.core.errors import DataError, ParamsError
from mllm_msr.engines.response_store import Response, ResponseStore

OLD = 1_700_000_000.0  # seconds since 1970, November 2023


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a store of two models; one response is old."""
    path = tmp_path / "responses.sqlite"
    monkeypatch.setenv("MLLM_MSR_RESPONSES", str(path))
    with ResponseStore(path) as store:
        store.add({"a": Response("yes", True), "b": Response("no", True)}, "small")
        store.add({"c": Response("a text", True)}, "large")
        store._database.execute("UPDATE answers SET added = ? WHERE key = 'a'", (OLD,))
    return path


def call(*words: str) -> str:
    return CliRunner().invoke(app, words, catch_exceptions=False).stdout


def left(path: Path) -> set[str]:
    with ResponseStore(path) as store:
        return set(store.find(["a", "b", "c"]))


def test_show_counts_the_responses_of_each_model(path: Path) -> None:
    first, *rest = call("show").splitlines()
    assert first.startswith(f"{path}: 3 responses, ")
    assert [line.split()[0] + " " + line.split()[-1] for line in rest] == ["1 large", "2 small"]


def test_the_size_is_that_of_the_file_and_its_log(path: Path) -> None:
    with ResponseStore(path) as another:  # the log stays while another process has the store open
        another.add({"d": Response("long " * 1_000_000, True)}, "large")
        assert path.with_name(path.name + "-wal").stat().st_size > 5e6
        said = call("show").splitlines()[0]
    size = float(said.split(", ")[-1].removesuffix(" MB"))
    assert size > 5.0


@pytest.mark.parametrize("kind", ["text", "of another program", "damaged"])
@pytest.mark.parametrize("words", [["show"], ["prune", "--model", "small"]])
def test_a_file_that_is_no_store_is_one_line(path: Path, kind: str, words: list[str]) -> None:
    if kind == "damaged":
        content = path.read_bytes()
        path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    else:
        path.unlink()
    if kind == "text":
        path.write_text("no database " * 100)
    if kind == "of another program":
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE answers (number INTEGER)")
        database.close()
    with pytest.raises(DataError, match="expected a response store; got ") as raised:
        call(*words)
    assert "\n" not in str(raised.value)


def test_nothing_asked_yet_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLM_MSR_RESPONSES", str(tmp_path / "none.sqlite"))
    assert "no responses yet" in call("show")
    assert not (tmp_path / "none.sqlite").exists()


def test_a_backup_has_all_responses(path: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup.sqlite"
    said = call("backup", str(backup))
    assert said.startswith(f"wrote {backup}: 3 responses, ")
    assert left(backup) == {"a", "b", "c"}
    with pytest.raises(DataError, match="expected a new file; got an existing one"):
        call("backup", str(backup))
    path.unlink()
    with pytest.raises(DataError, match="expected a response store; got no such file"):
        call("backup", str(tmp_path / "other.sqlite"))


@pytest.mark.parametrize("seconds", [1e300, -1e18, 3e11])
def test_a_damaged_date_is_said(path: Path, seconds: float) -> None:
    with ResponseStore(path) as store:
        store._database.execute("UPDATE answers SET added = ?", (seconds,))
    assert call("show").count("date damaged") == 2


@pytest.mark.parametrize("clock", [0.0, OLD, 1e11])
def test_a_clock_that_is_wrong_loses_no_response(
    path: Path, clock: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: clock)  # 1970, 2023, the year 5138
    with ResponseStore(path) as store:
        store.add({"d": Response("late", True)}, "large")
        assert store.find(["d"]) == {"d": Response("late", True)}
    assert "large" in call("show")
    monkeypatch.undo()
    monkeypatch.setenv("MLLM_MSR_RESPONSES", str(path))
    call("show")
    call("prune", "--older-than", "30")
    assert left(path) == {"b", "c"}


def test_prune_removes_the_responses_of_one_model(path: Path) -> None:
    assert call("prune", "--model", "small") == "removed 2 responses, 1 are left\n"
    assert left(path) == {"c"}


def test_prune_gives_the_room_back(path: Path) -> None:
    with ResponseStore(path) as store:
        store.add({f"d{n}": Response("long " * 1000, True) for n in range(200)}, "verbose")
    before = path.stat().st_size
    assert call("prune", "--model", "verbose") == "removed 200 responses, 3 are left\n"
    assert path.stat().st_size < before / 5


def test_prune_takes_no_age_in_the_future(path: Path) -> None:
    said = CliRunner().invoke(app, ["prune", "--older-than", "-1"])
    assert said.exit_code == 2
    assert left(path) == {"a", "b", "c"}


def test_prune_removes_what_is_older(path: Path) -> None:
    assert "removed 1 responses" in call("prune", "--older-than", "30")
    assert left(path) == {"b", "c"}


def test_prune_removes_what_is_of_one_model_and_older(path: Path) -> None:
    call("prune", "--model", "large", "--older-than", "30")
    assert left(path) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "--older-than; got neither"), (["--model", "x"], "large, small; got x")],
)
def test_prune_must_be_told_what(path: Path, words: list[str], said: str) -> None:
    with pytest.raises(ParamsError, match=said):
        call("prune", *words)
    assert left(path) == {"a", "b", "c"}


def test_a_store_of_before_is_completed_and_its_responses_found(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TABLE answers (key TEXT PRIMARY KEY, text TEXT NOT NULL,"
            " complete INTEGER NOT NULL) WITHOUT ROWID, STRICT"
        )
        database.execute("INSERT INTO answers VALUES ('a', 'yes', 1)")
    database.close()
    with ResponseStore(path) as store:
        assert store.find(["a"]) == {"a": Response("yes", True)}
        store.add({"b": Response("no", True)}, "small")
    assert "(model not noted)" in call("show")

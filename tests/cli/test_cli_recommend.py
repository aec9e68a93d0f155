"""``mllm-msr recommend``: its choices, its formats and its errors, on recommendations made here."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from typer.testing import CliRunner, Result

from mllm_msr.cli.recommend import app
from mllm_msr.core.errors import UserError
from mllm_msr.recommendation.recommender import (
    HistoryItem,
    Recommendation,
    Recommendations,
)

ITEMS = (
    Recommendation(1, "b", 'A "red", lamp', 0.75, 1.0986, "item_knn", 2),
    Recommendation(2, "c", None, 0.5, 0.0, "item_knn", 1),
)
HISTORY = (HistoryItem("a", "Blue tray"), HistoryItem("d", None))


class Fake:
    """Answers with the same items, and records what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __enter__(self) -> "Fake":
        return self

    def __exit__(self, *_: object) -> None:
        """Close nothing."""

    def recommend(self, **asked: Any) -> Recommendations:
        self.asked.append(asked)
        history = () if asked["history"] == [] else HISTORY
        return Recommendations(asked["user"], history, ("likes blue",), ITEMS)

    def recommend_all(self, **asked: Any) -> list[Recommendations]:
        self.asked.append(asked)
        return [Recommendations(user, HISTORY, ("likes blue",), ITEMS) for user in ("u1", "u2")]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    load = "mllm_msr.recommendation.recommender.Recommender.load"
    monkeypatch.setattr(load, lambda *_, **__: made)
    return made


def ask(*words: str) -> Result:
    result = CliRunner().invoke(app, words)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_table_has_rank_item_title_and_p_yes(fake: Fake) -> None:
    lines = ask("--user", "u1").stdout.splitlines()
    assert lines[0] == "user u1"
    assert lines[1].split() == ["rank", "item", "title", "p(yes)", "item_knn"]
    assert lines[2].split() == ["1", "b", "A", '"red",', "lamp", "0.750", "2"]
    assert lines[3].split() == ["2", "c", "0.500", "1"]
    expected = {"user": "u1", "history": None, "k": 10, "keep_seen": False, "new_items": ()}
    assert fake.asked == [expected]


@pytest.mark.usefixtures("fake")
def test_an_explanation_has_history_and_preferences() -> None:
    shown = ask("--user", "u1", "--explain").stdout
    assert "  a  Blue tray\n  d\n" in shown
    assert "  1. likes blue\n" in shown


def test_a_history_is_read_from_an_option_or_a_file(fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "history.txt"
    file.write_text("a\n\n d \n")
    ask("--history", "a, d", "--k", "3", "--keep-seen")
    ask("--history-file", str(file))
    assert [each["history"] for each in fake.asked] == [["a", "d"], ["a", "d"]]
    assert (fake.asked[0]["k"], fake.asked[0]["keep_seen"]) == (3, True)


@pytest.mark.usefixtures("fake")
def test_an_empty_history_is_said_to_be_popularity() -> None:
    assert "no history: the most popular items" in ask("--history", "").stderr


@pytest.mark.usefixtures("fake")
def test_json_lines_and_csv_have_the_same_rows(tmp_path: Path) -> None:
    lines = ask("--all-users", "--format", "jsonl", "--explain").stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["user"] for row in rows] == ["u1", "u1", "u2", "u2"]
    assert rows[0]["title"] == 'A "red", lamp'
    assert rows[0]["history"] == ["a", "d"]
    path = tmp_path / "recs.csv"
    ask("--all-users", "--out", str(path))
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["item"] for row in read] == [row["item"] for row in rows]
    assert read[0]["title"] == 'A "red", lamp'
    assert read[1]["title"] == ""


@pytest.mark.usefixtures("fake")
def test_parquet_has_types_and_nulls(tmp_path: Path) -> None:
    path = tmp_path / "recs.parquet"
    shown = ask("--all-users", "--out", str(path), "--explain").stdout
    assert f"wrote {path}: 4 recommendations" in shown
    table = pyarrow.parquet.read_table(path)
    assert table.num_rows == 4
    first = table.to_pylist()[0]
    assert (first["rank"], first["p_yes"], first["preferences"]) == (1, 0.75, ["likes blue"])
    assert table.to_pylist()[1]["title"] is None


def test_a_failure_leaves_no_file(fake: Fake, tmp_path: Path, monkeypatch) -> None:
    def break_off(**_: Any) -> Any:
        yield Recommendations("u1", HISTORY, (), ITEMS)
        raise KeyboardInterrupt

    monkeypatch.setattr(fake, "recommend_all", break_off)
    for name in ("recs.csv", "recs.jsonl", "recs.parquet"):
        CliRunner().invoke(app, ["--all-users", "--out", str(tmp_path / name)])
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--k", "3"), "expected one of --user"),
        (("--user", "u", "--history", "a"), "got 2"),
        (("--user", "u", "--format", "parquet"), "a file for Parquet"),
        (("--history-file", "no/such/file"), "a text file with an item on each line"),
    ],
)
def test_wrong_options_are_one_line(fake: Fake, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask(*words)
    assert not fake.asked


@pytest.mark.usefixtures("fake")
def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    binary, large = tmp_path / "binary", tmp_path / "large"
    binary.write_bytes(b"\xff\xfe\x00")
    with large.open("wb") as file:
        file.truncate(20_000_000)
    for path, message in ((binary, "a text file"), (large, "at most 10,000,000 bytes")):
        with pytest.raises(UserError, match=message):
            ask("--history-file", str(path))

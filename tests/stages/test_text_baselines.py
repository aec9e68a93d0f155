"""The stage text_baselines as a person runs it, from tables to tables."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from questions import ask, write_questions

from mllm_msr.core import schemas
from mllm_msr.core.tables import read_rows, write_rows

MODELS = ["word_overlap", "content_knn_summary"]
COLOURS = ("red", "blue", "green")
ITEMS = {f"i{number:02}": COLOURS[number % 3] for number in range(12)}


class World(NamedTuple):
    """Users who take items of one colour, and what the models wrote of them."""

    folder: Path
    interactions: Path
    filtered: Path


@pytest.fixture
def world(tmp_path: Path) -> World:
    log = [
        (f"u{user:02}", f"i{(user + 3 * step) % 12:02}", 100 * step + user)
        for user in range(12)
        for step in range(4)
    ]
    world = World(tmp_path, *write_questions(ask(log, min_history=3), tmp_path, negatives=6))
    rows = [{"item": item, "title": f"no {item}", "description": None} for item in ITEMS]
    write_rows(schemas.Items, rows, world.filtered / "items.parquet")
    write_summaries(world, ITEMS)
    sequences = read_rows(schemas.Sequences, world.filtered / "sequences.parquet", "sequence")
    likes = {row["sequence"]: COLOURS[int(row["user"][1:]) % 3] for row in sequences}
    write_preferences(world, {s: f"The user likes {colour} things." for s, colour in likes.items()})
    settings = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    settings["filter_sequences"]["min_user_interactions"] = 1
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return world


def write_summaries(world: World, colours: dict[str, str]) -> None:
    rows = [
        {"item": item, "text_summary": None, "image_description": None, "summary": colour}
        for item, colour in colours.items()
    ]
    write_rows(schemas.Summaries, rows, world.folder / "summaries.parquet")


def write_preferences(world: World, preferences: dict[int, str]) -> None:
    rows = [
        {"sequence": sequence, "block": 1, "items": 3, "preference": text}
        for sequence, text in preferences.items()
    ]
    write_rows(schemas.Preferences, rows, world.folder / "preferences.parquet")


@pytest.fixture
def run(world: World, run_command: Callable[..., int]) -> Callable[[str], int]:
    """Run the stage in this process; gives the exit code."""

    def run_stage(model: str) -> int:
        options = {"interactions": world.interactions, "filtered": world.filtered}
        options |= {n: world.folder / f"{n}.parquet" for n in ("summaries", "preferences")}
        options |= {"out": world.folder / "out", "params": world.folder / "params.yaml"}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        return run_command("text_baselines", model, *words)

    return run_stage


@pytest.mark.parametrize("model", MODELS)
def test_what_the_texts_say_decides_the_score_of_every_candidate(
    world: World, run: Callable[[str], int], model: str
) -> None:
    assert run(model) == 0
    rows = list(read_rows(schemas.Scores, world.folder / "out" / f"{model}.parquet", "sequence"))
    asked = {
        (row["sequence"], row["item"])
        for split in ("valid", "test")
        for row in read_rows(
            schemas.Candidates, world.filtered / f"{split}_candidates.parquet", "1"
        )
    }
    assert {(row["sequence"], row["item"]) for row in rows} == asked
    sequences = read_rows(schemas.Sequences, world.filtered / "sequences.parquet", "sequence")
    colours = {row["sequence"]: COLOURS[int(row["user"][1:]) % 3] for row in sequences}
    for row in rows:
        expected = float(ITEMS[row["item"]] == colours[row["sequence"]])
        assert row["log_odds"] == pytest.approx(expected)


@pytest.mark.parametrize("model", MODELS)
def test_a_run_without_summaries_is_one_line_that_says_what_to_leave_out(
    world: World, run: Callable[[str], int], model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_summaries(world, {})
    assert run(model) == 1
    error = capsys.readouterr().err
    assert f"take {model} out of text_baselines.models" in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (world.folder / "out").exists()


def test_a_run_without_preferences_leaves_word_overlap_nothing_to_read(
    world: World, run: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    write_preferences(world, {})
    assert run("word_overlap") == 1
    assert "take word_overlap out of text_baselines.models" in capsys.readouterr().err
    assert run("content_knn_summary") == 0


def test_summaries_without_a_word_are_an_error(
    world: World, run: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    write_summaries(world, dict.fromkeys(ITEMS, ""))
    assert run("content_knn_summary") == 1
    said = "expected an item whose summary has a word; got 12 without"
    assert said in capsys.readouterr().err


def test_an_unknown_baseline_is_an_error_that_names_those_there_are(
    run: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("content_knn") == 1
    assert "expected one of content_knn_summary, word_overlap" in capsys.readouterr().err

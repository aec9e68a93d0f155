"""The stage feature_baselines as a person runs it, from tables to tables."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from questions import Log, ask, write_questions

from mllm_msr.core.schemas import Candidates, Features, Scores, Sequences
from mllm_msr.core.tables import read_rows, write_rows

ITEMS = [f"i{number:02}" for number in range(30)]
NETWORKS = ["gru4rec_f", "sasrec_f", "gru4rec_image", "gru4rec_summary"]
SMALL = {"width": 8, "epochs": 2, "patience": 2}


@dataclass(frozen=True)
class World:
    """Tables and settings in a folder."""

    folder: Path
    interactions: Path
    filtered: Path

    @property
    def features(self) -> Path:
        return self.folder / "features.parquet"

    def scores(self, model: str) -> dict[tuple[str, str], float]:
        """Return the scores by user and item."""
        users = {
            row["sequence"]: row["user"]
            for row in read_rows(Sequences, self.filtered / "sequences.parquet", "1")
        }
        rows = read_rows(Scores, self.folder / "out" / f"{model}.parquet", "1")
        return {(users[row["sequence"]], row["item"]): row["log_odds"] for row in rows}


def make_log() -> Log:
    """Let thirty users take six items each, all items being taken."""
    generator = np.random.default_rng(4)
    return [
        (f"u{user:02}", ITEMS[(user + 5 * step) % 30], int(10 * step + generator.integers(10)))
        for user in range(30)
        for step in range(6)
    ]


def make_world(folder: Path, log: Log) -> World:
    world = World(folder, *write_questions(ask(log, min_history=3), folder, negatives=8))
    generator = np.random.default_rng(5)
    rows = [
        {
            "item": item,
            "image": None if item == ITEMS[3] else generator.normal(size=4).tolist(),
            "summary": generator.normal(size=6).tolist(),
        }
        for item in ITEMS
    ]
    write_rows(Features, rows, world.features)
    settings = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    settings["filter_sequences"]["min_user_interactions"] = 1
    for model in NETWORKS:
        settings["feature_baselines"][model] |= SMALL
    (folder / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return world


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_command: Callable[..., int]
) -> Callable[[World, str], int]:
    """Run the stage in this process; gives the exit code."""
    monkeypatch.setenv("MLLM_MSR_DEVICE", "cpu")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))  # whose state directory keeps trained baselines

    def run_stage(world: World, model: str) -> int:
        options = {"interactions": world.interactions, "filtered": world.filtered}
        options |= {"features": world.features, "out": world.folder / "out"}
        options |= {"params": world.folder / "params.yaml"}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        threads = torch.get_num_threads()
        code = run_command("feature_baselines", model, *words)
        torch.set_num_threads(threads)
        return code

    return run_stage


Run = Callable[[World, str], int]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "world", make_log())


@pytest.mark.slow
@pytest.mark.parametrize("model", [*NETWORKS, "vbpr"])
def test_every_candidate_of_valid_and_test_is_scored(
    world: World, run: Run, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if model == "vbpr":
        pytest.importorskip("cornac")
    assert run(world, model) == 0
    path = world.folder / "out" / f"{model}.parquet"
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {path}: 108 scores"
    scored = {(row["sequence"], row["item"]) for row in read_rows(Scores, path, "1")}
    asked = {
        (row["sequence"], row["item"])
        for split in ("valid", "test")
        for row in read_rows(Candidates, world.filtered / f"{split}_candidates.parquet", "1")
    }
    assert scored == asked
    assert len(set(world.scores(model).values())) > 90


@pytest.mark.slow
@pytest.mark.parametrize("model", NETWORKS)
def test_what_test_users_take_last_and_after_moves_no_score(
    run: Run, tmp_path: Path, model: str
) -> None:
    log = make_log()
    first = make_world(tmp_path / "first", log)
    rows = read_rows(Sequences, first.filtered / "sequences.parquet", "1")
    targets = {row["user"]: row["target"] for row in rows if row["split"] == "test"}
    changed: Log = [
        (user, other_item(log, user) if targets.get(user) == item else item, time)
        for user, item, time in log
    ]
    second = make_world(tmp_path / "second", changed)
    assert changed != log
    assert [run(first, model), run(second, model)] == [0, 0]
    one, other = first.scores(model), second.scores(model)
    both = one.keys() & other.keys()
    assert sum(user in targets for user, _ in both) > 20
    assert all(one[key] == other[key] for key in both)


def other_item(log: Log, user: str) -> str:
    """Return the last of the items that a user never takes."""
    return max(set(ITEMS) - {item for who, item, _ in log if who == user})


def test_settings_change_the_scores(world: World, run: Run) -> None:
    assert run(world, "gru4rec_f") == 0
    before = world.scores("gru4rec_f")
    path = world.folder / "params.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings["feature_baselines"]["gru4rec_f"]["features"] = ["image"]
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert run(world, "gru4rec_f") == 0
    after = world.scores("gru4rec_f")
    assert before.keys() == after.keys()
    assert before != after


def drop_features(world: World) -> str:
    world.features.unlink()
    return f"{world.features}: expected a table; got no such file"


def drop_images(world: World) -> str:
    rows: list[dict[str, Any]] = list(read_rows(Features, world.features, "item"))
    write_rows(Features, [row | {"image": None} for row in rows], world.features)
    return (
        "expected vectors of images; got none of 30 items; take gru4rec_image out of"
        " feature_baselines.models"
    )


@pytest.mark.parametrize("spoil", [drop_features, drop_images])
def test_an_error_is_one_line(
    world: World,
    run: Run,
    spoil: Callable[[World], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = spoil(world)
    assert run(world, "gru4rec_image") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert len(error.splitlines()) == 1
    assert not (world.folder / "out").exists()


def test_without_any_image_vbpr_says_that_it_has_nothing_to_read(
    world: World, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    drop_images(world)
    assert run(world, "vbpr") == 1
    assert "take vbpr out of feature_baselines.models" in capsys.readouterr().err


def test_without_any_image_the_summaries_alone_are_read(
    world: World, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    drop_images(world)
    assert run(world, "gru4rec_f") == 0
    assert caplog.messages == ["gru4rec_f: no item has vectors of images"]
    assert len(set(world.scores("gru4rec_f").values())) > 90


def test_an_unknown_baseline_is_an_error_that_names_those_there_are(
    world: World, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(world, "mgat") == 1
    named = ", ".join(sorted([*NETWORKS, "vbpr"]))
    assert f"expected one of {named}; got 'mgat'" in capsys.readouterr().err

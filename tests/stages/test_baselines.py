"""The stage baselines as a person runs it, from tables to tables."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from questions import Log, ask, write_questions

from mllm_msr.core.schemas import Candidates, Items, Scores
from mllm_msr.core.tables import read_rows, write_rows

COUNTING = ["recent_popularity", "item_knn", "markov", "content_knn"]
LEARNING = ["fpmc", "gru4rec", "sasrec", "bert4rec"]
SMALL = {"width": 8, "epochs": 1, "negatives": 4}

Run = Callable[..., int]


def make_log(times: bool = True) -> Log:
    """Let thirty users take six of thirty items each."""
    return [
        (f"u{user:02}", f"i{(user + 5 * step) % 30:02}", 100 * step + user if times else None)
        for user in range(30)
        for step in range(6)
    ]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_command: Callable[..., int]) -> Run:
    """Run the stage in this process on a log, with settings changed; gives the exit code."""
    monkeypatch.setenv("MLLM_MSR_DEVICE", "cpu")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))  # whose state directory keeps trained baselines

    def run_stage(model: str, log: Log, **changes: Any) -> int:
        interactions, filtered = write_questions(ask(log, min_history=3), tmp_path, negatives=8)
        titles = [f"kettle no{number} of set{number % 4}" for number in range(30)]
        rows = [
            {"item": f"i{number:02}", "title": title, "description": None}
            for number, title in enumerate(titles)
        ]
        write_rows(Items, rows, filtered / "items.parquet")
        settings = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
        settings["filter_sequences"]["min_user_interactions"] = 1
        settings["baselines"].get(model, {}).update(changes)
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        options = {"interactions": interactions, "filtered": filtered}
        options |= {"out": tmp_path / "out", "params": tmp_path / "params.yaml"}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        threads = torch.get_num_threads()
        code = run_command("baselines", model, *words)
        torch.set_num_threads(threads)
        return code

    return run_stage


@pytest.mark.slow
@pytest.mark.parametrize("model", [*COUNTING, *LEARNING])
def test_every_candidate_of_valid_and_test_has_one_score(
    run: Run, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if model in LEARNING:
        pytest.importorskip("cornac")
    assert run(model, make_log(), **(SMALL if model in LEARNING else {})) == 0
    scored = [
        (row["sequence"], row["item"])
        for row in read_rows(Scores, tmp_path / "out" / f"{model}.parquet", "sequence, item")
    ]
    asked = {
        (row["sequence"], row["item"])
        for split in ("valid", "test")
        for row in read_rows(Candidates, tmp_path / f"filtered/{split}_candidates.parquet", "1")
    }
    assert len(scored) == len(asked)
    assert set(scored) == asked
    assert f"{model}.parquet: {len(asked):,} scores" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "log", "said"),
    [
        (
            "item_nn",
            make_log(),
            "the baseline: expected one of bert4rec, content_knn, fpmc, gru4rec, item_",
        ),
        ("recent_popularity", make_log(times=False), "expected a timestamp for every interaction"),
    ],
)
def test_what_cannot_be_scored_is_one_line_and_no_table(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, log: Log, said: str
) -> None:
    assert run(model, log) == 1
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_ngram_that_ends_before_it_begins_is_refused(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("content_knn", make_log(), min_ngram=2, max_ngram=1) == 1
    assert "min_ngram is larger than max_ngram" in capsys.readouterr().err


def test_heads_that_do_not_share_the_width_are_refused(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sasrec", make_log(), width=16, heads=3) == 1
    assert "width is a multiple of heads; got 16 and 3" in capsys.readouterr().err

"""A finished run and a bundle of it, served: the answers are those of the run."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import httpx
import pytest
from fake_recommender import wait_for
from small_run import work_in
from typer.testing import CliRunner

from mllm_msr.recommendation.bundle import export

ROOT = Path(__file__).parents[2]
SECONDS_TO_LOAD = 300
Sequences = dict[int, tuple[list[str], dict[str, float]]]


@pytest.fixture(scope="module")
def sequences(run_folder: Path) -> Sequences:
    """Return the history and the log-odds by candidate of the scored test sequences."""
    data = run_folder / "data"
    found: Sequences = {}
    with duckdb.connect() as tables:
        histories = tables.execute(
            f"SELECT sequence, list(item ORDER BY position) FROM"
            f" '{data}/filter_sequences/histories.parquet' GROUP BY sequence"
        ).fetchall()
        scores = tables.execute(
            f"SELECT sequence, item, log_odds FROM '{data}/score/scores.parquet'"
            " WHERE split = 'test'"
        ).fetchall()
    by_sequence = dict(histories)
    for sequence, item, log_odds in scores:
        found.setdefault(sequence, (by_sequence[sequence], {}))[1][item] = log_odds
    assert found
    return found


@pytest.fixture(scope="module")
def url_of_bundle(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a bundle by the command, in a folder without settings and with an empty store."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with work_in(run_folder):
        paths = Path("data"), Path("params.yaml"), Path("prompts.yaml")
        export(*paths, elsewhere / "bundle", with_base=True)
    written = elsewhere / "written.txt"
    with written.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "mllm_msr.cli", "serve", "bundle", "--port", "0"],
            cwd=elsewhere,
            env=os.environ | store_in(elsewhere) | {"PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )

        def is_ready() -> bool:
            assert server.poll() is None, written.read_text()
            url = written.read_text().partition("/ (loading")[0]
            return url.startswith("http") and (
                httpx.get(f"{url}/health/ready", trust_env=False).status_code == 200
            )

        try:
            wait_for(is_ready, SECONDS_TO_LOAD)
            yield written.read_text().partition("/ (loading")[0]
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0, written.read_text()


def store_in(folder: Path) -> dict[str, str]:
    """Return the environment of a state directory and a response store of their own."""
    return {"DVC_ROOT": str(folder), "MLLM_MSR_RESPONSES": str(folder / "responses.sqlite")}


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(f"{url}{path}", json=body, trust_env=False, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.slow
def test_a_bundle_is_served_elsewhere_as_the_run_recommends(
    run_folder: Path, url_of_bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mllm_msr.cli.recommend import app

    for name, value in store_in(tmp_path).items():
        monkeypatch.setenv(name, value)
    users = httpx.get(f"{url_of_bundle}/users", trust_env=False).json()["users"][:2]
    for user in users:
        with work_in(run_folder):
            monkeypatch.setenv("MLLM_MSR_RESPONSES", str(tmp_path / "responses.sqlite"))
            words = ["--user", user, "--k", "5", "--explain", "--format", "jsonl"]
            told = CliRunner().invoke(app, words, catch_exceptions=False).stdout
        expected = [json.loads(line) for line in told.splitlines()]
        asked = {"user": user, "k": 5}
        answer = httpx.get(f"{url_of_bundle}/recommend", params=asked, trust_env=False, timeout=120)
        found = answer.json()
        assert [each["item"] for each in found["history"]] == expected[0]["history"]
        assert found["preferences"] == expected[0]["preferences"]
        assert len(found["items"]) == len(expected) == 5
        for item, row in zip(found["items"], expected, strict=True):
            # The last digits of a forward depend on the prompts that share it.
            for name in ("log_odds", "p_yes"):
                assert item.pop(name) == pytest.approx(row.pop(name), abs=1e-5)
            assert item == {name: row[name] for name in item if name != "image"} | {"image": True}


@pytest.mark.slow
@pytest.mark.parametrize("served", ["url_of_run", "url_of_bundle"])
def test_candidates_of_a_test_sequence_have_the_scores_of_the_stage(
    served: str, sequences: Sequences, request: pytest.FixtureRequest
) -> None:
    """The run has stored responses; the bundle computes all of them again."""
    url = request.getfixturevalue(served)
    for history, expected in sequences.values():
        body = {"history": history, "candidates": list(expected), "k": len(expected)}
        items = post(url, "/recommend", body)["items"]
        assert {each["item"]: each["log_odds"] for each in items} == pytest.approx(
            expected, abs=1e-5, rel=0
        )
        ranked = post(url, "/rerank", {"query": history, "documents": list(expected)})["results"]
        assert [list(expected)[each["index"]] for each in ranked] == [
            each["item"] for each in items
        ]
        assert [each["relevance_score"] for each in ranked] == [each["p_yes"] for each in items]


def test_the_longest_history_counts_by_its_last_items(
    url_of_run: str, sequences: Sequences
) -> None:
    history, expected = next(iter(sequences.values()))
    body = {"candidates": list(expected), "k": len(expected)}
    long = post(url_of_run, "/recommend", body | {"history": [*history * 1000][-1000:]})
    last = post(url_of_run, "/recommend", body | {"history": [*history * 1000][-9:]})
    assert long["history"] == last["history"]
    assert len(long["history"]) == 9  # filter_sequences.max_history
    assert long["items"] == last["items"]


def test_an_unknown_user_or_item_is_told_the_closest_one(url_of_run: str) -> None:
    with httpx.Client(base_url=url_of_run, trust_env=False, timeout=60) as client:
        item = client.get("/items", params={"limit": 1}).json()["items"][0]["item"]
        user = client.get("/users", params={"limit": 1}).json()["users"][0]
        unknown = client.post("/recommend", json={"history": [f"{item}x"]})
        assert unknown.status_code == 404
        assert f"the closest id is '{item}'" in unknown.json()["error"]
        unknown = client.get("/recommend", params={"user": f"{user}x"})
        assert unknown.status_code == 404
        assert f"the closest one is '{user}'" in unknown.json()["error"]
        assert client.get("/recommend", params={"user": user, "k": 1}).status_code == 200

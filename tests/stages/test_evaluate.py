"""The stage evaluate as a command."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from three_items import score_rows, write_world

from mllm_msr.core.command import run
from mllm_msr.core.schemas import FirstItems, Items, Retrieved, Scores
from mllm_msr.core.tables import arrow_schema, write_rows
from stages.evaluate import evaluate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Write the world's tables once."""
    folder = tmp_path_factory.mktemp("tables")
    write_world(folder)
    return folder


@pytest.fixture
def world(tables, tmp_path, monkeypatch):
    """Return a project folder with the tables and settings."""
    shutil.copytree(tables, tmp_path, dirs_exist_ok=True)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["evaluate"]["bootstrap_samples"] = 20
    params["baselines"]["models"] = []
    params["feature_baselines"]["models"] = []
    params["text_baselines"]["models"] = []
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """Return a function that runs the command and returns its exit code, output and errors."""

    def call(*options: str) -> tuple[int, str, str]:
        paths = (
            "--scores scores.parquet --filtered filtered --oracle oracle.parquet"
            " --baselines baselines --feature-baselines feature_baselines"
            " --text-baselines text_baselines --out out"
        )
        monkeypatch.setattr(sys, "argv", ["evaluate", *paths.split(), *options])
        with pytest.raises(SystemExit) as end:
            run(evaluate)
        return (end.value.code, *capsys.readouterr())

    return call


def change(world: Path, section: str, key: str, value: Any) -> None:
    path = world / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params[section][key] = value
    path.write_text(yaml.safe_dump(params))


def test_it_prints_the_table_and_the_written_files(world, command):
    code, output, _ = command()
    assert code == 0
    assert "| MLLM-MSR          | 0.875" in output
    assert "pocket world: an embedded toy" in output
    assert output.splitlines()[-1] == "wrote out/metrics.json: 1 samplings"
    assert json.loads((world / "out/metrics.json").read_text())["uniform"]["test"]["hr@5"] == 1.0


def test_the_oracle_is_read_for_the_pocket_world_only(world, command):
    change(world, "preprocess", "source", "tables")
    (world / "oracle.parquet").unlink()
    code, output, _ = command()
    assert code == 0
    assert "oracle" not in output
    assert "pocket" not in output


def test_a_misused_pocket_model_is_a_warning_of_the_table_and_the_metrics(world, command):
    change(world, "preprocess", "source", "tables")
    change(world, "recommender", "model", str(ROOT / "mllm_msr/pocket/model"))
    _, output, _ = command()
    assert output.startswith("not a result: the pocket model")
    (warning,) = json.loads((world / "out/metrics.json").read_text())["warnings"]
    assert "recommender.model" in warning


def test_the_baselines_of_the_settings_are_rows_of_the_table(world, command):
    change(world, "baselines", "models", ["item_knn", "sasrec"])
    code, output, _ = command()
    assert code == 0
    assert [line.split("|")[1].strip() for line in output.splitlines()[4:6]] == [
        "SASRec",
        "Item-kNN",
    ]
    assert "sasrec" in json.loads((world / "out/metrics.json").read_text())["uniform"]


def test_baselines_of_both_stages_are_rows_of_the_table(world, command):
    change(world, "baselines", "models", ["item_knn"])
    change(world, "feature_baselines", "models", ["sasrec_f"])
    (world / "feature_baselines").mkdir()
    shutil.copy(world / "baselines/sasrec.parquet", world / "feature_baselines/sasrec_f.parquet")
    code, _, _ = command()
    assert code == 0
    metrics = json.loads((world / "out/metrics.json").read_text())["uniform"]
    simple = ["target_popularity", "popularity", "chance"]
    assert list(metrics)[-6:] == ["sasrec_f", "item_knn", *simple, "calibration"]


def test_an_empty_table_of_scores_leaves_the_model_out(world, command):
    write_rows(Scores, [], world / "scores.parquet")
    change(world, "baselines", "models", ["item_knn"])
    code, output, _ = command()
    assert code == 0
    assert "MLLM-MSR" not in output
    assert "Item-kNN" in output
    assert "test" not in json.loads((world / "out/metrics.json").read_text())["uniform"]


def test_without_baselines_their_folder_is_not_needed(world, command):
    shutil.rmtree(world / "baselines")
    assert command()[0] == 0


def test_a_baseline_without_scores_is_one_line(world, command):
    change(world, "baselines", "models", ["sasrec", "markov"])
    code, _, errors = command()
    assert (code, errors.count("\n")) == (1, 1)
    assert errors.startswith("error: baselines/markov.parquet: expected a table; got no such file")


def test_retrieved_lists_are_a_section_and_a_table_of_their_own(world, command):
    rows = [
        {"sequence": sequence, "split": split, "item": item, "rank": rank, "score": float(-rank)}
        for sequence, split, items in ((1, "valid", "cb"), (2, "test", "ba"), (3, "test", "ca"))
        for rank, item in enumerate(items, start=1)
    ]
    scores = [
        {name: row[name] for name in ("sequence", "split", "item")} | {"log_odds": row["rank"]}
        for row in rows
    ]
    items = [{"item": item, "title": f"kettle {item}", "description": None} for item in "abc"]
    write_rows(Retrieved, rows, world / "retrieve/candidates.parquet")
    write_rows(FirstItems, [], world / "retrieve/baselines.parquet")
    write_rows(Scores, scores, world / "rerank.parquet")
    write_rows(Items, items, world / "filtered/items.parquet")
    change(world, "retrieve", "retriever", "item_knn")
    code, output, _ = command("--retrieved", "retrieve", "--reranked", "rerank.parquet")
    assert code == 0
    assert "| Item-kNN, reranked by MLLM-MSR |" in output
    section = json.loads((world / "out/metrics.json").read_text())["full_catalogue"]
    assert section["rows"]["retriever"]["ndcg@10"] == pytest.approx(0.5 / np.log2(3), abs=1e-6)
    assert section["rows"]["reranked"]["ndcg@10"] == 0.5  # one target first, one not retrieved
    assert section["recall"]["2"]["recall"] == 0.5


BROKEN = {
    "missing": score_rows()[1:],
    "extra": [*score_rows(), score_rows()[0] | {"item": "z"}],
    "nan": [score_rows()[0] | {"log_odds": float("nan")}, *score_rows()[1:]],
}


@pytest.mark.parametrize("rows", BROKEN.values(), ids=BROKEN)
def test_bad_scores_are_one_line_and_keep_the_earlier_files(world, command, rows):
    command()
    before = {path: path.read_bytes() for path in (world / "out").rglob("*.*") if path.is_file()}
    table = pyarrow.Table.from_pylist(rows, schema=arrow_schema(Scores))
    pyarrow.parquet.write_table(table, world / "scores.parquet")  # another program's
    code, output, errors = command()
    assert (code, output, errors.count("\n")) == (1, "", 1)
    assert errors.startswith("error: ")
    after = {path: path.read_bytes() for path in (world / "out").rglob("*.*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("ks", [[], [5, 3], [3, 3], [0]])
def test_contradictory_cutoffs_are_refused(world, command, ks):
    change(world, "evaluate", "ks", ks)
    code, _, errors = command()
    assert code == 1
    assert "evaluate.ks" in errors or "ks must ascend" in errors


def test_the_calibration_is_one_of_the_settings(world, command):
    change(world, "evaluate", "calibration", "none")
    assert command()[0] == 0
    found = json.loads((world / "out/metrics.json").read_text())["uniform"]["calibration"]
    assert "slope" not in found
    change(world, "evaluate", "calibration", "isotonic")
    code, _, errors = command()
    assert (code, errors.count("\n")) == (1, 1)
    assert "evaluate.calibration = 'isotonic'" in errors

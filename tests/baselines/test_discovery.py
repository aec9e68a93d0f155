"""Discovery finds each baseline's file and says what tables call it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_msr.baselines import models
from mllm_msr.baselines.discovery import Inputs, all_baselines, baselines_of, find_baseline
from mllm_msr.core.errors import ParamsError

FOLDER = Path("mllm_msr/baselines/models")
# Those that are shipped, by what a baseline knows, most first.
ROWS = {
    "sasrec_f": "SASRec_F",
    "gru4rec_f": "GRU4Rec_F",
    "gru4rec_summary": "GRU4Rec on summaries",
    "gru4rec_image": "GRU4Rec on images",
    "vbpr": "VBPR",
    "content_knn_summary": "content kNN on summaries",
    "word_overlap": "word overlap",
    "sasrec": "SASRec",
    "bert4rec": "BERT4Rec",
    "gru4rec": "GRU4Rec",
    "fpmc": "FPMC",
    "markov": "Markov chain",
    "item_knn": "Item-kNN",
    "content_knn": "content kNN",
    "recent_popularity": "recent popularity",
}


def test_the_rows_of_tables_have_this_order_and_these_labels() -> None:
    rows = [(each.name, each.label) for each in all_baselines() if each.name in ROWS]
    assert rows == list(ROWS.items())


def test_no_two_baselines_have_the_same_label_or_rank() -> None:
    for seen in ("label", "order"):
        values = [getattr(each, seen) for each in all_baselines()]
        assert len(set(values)) == len(values)


def test_every_file_of_the_folder_is_a_baseline() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert files == {each.name for each in all_baselines()}


def test_only_recent_popularity_does_not_know_the_user() -> None:
    for name in ROWS:
        assert find_baseline(name).personal == (name != "recent_popularity")


def test_a_baseline_is_found_by_its_name() -> None:
    found = find_baseline("item_knn")
    assert (found.name, found.stage) == ("item_knn", "baselines")
    assert found in baselines_of("baselines")
    assert found not in baselines_of("text_baselines")


def test_an_unknown_baseline_is_one_line() -> None:
    with pytest.raises(ParamsError, match=r"expected one of bert4rec, .*; got 'mgat'") as error:
        find_baseline("mgat")
    assert "\n" not in str(error.value)


def test_a_file_that_is_put_into_the_folder_is_a_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    markov = (FOLDER / "markov.py").read_text(encoding="utf-8")
    (tmp_path / "markov_again.py").write_text(markov.replace("120", "125"), encoding="utf-8")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mllm_msr.baselines.models.markov_again", raising=False)
    names = [each.name for each in all_baselines()]
    assert names.index("markov_again") == names.index("markov") + 1


def test_inputs_are_the_paths_that_a_stage_has() -> None:
    assert Inputs() == Inputs(items=None, features=None, summaries=None, preferences=None)


def test_finding_all_baselines_imports_none_of_the_heavy_packages() -> None:
    heavy = {"torch", "cornac", "sklearn", "transformers"}
    code = (
        "import sys; from mllm_msr.baselines.discovery import all_baselines; all_baselines();"
        f"print(sys.modules.keys() & {heavy})"
    )
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"


def test_no_baseline_imports_another() -> None:
    # Else an edit of one would change the scores of another that is not run again.
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "baselines.models" not in ast.unparse(node), path

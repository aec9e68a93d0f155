"""The baseline and the reader of docs/extending.md, executed in a copy of the project."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from example_project import PAGE, block_after, change_settings, replace, run
from questions import ask, plant, write_questions

from mllm_msr.core.schemas import Interactions, Items, Scores
from mllm_msr.core.tables import read_rows, write_rows


@pytest.mark.slow
def test_the_baseline_of_the_page_has_scores_and_a_row_of_the_table(project: Path) -> None:
    code = block_after("Write `mllm_msr/baselines/models/last_item.py`", "python")
    (project / "mllm_msr/baselines/models/last_item.py").write_text(code, encoding="utf-8")
    assert 20 <= len(code.splitlines()) <= 40
    interactions, filtered = write_questions(ask(plant(), min_history=3), project, negatives=8)
    rows = [{"item": f"i{item:02}", "title": "red lamp", "description": None} for item in range(30)]
    write_rows(Items, rows, filtered / "items.parquet")
    added = yaml.safe_load(block_after("Add its settings to its stage's section", "yaml"))
    others = {"preprocess": {"source": "tables"}, "evaluate": {"bootstrap_samples": 10}}
    others |= {"feature_baselines": {"models": []}, "text_baselines": {"models": []}}
    others |= {"filter_sequences": {"min_user_interactions": 1}}
    change_settings(project, added | others)
    tables = ("--filtered", str(filtered))
    for model in added["baselines"]["models"]:
        run(project, "stages.baselines", model, "--interactions", str(interactions), *tables)
    scores = list(read_rows(Scores, project / "data/baselines/last_item.parquet", "1"))
    assert {row["log_odds"] for row in scores} > {0.0}
    shutil.copytree(filtered, project / "data/filter_sequences")
    table = run(project, "mllm_msr.cli", "evaluate", "baselines")
    labels = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    rows_of = [label for label in labels if label in {"Item-kNN", "last item", "content kNN"}]
    assert rows_of[:3] == ["Item-kNN", "last item", "content kNN"]


def test_the_reader_of_the_page_makes_the_tables_of_preprocess(project: Path) -> None:
    sources = project / "mllm_msr/data/sources"
    code = block_after("Write `mllm_msr/data/sources/plays.py`", "python")
    (sources / "plays.py").write_text(code, encoding="utf-8")
    line = block_after("Name it in `mllm_msr/data/sources/__init__.py`", "python")
    with (sources / "__init__.py").open("a", encoding="utf-8") as file:
        file.write(f"\nfrom mllm_msr.data.sources import plays\n\n{line}")
    replace(project / "mllm_msr/core/params.py", 'source: Literal["', 'source: Literal["plays", "')
    raw = project / "data/raw/plays"
    raw.mkdir(parents=True)
    raw.joinpath("plays.csv").write_text("user,track\nann,b\nbob,a\nann,a\nann,b\n")
    change_settings(project, {"preprocess": {"source": "plays"}})
    said = run(project, "stages.preprocess")
    assert "3 interactions, 2 items, 0 images" in said
    read = read_rows(Interactions, project / "data/preprocess/interactions.parquet", "position")
    assert [(row["user"], row["item"]) for row in read] == [
        ("ann", "b"),
        ("bob", "a"),
        ("ann", "a"),
    ]


@pytest.mark.parametrize("title", ["Baseline", "Dataset", "Setting"])
def test_the_files_and_types_that_a_section_names_are_there(title: str) -> None:
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert section
    text = re.sub("```.*?```", "", section, flags=re.DOTALL)
    written = {"last_item.py", "plays.py", "test_source_plays.py"}  # by who follows the page
    for path in set(re.findall(r"`([\w/]+\.(?:py|md|yaml))`", text)):
        assert Path(path).is_file() or Path(path).name in written, path
    types = Path("mllm_msr/core/params.py").read_text(encoding="utf-8")
    for name in {"Count", "Share", "Tokens", "Seed", "RENAMED"} & set(re.findall(r"`(\w+)`", text)):
        assert re.search(rf"^{name} = ", types, re.MULTILINE)

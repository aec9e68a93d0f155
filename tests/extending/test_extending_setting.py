"""The setting of docs/extending.md, executed in a copy of the project."""

import re
from pathlib import Path

import pytest
import yaml
from example_project import block_after, call, change_settings, replace, run
from report_world import write_report_world

from mllm_msr.report.inputs import Inputs


@pytest.fixture
def extended(project: Path) -> Path:
    """Change the copy of the project as the page says, but for its params.yaml."""
    field = block_after("Add the field to the section's model", "python").strip()
    params = project / "mllm_msr/core/params.py"
    last = "    seed: Seed  # of the choice of stories\n"
    replace(params, last, f"    {field}\n{last}")
    lines = block_after("Read it. A stage gets its section", "python").splitlines()
    stories = project / "mllm_msr/report/stories.py"
    (line,) = re.findall(r"^ +shown = .*SHOWN.*\n", stories.read_text(), re.MULTILINE)
    replace(stories, line, "".join(f"        {each}\n" for each in lines))
    return project


def options(inputs: Inputs) -> list[str]:
    """Return the options of stages.report that name the inputs."""
    return [word for name, path in vars(inputs).items() for word in (f"--{name}", str(path))]


def count_candidates(page: str) -> list[int]:
    """Return the number of candidates of each story, those beside the target ranked first."""
    rankings = re.findall(r'<table class="ranking">.*?</table>', page, re.DOTALL)
    return [ranking.count("<tr") - 1 for ranking in rankings]  # less the head


@pytest.mark.slow
def test_the_setting_of_the_page_decides_what_the_report_shows(
    extended: Path, tmp_path: Path
) -> None:
    words = ["stages.report", *options(write_report_world(tmp_path / "run"))]
    report = extended / "data/report/report.html"
    added = yaml.safe_load(block_after("Add the key to the section", "yaml"))
    change_settings(extended, added)
    run(extended, *words)
    assert count_candidates(report.read_text()) == [3, 3, 3]  # as many as there are
    assert "<dt>story_candidates</dt><dd>10</dd>" in report.read_text()
    change_settings(extended, {"report": {"story_candidates": 1}})
    run(extended, *words)
    # The target is shown anyway: it is first in one sequence and not in the others.
    assert sorted(count_candidates(report.read_text())) == [1, 2, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "missing report.story_candidates"),
        ({"story_candidates": 0}, "invalid report.story_candidates = 0"),
        ({"story_candidate": 10}, "unknown report.story_candidate; missing"),
    ],
)
def test_a_value_that_the_setting_refuses_is_one_line(
    extended: Path, settings: dict[str, int], message: str
) -> None:
    change_settings(extended, {"report": settings})
    ended = call(extended, "stages.report")
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert message in ended.stderr

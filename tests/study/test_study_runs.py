"""Studies on a real DVC project of one tiny stage: run once, resumed, locked, failing with reasons.

The stage takes its figures from ``sft.seed``. A file named by ``HOLD`` makes it wait, which gives
a test time to stop the study.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from mllm_msr.core.errors import DataError, ParamsError
from mllm_msr.study.__main__ import app
from mllm_msr.study.experiments import check_sources, describe_other_source, find_experiments

ROOT = Path(__file__).parents[2]
SECONDS_TO_WAIT = 300  # a busy machine is slow
UNLUCKY = 13  # the seed with which the stage fails

STAGE = """
import json, os, pathlib, sys, time
import pyarrow, pyarrow.parquet, yaml

seed = yaml.safe_load(open("params.yaml"))["sft"]["seed"]
print("a line of the stage")
hold = pathlib.Path(os.environ["HOLD"])
while hold.exists():
    hold.with_suffix(".held").touch()
    time.sleep(0.05)
if seed == 13:
    sys.exit("an unlucky seed")
out = pathlib.Path("data/evaluate")
out.mkdir(parents=True, exist_ok=True)
sizes = {"uniform": 30, "targets": 20}
rows = [
    {"sampling": sampling, "sequence": i, "split": split, "scorer": scorer, "candidates": 5,
     "tied": 0, "above": (i * seed) % 4 if scorer == "MLLM-MSR" else 3}
    for sampling, size in sizes.items() for i in range(size) for split in ("test", "valid")
    for scorer in ("MLLM-MSR", "popularity")
]
# The split is part of the sequence's number: a table has each sequence once for a scorer.
for row in rows:
    row["sequence"] += 100 * (row["split"] == "valid")
schema = pyarrow.schema(
    [("sampling", "string"), ("sequence", "int64"), ("split", "string"), ("scorer", "string"),
     ("candidates", "int64"), ("above", "int64"), ("tied", "int64")]
)
pyarrow.parquet.write_table(
    pyarrow.Table.from_pylist(rows, schema=schema), out / "per_sequence.parquet"
)
metrics = {"confidence": 0.95}
for sampling, size in sizes.items():
    figures = {"sequences": size}
    for metric in ("auc", "hr@5", "ndcg@5", "mrr@5"):
        figures |= {metric: seed / 100, metric + "_low": 0.0, metric + "_high": 1.0}
    metrics[sampling] = dict.fromkeys(("valid", "test", "popularity", "chance"), figures)
(out / "metrics.json").write_text(json.dumps(metrics))
"""

PIPELINE = {
    "stages": {
        "evaluate": {
            "cmd": "python measure.py",
            "deps": ["measure.py"],
            "params": ["sft"],
            "outs": ["data/evaluate/per_sequence.parquet"],
            "metrics": [{"data/evaluate/metrics.json": {"cache": False}}],
        }
    }
}


def execute(folder: Path, *command: str) -> str:
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return ended.stdout


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the project and commit it; nothing has run."""
    folder = tmp_path_factory.mktemp("studies") / "project"
    folder.mkdir()
    (folder / "measure.py").write_text(STAGE, encoding="utf-8")
    for name, content in {
        "params.yaml": {
            "preprocess": {"source": "pocket"},
            "recommender": {"model": "mllm_msr/pocket/model"},
            "sft": {"seed": 50, "epochs": 1},
            "baselines": {"models": ["item_knn"]},
            "feature_baselines": {"models": []},
        },
        "prompts.yaml": {"recommender": {"question": "?"}},
        "dvc.yaml": PIPELINE,
    }.items():
        (folder / name).write_text(yaml.safe_dump(content), encoding="utf-8")
    (folder / ".gitignore").write_text(".mllm_msr/\n", encoding="utf-8")
    execute(folder, "git", "init", "--quiet", "--initial-branch=main")
    execute(folder, "git", "config", "user.email", "test@example.org")
    execute(folder, "git", "config", "user.name", "Test")
    execute(folder, sys.executable, "-m", "dvc", "init", "--quiet")
    execute(folder, sys.executable, "-m", "dvc", "config", "core.analytics", "false")
    execute(folder, "git", "add", "--all")
    execute(folder, "git", "commit", "--quiet", "--message=begin")
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Lend a copy of the project as the working directory, with a stage that does not wait."""
    folder = tmp_path / "project"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("HOLD", str(tmp_path / "hold"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield folder
    (tmp_path / "hold").unlink(missing_ok=True)


def study(*words: str) -> str:
    return CliRunner().invoke(app, words, catch_exceptions=False).stdout


def set_seed(folder: Path, seed: int) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    params["sft"]["seed"] = seed
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def state(folder: Path) -> tuple[str, str, str]:
    """Return the state that must not change: the branch, the changed files, and git's stash."""
    branch = execute(folder, "git", "symbolic-ref", "HEAD")
    changed = execute(folder, "git", "diff", "HEAD")
    return branch, changed, execute(folder, "git", "stash", "list")


def shown_experiments(folder: Path) -> list[str]:
    """Return the names of all experiments that DVC shows, finished or not."""
    shown = json.loads(execute(folder, sys.executable, "-m", "dvc", "exp", "show", "--json"))
    return [each["name"] for commit in shown for each in commit["experiments"] or ()]


def copies(folder: Path) -> list[str]:
    """Return the copies of the project that were not removed."""
    inside = (folder / ".dvc" / "tmp" / "exps" / "standalone").iterdir()
    return [path.name for path in inside if path.name.startswith("tmp")]


def wait_for(condition: Callable[[], Any]) -> None:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < SECONDS_TO_WAIT, "waited in vain"
        time.sleep(0.005)


@contextlib.contextmanager
def studying(*words: str) -> Iterator["subprocess.Popen[str]"]:
    """Begin a study in a process of its own; it has ended when the block ends."""
    command = [sys.executable, "-m", "mllm_msr.study", *words]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of DVC and its stages that work in the project."""
    found = []
    for process in psutil.process_iter(["cwd", "cmdline", "status"]):
        inside = (process.info["cwd"] or "").startswith(str(folder))
        if inside and process.pid != os.getpid() and process.info["status"] != "zombie":
            found.append(" ".join(process.info["cmdline"] or ()))
    return found


@pytest.mark.slow
def test_a_study_runs_its_experiments_once_and_leaves_the_workspace(project):
    set_seed(project, 51)  # not committed: it is part of the experiments all the same
    before = state(project)
    first = study("seeds", "--count", "2")
    lines = [line for line in first.splitlines() if line.startswith("[")]
    assert [line.split()[0] for line in lines] == ["[1/2]", "[2/2]"]
    assert all(line.endswith(" s") for line in lines)
    assert "| seed 51 " in first
    assert "| mean of 2" in first
    assert state(project) == before
    assert execute(project, "git", "status", "--porcelain").split() == [
        *("M", "params.yaml"),
        *("??", "data/"),
    ]
    assert [path.name for path in (project / "data").iterdir()] == ["studies"]
    assert {file.name for file in (project / "data/studies/seeds").iterdir()} == {
        "table.md",
        "table.csv",
        "figure.svg",
        "figure.png",
    }
    experiments = find_experiments()
    assert len(experiments) == 2
    assert sorted(each.metrics["uniform"]["test"]["auc"] for each in experiments.values()) == [
        0.51,
        0.52,
    ]

    logs = {file: file.stat().st_mtime_ns for file in (project / ".mllm_msr/studies").iterdir()}
    again = study("seeds", "--count", "2")
    assert again.count("already done") == 2
    assert find_experiments() == experiments
    assert {file: file.stat().st_mtime_ns for file in logs} == logs
    assert "2 of 3 done" in study("list").splitlines()[6]  # seeds

    one, two = sorted(experiments)
    compared = study("compare", one, two)
    assert f"| MLLM-MSR | {one} | {two} | difference" in " ".join(compared.split())
    assert "test sequences: uniform: 30; targets: 20" in compared
    assert "| AUC, targets " in compared

    set_seed(project, 52)  # other settings: no earlier experiment is taken for theirs
    planned = study("seeds", "--count", "2", "--dry-run").splitlines()
    assert [line.split("--set-param=")[1] for line in planned] == ["sft.seed=52", "sft.seed=53"]
    (project / "prompts.yaml").write_text("recommender: {question: '!'}\n", encoding="utf-8")
    assert study("seeds", "--count", "2", "--dry-run").splitlines() != planned
    names = {line.split("--name ")[1].split()[0] for line in planned}
    assert not names & experiments.keys()


@pytest.mark.slow
def test_a_stopped_study_ends_its_experiment_and_leaves_nothing_behind(project, tmp_path):
    hold = tmp_path / "hold"
    hold.touch()
    before = state(project)
    with studying("seeds", "--count", "1") as running:
        wait_for(hold.with_suffix(".held").exists)
        with pytest.raises(DataError, match=f"study seeds, process {running.pid}, still running"):
            study("seeds", "--count", "1")
        running.send_signal(signal.SIGINT)
        output, _ = running.communicate(timeout=SECONDS_TO_WAIT)
    assert running.returncode == 130
    assert output.endswith(": stopped\ninterrupted; run again to continue\n")
    assert processes_of(project) == []
    assert state(project) == before
    assert (shown_experiments(project), copies(project)) == ([], [])


@pytest.mark.slow
def test_a_commit_while_a_study_runs_is_an_error_and_no_table_is_written(project, tmp_path):
    hold = tmp_path / "hold"
    hold.touch()
    with studying("seeds", "--count", "1") as running:
        wait_for(hold.with_suffix(".held").exists)
        (project / "README.md").write_text("Other.\n", encoding="utf-8")
        execute(project, "git", "add", "README.md")
        execute(project, "git", "commit", "--quiet", "--message=other")
        hold.unlink()
        output, _ = running.communicate(timeout=SECONDS_TO_WAIT)
    assert running.returncode == 1
    assert output.splitlines()[-1].startswith("error: .: expected the workspace as it was when")
    assert not (project / "data" / "studies").exists()


@pytest.mark.slow
def test_the_copy_of_a_killed_experiment_is_removed_and_the_study_continues(project, tmp_path):
    hold = tmp_path / "hold"
    hold.touch()
    with studying("seeds", "--count", "1") as running:
        wait_for(hold.with_suffix(".held").exists)
        experiments = psutil.Process(running.pid).children()
        running.kill()
        for experiment in experiments:
            os.killpg(experiment.pid, signal.SIGKILL)
        wait_for(lambda: not processes_of(project))
    assert len(shown_experiments(project)) == len(copies(project)) == 1  # so DVC leaves it
    assert find_experiments() == {}
    hold.unlink()
    assert "[1/1] seeds-50-" in study("seeds", "--count", "1")
    assert list(find_experiments()) == shown_experiments(project)
    assert copies(project) == []


@pytest.mark.slow
def test_a_study_stopped_while_the_copy_is_made_restores_the_workspace(project):
    (project / "measure.py").write_text(STAGE + "# not committed\n", encoding="utf-8")
    before = state(project)
    with studying("seeds", "--count", "1") as running:
        wait_for((project / ".git" / "refs" / "stash").exists)  # the workspace is aside
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=SECONDS_TO_WAIT)
    assert running.returncode == 130
    assert state(project) == before
    assert processes_of(project) == []
    # The signal had to wait until the copy was made and the workspace back.
    log = next((project / ".mllm_msr" / "studies").glob("*.log"))
    assert "Reproducing experiment" in log.read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_experiment_that_outlives_a_killed_study_holds_the_lock_and_is_kept(project, tmp_path):
    hold = tmp_path / "hold"
    hold.touch()
    with studying("seeds", "--count", "1") as running:
        wait_for(hold.with_suffix(".held").exists)
        running.kill()
        running.wait()
        with pytest.raises(DataError, match="still running; wait until it ends"):
            study("seeds", "--count", "1")
        hold.unlink()
        wait_for(lambda: not processes_of(project))
    assert "[1/1]" in (said := study("seeds", "--count", "1"))
    assert "already done" in said


@pytest.mark.slow
def test_a_failed_experiment_is_shown_with_its_last_lines(project):
    set_seed(project, UNLUCKY)
    before = state(project)
    with studying("seeds", "--count", "2") as running:
        output, _ = running.communicate(timeout=SECONDS_TO_WAIT)
    assert running.returncode == 1
    assert "a line of the stage" in output
    assert "an unlucky seed" in output
    error = output.splitlines()[-1]
    assert error.startswith("error: ")
    assert "/.mllm_msr/studies/seeds-13-" in error
    assert "expected the experiment seeds-13-" in error
    assert error.endswith("then run the study again: it continues from here")
    assert state(project) == before
    assert not (project / "data" / "studies").exists()


@pytest.mark.usefixtures("project")
def test_the_list_shows_what_is_finished():
    lines = study("list").splitlines()
    assert [line.split()[0] for line in lines] == [
        *("table", "ablation", "block-size", "summary-length", "image-summary", "loss", "seeds"),
        *("cold-items", "folds", "learning-curve", "full-ranking"),
    ]
    assert "0 of 3 done" in lines[6]  # seeds


@pytest.mark.usefixtures("project")
def test_commands_are_printed_and_nothing_is_run():
    printed = study("seeds", "--count", "2", "--dry-run").splitlines()
    assert all(line.startswith("dvc exp run --temp --name seeds-5") for line in printed)
    assert [line.rpartition(" ")[2] for line in printed] == [
        "--set-param=sft.seed=50",
        "--set-param=sft.seed=51",
    ]
    assert find_experiments() == {}


@pytest.mark.usefixtures("project")
def test_a_setting_that_the_project_lacks_is_named_before_anything_runs():
    with pytest.raises(ParamsError, match=r"setting infer_preferences\.mode; got none"):
        study("table", "--dry-run")


@pytest.mark.usefixtures("project")
def test_a_revision_that_does_not_exist_is_named():
    with pytest.raises(DataError, match=r"nothing-like-it: expected params.yaml"):
        study("compare", "nothing-like-it", "HEAD")


def test_runs_of_different_sources_are_not_compared(project):
    params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    params["preprocess"]["source"] = "tables"
    (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    assert describe_other_source("HEAD").startswith("note: these are runs with preprocess.source:")
    execute(project, "git", "commit", "--quiet", "--all", "--message=own")
    with pytest.raises(DataError, match=r"got pocket at HEAD~1, tables at HEAD; commit your run"):
        study("compare", "HEAD~1", "HEAD")
    check_sources(("HEAD", "HEAD"))
    assert describe_other_source("HEAD") == ""


@pytest.mark.slow
def test_untracked_raw_files_must_have_been_read(project):
    params = {"preprocess": {"source": "tables"}, "sft": {"seed": 50, "epochs": 1}}
    (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    pipeline = {
        "stages": {
            "fetch_images": {
                "cmd": "cp data/raw/tables/file copied",
                "deps": ["data/raw/tables"],
                "outs": ["copied"],
            },
            **PIPELINE["stages"],
        }
    }
    (project / "dvc.yaml").write_text(yaml.safe_dump(pipeline), encoding="utf-8")
    raw = project / "data" / "raw" / "tables"
    raw.mkdir(parents=True)
    (raw / "file").write_text("a", encoding="utf-8")
    (raw.parent / ".gitignore").write_text("/tables\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"dvc add data/raw/tables and git add data/raw/tables\.dvc"
    ):
        study("seeds", "--count", "1")
    execute(project, sys.executable, "-m", "dvc", "repro", "--quiet", "fetch_images")
    assert "| seed 50 " in study("seeds", "--count", "1")

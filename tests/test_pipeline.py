"""Which stages DVC reruns after a change, on the real pipeline in a copy of the project.

The copy has a very small pocket world and a model with random weights, because quality does not
matter here. The pipeline runs once; each test makes one change, checks its effect, and reverts it.
"""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
COPIED = (
    *(".dvcignore", ".gitignore", "dvc.yaml", "mllm_msr", "params.yaml", "plots", "prompts.yaml"),
    "stages",
)
# Folders of data that exist before any stage runs.
GIVEN = ("data/baselines", "data/feature_baselines", "data/text_baselines", "data/studies")
SMALL: dict[str, dict[str, Any]] = {
    "pocket_world": {"users": 20, "items": 50},
    "filter_sequences": {
        "min_user_interactions": 3,
        "min_item_interactions": 1,
        "valid_share": 0.2,
        "test_share": 0.3,
        "valid_negatives": 3,
        "test_negatives": 3,
        "evaluation_sampling": ["uniform"],
    },
    "summarize_items": {"max_new_tokens": 4},
    "infer_preferences": {"max_new_tokens": 4},
    "sft": {"epochs": 1, "batch_size": 12},
    "baselines": {"models": ["item_knn", "markov"]},  # no extra package
    "feature_baselines": {"models": ["gru4rec_f"]},
    "text_baselines": {"models": ["word_overlap"]},
    "evaluate": {"bootstrap_samples": 20, "ks": [1, 3]},
}
BASELINES = [
    f"{stage}@{model}"
    for stage in ("baselines", "feature_baselines", "text_baselines")
    for model in SMALL[stage]["models"]
]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
STAGES = [*(stage for stage in PIPELINE if "matrix" not in PIPELINE[stage]), *BASELINES]
SECONDS_TO_WAIT = 120

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Run:
    """The result of a DVC command.

    Attributes:
        output: The output of the command and its stages.
        stages: The stages that were run, in order.
        restored: The stages that were restored from the run cache.
    """

    output: str
    stages: list[str]
    restored: list[str]

    @property
    def asked(self) -> list[int]:
        """Number of model calls of each stage."""
        return [
            int(number.replace(",", "")) for number in re.findall(r"asked ([\d,]+)", self.output)
        ]


@dataclass(frozen=True)
class Project:
    """A copy of the project with its own git and DVC repositories."""

    folder: Path

    def dvc(self, *arguments: str, fails: bool = False) -> Run:
        """Run a DVC command in the copy."""
        ended = subprocess.run(
            dvc_command(*arguments),
            cwd=self.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert (ended.returncode != 0) == fails, ended.stdout
        begun = re.findall(r"^Running stage '([\w@]+)'", ended.stdout, re.MULTILINE)
        restored = re.findall(
            r"^Stage '([\w@]+)' is cached - skipping run", ended.stdout, re.MULTILINE
        )
        return Run(ended.stdout, begun, restored)

    def git(self, *arguments: str) -> str:
        command = ["git", *arguments]
        ended = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=True)
        return ended.stdout

    def read_json(self, *command: str) -> Any:
        """Run a DVC command with JSON output."""
        ended = subprocess.run(
            dvc_command(*command, "--json"),
            cwd=self.folder,
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(ended.stdout)

    def changed(self) -> set[str]:
        """Return the stages whose dependencies have changed."""
        return set(self.read_json("status")) & set(STAGES)

    def set(self, section: str, **keys: Any) -> None:
        """Change settings of a section of ``params.yaml``."""
        change_yaml(self.folder / "params.yaml", {section: keys})

    def say(self, section: str, **prompts: str) -> None:
        """Change prompts of a section of ``prompts.yaml``."""
        change_yaml(self.folder / "prompts.yaml", {section: prompts})

    def comment(self, module: str) -> None:
        """Append a comment to a source file."""
        with (self.folder / module).open("a", encoding="utf-8") as file:
            file.write("# A comment.\n")

    def answers(self) -> int:
        """Count what the response store holds."""
        path = self.folder / ".mllm_msr" / "responses.sqlite"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as store:
            return int(store.execute("SELECT count(*) FROM answers").fetchone()[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Copy the project, run the whole pipeline once, and commit the result."""
    from families import build_family

    project = Project(tmp_path_factory.mktemp("pipeline"))
    unwanted = shutil.ignore_patterns("__pycache__", "model")  # the model's folder, not its module
    for name in GIVEN:
        (project.folder / name).mkdir(parents=True)
        shutil.copy(ROOT / name / ".gitignore", project.folder / name)
    for name in COPIED:
        source, target = ROOT / name, project.folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=unwanted)
        else:
            shutil.copy(source, target)
    build_family("llava", project.folder / "mllm_msr" / "pocket" / "model")
    change_yaml(project.folder / "params.yaml", SMALL)
    project.git("init", "--quiet", "--initial-branch=main")
    project.git("config", "user.email", "test@example.org")
    project.git("config", "user.name", "Test")
    project.dvc("init", "--quiet")
    commit(project)
    assert sorted(project.dvc("repro").stages) == sorted(STAGES)
    commit(project)
    return project


@pytest.fixture
def project(finished: Project) -> Iterator[Project]:
    """Return the finished project, and reset it to its commit after the test."""
    yield finished
    finished.git("reset", "--quiet", "--hard")
    finished.dvc("checkout", "--quiet", "--force")
    for study in (finished.folder / "data/studies").glob("*/"):  # not committed
        shutil.rmtree(study)


# -- reruns ----------------------------------------------------------------------------------------


def test_nothing_runs_when_nothing_changed(project: Project) -> None:
    again = project.dvc("repro")
    assert (again.stages, again.restored) == ([], [])
    assert project.git("status", "--porcelain") == ""


def test_evaluation_settings_rerun_only_evaluate_and_report(project: Project) -> None:
    project.set("evaluate", bootstrap_samples=30, ks=[1, 2])
    assert project.dvc("repro").stages == ["evaluate", "report"]


def test_more_test_negatives_rerun_no_training_or_inference(project: Project) -> None:
    project.set("filter_sequences", test_negatives=5)
    again = project.dvc("repro")
    assert again.stages[0] == "filter_sequences"
    assert set(again.stages[1:]) == {*BASELINES, "score", "retrieve", "evaluate", "report"}
    assert again.asked == [2 * count_test_sequences(project)]  # only the two new candidates of each


def test_another_sampling_scores_more_and_reruns_no_training(project: Project) -> None:
    project.set("filter_sequences", evaluation_sampling=["uniform", "targets"])
    again = project.dvc("repro")
    assert again.stages[0] == "filter_sequences"
    assert set(again.stages[1:]) == {*BASELINES, "score", "retrieve", "evaluate", "report"}


def test_more_training_negatives_rerun_the_training(project: Project) -> None:
    project.set("filter_sequences", train_negatives=2)
    assert project.dvc("repro", "filter_sequences").stages == ["filter_sequences"]
    assert project.changed() == {"sft", "report"}  # and what follows from another adapter


def test_a_block_size_reruns_from_infer_preferences(project: Project) -> None:
    tried = project.dvc("exp", "run", "--set-param", "infer_preferences.block_size=2")
    assert set(tried.stages) == after_preferences()


def test_a_preference_prompt_reruns_from_infer_preferences(project: Project) -> None:
    project.say("infer_preferences", first="{items}\nWhat does the user like?")
    assert project.changed() == {"infer_preferences"}
    readers = {"sft", "score", "retrieve", "rerank", "text_baselines", "evaluate", "report"}
    assert below("infer_preferences") == readers


def test_the_adapter_rank_reruns_from_sft(project: Project) -> None:
    lora = yaml.safe_load((project.folder / "params.yaml").read_text(encoding="utf-8"))["sft"]
    project.set("sft", lora=lora["lora"] | {"rank": 2})
    assert project.changed() == {"sft", "report"}  # which shows every setting
    assert below("sft") == {"score", "rerank", "evaluate", "report"}


def test_a_summary_prompt_reruns_from_summarize_items(project: Project) -> None:
    project.say("summarize_items", text="{text}\nWhat is it?")
    assert project.changed() == {"summarize_items"}
    readers = {"encode_items", "feature_baselines", "text_baselines", "retrieve", "rerank"}
    readers |= {"infer_preferences", "sft", "score", "evaluate", "report"}
    assert below("summarize_items") == readers


@pytest.mark.parametrize(
    ("module", "stages"),
    [
        ("mllm_msr/evaluation/metrics.py", {"evaluate", "report"}),
        ("mllm_msr/ranking.py", {"feature_baselines@gru4rec_f", "retrieve", "evaluate", "report"}),
        ("mllm_msr/method/scoring.py", {"score", "rerank"}),
        ("mllm_msr/method/preferences.py", {"infer_preferences"}),
        ("stages/sft.py", {"sft"}),
        ("mllm_msr/report/charts.py", {"report"}),
        ("mllm_msr/report/templates/style.css", {"report"}),
    ],
)
def test_code_reruns_only_the_stages_that_import_it(
    project: Project, module: str, stages: set[str]
) -> None:
    project.comment(module)
    assert project.changed() == stages


def test_evaluation_code_reruns_only_evaluate_and_report(project: Project) -> None:
    project.comment("mllm_msr/evaluation/evaluation.py")
    assert project.dvc("repro").stages == ["evaluate", "report"]


def test_a_setting_of_one_baseline_reruns_no_other(project: Project) -> None:
    project.set("baselines", markov={"smoothing": 3.0})
    assert project.dvc("repro").stages == ["baselines@markov", "retrieve", "evaluate", "report"]


def test_a_run_without_baselines_has_no_rows_of_them(project: Project) -> None:
    project.set("baselines", models=[])
    project.set("feature_baselines", models=[])
    project.set("text_baselines", models=[])
    assert project.dvc("repro").stages == ["retrieve", "evaluate", "report"]
    shown = json.loads((project.folder / "data/evaluate/metrics.json").read_text())
    non_personal = {"target_popularity", "popularity", "chance"}
    assert shown["uniform"].keys() == {"valid", "test", "calibration", "oracle"} | non_personal


def test_an_earlier_setting_is_restored_from_the_run_cache(project: Project) -> None:
    before = read_data(project)
    project.set("infer_preferences", block_size=2)
    project.dvc("repro")
    assert read_data(project) != before
    project.git("checkout", "params.yaml")
    back = project.dvc("repro")
    assert back.stages == []
    assert set(back.restored) == after_preferences()
    assert read_data(project) == before


# -- experiments -----------------------------------------------------------------------------------


def test_an_experiment_shows_its_settings_and_metrics(project: Project) -> None:
    project.dvc("exp", "run", "--name", "wide", "--set-param", "evaluate.confidence=0.8")
    shown = project.dvc("exp", "show", "--csv").output
    rows = {row["Experiment"]: row for row in csv.DictReader(io.StringIO(shown))}
    assert rows["wide"]["evaluate.confidence"] == "0.8"
    assert float(rows["wide"]["uniform.test.auc"]) == float(rows[""]["uniform.test.auc"])
    settings = project.read_json("params", "diff")["params.yaml"]
    assert settings == {"evaluate.confidence": {"old": 0.95, "new": 0.8, "diff": 0.8 - 0.95}}
    metrics = project.read_json("metrics", "diff")["data/evaluate/metrics.json"]
    assert metrics["confidence"]["new"] == 0.8
    assert "uniform.test.auc" not in metrics  # another interval is no other figure


def test_the_plots_of_two_revisions_are_drawn_together(project: Project, tmp_path: Path) -> None:
    project.set("evaluate", ks=[1, 2])
    project.dvc("repro")
    project.dvc("plots", "diff", "HEAD", "--out", str(tmp_path))
    drawn = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "HEAD" in drawn
    assert "workspace" in drawn


def test_the_plots_show_metrics_probabilities_and_training(project: Project) -> None:
    plots = project.read_json("plots", "show")
    declared = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["plots"]
    assert set(plots["data"]) == {name for plot in declared for name in plot}
    assert not plots.get("errors")
    for drawings in plots["data"].values():
        assert "<DVC_METRIC" not in json.dumps(drawings[0]["content"])
        assert drawings[0]["content"]["data"]["values"]


# -- kills and failures ----------------------------------------------------------------------------


def test_a_killed_stage_continues_with_the_stored_responses(project: Project) -> None:
    project.set("infer_preferences", block_size=1, max_new_tokens=5)
    before = project.answers()
    killed = kill_when(project, "infer_preferences", lambda: project.answers() > before)
    kept = project.answers() - before
    assert "asked" not in killed
    again = project.dvc("repro", "infer_preferences")
    assert kept > 0
    assert again.asked == [project.answers() - before - kept]
    assert again.asked[0] > 0


def test_an_experiment_in_a_copy_uses_the_same_response_store(project: Project) -> None:
    project.comment("mllm_msr/method/summaries.py")
    before = project.answers()
    tried = project.dvc("exp", "run", "--temp")
    assert tried.stages == ["summarize_items"]
    assert tried.asked == [0]
    assert project.answers() == before


def test_a_study_runs_and_is_in_the_report(project: Project) -> None:
    command = [sys.executable, "-m", "mllm_msr.study", "image-summary"]
    made = subprocess.run(
        command, cwd=project.folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert re.search(r"GRU4Rec on images +\| [\d.]+ \[", made.stdout)
    table = (project.folder / "data/studies/image-summary/table.md").read_text(encoding="utf-8")
    assert table in made.stdout
    assert project.dvc("repro").stages == ["report"]
    page = (project.folder / "data/report/report.html").read_text(encoding="utf-8")
    assert "GRU4Rec on summaries" in page


def test_a_failing_stage_prints_one_error_line(project: Project) -> None:
    project.set("filter_sequences", min_item_interactions=1000)
    failed = project.dvc("repro", fails=True)
    assert failed.stages == ["filter_sequences"]
    assert len(errors(failed)) == 1
    assert "Traceback" not in failed.output


def test_outputs_before_a_failure_are_restored(project: Project) -> None:
    before = read_data(project)
    project.set("filter_sequences", min_item_interactions=1000)
    project.dvc("repro", fails=True)  # DVC itself removes a stage's outputs before it runs
    project.git("checkout", "params.yaml")
    back = project.dvc("repro")
    assert (back.stages, back.restored) == ([], ["filter_sequences"])
    assert read_data(project) == before


def test_a_failing_training_prints_one_error_line(project: Project) -> None:
    project.set("sft", rank=2)
    failed = project.dvc("repro", fails=True)
    assert len(errors(failed)) == 1
    assert "unknown sft.rank" in errors(failed)[0]
    assert "Traceback" not in failed.output


# -- helpers ---------------------------------------------------------------------------------------


def dvc_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]


def environment() -> Mapping[str, str]:
    """Return an environment with this interpreter and without variables of the outer project."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLLM_MSR_", "GIT_"))}
    scripts = str(Path(sys.executable).parent)
    quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "DVC_NO_ANALYTICS": "1"}
    # Spinning threads slow each other down if cores are shared.
    quiet |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    return kept | quiet | {"PATH": os.pathsep.join([scripts, os.environ["PATH"]])}


def change_yaml(path: Path, changes: Mapping[str, Mapping[str, Any]]) -> None:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, keys in changes.items():
        document[section] |= keys
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def commit(project: Project) -> None:
    project.git("add", "--all")
    project.git("commit", "--quiet", "--message", "Test")


def count_test_sequences(project: Project) -> int:
    statistics = project.folder / "data" / "filter_sequences" / "statistics.json"
    return int(json.loads(statistics.read_text())["sequences"]["test"])


def after_preferences() -> set[str]:
    """Return the stages that rerun after a change of the preferences."""
    stages = {"infer_preferences", "sft", "score", "retrieve", "rerank", "evaluate", "report"}
    return {*stages, *(f"text_baselines@{model}" for model in SMALL["text_baselines"]["models"])}


def below(stage: str) -> set[str]:
    """Return all stages downstream of a stage."""
    readers = {
        name
        for name, entry in PIPELINE.items()
        if any(f"{path}/".startswith(f"data/{stage}/") for path in entry["deps"])
    }
    return readers.union(*map(below, readers))


def read_data(project: Project) -> dict[str, bytes]:
    """Return the content of every output file."""
    files = [path for path in (project.folder / "data").rglob("*") if path.is_file()]
    return {path.relative_to(project.folder).as_posix(): path.read_bytes() for path in files}


def errors(run: Run) -> list[str]:
    """Return the error lines of stages."""
    return [line for line in run.output.splitlines() if line.startswith("error:")]


def kill_when(project: Project, stage: str, condition: Any) -> str:
    """Run a stage through DVC, kill both when a condition holds, and return the output."""
    running = subprocess.Popen(
        dvc_command("repro", stage),
        cwd=project.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    stop = time.monotonic() + SECONDS_TO_WAIT
    while running.poll() is None and not condition() and time.monotonic() < stop:
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    output, _ = running.communicate()
    return output

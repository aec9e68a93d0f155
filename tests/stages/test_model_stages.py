"""The model stages by their command lines: dry runs, outputs, one-line errors, resuming."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import Family
from small_world import SmallWorld, write_settings, write_small_world

from mllm_msr.core import command, schemas
from mllm_msr.core.errors import DataError, ParamsError
from mllm_msr.core.files import file_digest
from mllm_msr.core.tables import read_rows, write_rows
from mllm_msr.training.finetuning import FineTuning

STAGES = ["summarize_items", "infer_preferences", "sft", "score"]
EVERY = pytest.mark.parametrize("stage", STAGES)
# Summaries: 6 texts, 6 images, 5 of both. Preferences: 3 + 1 + 1 blocks. Training: 2 pairs, and
# 3 of validation before and after the epoch. Scores: 3 candidates of valid and 3 of test.
CALLS = {"summarize_items": 17, "infer_preferences": 5, "sft": 2 + 3 * 2, "score": 6}


@dataclass(frozen=True)
class Project:
    """A folder with tables, settings and prompts, and the command lines of its stages."""

    world: SmallWorld
    params: Path
    prompts: Path

    def arguments(self, stage: str) -> list[str]:
        world, out = self.world, self.world.folder / stage
        tables_read = {
            "summarize_items": {"items": world.items, "images": world.images},
            "infer_preferences": {
                **{"histories": world.histories, "summaries": world.summaries, "items": world.items}
            },
            "sft": {
                "train": world.candidates("train"),
                "selection": world.candidates("selection"),
                **{"preferences": world.preferences, "items": world.items, "images": world.images},
            },
            "score": {
                **{"filtered": world.filtered, "preferences": world.preferences},
                **{"items": world.items, "images": world.images, "trained": world.folder / "sft"},
            },
            "rerank": {
                "retrieved": world.folder / "retrieve" / "candidates.parquet",
                "preferences": world.preferences,
                **{"items": world.items, "images": world.images, "trained": world.folder / "sft"},
            },
        }[stage]
        options = tables_read | {"out": out, "params": self.params, "prompts": self.prompts}
        return [word for key, value in options.items() for word in (f"--{key}", str(value))]

    def out(self, stage: str) -> Path:
        return self.world.folder / stage

    def change(self, section: str, **keys: Any) -> None:
        settings = yaml.safe_load(self.params.read_text(encoding="utf-8"))
        settings[section] |= keys
        self.params.write_text(yaml.safe_dump(settings), encoding="utf-8")


Run = Callable[..., int]


@pytest.fixture
def run(run_command: Callable[..., int], responses: Path) -> Run:
    """Run a stage in this process by its command line; return the exit code."""

    assert not responses.exists()

    def run_stage(project: Project, stage: str, *more: str) -> int:
        return run_command(stage, *project.arguments(stage), *more)

    return run_stage


def make_project(folder: Path, model: Path, **changes: Any) -> Project:
    params = write_settings(folder, model, **changes)
    prompts = shutil.copy("prompts.yaml", folder)
    return Project(write_small_world(folder / "data"), params, Path(prompts))


@pytest.fixture(scope="session")
def fresh(build: Callable[[str], Family], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return a project that only :func:`project` copies."""
    folder = tmp_path_factory.mktemp("project")
    return make_project(folder, build("llava").folder)


@pytest.fixture
def project(fresh: Project, tmp_path: Path) -> Project:
    folder = shutil.copytree(fresh.params.parent, tmp_path / "project")
    world = SmallWorld(folder / "data")
    return Project(world, folder / "params.yaml", folder / "prompts.yaml")


def all_files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@EVERY
def test_a_dry_run_prints_first_prompt_and_calls_and_writes_nothing(
    project: Project, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    before = all_files(tmp_path)
    assert run(project, stage, "--dry-run") == 0
    said = capsys.readouterr().out
    assert all_files(tmp_path) == before
    first, _, rest = said.removeprefix("--- first prompt\n").partition("\n---\n")
    assert first.startswith("USER:")
    assert first.endswith("ASSISTANT:")
    assert rest.startswith(f"{CALLS[stage]:,} model calls")
    assert rest.endswith("dry run: nothing was written\n")


@pytest.mark.parametrize("stage", ["summarize_items", "infer_preferences"])
def test_a_dry_run_with_stored_responses_prints_the_same_and_writes_nothing(
    project: Project, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    assert run(project, stage, "--dry-run") == 0
    first = capsys.readouterr().out
    assert run(project, stage) == 0
    before = all_files(tmp_path)
    capsys.readouterr()
    assert run(project, stage, "--dry-run") == 0
    assert capsys.readouterr().out == first
    assert all_files(tmp_path) == before


def test_the_old_variable_of_the_store_is_one_line(
    project: Project,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLLM_MSR_ANSWERS", "mine.sqlite")
    assert run(project, "infer_preferences") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the environment: expected the variable MLLM_MSR_RESPONSES")


@EVERY
def test_help_has_an_example_and_describes_options(
    project: Project, run: Run, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    assert run(project, stage, "--help") == 0
    said = capsys.readouterr().out
    assert "Example:" in said
    assert f"stages.{stage} --dry-run" in " ".join(said.split())
    assert "--debug" in said


def test_the_stages_run_in_order_and_compute_nothing_a_second_time(
    project: Project, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    written = {
        "summarize_items": "summaries.parquet: 8 summaries",
        "infer_preferences": "preferences.parquet: 5 preferences of 3 sequences",
        "sft": "adapter: 2 training pairs",
        "score": "scores.parquet: 6 scores",
    }
    for stage in STAGES:
        assert run(project, stage) == 0
        said = capsys.readouterr().out.splitlines()[-1]
        assert said == f"wrote {project.out(stage)}/{written[stage]}"
    summaries = list(read_rows(schemas.Summaries, project.world.summaries, "item"))
    assert [row["item"] for row in summaries] == list("abcdefgt")
    scores = list(read_rows(schemas.Scores, project.out("score") / "scores.parquet", "1"))
    assert {(row["sequence"], row["split"]) for row in scores} == {(1, "valid"), (2, "test")}
    training = json.loads((project.out("sft") / "training.json").read_text(encoding="utf-8"))
    assert training["steps"] == training["epoch"] == 1
    before = all_files(project.world.folder)
    for stage in ("summarize_items", "infer_preferences", "score"):
        assert run(project, stage) == 0
        assert "asked 0 " in capsys.readouterr().out
    assert all_files(project.world.folder) == before


def retrieve(project: Project, items: dict[int, str]) -> None:
    """Write candidates: sequence 1 is of valid, 2 of test."""
    rows = [
        {"sequence": sequence, "split": {1: "valid", 2: "test"}[sequence], "item": item}
        | {"rank": rank, "score": float(-rank)}
        for sequence, letters in items.items()
        for rank, item in enumerate(letters, start=1)
    ]
    write_rows(schemas.Retrieved, rows, project.world.folder / "retrieve" / "candidates.parquet")


def test_reranking_scores_each_retrieved_item_as_the_stage_score_does(
    project: Project, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    retrieve(project, {1: "tbg", 2: "ce"})
    for stage in ("sft", "score", "rerank"):
        assert run(project, stage) == 0
    said = capsys.readouterr().out
    # t, b of sequence 1 and c, e of sequence 2 are in the response store.
    assert re.search(r"asked 1 of 5 pairs in [\d.]+ s, [\d.]+ pairs per second", said)
    scored = [
        {
            (row["sequence"], row["item"]): row["log_odds"]
            for row in read_rows(schemas.Scores, project.out(stage) / "scores.parquet", "1")
        }
        for stage in ("score", "rerank")
    ]
    assert scored[1].keys() == {(1, "t"), (1, "b"), (1, "g"), (2, "c"), (2, "e")}
    shared = scored[0].keys() & scored[1].keys()
    assert {key: scored[0][key] for key in shared} == {key: scored[1][key] for key in shared}


def test_without_a_retriever_nothing_is_reranked(
    project: Project, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    retrieve(project, {})
    assert run(project, "rerank") == 0
    path = project.out("rerank") / "scores.parquet"
    assert capsys.readouterr().out == f"retrieve.retriever is null: wrote {path} without rows\n"


def test_a_dry_run_of_the_reranking_counts_its_pairs(
    project: Project, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    retrieve(project, {1: "tb", 2: "c"})
    assert run(project, "rerank", "--dry-run") == 0
    assert "3 model calls" in capsys.readouterr().out
    assert not project.out("rerank").exists()


def test_a_text_model_runs_every_stage_without_images(
    build: Callable[[str], Family], project: Project, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(build("llama3").folder)
    project.change("summarize_items", model=model, image=False)
    project.change("infer_preferences", model=model)
    project.change("recommender", model=model, image=False)
    project.change("sft", epochs=0)
    for stage in STAGES:
        assert run(project, stage) == 0
    assert "kept TrainingReport(steps=0, epoch=0" in capsys.readouterr().out
    rows = list(read_rows(schemas.Summaries, project.world.summaries, "item"))
    assert all(row["image_description"] is None for row in rows)


@pytest.mark.parametrize(("own", "expected"), [(None, "1000"), ("7", "7")])
def test_a_stage_sets_the_spin_count_of_threads_unless_it_is_set(
    monkeypatch: pytest.MonkeyPatch, own: str | None, expected: str
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if own:
        monkeypatch.setenv("GOMP_SPINCOUNT", own)
    code = "import sys, stages, os; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", expected]


def test_smaller_batches_with_as_many_pairs_per_step_have_the_same_checkpoints(
    project: Project, run: Run, responses: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(training: FineTuning, *_: object) -> None:
        work.append(training.work)
        raise DataError(
            expected="memory", got="too little", where="sft", fix="see the test of FineTuning"
        )

    work: list[Path] = []
    monkeypatch.setattr(FineTuning, "run", run_out)
    for size, accumulation in ((4, 2), (2, 4), (2, 2)):
        project.change("sft", batch_size=size, accumulation=accumulation)
        assert run(project, "sft") == 1
    assert work[0] == work[1] != work[2]
    assert work[0].parent.parent == responses.parent


@pytest.mark.parametrize("stage", ["summarize_items", "sft"])
def test_an_image_for_a_text_model_is_an_error_of_the_stage(
    build: Callable[[str], Family],
    project: Project,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    stage: str,
) -> None:
    section = "recommender" if stage == "sft" else stage
    project.change(section, model=str(build("llama3").folder))
    assert run(project, stage) == 1
    assert "expected a model that takes images; got a text-only model" in capsys.readouterr().err


def test_titles_replace_preferences_without_a_model(
    project: Project, run: Run, responses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project.change("infer_preferences", mode="none", model="there is no such model")
    assert run(project, "infer_preferences", "--dry-run") == 0
    assert "\n0 model calls" in capsys.readouterr().out
    assert run(project, "infer_preferences") == 0
    rows = list(read_rows(schemas.Preferences, project.world.preferences, "sequence"))
    assert "Red kettle; Blue teapot; Green cup; Yellow jug" in rows[0]["preference"]
    assert not responses.exists()


NULLED = {
    "summarize_items": ("summarize_items.model", "summaries.parquet", schemas.Summaries),
    "infer_preferences": ("infer_preferences.model", "preferences.parquet", schemas.Preferences),
    "score": ("recommender.model", "scores.parquet", schemas.Scores),
    "rerank": ("recommender.model", "scores.parquet", schemas.Scores),
}


@pytest.mark.parametrize("mode", ["direct", "recurrent", "none"])
def test_every_mode_reads_titles_that_no_model_summarized(
    project: Project, run: Run, mode: str
) -> None:
    project.change("summarize_items", model=None, text="raw", image=False)
    project.change("infer_preferences", mode=mode)
    assert run(project, "summarize_items") == 0
    path = project.out("summarize_items") / "summaries.parquet"
    rows = {row["item"]: row for row in read_rows(schemas.Summaries, path, order="item")}
    assert rows["a"]["summary"] == rows["a"]["text_summary"] == "Red kettle. For tea"
    assert rows["g"]["summary"] == ""
    assert run(project, "infer_preferences") == 0
    preferences = project.out("infer_preferences") / "preferences.parquet"
    inferred = {row["sequence"] for row in read_rows(schemas.Preferences, preferences, "1")}
    assert inferred == {0, 1, 2}


def leave_out_all(project: Project) -> None:
    for section in ("summarize_items", "encode_items", "infer_preferences", "recommender"):
        project.change(section, model=None)
    project.change("feature_baselines", models=[])


@pytest.mark.parametrize("stage", NULLED)
def test_a_stage_without_a_model_writes_an_empty_table(
    project: Project, run: Run, responses: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    leave_out_all(project)
    setting, name, model = NULLED[stage]
    path = project.out(stage) / name
    assert run(project, stage) == 0
    assert capsys.readouterr().out == f"{setting} is null: wrote {path} without rows\n"
    assert list(read_rows(model, path, "1")) == []
    assert not responses.exists()


@pytest.mark.parametrize("stage", [*NULLED, "sft"])
def test_a_dry_run_without_a_model_writes_nothing(
    project: Project, run: Run, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    leave_out_all(project)
    kept = project.out(stage) / "adapter" / "kept"
    kept.parent.mkdir(parents=True)
    kept.write_text("earlier")
    before = sorted(project.out(stage).rglob("*"))
    assert run(project, stage, "--dry-run") == 0
    assert "is null: would write" in capsys.readouterr().out
    assert sorted(project.out(stage).rglob("*")) == before


def test_a_fine_tuning_without_a_model_writes_placeholders(
    project: Project, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_out_all(project)
    out = project.out("sft")
    assert run(project, "sft") == 0
    assert capsys.readouterr().out == f"recommender.model is null: wrote {out} without an adapter\n"
    assert "no adapter" in (out / "adapter/README.md").read_text(encoding="utf-8")
    training = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert training == dict.fromkeys(("valid_auc", "valid_loss", "model")) | {
        "steps": 0,
        "epoch": 0,
    }
    curves = out / "curves/plots/metrics"
    assert (curves / "valid/auc.tsv").read_text(encoding="utf-8") == "step\tauc\n"


def test_stages_without_a_model_import_no_torch(project: Project) -> None:
    leave_out_all(project)
    code = "import sys\n"
    for stage in [*STAGES, "rerank"]:
        code += f"from stages.{stage} import {stage}\n"
        arguments = project.arguments(stage)
        options = {k[2:]: v for k, v in zip(arguments[::2], arguments[1::2], strict=True)}
        given = ", ".join(f"{key}=Path({value!r})" for key, value in options.items())
        code += f"{stage}({given})\n"
    code += "print(sys.modules.keys() & {'torch', 'transformers', 'accelerate', 'peft'})"
    command = [sys.executable, "-c", f"from pathlib import Path\n{code}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "set()"


def pocket_copy(folder: Path) -> Path:
    return Path(shutil.copytree("mllm_msr/pocket/model", folder / "my-model"))


@EVERY
def test_the_pocket_model_is_refused_on_other_data_before_any_work(
    project: Project,
    run: Run,
    responses: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: str,
) -> None:
    section = "recommender" if stage in {"sft", "score"} else stage
    project.change("preprocess", source="tables")
    project.change(section, model=str(pocket_copy(tmp_path)))
    before = all_files(project.world.folder)
    assert run(project, stage) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: {section}.model: expected a model for preprocess.source: tables"
    )
    assert "apply ids_only" in said
    assert "preprocess.allow_pocket_model to true" in said
    assert len(said.splitlines()) == 1
    assert all_files(project.world.folder) == before
    assert not responses.exists()


def test_the_pocket_model_may_be_allowed_on_other_data(
    project: Project, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    project.change("preprocess", source="tables", allow_pocket_model=True)
    project.change("infer_preferences", model="mllm_msr/pocket/model")
    assert run(project, "infer_preferences", "--dry-run") == 0
    assert "model calls" in capsys.readouterr().out


def test_titles_are_allowed_with_the_pocket_model_on_other_data(project: Project, run: Run) -> None:
    project.change("preprocess", source="tables")
    project.change("infer_preferences", mode="none", model="mllm_msr/pocket/model")
    assert run(project, "infer_preferences") == 0


def unknown_key(project: Project, stage: str) -> None:
    project.change("recommender" if stage == "score" else stage, sead=1)


def bad_prompt(project: Project, stage: str) -> None:
    document = yaml.safe_load(project.prompts.read_text(encoding="utf-8"))
    section = "recommender" if stage in {"sft", "score"} else stage
    name = next(iter(document[section]))
    document[section][name] = "{nothing}"
    project.prompts.write_text(yaml.safe_dump(document), encoding="utf-8")


def no_model(project: Project, stage: str) -> None:
    section = "recommender" if stage in {"sft", "score"} else stage
    project.change(section, model=str(project.world.folder / "nowhere"))


def no_table(project: Project, stage: str) -> None:
    del stage
    project.world.items.write_bytes(b"")
    project.world.summaries.unlink()


@EVERY
@pytest.mark.parametrize("spoil", [unknown_key, bad_prompt, no_model, no_table])
def test_an_error_is_one_line_and_leaves_earlier_outputs(
    project: Project,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    spoil: Callable[[Project, str], None],
) -> None:
    outputs = project.out(stage)
    outputs.mkdir(exist_ok=True)
    (outputs / "earlier.txt").write_text("an earlier output")
    spoil(project, stage)
    before = all_files(project.world.folder)
    assert run(project, stage) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 1
    assert "expected" in said.err
    assert said.out == ""
    assert all_files(project.world.folder) == before


def test_debug_raises_the_error(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown_key(project, "sft")
    monkeypatch.setattr(sys, "argv", ["sft", *project.arguments("sft"), "--debug"])
    with pytest.raises(ParamsError, match=r"unknown sft\.sead"):
        command.run(import_module("stages.sft").sft)


def test_scoring_needs_an_adapter_of_its_model(
    build: Callable[[str], Family],
    project: Project,
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(project, "score") == 1
    assert "expected a trained adapter; got no such file; run the stage sft" in (
        capsys.readouterr().err
    )
    project.change("sft", epochs=0)
    assert run(project, "sft") == 0
    project.change("recommender", model=str(build("llava_next").folder))
    assert run(project, "score") == 1
    assert "expected an adapter of this model; got one of another; run" in capsys.readouterr().err
    assert not project.out("score").exists()


@pytest.mark.parametrize("spoilt", ["training.json", "adapter/adapter_config.json"])
def test_scoring_needs_the_adapter_as_it_was_trained(
    project: Project, run: Run, capsys: pytest.CaptureFixture[str], spoilt: str
) -> None:
    project.change("sft", epochs=0)
    assert run(project, "sft") == 0
    path = project.out("sft") / spoilt
    content = path.read_text(encoding="utf-8")
    other = json.dumps(json.loads(content) | {"lora_alpha": 999})
    path.write_text(content[:20] if spoilt == "training.json" else other, encoding="utf-8")
    capsys.readouterr()
    assert run(project, "score") == 1
    said = capsys.readouterr().err
    assert "expected the record of a" in said or "got another adapter_config.json than" in said
    assert len(said.splitlines()) == 1
    path.write_text(content, encoding="utf-8")
    assert run(project, "score") == 0


@pytest.mark.parametrize(("stage", "name"), [("sft", "question"), ("summarize_items", "text")])
def test_a_template_with_the_models_image_placeholder_is_one_line(
    project: Project, run: Run, capsys: pytest.CaptureFixture[str], stage: str, name: str
) -> None:
    document = yaml.safe_load(project.prompts.read_text(encoding="utf-8"))
    section = document["recommender" if stage == "sft" else stage]
    section[name] = f"<image> {section[name]}"
    project.prompts.write_text(yaml.safe_dump(document), encoding="utf-8")
    assert run(project, stage) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: prompts.yaml: expected a text without <image>, which the model")


def test_a_failing_stage_leaves_earlier_outputs_unchanged(
    project: Project, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(project, "summarize_items") == 0
    before = all_files(project.world.folder)
    project.change("summarize_items", max_new_tokens=3)
    module = import_module("mllm_msr.method.summaries")

    def fail(*_: object) -> None:
        raise DataError(expected="room", got="none", where="the disk", fix="free some")

    monkeypatch.setattr(module.Summarizer, "_fuse", fail)
    assert run(project, "summarize_items") == 1
    assert all_files(project.world.folder) == before


def start(project: Project, stage: str, *more: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", f"stages.{stage}", *project.arguments(stage), *more],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_error_of_a_process_is_one_line_and_exit_code_1(project: Project) -> None:
    unknown_key(project, "summarize_items")
    process = start(project, "summarize_items")
    out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_a_killed_process_resumes(
    project: Project, run: Run, responses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project.change(
        "summarize_items", max_new_tokens=150
    )  # about a second for each of three batches
    root = str(responses.parent.parent)
    process = start(project, "summarize_items", DVC_ROOT=root, OMP_NUM_THREADS="1")
    given = 0
    while given == 0 and process.poll() is None:
        time.sleep(0.05)
        if responses.exists():
            with sqlite3.connect(responses, timeout=30) as database:
                tables_made = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                if tables_made:
                    given = database.execute("SELECT count(*) FROM answers").fetchone()[0]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < given < CALLS["summarize_items"]
    with sqlite3.connect(responses) as database:
        given = database.execute("SELECT count(*) FROM answers").fetchone()[0]
    assert run(project, "summarize_items") == 0
    assert f"asked {CALLS['summarize_items'] - given} prompts" in capsys.readouterr().out

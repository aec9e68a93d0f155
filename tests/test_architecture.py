"""Architecture rules: stage names, declared dependencies and settings, forbidden code."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml

from mllm_msr.baselines.discovery import MODELS, all_baselines, baselines_of
from mllm_msr.core.params import SECTIONS
from mllm_msr.evaluation.results import read_comparisons, read_metrics
from mllm_msr.evaluation.table import format_table

ROOT = Path(__file__).parents[1]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
STAGES: dict[str, dict[str, Any]] = PIPELINE["stages"]
SETTINGS = {
    name: yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    for name in ("params.yaml", "prompts.yaml")
}
SOURCES = sorted(p for name in ("mllm_msr", "stages") for p in (ROOT / name).rglob("*.py"))
# In the repository; produced by its own pipeline, not by a stage.
POCKET_MODEL = "mllm_msr/pocket/model"
REGISTRY = "mllm_msr.baselines.discovery"
MODELS_FOLDER = MODELS.replace(".", "/")
CORE = "mllm_msr/core"  # a dependency of every stage as a whole, although each uses only a part
BASELINES = "mllm_msr/baselines"  # a dependency as a whole of the stage that runs any of them
# Set the version and the start of a process; they do not affect results.
SETUP = {"mllm_msr/__init__.py", "stages/__init__.py"}
STUDIES = "data/studies"  # written by study runs, outside the pipeline
# Modules that must not import torch.
WITHOUT_TORCH = (
    "core.command core.tables baselines.discovery data.sources data.sequences data.candidates"
    " images.gallery fetching.fetch presets method.prompts evaluation.evaluation pocket.raw"
    " pocket.identity training.files report.page study.figures study.__main__ cli.evaluate"
)
# Inputs whose paths are in the table image_sources.parquet instead of the stage file.
PATHS_IN_TABLES = {"fetch_images": {"data/raw/pocket"}}

every_stage = pytest.mark.parametrize("stage", STAGES)
every_source = pytest.mark.parametrize(
    "source", SOURCES, ids=[path.relative_to(ROOT).as_posix() for path in SOURCES]
)


# -- names of stages -------------------------------------------------------------------------------


def test_stage_files_match_the_stages_in_dvc_yaml() -> None:
    files = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert files == set(STAGES)


@every_stage
def test_a_stage_has_the_same_name_in_file_pipeline_function_and_folder(stage: str) -> None:
    entry = STAGES[stage]
    assert re.search(rf" -m stages\.{stage}( \$\{{item\.\w+\}})?$", entry["cmd"])
    assert stage in functions(stage)
    assert any(path.startswith(f"data/{stage}/") for path in outputs(stage))


@every_stage
def test_each_stage_has_a_description_in_dvc_yaml(stage: str) -> None:
    entry = STAGES[stage]
    assert len(entry.get("desc", "")) > 20


@every_stage
def test_each_stage_has_a_section_of_settings(stage: str) -> None:
    # The stages score and rerank share their settings with sft.
    section = {"score": "recommender", "rerank": "recommender"}.get(stage, stage)
    assert section in SECTIONS
    assert section in {key.partition(".")[0] for _, key in declared_settings(stage)}


@every_stage
def test_each_stage_is_tested(stage: str) -> None:
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if file != Path(__file__)]
    assert any(f'"{stage}"' in file.read_text(encoding="utf-8") for file in files) or any(
        file.name == f"test_{stage}.py" for file in files
    )


def test_a_stage_file_has_fewer_than_120_lines() -> None:
    files = (ROOT / "stages").glob("*.py")
    lengths = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {name: lines for name, lines in lengths.items() if lines >= 120} == {}


# -- help ------------------------------------------------------------------------------------------


@every_stage
def test_the_help_of_each_stage_shows_an_example(stage: str) -> None:
    described = ast.get_docstring(functions(stage)[stage]) or ""
    assert re.search(rf"^Example: .*-m stages\.{stage}\b", described, re.MULTILINE)


def test_help_comes_from_the_docstring() -> None:
    shown = python("-m", "stages.evaluate", "--help")
    assert "Example: python -m stages.evaluate" in " ".join(shown.split())
    assert "--params" in shown


# -- dependencies of stages ------------------------------------------------------------------------


@every_stage
def test_imported_code_is_a_dependency_of_the_stage(stage: str) -> None:
    for item in items_of(stage):
        dependencies = code_dependencies(stage, item)
        for file in imported_files(stage, item):
            assert any(covers(path, file) for path in dependencies) or has_no_code(file), file


@every_stage
def test_code_dependencies_are_imported_by_the_stage(stage: str) -> None:
    imported = {file for item in items_of(stage) for file in imported_files(stage, item)}
    paths = {path for item in items_of(stage) for path in code_dependencies(stage, item)}
    for path in paths - {CORE, BASELINES}:
        files = [Path(path)] if path.endswith(".py") else (ROOT / path).rglob("*.py")
        for file in (ROOT / each for each in files):
            name = file.relative_to(ROOT).as_posix()
            assert name in imported or has_no_code(name), f"{name} does not change {stage}"


@every_stage
def test_a_stage_has_at_most_ten_code_dependencies(stage: str) -> None:
    assert len(code_dependencies(stage)) <= 10


@every_stage
def test_no_stage_lists_a_dependency_twice(stage: str) -> None:
    entry = STAGES[stage]
    assert len(entry["deps"]) == len(set(entry["deps"]))


def test_a_stage_reads_only_outputs_of_earlier_stages() -> None:
    written: set[str] = set()
    for stage in STAGES:
        read = set(data_dependencies(stage)) - {POCKET_MODEL, STUDIES}
        missing = {path for path in read if not any(covers(path, other) for other in written)}
        assert not missing, f"{stage} reads files that no earlier stage writes"
        written |= set(outputs(stage))


def test_every_output_has_one_stage_and_lies_in_its_folder() -> None:
    written = [path for stage in STAGES for path in outputs(stage)]
    assert len(written) == len(set(written))
    for stage in STAGES:
        folders = (
            (f"data/{stage}/", "data/raw/pocket")
            if stage == "pocket_world"
            else (f"data/{stage}/",)
        )
        assert all(path.startswith(folders) for path in outputs(stage))


@every_stage
def test_paths_in_a_stage_file_match_dvc_yaml(stage: str) -> None:
    named = set(data_paths(stage))
    declared = {*data_dependencies(stage), *outputs(stage)}
    for path in named:
        assert any(covers(path, other) for other in declared), f"{path} is not declared"
    for path in declared - {POCKET_MODEL} - PATHS_IN_TABLES.get(stage, set()):
        assert any(covers(other, path) for other in named), f"{path} is not used"


# -- settings --------------------------------------------------------------------------------------


@every_stage
def test_the_settings_in_dvc_yaml_exist(stage: str) -> None:
    for file, declared in declared_settings(stage):
        for key in each_item(stage, declared):
            value = SETTINGS[file]
            for part in key.split("."):
                assert part in value, f"{file} has no {key}"
                value = value[part]


@every_stage
def test_a_stage_declares_exactly_the_settings_that_it_loads(stage: str) -> None:
    names = {model.__name__: section for section, model in SECTIONS.items()}
    loaded = {
        ("params.yaml", names[ast.unparse(call.args[0])])
        if call.func.id == "load_params"
        else ("prompts.yaml", ast.literal_eval(call.args[0]))
        for call in calls(stage, {"load_params", "load_prompts"})
    }
    for _ in calls(stage, {"load_all_params"}):
        loaded |= {("params.yaml", section) for section in SECTIONS}
    declared = {(file, key.partition(".")[0]) for file, key in declared_settings(stage)}
    assert loaded == declared


def test_preprocess_declares_all_of_its_settings_but_the_one_of_the_model_stages() -> None:
    declared = {key.partition(".")[2] for _, key in declared_settings("preprocess")}
    assert declared == {*SETTINGS["params.yaml"]["preprocess"]} - {"allow_pocket_model"}


def test_every_setting_belongs_to_a_stage() -> None:
    declared = {
        (file, key.partition(".")[0]) for stage in STAGES for file, key in declared_settings(stage)
    }
    assert declared == {(file, key) for file, content in SETTINGS.items() for key in content}


def test_only_stages_and_commands_read_settings() -> None:
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(("load_params", "load_all_params"))
    }
    # A recommender is loaded in Python as by its command.
    allowed = {"stages", "mllm_msr/cli", "mllm_msr/recommendation"}
    assert {str(Path(reader).parent) for reader in readers} == allowed


# -- forbidden code and files ----------------------------------------------------------------------


@every_source
def test_loading_a_file_never_executes_code_from_it(source: Path) -> None:
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert ast.unparse(node.value) == "False"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in {"torch.load", "torch.hub"}
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.partition(".")[0] for alias in node.names}
            names.add((getattr(node, "module", None) or "").partition(".")[0])
            assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


@pytest.mark.slow
def test_raw_data_is_ignored_by_git_and_restored_by_dvc(tmp_path: Path) -> None:
    def run(*words: str) -> None:
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)

    dvc = (sys.executable, "-m", "dvc")
    (tmp_path / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    for source in ("amazon", "microlens", "tables"):
        (tmp_path / "data/raw" / source).mkdir(parents=True)
        (tmp_path / "data/raw" / source / "items.csv").write_text("item,title\n", encoding="utf-8")
    run("git", "init", "--quiet")
    run(*dvc, "init", "--quiet")
    untracked = ["git", "ls-files", "--others", "--exclude-standard", "data"]
    assert subprocess.run(untracked, cwd=tmp_path, check=True, capture_output=True).stdout == b""
    run(*dvc, "add", "--quiet", "data/raw/tables")
    run("git", "add", "data/raw/tables.dvc")  # fails if it is ignored
    shutil.rmtree(tmp_path / "data/raw/tables")
    run(*dvc, "checkout", "--quiet")
    assert (tmp_path / "data/raw/tables/items.csv").is_file()


def test_no_module_is_named_utils_or_alike() -> None:
    assert not {path.stem for path in SOURCES} & {"utils", "util", "helpers", "misc", "common"}


def test_torch_is_imported_only_where_a_model_runs() -> None:
    modules = ", ".join(f"mllm_msr.{name}" for name in WITHOUT_TORCH.split())
    # Stages import torch only when they load a model.
    stages = ", ".join(f"stages.{name}" for name in STAGES)
    heavy = "{'torch', 'transformers', 'peft', 'accelerate'}"
    printed = python("-c", f"import sys, {modules}, {stages}; print(sys.modules.keys() & {heavy})")
    assert printed.strip() == "set()"


def test_the_import_contracts_hold() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    ended = subprocess.run(
        [*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_pre_commit_uses_the_installed_linters() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repository["repo"] for repository in hooks["repos"]} == {"local"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tools = {re.split(r"[\[>=<]", name)[0] for name in project["optional-dependencies"]["test"]}
    assert {"pre-commit", "ruff", "mypy", "import-linter"} <= tools


def test_no_test_reads_outputs_of_the_pipeline() -> None:
    # Trained results differ between processors, so such a test would fail after a user's run.
    written = {path for stage in STAGES for path in outputs(stage)} | {"dvc.lock"}
    for file in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                joined = "/".join(text_parts(node))
                if joined.startswith("ROOT/"):
                    path = joined.removeprefix("ROOT/")
                    assert not any(covers(one, path) for one in written), f"{file.name}: {path}"


# -- helpers ---------------------------------------------------------------------------------------


def python(*arguments: str) -> str:
    """Run this interpreter in the project's root and return its output."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def stage_tree(stage: str) -> ast.Module:
    return parsed(ROOT / "stages" / f"{stage}.py")


def functions(stage: str) -> dict[str, ast.FunctionDef]:
    body = stage_tree(stage).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def calls(stage: str, names: set[str]) -> Iterator[Any]:
    """Yield the calls of the given functions in a stage file."""
    for node in ast.walk(stage_tree(stage)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield node


def test_the_training_of_the_pocket_model_names_the_files_that_decide_it() -> None:
    folder = ROOT / "mllm_msr/pocket/training"
    stages = yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values()
    named = {
        (folder / file).resolve().relative_to(ROOT) for stage in stages for file in stage["deps"]
    }
    imported = reached_modules(["mllm_msr.pocket.train", "mllm_msr.pocket.measure"])
    own = {Path(module_file(each)) for each in imported if each.startswith("mllm_msr.pocket.")}
    assert {*own, Path("prompts.yaml"), Path("mllm_msr/method/prompts.py")} <= named


@cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(
        "mllm_msr", "stages", exclude_type_checking_imports=True, cache_dir=None
    )


def items_of(stage: str) -> list[str | None]:
    """Return what a stage runs once for each of: all baselines that it has, or nothing."""
    has_matrix = "matrix" in STAGES[stage]
    return [baseline.name for baseline in baselines_of(stage)] if has_matrix else [None]


def imported_files(stage: str, item: str | None) -> set[str]:
    """Return the files that decide what a stage does, the packages' own ``__init__.py`` included.

    Discovery imports baselines by name. A stage of baselines runs one of them, with all that it
    imports; other stages that reach it read labels, which the files themselves declare.
    """
    run = [item] if item else []
    if BASELINES in STAGES[stage]["deps"]:
        run = [baseline.name for baseline in all_baselines() if baseline.build]
    modules = reached_modules([f"stages.{stage}", *(f"{MODELS}.{each}" for each in run)])
    files = {module_file(module) for module in modules}
    if REGISTRY in modules and not item:
        files |= {path.relative_to(ROOT).as_posix() for path in (ROOT / MODELS_FOLDER).glob("*.py")}
    return files


def reached_modules(waiting: list[str]) -> set[str]:
    """Return modules with all that they import, directly or not."""
    found: set[str] = set()
    while waiting:
        module = waiting.pop()
        # Importing a.b.c runs a and a.b first.
        for part in accumulate(module.split("."), lambda parent, child: f"{parent}.{child}"):
            if part not in found:
                found.add(part)
                waiting += graph().find_modules_directly_imported_by(part)
    return found


def module_file(module: str) -> str:
    path = Path(*module.split("."))
    package = path / "__init__.py"
    chosen = package if (ROOT / package).exists() else path.with_suffix(".py")
    return chosen.as_posix()


def resolved(path: str) -> str:
    """Replace ``${section.key}`` by the setting."""

    def look_up(match: re.Match[str]) -> str:
        section, key = match[1].split(".")
        return str(SETTINGS["params.yaml"][section][key])

    return re.sub(r"\$\{([\w.]+)\}", look_up, path)


def each_item(stage: str, text: str) -> list[str]:
    """Return a text for each item of a stage's matrix, with ``${item.key}`` replaced."""
    texts = [text]
    for key, values in STAGES[stage].get("matrix", {}).items():
        section, name = values[2:-1].split(".")  # ${section.name}
        items = SETTINGS["params.yaml"][section][name]
        texts = [old.replace(f"${{item.{key}}}", item) for old in texts for item in items]
    return list(dict.fromkeys(texts))


def code_dependencies(stage: str, item: str | None = None) -> list[str]:
    """Return the files and folders of code that a stage depends on, for an item of its matrix."""
    paths = [path for path in STAGES[stage]["deps"] if path.startswith(("mllm_msr/", "stages/"))]
    if item:
        paths = [path.replace("${item.model}", item) for path in paths]
    return [path for path in paths if path != POCKET_MODEL]


def has_no_code(file: str) -> bool:
    """Return whether a file is an ``__init__.py`` that cannot change a result."""
    if file in SETUP:
        return True
    only_docstring = all(isinstance(node, ast.Expr) for node in parsed(ROOT / file).body)
    return file.endswith("__init__.py") and only_docstring


def data_dependencies(stage: str) -> list[str]:
    code = code_dependencies(stage)
    return [resolved(path) for path in STAGES[stage]["deps"] if path not in code]


def outputs(stage: str) -> list[str]:
    """Return the paths of a stage's outs and metrics."""
    entries = [*STAGES[stage].get("outs", []), *STAGES[stage].get("metrics", [])]
    paths = [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]
    return [resolved(item) for path in paths for item in each_item(stage, path)]


def declared_settings(stage: str) -> Iterator[tuple[str, str]]:
    """Yield a stage's settings in dvc.yaml as (file, key)."""
    for entry in STAGES[stage]["params"]:
        if isinstance(entry, str):
            yield "params.yaml", entry
        else:
            for file, keys in entry.items():
                yield from ((file, key) for key in keys)


def data_paths(stage: str) -> Iterator[str]:
    """Yield the paths below ``data`` that a stage file names."""
    for node in ast.walk(stage_tree(stage)):
        if isinstance(node, ast.Call) and ast.unparse(node).startswith("Path('data/"):
            yield ast.literal_eval(node.args[0])


def text_parts(node: ast.expr) -> list[str]:
    """Return the parts of a path expression joined by slashes; variables by their name."""
    if isinstance(node, ast.BinOp):
        return [*text_parts(node.left), *text_parts(node.right)]
    return [str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)]


def covers(folder: str, path: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


# -- README ----------------------------------------------------------------------------------------


def test_the_readme_shows_the_table_of_the_reference_results() -> None:
    # Not data/evaluate/metrics.json, which every run overwrites.
    metrics = read_metrics(ROOT / "docs/reference/pocket_metrics.json")
    comparisons = read_comparisons(ROOT / "docs/reference/pocket_comparisons.parquet")
    assert format_table(metrics, comparisons) in (ROOT / "README.md").read_text(encoding="utf-8")

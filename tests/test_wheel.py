"""The wheel has what the command line and the library read outside a checkout."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from shutil import copy2
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
# Package folders with data: every tracked file below them has to be in the wheel.
DATA = ("mllm_msr/pocket/model/", "mllm_msr/report/templates/", "mllm_msr/serving/page/")


def run(*command: str, cwd: Path, **variables: str) -> str:
    environment = os.environ | variables
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Return the tracked files that a build could need."""
    command = ["git", "ls-files", "*.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]
    folders = ["params.yaml", "mllm_msr", "stages", "presets"]
    listed = subprocess.run([*command, *folders], cwd=ROOT, capture_output=True, check=True)
    return listed.stdout.decode().splitlines()


@pytest.fixture(scope="module")
def source(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the tracked files, so that the build leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    run("-m", "pip", "wheel", *options, "-w", str(folder), ".", cwd=source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel installed, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--disable-pip-version-check", "--target", str(folder)]
    run("-m", "pip", "install", *options, str(wheel), cwd=folder)
    return folder


def outside(installed: Path, empty: Path, *command: str) -> str:
    """Run Python in an empty folder, with the installed wheel before everything else."""
    assert not list(empty.iterdir())
    return run(*command, cwd=empty, PYTHONPATH=str(installed))


def test_every_module_and_data_file_is_in_the_wheel(wheel: Path, tracked: list[str]) -> None:
    packed = set(ZipFile(wheel).namelist())
    code = {name for name in tracked if name.endswith(".py") and "/" in name}
    data = {name for name in tracked if name.startswith(DATA)}
    shipped = {name for name in tracked if name.startswith("presets/")} | {"params.yaml"}
    assert code
    assert data
    assert len(shipped) > 1
    assert packed >= code | data | {f"mllm_msr/shipped/{name}" for name in shipped}


def test_the_wheel_installs_the_command(installed: Path) -> None:
    assert (installed / "bin" / "mllm-msr").is_file()


def test_a_source_distribution_has_what_its_wheel_needs(
    source: Path, tmp_path: Path, tracked: list[str]
) -> None:
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run("-c", build, str(tmp_path), cwd=source)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    needed = ("presets/", "params.yaml", "setup.py", "pyproject.toml", *DATA)
    assert packed >= {name for name in tracked if name.startswith(needed)}


def test_presets_are_listed_outside_a_checkout(installed: Path, tmp_path: Path) -> None:
    listed = outside(installed, tmp_path, "-m", "mllm_msr.cli", "presets", "list")
    here = run("-m", "mllm_msr.cli", "presets", "list", cwd=ROOT)
    assert listed == here


def test_a_preset_is_compared_with_the_shipped_settings(installed: Path, tmp_path: Path) -> None:
    shown = outside(installed, tmp_path, "-m", "mllm_msr.cli", "presets", "show", "qwen")
    assert "recommender.model: mllm_msr/pocket/model -> Qwen/Qwen3-VL-4B-Instruct\n" in shown


def test_the_pocket_model_the_templates_and_the_stages_are_read_from_the_wheel(
    installed: Path, tmp_path: Path
) -> None:
    program = """
from jinja2 import Environment, PackageLoader
from mllm_msr.pocket.identity import SHIPPED, is_pocket_model
from mllm_msr.presets import find_shipped
from tokenizers import Tokenizer
import stages.report
assert is_pocket_model(str(SHIPPED))
Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
template = Environment(loader=PackageLoader("mllm_msr.report")).get_template("report.html")
print(SHIPPED, template.filename, find_shipped("presets"), stages.report.__file__, sep="\\n")
"""
    paths = outside(installed, tmp_path, "-c", program).splitlines()
    assert all(Path(path).is_relative_to(installed) and Path(path).exists() for path in paths)
    assert len(paths) == 4

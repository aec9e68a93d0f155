"""The command line: its subcommands, what it imports, and how it ends."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from mllm_msr import cli

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "pandas", "duckdb", "matplotlib", "dvc")
INTERRUPTED = 130

every_subcommand = pytest.mark.parametrize("name", cli.SUBCOMMANDS)


def python(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in the repository's root."""
    command = [sys.executable, *words]
    environment = os.environ | variables
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


# -- subcommands -----------------------------------------------------------------------------------


def test_help_lists_every_subcommand() -> None:
    shown = CliRunner().invoke(cli.app, ["--help"]).output
    for name, subcommand in cli.SUBCOMMANDS.items():
        assert name in shown
        assert subcommand.about in shown


@every_subcommand
def test_a_subcommand_shows_the_help_of_its_own_app(name: str) -> None:
    app = importlib.import_module(cli.SUBCOMMANDS[name].module).app
    has_commands = isinstance(get_command(app), TyperGroup)
    shown = CliRunner().invoke(cli.app, [name, "--help"], catch_exceptions=False).output
    assert (f"{name} [OPTIONS] COMMAND" in shown) == has_commands
    own = CliRunner().invoke(app, ["--help"]).output
    assert shown.splitlines()[3:] == own.splitlines()[3:]  # below the usage


@pytest.mark.parametrize(
    "name", [name for name in cli.SUBCOMMANDS if name not in ("plan", "serve")]
)
def test_a_subcommand_without_arguments_shows_its_help(name: str) -> None:
    shown = CliRunner().invoke(cli.app, [name], catch_exceptions=False).output
    assert shown.strip() == CliRunner().invoke(cli.app, [name, "--help"]).output.strip()


def test_a_misspelt_subcommand_is_corrected() -> None:
    ended = CliRunner().invoke(cli.app, ["preset"])
    assert ended.exit_code == 2
    assert "Did you mean 'presets'?" in ended.output


@pytest.mark.slow
@pytest.mark.parametrize("module", ["mllm_msr.presets", "mllm_msr.store", "mllm_msr.study"])
def test_the_modules_stay_commands_of_their_own(module: str) -> None:
    ended = python("-m", module, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "Usage" in ended.stdout


# -- what is imported ------------------------------------------------------------------------------


def test_help_imports_no_library_and_no_subcommand() -> None:
    modules = [*HEAVY, *(subcommand.module for subcommand in cli.SUBCOMMANDS.values())]
    program = f"""
import atexit, sys
from mllm_msr.cli import main
atexit.register(lambda: print("imported", sys.modules.keys() & {set(modules)}))
main()
"""
    ended = python("-c", program, "--help")
    assert ended.stdout.splitlines()[-1] == "imported set()"


@pytest.mark.parametrize("name", ["export", "forget", "plan", "recommend"])
def test_the_help_of_a_command_that_runs_a_model_imports_no_torch(name: str) -> None:
    program = """
import atexit, sys
from mllm_msr.cli import main
atexit.register(lambda: print("imported", sys.modules.keys() & {"torch", "transformers", "peft"}))
main()
"""
    ended = python("-c", program, name, "--help")
    assert ended.stdout.splitlines()[-1] == "imported set()"


# -- the program -----------------------------------------------------------------------------------


def test_the_entry_point_is_the_command_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["mllm-msr"].partition(":")
    assert getattr(importlib.import_module(module), function) is cli.main


def test_the_usage_names_the_program_however_it_is_started() -> None:
    assert "Usage: mllm-msr [OPTIONS] COMMAND" in python("-m", "mllm_msr.cli", "--help").stdout


def test_a_user_error_is_one_line_and_exit_code_1() -> None:
    ended = python("-m", "mllm_msr.cli", "presets", "apply", "none")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: presets: expected a preset among ")
    assert ended.stderr.count("\n") == 1


def test_an_interrupt_while_importing_is_one_line_and_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupt)
    monkeypatch.setattr(sys, "argv", ["mllm-msr", "store", "show"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == INTERRUPTED
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.strip().startswith("interrupted; ")
    assert shown.err.strip().count("\n") == 0


# -- shell completion ------------------------------------------------------------------------------


def complete(typed: str) -> list[str]:
    """Return what bash is offered after the typed words; the last one is incomplete."""
    ended = python(
        "-m",
        "mllm_msr.cli",
        _MLLM_MSR_COMPLETE="complete_bash",
        COMP_WORDS=typed,
        COMP_CWORD=str(typed.count(" ")),
    )
    return ended.stdout.split()


def test_help_offers_to_install_completion() -> None:
    assert "--install-completion" in CliRunner().invoke(cli.app, ["--help"]).output


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("mllm-msr st", ["study", "store"]),
        ("mllm-msr presets ", ["list", "show", "apply"]),
        ("mllm-msr none ", list(cli.SUBCOMMANDS)),
    ],
)
def test_bash_is_offered_subcommands_and_commands(typed: str, offered: list[str]) -> None:
    assert complete(typed) == offered

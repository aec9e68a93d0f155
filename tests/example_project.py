"""Code blocks of docs/extending.md, and what their tests do with a copy of the project."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

PAGE = Path("docs/extending.md").read_text(encoding="utf-8")


def block_after(words: str, language: str) -> str:
    """Return the first block of code after some words of the page."""
    text = PAGE[PAGE.index(words) :]
    block = re.search(rf"^   ```{language}\n(.*?)^   ```$", text, re.DOTALL | re.MULTILINE)
    assert block
    return re.sub("^   ", "", block[1], flags=re.MULTILINE)


def call(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a module of a project."""
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


def run(project: Path, *words: str) -> str:
    """Run a module of a project that must succeed, and return its output."""
    ended = call(project, *words)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def change_settings(project: Path, changes: dict[str, dict[str, Any]]) -> None:
    """Change keys of a project's params.yaml, by section."""
    path = project / "params.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, values in changes.items():
        settings[section] |= values
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")


def replace(file: Path, old: str, new: str) -> None:
    """Replace a text that a file has once."""
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file} has no longer {old}"
    file.write_text(text.replace(old, new), encoding="utf-8")

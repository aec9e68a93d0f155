"""Code that relies on private APIs names the version range that the project requires."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
RANGE = re.compile(r"\b(transformers|peft|accelerate)(>=[\d.]+,<\d+)")


def test_version_ranges_in_the_code_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = dict(RANGE.findall(" ".join(project["dependencies"])))
    assert required.keys() == {"transformers", "peft", "accelerate"}
    named = [
        found
        for path in (ROOT / "mllm_msr").rglob("*.py")
        for found in RANGE.findall(path.read_text(encoding="utf-8"))
    ]
    assert len(named) > 5
    assert set(named) <= required.items()

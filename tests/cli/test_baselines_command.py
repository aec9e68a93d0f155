"""The baselines' commands: which there are, which are switched on, and their settings."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mllm_msr.cli.baselines import app
from mllm_msr.core.errors import ParamsError

ROOT = Path(__file__).parents[2]
SETTINGS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
STAGES = ("baselines", "feature_baselines", "text_baselines")


def call(*words: str) -> str:
    return CliRunner().invoke(app, words, catch_exceptions=False).stdout


def test_list_has_a_line_for_each_baseline_with_settings() -> None:
    lines = call("list").splitlines()
    names = {name for stage in STAGES for name in SETTINGS[stage] if name != "models"}
    assert len(lines) == len(names)
    assert {line.split()[0] for line in lines} == names


def test_list_tells_stage_and_whether_the_settings_switch_it_on() -> None:
    for line in call("list").splitlines():
        name, stage, state = line.split()[0], *line.split()[-2:]
        assert name in SETTINGS[stage]
        assert state == ("on" if name in SETTINGS[stage]["models"] else "off")


def test_show_prints_the_settings_as_yaml() -> None:
    assert yaml.safe_load(call("show", "sasrec_f")) == SETTINGS["feature_baselines"]["sasrec_f"]


def test_show_reads_the_file_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("    days: 30", "    days: 3"), encoding="utf-8")
    assert call("show", "recent_popularity", "--params", str(path)) == "days: 3\n"


def test_the_shipped_settings_are_read_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("show", "recent_popularity") == "days: 30\n"


def test_an_unknown_baseline_is_an_error() -> None:
    with pytest.raises(ParamsError, match="got 'none'"):
        call("show", "none")


def test_wrong_settings_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("baselines: {models: []}\n", encoding="utf-8")
    with pytest.raises(ParamsError, match="expected a section"):
        call("list", "--params", str(path))

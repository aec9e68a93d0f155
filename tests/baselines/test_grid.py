"""The grids of settings that can be tried, without trying them."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bench.baselines import settings_of
from mllm_msr.baselines.discovery import all_baselines
from mllm_msr.core.params import BaselinesParams, load_all_params, load_params

PARAMS = Path("params.yaml")


def test_every_baseline_that_is_run_has_a_grid_of_settings_that_are_accepted() -> None:
    settings = load_all_params(PARAMS)
    run = {
        *settings.baselines.models,
        *settings.feature_baselines.models,
        *settings.text_baselines.models,
    }
    grids = {baseline.name for baseline in all_baselines() if baseline.grid}
    assert grids == run
    for model in grids:
        tried = [settings.model_dump_json() for settings in settings_of(model, PARAMS)]
        assert len(set(tried)) == len(tried) > 1


@pytest.mark.parametrize(
    "model", ["item_knn", "content_knn", "markov", "fpmc", "gru4rec", "sasrec", "bert4rec"]
)
def test_what_was_chosen_on_microlens_is_in_the_grid(model: str, tmp_path: Path) -> None:
    chosen = yaml.safe_load(Path("presets/microlens.yaml").read_text())["baselines"][model]
    settings = yaml.safe_load(PARAMS.read_text())
    settings["baselines"][model] |= chosen
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    own = load_params(BaselinesParams, tmp_path / "params.yaml").of(model)
    assert own in list(settings_of(model, tmp_path / "params.yaml"))


def test_a_model_without_a_grid_is_one_line() -> None:
    command = [sys.executable, "-m", "bench.baselines", "gru4rec_image"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: bench/baselines.py: expected one of sasrec_f,")
    assert ended.stderr.count("\n") == 1

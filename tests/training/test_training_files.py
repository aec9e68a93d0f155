"""The placeholder files of a run without a training can be plotted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mllm_msr.training.files import CURVES, write_empty_curves, write_no_training


def test_curves_without_points_replace_those_of_an_earlier_run(tmp_path: Path) -> None:
    old = tmp_path / "curves/plots/metrics/train/loss.tsv"
    old.parent.mkdir(parents=True)
    old.write_text("step\tloss\n1\t2.0\n", encoding="utf-8")
    write_empty_curves(tmp_path / "curves")
    files = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.tsv")}
    folder = Path("curves/plots/metrics")
    assert files == {folder / f"{n}.tsv": f"step\t{Path(n).name}\n" for n in CURVES.values()}


@pytest.mark.slow
def test_the_plots_of_a_run_without_a_training_are_shown(tmp_path: Path) -> None:
    plots = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["plots"]
    curves = [plot for plot in plots if "data/sft" in json.dumps(plot)]
    assert curves
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"plots": curves}), encoding="utf-8")
    write_no_training(tmp_path / "data/sft")
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "--quiet"], cwd=tmp_path, check=True)
    shown = subprocess.run(
        [*dvc, "plots", "show"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0
    assert "failed" not in shown.stdout + shown.stderr
    assert (tmp_path / "dvc_plots/index.html").is_file()

"""Two processes train what one trains, with replicated or sharded weights, and go on from it."""

import csv
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from training_jobs import STEPS, Job, command, run

if TYPE_CHECKING:
    from families import Family
    from small_world import SmallWorld

    from mllm_msr.engines.local import LocalModel
    from mllm_msr.images.gallery import Gallery

pytestmark = pytest.mark.slow

KINDS = ("replicated", "sharded")  # weights: DDP and FSDP2
# Divisions of the steps: by batches, by parts of batches, and by sequences.
CHANGES: dict[str, dict[str, Any]] = {
    "batches": {},
    "parts": {"accumulation": 1},
    "sequences": {"loss": "listwise"},
}
PLAIN = Job("")
DEATHS = {"middle": Job("", dies_at=2), "end": Job("", dies_at=STEPS, in_training=False)}


@dataclass(frozen=True)
class Trained:
    """The outputs of a training."""

    out: Path

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Return the points of a training curve."""
        path = self.out / "curves/plots/metrics" / f"{name}.tsv"
        with path.open(encoding="utf-8") as file:
            rows = csv.DictReader(file, delimiter="\t")
            return [(int(row["step"]), float(row[name.rpartition("/")[2]])) for row in rows]

    def assert_equals(self, other: "Trained") -> None:
        """Compare losses by step, at the start up to the rounding of float32, and adapters."""
        for name in ("train/loss", "valid/loss", "valid/auc"):
            found, expected = self.curve(name), other.curve(name)
            assert [step for step, _ in found] == [step for step, _ in expected]
            values = [[value for _, value in one] for one in (found, expected)]
            assert values[0][:STEPS] == pytest.approx(values[1][:STEPS], rel=1e-4)
            assert values[0] == pytest.approx(values[1], rel=1e-2)
        weights = [
            load_file(one.out / "adapter/adapter_model.safetensors") for one in (self, other)
        ]
        torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-3)


@pytest.fixture(scope="module")
def trained(
    build: "Callable[[str], Family]",
    llava: "LocalModel",
    world: "SmallWorld",
    gallery: "Gallery",
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Trained]:
    """Run all trainings, those of two processes in one launch; return the one of a name."""
    folder = tmp_path_factory.mktemp("trainings")

    def job(name: str, like: Job = PLAIN) -> Job:
        out = folder / name
        out.mkdir(exist_ok=True)
        return replace(like, out=str(out), sharded=name.startswith("sharded"))

    def run_alone(name: str, like: Job = PLAIN) -> None:
        run(replace(job(name, like), sharded=False), llava, gallery)

    together = []
    for way, changes in CHANGES.items():
        run_alone(f"alone {way}", Job("", changes=changes))
        together += [job(f"{kind} {way}", Job("", changes=changes)) for kind in KINDS]
    for when, death in DEATHS.items():
        run_alone(f"begun alone {when}", death)
        for kind in KINDS:
            shutil.copytree(folder / f"begun alone {when}", folder / f"{kind} goes on {when}")
            together += [job(f"{kind} goes on {when}"), job(f"{kind} begins {when}", death)]
    words = command(build("llava").folder, world.images, together)
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-5000:]
    for when in DEATHS:
        for kind in KINDS:
            run_alone(f"{kind} begins {when}")
    return lambda name: Trained(folder / name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", CHANGES)
def test_two_processes_train_what_one_trains(
    trained: Callable[[str], Trained], kind: str, way: str
) -> None:
    trained(f"{kind} {way}").assert_equals(trained(f"alone {way}"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", DEATHS)
def test_two_processes_go_on_where_one_was_killed(
    trained: Callable[[str], Trained], kind: str, when: str
) -> None:
    trained(f"{kind} goes on {when}").assert_equals(trained("alone batches"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", DEATHS)
def test_one_process_goes_on_where_two_were_killed(
    trained: Callable[[str], Trained], kind: str, when: str
) -> None:
    trained(f"{kind} begins {when}").assert_equals(trained("alone batches"))


def test_checkpoints_of_sharded_weights_have_the_files_of_a_single_process(
    trained: Callable[[str], Trained],
) -> None:
    def files(name: str) -> set[str]:
        (checkpoint,) = (trained(name).out / "work").glob(f"checkpoint-{STEPS}")
        random = "rng_state"
        return {path.name for path in checkpoint.iterdir() if not path.name.startswith(random)}

    assert files("sharded batches") == files("alone batches")

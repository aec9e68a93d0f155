"""Small trainings that ``accelerate launch`` can run: in one process and in several.

    accelerate launch ... tests/training_jobs.py MODEL IMAGES JOBS

``JOBS`` is a JSON list of the fields of :class:`Job`.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from mllm_msr.core.params import LoraParams, SftParams
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.images.gallery import Gallery
from mllm_msr.method.examples import Example, Question
from mllm_msr.method.prompts import load_prompts, recommendation
from mllm_msr.training.finetuning import AnswerTrainer, FineTuning

ROOT = Path(__file__).parents[1]
TEMPLATES = load_prompts("recommender", ROOT / "prompts.yaml")
# 26 pairs: the last of four steps has one batch of two.
PARAMS = SftParams(
    lora=LoraParams(rank=4, alpha=8, dropout=0.0, layers=["q_proj", "v_proj", "down_proj"]),
    loss="yes_no",
    epochs=2,
    learning_rate=0.01,
    schedule="linear",
    warmup_share=0.1,
    batch_size=4,
    accumulation=2,
    max_gradient_norm=1.0,
    select_by="auc",
    validation_sequences=9,
    seed=5,
)
SEQUENCES, STEPS = 13, 4  # of training; optimizer steps of an epoch


@dataclass(frozen=True)
class Job:
    """A training.

    Attributes:
        out: Its folder, with the checkpoints.
        sharded: Whether with FSDP.
        changes: Of the settings.
        dies_at: The step at which all processes end: in the training that follows it, or in the
            validation, with a checkpoint at every step.
        in_training: Whether in training.
    """

    out: str
    sharded: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    dies_at: int | None = None
    in_training: bool = True


def run(job: Job, model: LocalModel, gallery: Gallery) -> None:
    """Run a training, or until it dies."""
    out = Path(job.out)
    question = recommendation(TEMPLATES, "", "", None, None)
    yes, no = (model.encoder.answer_token_id(question, answer) for answer in ("yes", "no"))
    params = PARAMS.model_copy(update=job.changes)
    tuning = FineTuning(model, (yes, no), params, out / "work", out)
    train = [make_example(s, label, gallery) for s in range(SEQUENCES) for label in (False, True)]
    valid = [make_example(s, label, gallery) for s in (20, 21, 22) for label in (True, False)]
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, job)
        with contextlib.suppress(KeyboardInterrupt), sharding(patch, job.sharded):
            tuning.run(train, valid)
            assert job.dies_at is None


def make_example(sequence: int, label: bool, gallery: Gallery) -> Example:
    """Return an example whose title determines the answer; some have an image."""
    title = f"{'red red red' if label else 'blue'} {sequence}"
    item = "ad"[sequence % 2]
    prompt = recommendation(TEMPLATES, "Likes red.", title, gallery.image_ref(item), None)
    return Example(Question(sequence, item if label else "b", label), prompt)


def watch(patch: pytest.MonkeyPatch, job: Job) -> None:
    """Check in each forward that the model is sharded or not, and let all processes end at a step.

    In a training that is to end, checkpoints are at every step.
    """
    forward = AnswerTrainer._run

    def run_or_die(trainer: AnswerTrainer, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        layers = trainer.accelerator.unwrap_model(model).get_base_model().get_decoder().layers
        assert {isinstance(layer, FSDPModule) for layer in layers} == {job.sharded}
        if trainer.state.global_step == job.dies_at and model.training == job.in_training:
            raise KeyboardInterrupt
        return forward(trainer, model, inputs)

    patch.setattr(AnswerTrainer, "_run", run_or_die)
    if job.dies_at is not None:
        patch.setattr("mllm_msr.training.finetuning.CHECKPOINT_SECONDS", 0)


@contextlib.contextmanager
def sharding(patch: pytest.MonkeyPatch, wanted: bool) -> Iterator[None]:
    """Let accelerate use FSDP2, as its configuration does, which it ignores on CPUs."""
    AcceleratorState._reset_state()
    if wanted:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("FSDP_VERSION", "2")
        patch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
        start = AcceleratorState.__init__

        def start_sharded(state: Any, *arguments: Any, **options: Any) -> None:
            start(state, *arguments, **options)
            if plugin := options.get("fsdp_plugin"):
                state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin

        patch.setattr(AcceleratorState, "__init__", start_sharded)
    yield


def main(model: str, images: str, jobs: str) -> None:
    """Run trainings one after the other."""
    torch.set_num_threads(1)
    with Gallery(Path(images)) as gallery:
        loaded = LocalModel(Encoder(model, None, gallery))
        assert PartialState().num_processes == int(os.environ.get("WORLD_SIZE", "1"))
        for job in json.loads(jobs):
            run(Job(**job), loaded, gallery)


def command(folder: Path, images: Path, jobs: list[Job]) -> list[str]:
    """Return the command line that runs trainings in two processes on the CPU."""
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
    ]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launch += ["--main_process_port=0"]
    given = json.dumps([dataclasses.asdict(job) for job in jobs])
    return [*launch, os.fspath(Path(__file__)), str(folder), str(images), given]


if __name__ == "__main__":
    main(*sys.argv[1:])

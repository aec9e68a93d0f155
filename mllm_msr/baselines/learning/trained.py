"""Trained baselines in the state directory: what was trained once is loaded and only scores.

A file is named by a key of everything that its training depends on: settings, what is known, the
tables that the stage reads, the code, and the packages that train. The candidates to score are no
part of it. So a further evaluation protocol trains nothing again, nor does an experiment that comes
back to earlier settings. The device is no part of it either: a model trained on a GPU scores on a
CPU.
"""

import hashlib
import importlib.metadata
import json
import logging
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mllm_msr.baselines.discovery import MODELS, Baseline, Inputs, Learner
from mllm_msr.core.errors import explain_out_of_memory
from mllm_msr.core.files import atomic_write, file_digest
from mllm_msr.core.params import Section

if TYPE_CHECKING:
    from mllm_msr.baselines.task import Task, Training
    from mllm_msr.core.arrays import Floats

log = logging.getLogger(__name__)

PACKAGES = ("cornac", "torch")  # another release may train another model
# Code that several baselines share, in the folder of the package mllm_msr.
SHARED_CODE = ("baselines/*.py", "baselines/learning/*.py", "ranking.py")
MEMORY_SETTINGS = ("batch_size", "width")  # the lower, the less memory a training needs
DIGEST = "digest"  # in a file's metadata: the SHA-256 of its arrays

Arrays = dict[str, npt.NDArray[Any]]


def score_candidates(
    baseline: Baseline, task: "Task", settings: Section, inputs: Inputs, keep: Path | None = None
) -> "Floats":
    """Score every candidate of a task by a baseline, [candidates].

    Args:
        baseline: One that computes its scores, or one that learns.
        task: What is known and asked.
        settings: The baseline's own.
        inputs: Further tables.
        keep: Folder of trained baselines (:func:`fit_or_load`); None trains and keeps nothing.

    Raises:
        DataError: A table is missing, of another run, or lacks what the baseline needs.
        ModelError: The baseline needs a package that is not installed, its training diverges, or
            memory runs out in it.
    """
    if baseline.score:
        return baseline.score(task, settings, inputs)
    return fit_or_load(baseline, task.training, settings, inputs, keep).score_candidates(task)


def fit_or_load(
    baseline: Baseline,
    training: "Training",
    settings: Section,
    inputs: Inputs,
    keep: Path | None = None,
) -> Learner:
    """Return a trained model: loaded if it was trained on the same before, else trained and kept.

    A damaged file counts as missing.

    Args:
        baseline: One that learns.
        training: What to learn from.
        settings: The baseline's own.
        inputs: Further tables.
        keep: Folder of trained baselines; None trains and keeps nothing.

    Raises:
        DataError: As :func:`score_candidates`; or the disk is full.
        ModelError: As :func:`score_candidates`.
    """
    assert baseline.build, "a baseline that learns has it"
    learner = baseline.build(training, settings, inputs)
    if keep is None:
        _fit(learner, baseline, settings)
        return learner
    key = compute_key(baseline, training, settings, inputs)
    path = keep / baseline.name / f"{key}.safetensors"
    if state := _read(path):
        log.info("%s: loaded %s", baseline.name, path)
        learner.load(state)
        return learner
    _fit(learner, baseline, settings)
    _write(learner.state(), path)
    return learner


def _fit(learner: Learner, baseline: Baseline, settings: Section) -> None:
    """Train a model.

    Raises:
        DataError: As :func:`score_candidates`.
        ModelError: As :func:`score_candidates`.
    """
    names = [name for name in MEMORY_SETTINGS if hasattr(settings, name)]
    lower = " or ".join(f"{name} (now {getattr(settings, name)})" for name in names)
    other = f"lower its {lower}" if names else f"leave it out of {baseline.stage}.models"
    where, fix = f"{baseline.stage}.{baseline.name}", f"free memory, or {other}"
    with explain_out_of_memory("the training", where, fix):
        learner.fit()


def compute_key(baseline: Baseline, training: "Training", settings: Section, inputs: Inputs) -> str:
    """Return the hexadecimal SHA-256 of everything that the training of a baseline depends on."""
    tables = {name: path for name, path in vars(inputs).items() if path}
    parts = {
        "settings": settings.model_dump(mode="json"),
        "training": _digest_arrays(_list_arrays(training)),
        "tables": {name: file_digest(path) for name, path in tables.items()},
        "code": sorted(map(file_digest, _find_code(baseline.name))),
        "packages": {name: _find_version(name) for name in PACKAGES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _list_arrays(training: "Training") -> Arrays:
    """Return all that is learned from as arrays."""
    known, selection = training.known, training.selection
    lengths = [len(history) for history in training.histories]
    arrays = {
        "items": np.array(training.items, dtype=np.str_),
        "users": np.array(training.users, dtype=np.str_),
        "known.users": known.users,
        "known.items": known.items,
        "known.timestamps": known.timestamps,
        "longest": np.array(training.longest),
        "lengths": np.array(lengths, dtype=np.int64),
        "histories": np.concatenate([np.empty(0, dtype=np.int64), *training.histories]),
        "selection.questions": selection.questions,
        "selection.items": selection.items,
        "selection.labels": selection.labels,
    }
    return {name: array for name, array in arrays.items() if array is not None}


def _digest_arrays(arrays: Arrays) -> str:
    """Return the SHA-256 of arrays, their names, types and shapes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _find_code(name: str) -> list[Path]:
    """Return the files whose code may train a baseline: its own, and those that several share."""
    own = Path(str(import_module(f"{MODELS}.{name}").__file__))
    package = Path(__file__).parents[2]
    return [own, *(path for pattern in SHARED_CODE for path in package.glob(pattern))]


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> Arrays | None:
    """Read a trained state; None where there is none, or a damaged one."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            digest = (file.metadata() or {}).get(DIGEST)
    except SafetensorError:
        digest, state = None, {}
    if digest == _digest_arrays(state):
        return state
    log.warning("%s is damaged and counts as missing; check the disk", path)
    return None


def _write(state: Arrays, path: Path) -> None:
    """Write a trained state atomically, with the digest of its arrays."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(state, {DIGEST: _digest_arrays(state)}))

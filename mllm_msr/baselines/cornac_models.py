"""Training and scoring of Cornac's models: baselines that learn from who took what.

Those of sequences learn to tell the next of each user's known interactions, and score the history
of a question. Each model's function is in its own file of ``mllm_msr/baselines/models``.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mllm_msr.baselines.settings import LearnedParams
from mllm_msr.baselines.task import Floats, Integers, Task
from mllm_msr.core.devices import find_device_for_small_steps
from mllm_msr.core.errors import ModelError

try:
    from cornac.data import Dataset, ImageModality, SequentialDataset
    from cornac.models import FPMC, VBPR, BERT4Rec, GRU4Rec, SASRec
    from cornac.models.recommender import NextItemRecommender
except ImportError as error:
    fix = "pip install '.[baselines]', or leave the baseline out"
    raise ModelError(
        expected="the package Cornac", got="none", where="baselines.models", fix=fix
    ) from error

# With Cornac's classes, so that only this module says what to do where it is not installed.
__all__ = [
    "FPMC",
    "VBPR",
    "BERT4Rec",
    "Dataset",
    "GRU4Rec",
    "ImageModality",
    "SASRec",
    "find_longest",
    "name_device",
    "number",
    "pick_candidates",
    "score_next_items",
    "translate",
]

CORNACS_NAMES = {
    "width": "embedding_dim",
    "epochs": "n_epochs",
    "negatives": "n_sample",
    "popularity_exponent": "sample_alpha",
    "blocks": "num_blocks",
    "heads": "num_heads",
}


def translate(settings: LearnedParams, *without: str) -> dict[str, Any]:
    """Return settings under Cornac's names, and the device.

    Args:
        settings: Of a sequential model.
        without: Names of settings to leave out.
    """
    named = settings.model_dump(exclude=set(without)).items()
    return {CORNACS_NAMES.get(name, name): value for name, value in named} | {
        "device": name_device(),
        "verbose": True,  # a progress bar
    }


def name_device() -> str:
    """Return CUDA or the CPU: Cornac runs on no other."""
    return "cuda" if find_device_for_small_steps().type == "cuda" else "cpu"


def find_longest(task: Task) -> int:
    """Return the number of items of the longest history."""
    return max(map(len, task.questions.histories))


def number(task: Task) -> dict[str, Any]:
    """Return the known interactions as arguments of a Cornac dataset, under the task's integer ids.

    Items without a known interaction keep their numbers too.
    """
    known = task.known
    return {
        "num_users": len(task.users),
        "num_items": len(task.items),
        "uid_map": OrderedDict(enumerate(range(len(task.users)))),
        "iid_map": OrderedDict(enumerate(range(len(task.items)))),
        "uir_tuple": (known.users, known.items, np.ones(len(known.users))),
    }


def score_next_items(model: NextItemRecommender, task: Task, users: Integers) -> Floats:
    """Train on each user's known interactions as one session, and score the histories.

    Args:
        model: Untrained.
        task: What is known and asked.
        users: Who each question is asked about, as Cornac numbers users, [questions].
    """
    known, seed = task.known, model.seed
    sessions = np.unique(known.users)
    data = SequentialDataset(
        **number(task),
        num_sessions=len(sessions),
        sid_map=OrderedDict(zip(sessions.tolist(), sessions.tolist(), strict=True)),
        session_indices=known.users,
        seed=seed,
    )
    torch.manual_seed(seed)  # GRU4Rec's dropout takes chance from here
    model.fit(data)
    asked = zip(users.tolist(), task.questions.histories, strict=True)
    with torch.no_grad():
        return pick_candidates(
            task, (model.score(user, history.tolist()) for user, history in asked)
        )


def pick_candidates(task: Task, scores: Iterable[npt.NDArray[np.floating]]) -> Floats:
    """Return the candidates' scores, [candidates].

    Args:
        task: What is asked.
        scores: Those of all items, an array [items] per question.
    """
    asked = task.candidates
    starts = np.searchsorted(asked.questions, np.arange(len(task.questions.users)))
    items = np.split(asked.items, starts[1:])
    picked = [all_items[chosen] for all_items, chosen in zip(scores, items, strict=True)]
    return np.concatenate(picked).astype(np.float64)

"""Baselines that learn from who took what, as Cornac has them. None sees a text; VBPR sees images.

- FPMC, Rendle et al., WWW 2010
- GRU4Rec, Hidasi et al., ICLR 2016
- SASRec, Kang and McAuley, ICDM 2018
- BERT4Rec, Sun et al., CIKM 2019; here trained to tell the last item from those before it, which
  Cornac prefers to masks
- VBPR, He and McAuley, AAAI 2016

The first four learn to tell the next of each user's known interactions, and score the history of a
question; FPMC its last item and its user. VBPR knows no order and scores the user.

Settings are those of :mod:`mllm_msr.core.params`; each function gives a score per candidate.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mllm_msr.baselines.task import Floats, Integers, Task, find_cold_users
from mllm_msr.core.devices import find_device_for_small_steps
from mllm_msr.core.errors import DataError, ModelError

try:
    from cornac.data import Dataset, ImageModality, SequentialDataset
    from cornac.models import FPMC, VBPR, BERT4Rec, GRU4Rec, SASRec
    from cornac.models.recommender import NextItemRecommender
except ImportError as error:
    fix = "pip install '.[baselines]', or leave the baseline out"
    raise ModelError(
        expected="the package Cornac", got="none", where="baselines.models", fix=fix
    ) from error

NOBODY = -1  # Cornac's FPMC scores a user whom it does not know by the last item alone
CORNACS_NAMES = {
    "width": "embedding_dim",
    "epochs": "n_epochs",
    "negatives": "n_sample",
    "popularity_exponent": "sample_alpha",
    "blocks": "num_blocks",
    "heads": "num_heads",
}


def fpmc(task: Task, **settings: Any) -> Floats:
    """Train FPMC and score the candidates by user and last item.

    It learns of a user from each step to a next item. A user without one has a vector of chance,
    so that the last item alone scores.
    """
    users, strangers = task.questions.users, find_cold_users(task, least=2)
    asked = np.where(strangers[users], NOBODY, users)
    return _score_next_items(FPMC(**_translate(settings)), task, asked)


def gru4rec(task: Task, *, width: int, dropout: float, batch_size: int, **settings: Any) -> Floats:
    """Train GRU4Rec, one layer whose items are embedded alike on both sides, and score.

    Raises:
        DataError: There is nothing to train on.
    """
    sessions = np.count_nonzero(np.bincount(task.known.users) > 1)
    if not sessions:
        fix = "bring more users, or leave gru4rec out of baselines.models"
        raise DataError(
            expected="users with two known interactions",
            got="none",
            where="filter_sequences",
            fix=fix,
        )
    model = GRU4Rec(
        layers=[width],
        dropout_p_embed=dropout,
        batch_size=min(batch_size, sessions),  # Cornac fails on a batch that it cannot fill
        **_translate(settings),
    )
    return _score_next_items(model, task, task.questions.users)


def sasrec(task: Task, **settings: Any) -> Floats:
    """Train SASRec on stretches as long as the longest history, and score."""
    model = SASRec(max_len=_longest(task), **_translate(settings))
    return _score_next_items(model, task, task.questions.users)


def bert4rec(task: Task, **settings: Any) -> Floats:
    """Train BERT4Rec on stretches as long as the longest history, and score."""
    model = BERT4Rec(max_len=_longest(task), **_translate(settings))
    return _score_next_items(model, task, task.questions.users)


def vbpr(
    task: Task,
    features: npt.NDArray[np.float32],
    *,
    width: int,
    image_width: int,
    epochs: int,
    seed: int,
    **settings: Any,
) -> Floats:
    """Train VBPR and score the candidates by user; of one who took nothing, by the items alone.

    Args:
        task: What is known and asked.
        features: Of the items' images, [items, any width].
        width: Of the factors of users and items.
        image_width: Of the users' factors for images, and of the images' projection.
        epochs: Passes over the known interactions.
        seed: Of weights, order and negatives.
        settings: Cornac's batch_size, learning_rate, lambda_w, lambda_b, lambda_e.

    Returns:
        A score per candidate, [candidates].
    """
    data = Dataset(**_number(task), seed=seed)
    data.add_modalities(item_image=ImageModality(features=features))
    model = VBPR(
        k=width,
        k2=image_width,
        n_epochs=epochs,
        use_gpu=_device() == "cuda",
        seed=seed,
        verbose=True,  # a progress bar
        **settings,
    ).fit(data)
    strangers = find_cold_users(task, least=1)  # whose vectors are still those of chance
    model.gamma_user[strangers] = 0
    model.theta_user[strangers] = 0
    return _score_users(model, task)


def _translate(settings: dict[str, Any]) -> dict[str, Any]:
    """Give settings under Cornac's names, and the device."""
    return {CORNACS_NAMES.get(name, name): value for name, value in settings.items()} | {
        "device": _device(),
        "verbose": True,  # a progress bar
    }


def _device() -> str:
    """Give CUDA or the CPU: Cornac runs on no other."""
    return "cuda" if find_device_for_small_steps().type == "cuda" else "cpu"


def _longest(task: Task) -> int:
    return max(map(len, task.questions.histories))


def _number(task: Task) -> dict[str, Any]:
    """Say what is known as Cornac's data sets take it; our numbers stay, unknown items too."""
    known = task.known
    return {
        "num_users": len(task.users),
        "num_items": len(task.items),
        "uid_map": OrderedDict(enumerate(range(len(task.users)))),
        "iid_map": OrderedDict(enumerate(range(len(task.items)))),
        "uir_tuple": (known.users, known.items, np.ones(len(known.users))),
    }


def _score_next_items(model: NextItemRecommender, task: Task, users: Integers) -> Floats:
    """Train on each user's known interactions as one session, and score the histories.

    Args:
        model: Untrained.
        task: What is known and asked.
        users: Who each question is asked about; perhaps ``NOBODY``, [questions].
    """
    known, seed = task.known, model.seed
    sessions = np.unique(known.users)
    data = SequentialDataset(
        **_number(task),
        num_sessions=len(sessions),
        sid_map=OrderedDict(zip(sessions.tolist(), sessions.tolist(), strict=True)),
        session_indices=known.users,
        seed=seed,
    )
    torch.manual_seed(seed)  # GRU4Rec's dropout takes chance from here
    model.fit(data)
    asked = zip(users.tolist(), task.questions.histories, strict=True)
    with torch.no_grad():
        return _pick(task, (model.score(user, history.tolist()) for user, history in asked))


def _score_users(model: VBPR, task: Task) -> Floats:
    return _pick(task, map(model.score, task.questions.users.tolist()))


def _pick(task: Task, scores: Iterable[npt.NDArray[np.floating]]) -> Floats:
    """Take the candidates' scores out of those of all items, one array per question."""
    asked = task.candidates
    starts = np.searchsorted(asked.questions, np.arange(len(task.questions.users)))
    items = np.split(asked.items, starts[1:])
    picked = [all_items[chosen] for all_items, chosen in zip(scores, items, strict=True)]
    return np.concatenate(picked).astype(np.float64)

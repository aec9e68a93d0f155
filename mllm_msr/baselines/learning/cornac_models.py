"""Training and scoring of Cornac's models: baselines that learn from who took what.

Those of sequences learn to tell the next of each user's known interactions, and score the history
of a question. Each baseline's settings and its function are in its own file of
``mllm_msr/baselines/models``.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mllm_msr.baselines.settings import LearnedParams, TransformerParams
from mllm_msr.baselines.task import Task, Training, find_cold_users, log_cold_users
from mllm_msr.core.arrays import Floats, Integers
from mllm_msr.core.devices import find_device_for_small_steps
from mllm_msr.core.errors import ModelError, install_command

try:
    from cornac.data import Dataset, ImageModality, SequentialDataset
    from cornac.models import FPMC, VBPR, BERT4Rec, GRU4Rec, SASRec
    from cornac.models.recommender import NextItemRecommender
except ImportError as error:
    fix = f"{install_command('baselines')}, or leave the baseline out"
    raise ModelError(
        expected="the package Cornac", got="none", where="baselines.models", fix=fix
    ) from error

# With Cornac's classes, so that only this module says what to do where it is not installed.
__all__ = [
    "FPMC",
    "VBPR",
    "BERT4Rec",
    "GRU4Rec",
    "ImageModality",
    "NextItemLearner",
    "PairDataset",
    "SASRec",
    "build_transformer",
    "name_device",
    "number",
    "pick_candidates",
    "translate",
]

NOBODY = -1  # Cornac's FPMC scores a user whom it does not know by the last item alone

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


def number(training: Training) -> dict[str, Any]:
    """Return the known interactions as arguments of a Cornac dataset, under the task's integer ids.

    Items without a known interaction keep their numbers too.
    """
    known, users, items = training.known, len(training.users), len(training.items)
    return {
        "num_users": users,
        "num_items": items,
        "uid_map": OrderedDict(enumerate(range(users))),
        "iid_map": OrderedDict(enumerate(range(items))),
        "uir_tuple": (known.users, known.items, np.ones(len(known.users))),
    }


class PairDataset(Dataset):  # type: ignore[misc]
    """Known interactions, each with a sampled item that the user has not taken.

    Cornac's own also samples items without a known interaction, and looks up one pair at a time.
    """

    def uij_iter(
        self, batch_size: int = 1, shuffle: bool = False, neg_sampling: str = "uniform"
    ) -> Iterator[tuple[Integers, Integers, Integers]]:
        """Yield batches of users, their items and negatives, uniform over items that are not cold.

        Interactions of users who took every such item are left out.

        Raises:
            NotImplementedError: Another sampling than ``uniform``.
        """
        if neg_sampling != "uniform":
            raise NotImplementedError(neg_sampling)
        users, items, _ = self.uir_tuple
        pool, pairs = np.unique(items), np.unique(users * self.num_items + items)
        all_taken = np.bincount(pairs // self.num_items, minlength=self.num_users) == len(pool)
        for batch in self.idx_iter(len(users), batch_size, shuffle):
            rows = batch[~all_taken[users[batch]]]
            negatives = self.rng.choice(pool, len(rows))
            while (taken := _contains(pairs, users[rows] * self.num_items + negatives)).any():
                negatives[taken] = self.rng.choice(pool, np.count_nonzero(taken))
            if len(rows):
                yield users[rows], items[rows], negatives


class NextItemLearner:
    """A Cornac model of sequences, which trains on each user's known interactions as one session.

    Cornac makes the network of a model only inside ``fit``, and keeps a model only by pickle, which
    may run code when it is read. So :meth:`load` trains for no epoch, which makes the network and
    all that scoring needs, and then puts the kept weights into it.
    """

    def __init__(
        self, model: NextItemRecommender, training: Training, least: int | None = None
    ) -> None:
        """Take an untrained model, and what it learns from.

        Args:
            model: Untrained.
            training: What is known.
            least: Of a model that learns of users, the known interactions from which on it does;
                None for one that reads the history alone.
        """
        self.model, self.training, self.least = model, training, least
        self.cold = find_cold_users(training, least or 0)

    def fit(self) -> None:
        """Train on all sessions."""
        self._fit()

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return the network's weights."""
        weights = self.model.model.state_dict()
        return {name: tensor.cpu().numpy() for name, tensor in weights.items()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Make the network and load its weights."""
        self.model.n_epochs, self.model.verbose = 0, False
        self._fit()
        weights = {name: torch.from_numpy(array) for name, array in state.items()}
        self.model.model.load_state_dict(weights)

    @torch.no_grad()
    def score_items(self, user: int | None, history: Integers) -> Floats:
        """Score all items as the next one; of a cold-start user, by the history alone."""
        asked = NOBODY if user is None or self.cold[user] else user
        return np.asarray(self.model.score(asked, history.tolist()), dtype=np.float64)

    def score_candidates(self, task: Task) -> Floats:
        """Score candidates by the histories of their questions."""
        if self.least is not None:
            log_cold_users(task, self.least)
        return pick_candidates(task, self.score_items)

    def _fit(self) -> None:
        known, seed = self.training.known, self.model.seed
        sessions = np.unique(known.users)
        data = SequentialDataset(
            **number(self.training),
            num_sessions=len(sessions),
            sid_map=OrderedDict(zip(sessions.tolist(), sessions.tolist(), strict=True)),
            session_indices=known.users,
            seed=seed,
        )
        torch.manual_seed(seed)  # GRU4Rec's dropout takes chance from here
        self.model.fit(data)


def _contains(ascending: Integers, numbers: Integers) -> npt.NDArray[np.bool_]:
    """Return which numbers are in a sorted array that is not empty, [numbers]."""
    places = np.searchsorted(ascending, numbers)
    return np.asarray(ascending.take(places, mode="clip") == numbers)


def build_transformer(
    model: type[SASRec | BERT4Rec], training: Training, settings: TransformerParams
) -> NextItemLearner:
    """Build SASRec or BERT4Rec on stretches as long as the longest history."""
    return NextItemLearner(model(max_len=training.longest, **translate(settings)), training)


def pick_candidates(task: Task, score_items: Callable[[int | None, Integers], Floats]) -> Floats:
    """Score all items for each question and return the candidates' scores, [candidates].

    Args:
        task: What is asked.
        score_items: Scores of all items by user and history, [items].
    """
    asked, questions = task.candidates, task.questions
    starts = np.searchsorted(asked.questions, np.arange(len(questions.users)))
    items = np.split(asked.items, starts[1:])
    rows = zip(questions.users.tolist(), questions.histories, items, strict=True)
    return np.concatenate([score_items(user, history)[chosen] for user, history, chosen in rows])

"""First-stage retrieval: the items of the whole catalogue that the model is asked about.

A retriever is popularity, or any baseline that learns (:mod:`mllm_msr.baselines.discovery`): it
scores every item for a history, and the best that the user has not seen are candidates. A baseline
is trained on what its own stage trained it on, and loaded where that stage kept it.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from safetensors.numpy import load_file, save_file

from mllm_msr.baselines.discovery import Baseline, Inputs, Learner, all_baselines, find_baseline
from mllm_msr.baselines.learning.trained import compute_key, fit_or_load
from mllm_msr.baselines.task import Training, read_task
from mllm_msr.core.arrays import Floats
from mllm_msr.core.errors import ParamsError
from mllm_msr.core.files import state_dir
from mllm_msr.core.params import Params, Section
from mllm_msr.recommendation.catalogue import Catalogue
from mllm_msr.recommendation.full_catalogue import POPULARITY, find_first, find_inputs

DEFAULT = "item_knn"
FEATURES = "encode_items/features.parquet"


class Retriever(Protocol):
    """Scores the whole catalogue."""

    @property
    def name(self) -> str:
        """Its name: ``popularity``, or that of a baseline."""

    @property
    def items(self) -> Sequence[str]:
        """The items that it scores."""

    @property
    def counts(self) -> Floats:
        """Their known interactions, [items]."""

    def score(self, user: str | None, history: Sequence[str]) -> Floats | None:
        """Score every item, [items]; None for a history that it knows nothing about."""


class PopularityRetriever:
    """Scores items by their known interactions."""

    name = POPULARITY

    def __init__(self, catalogue: Catalogue) -> None:
        """Take the counts of a catalogue."""
        self.items = list(catalogue.titles)
        self.counts = np.array([catalogue.popularity[i] for i in self.items], dtype=np.float64)

    def score(self, user: str | None, history: Sequence[str]) -> Floats:  # noqa: ARG002
        """Return each item's known interactions."""
        return self.counts


class BaselineRetriever:
    """Scores items by a trained baseline."""

    def __init__(self, name: str, learner: Learner, training: Training) -> None:
        """Take a trained baseline, and what it was trained on."""
        self.name, self.items = name, training.items
        counts = np.bincount(training.known.items, minlength=len(training.items))
        self.counts: Floats = counts.astype(np.float64)
        self._learner = learner
        self._numbers = {item: number for number, item in enumerate(training.items)}
        self._users = {user: number for number, user in enumerate(training.users)}

    def score(self, user: str | None, history: Sequence[str]) -> Floats | None:
        """Score items by a history; None where no item of it has an interaction in training."""
        known = np.array([self._numbers[item] for item in history if item in self._numbers], int)
        if not self.counts[known].any():
            return None
        number = None if user is None else self._users.get(user)
        return self._learner.score_items(number, known)


def open_retriever(
    name: str, data: Path, params: Params, catalogue: Catalogue, trained: Path | None = None
) -> Retriever:
    """Open a retriever by its name.

    Args:
        name: ``popularity``, or a baseline that learns.
        data: Folder of the stages' outputs.
        params: Settings of the run.
        catalogue: Its items.
        trained: Folder of a bundle's trained baselines; None: the state directory, where one that
            is missing is trained.

    Raises:
        ParamsError: There is no such retriever.
        DataError: A table is missing or of another run.
        ModelError: The baseline needs a package that is not installed.
    """
    if name == POPULARITY:
        return PopularityRetriever(catalogue)
    names = retriever_names()
    if trained is not None:
        names = [each for each in names if each == POPULARITY or _file_of(each, trained).is_file()]
    if name not in names:
        raise ParamsError(
            expected=f"one of {', '.join(names)}",
            got=repr(name),
            where="the retriever",
            fix="name one of them",
        )
    baseline, settings, inputs = _find_inputs(name, data, params)
    training = _read_training(data, params)
    if trained is None:
        learner = fit_or_load(baseline, training, settings, inputs, _kept())
    else:
        assert baseline.build, "a retriever learns"
        learner = baseline.build(training, settings, inputs)
        learner.load(load_file(_file_of(name, trained)))
    return BaselineRetriever(name, learner, training)


def keep_retrievers(data: Path, params: Params, folder: Path) -> list[str]:
    """Write the trained baselines of a run into a folder, and return their names.

    Those are the ones that the state directory has, and the default one, which is trained where it
    is missing.

    Args:
        data: Folder of the stages' outputs.
        params: Settings of the run.
        folder: Of the written files.

    Raises:
        DataError: A table is missing or of another run.
    """
    training, found = _read_training(data, params), []
    folder.mkdir(parents=True)
    for name in retriever_names()[1:]:
        baseline, settings, inputs = _find_inputs(name, data, params)
        if inputs.features and not inputs.features.is_file():
            continue
        key = compute_key(baseline, training, settings, inputs)
        if name == DEFAULT or _file_of(key, _kept() / name).is_file():
            learner = fit_or_load(baseline, training, settings, inputs, _kept())
            save_file(learner.state(), _file_of(name, folder))
            found.append(name)
    return found


def retriever_names() -> list[str]:
    """Return the names of all retrievers."""
    return [POPULARITY, *(each.name for each in all_baselines() if each.build)]


def retrieve(
    retriever: Retriever, fallback: Retriever, request: "Asked", number: int
) -> tuple[str, list[str]]:
    """Return the best items for a history, those of the fallback where the retriever knows nothing.

    Args:
        retriever: Which scores the catalogue.
        fallback: One that needs no history.
        request: The user and history, and the items to leave out.
        number: How many items, at most.

    Returns:
        The name of the retriever that was used, and the items, best first; of equal scores the most
        popular item first.
    """
    scores, used = retriever.score(request.user, request.history), retriever
    if scores is None:
        used = fallback
        scores = fallback.score(request.user, request.history)
        assert scores is not None, "a fallback scores any history"
    most = number + len(request.excluded)
    first = find_first(scores, np.array([], int), most, ties=used.counts)
    found = [used.items[index] for index in first.tolist()]
    return used.name, [item for item in found if item not in request.excluded][:number]


class Asked(NamedTuple):
    """What a retriever is asked.

    Attributes:
        user: The user's id, if it is a user of the run.
        history: Items, oldest first; perhaps none.
        excluded: Items that are not proposed.
    """

    user: str | None
    history: Sequence[str]
    excluded: Collection[str]


def _kept() -> Path:
    return state_dir() / "baselines"


def _file_of(name: str, folder: Path) -> Path:
    return folder / f"{name}.safetensors"


def _find_inputs(name: str, data: Path, params: Params) -> tuple[Baseline, Section, Inputs]:
    """Return a baseline with its settings and tables."""
    baseline = find_baseline(name)
    settings: Section = getattr(params, baseline.stage).of(name)
    return baseline, settings, find_inputs(baseline, data / "filter_sequences", data / FEATURES)


def _read_training(data: Path, params: Params) -> Training:
    """Read what the baselines of a run learn from."""
    filters = params.filter_sequences
    return read_task(
        data / "preprocess/interactions.parquet",
        data / "filter_sequences",
        min_user_interactions=filters.min_user_interactions,
        by_time=filters.split == "time",
        only_used=filters.budget.interactions == "used",
    ).training

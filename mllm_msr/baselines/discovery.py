"""What a baseline is, and where it is found: each file of ``mllm_msr/baselines/models`` is one.

A file declares the baseline's settings, its function and :class:`Baseline`. Its name is that of the
baseline in ``params.yaml``, on the command line and in tables. Files are imported to check settings
and to label tables, so they import what is slow to import only inside their function: torch,
scikit-learn, SciPy, Cornac, and :mod:`mllm_msr.baselines.task`, which reads tables.

A baseline that counts has ``score``, which computes everything anew. A baseline that learns has
``build``, which returns a :class:`Learner`: its training is apart from its scoring, so that what it
learned can be kept (:mod:`mllm_msr.baselines.learning.trained`).
"""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mllm_msr.core.errors import ParamsError
from mllm_msr.core.params import Section

if TYPE_CHECKING:  # at run time, tables of metrics need only labels and their order
    import numpy.typing as npt

    from mllm_msr.baselines.task import Task, Training
    from mllm_msr.core.arrays import Floats, Integers

MODELS = "mllm_msr.baselines.models"  # the package whose modules are the baselines


@dataclass(frozen=True)
class Inputs:
    """Tables that a baseline may read besides its task; None where its stage does not have one.

    Attributes:
        items: The table Items, which has the titles; baselines and text baselines have it.
        features: The table Features; feature baselines have it.
        summaries: The table Summaries; text baselines have it.
        preferences: The table Preferences; text baselines have it.
    """

    items: Path | None = None
    features: Path | None = None
    summaries: Path | None = None
    preferences: Path | None = None


Score = Callable[["Task", Any, Inputs], "Floats"]
"""Scores every candidate of a task, higher for likelier ones, [candidates].

It gets the task, the baseline's settings (an instance of its ``params``) and the inputs.
"""


class Learner(Protocol):
    """The model of a baseline that learns: fit it or load an earlier state, then score.

    It is built from what it learns from, its settings and its inputs. Neither these nor its state
    depend on the candidates to score.
    """

    def fit(self) -> None:
        """Train the model.

        Raises:
            DataError: There is nothing to train on.
            ModelError: The training diverges.
        """

    def state(self) -> "dict[str, npt.NDArray[Any]]":
        """Return what was learned, by name: all that scoring needs besides what builds a model."""

    def load(self, state: "Mapping[str, npt.NDArray[Any]]") -> None:
        """Load the state of a model that was built from the same; scores are then its scores."""

    def score_items(self, user: int | None, history: "Integers") -> "Floats":
        """Score all items as the next one of a history, [items].

        Args:
            user: Number of the user; None for one of whom nothing was learned.
            history: Numbers of items, oldest first; at least one.
        """

    def score_candidates(self, task: "Task") -> "Floats":
        """Score every candidate of a task, [candidates]."""


Build = Callable[["Training", Any, Inputs], Learner]
"""Builds an untrained model.

It gets what to learn from, the baseline's settings and the inputs.
"""


@dataclass(frozen=True)
class Baseline:
    """A scorer to compare with.

    Attributes:
        label: What tables call it.
        stage: The stage that runs it, whose section of ``params.yaml`` has its settings.
        order: Position of its row in tables, lowest first; baselines with more inputs come first.
        params: The model of its settings.
        score: Its function, if it computes its scores anew each time.
        build: Its function, if it learns. A baseline has exactly one of the two.
        personal: Whether its scores depend on the user or the history.
        grid: Settings for ``bench/baselines.py`` to try: every combination of each entry's values.
        name: That of its module, set when it is found.
    """

    label: str
    stage: Literal["baselines", "feature_baselines", "text_baselines"]
    order: int
    params: type[Section]
    score: Score | None = None
    build: Build | None = None
    personal: bool = True
    grid: tuple[dict[str, list[Any]], ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        """Refuse a baseline with neither or both of its two functions."""
        if (self.score is None) == (self.build is None):
            raise TypeError(f"the baseline {self.label} needs either score or build")


def all_baselines() -> list[Baseline]:
    """Return all baselines in the order of the tables' rows."""
    folders = import_module(MODELS).__path__
    found = [_load(module.name) for module in pkgutil.iter_modules(folders)]
    return sorted(found, key=lambda baseline: (baseline.order, baseline.name))


def baselines_of(stage: str) -> list[Baseline]:
    """Return the baselines that a stage runs, in the order of the tables' rows."""
    return [baseline for baseline in all_baselines() if baseline.stage == stage]


def find_baseline(name: str) -> Baseline:
    """Return a baseline by its name.

    Raises:
        ParamsError: There is no such baseline.
    """
    names = [module.name for module in pkgutil.iter_modules(import_module(MODELS).__path__)]
    if name not in names:
        raise ParamsError(
            expected=f"one of {', '.join(names)}",
            got=repr(name),
            where="the baseline",
            fix="correct its name",
        )
    return _load(name)


def _load(name: str) -> Baseline:
    baseline: Baseline = import_module(f"{MODELS}.{name}").BASELINE
    return replace(baseline, name=name)

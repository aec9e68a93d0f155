"""FPMC: a user's taste and the step from the last item (Rendle et al., WWW 2010)."""

from typing import TYPE_CHECKING

from mllm_msr.baselines.discovery import Baseline, Inputs, Learner
from mllm_msr.baselines.settings import LearnedParams

if TYPE_CHECKING:
    from mllm_msr.baselines.task import Training


def build(training: "Training", settings: LearnedParams, _: Inputs) -> Learner:
    """Build FPMC, which scores by user and last item.

    It learns of a user from each step to a next item. A user without one has a vector of chance,
    so that the last item alone scores.

    Raises:
        ModelError: Cornac is not installed.
    """
    from mllm_msr.baselines.learning.cornac_models import FPMC, NextItemLearner, translate

    return NextItemLearner(FPMC(**translate(settings)), training, least=2)


BASELINE = Baseline(
    label="FPMC",
    stage="baselines",
    order=110,
    params=LearnedParams,
    build=build,
    grid=(
        {"epochs": [10], "loss": ["bpr", "cross-entropy"], "learning_rate": [0.1, 0.3]},
        {"epochs": [20], "loss": ["bpr"], "learning_rate": [0.2, 0.5]},
    ),
)

"""FPMC: a user's taste and the step from the last item (Rendle et al., WWW 2010)."""

import numpy as np

from mllm_msr.baselines.registry import Baseline, Inputs
from mllm_msr.baselines.settings import LearnedParams
from mllm_msr.baselines.task import Floats, Task, find_cold_users

NOBODY = -1  # Cornac's FPMC scores a user whom it does not know by the last item alone


def score(task: Task, settings: LearnedParams, _: Inputs) -> Floats:
    """Train FPMC and score the candidates by user and last item.

    It learns of a user from each step to a next item. A user without one has a vector of chance,
    so that the last item alone scores.

    Raises:
        ModelError: Cornac is not installed.
    """
    from mllm_msr.baselines.cornac_models import FPMC, score_next_items, translate

    users, cold = task.questions.users, find_cold_users(task, least=2)
    asked = np.where(cold[users], NOBODY, users)
    return score_next_items(FPMC(**translate(settings)), task, asked)


BASELINE = Baseline(
    label="FPMC",
    stage="baselines",
    order=110,
    params=LearnedParams,
    score=score,
    grid=(
        {"epochs": [10], "loss": ["bpr", "cross-entropy"], "learning_rate": [0.1, 0.3]},
        {"epochs": [20], "loss": ["bpr"], "learning_rate": [0.2, 0.5]},
    ),
)

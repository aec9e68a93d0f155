"""Recent popularity: how often a candidate was taken in the days before the question.

Ji et al., SIGIR 2020, "A Re-visit of the Popularity Baseline in Recommender Systems".
"""

from typing import TYPE_CHECKING

import numpy as np

from mllm_msr.baselines.discovery import Baseline, Inputs
from mllm_msr.core.arrays import Floats
from mllm_msr.core.errors import DataError
from mllm_msr.core.params import Count, Section

if TYPE_CHECKING:
    from mllm_msr.baselines.task import Task

MS_PER_DAY = 86_400_000


class RecentPopularityParams(Section):
    """The window in which interactions are counted."""

    days: Count  # before the target


def score(task: "Task", settings: RecentPopularityParams, _: Inputs) -> Floats:
    """Count the known interactions with a candidate in the days before the question.

    An interaction counts if it is before the target's time and at most ``days`` before it. If all
    known interactions are earlier, as under ``split: time``, the window ends at the last of them.

    Returns:
        A count per candidate, [candidates].

    Raises:
        DataError: An interaction has no timestamp.
    """
    known, asked = task.known, task.candidates
    if known.timestamps is None or task.questions.timestamps is None:
        raise DataError(
            expected="a timestamp for every interaction, to tell which are recent",
            got="interactions without",
            where="baselines.models, recent_popularity",
            fix="leave it out, or bring timestamps",
        )
    moments = np.unique(known.timestamps)
    now = np.minimum(task.questions.timestamps, moments[-1] + 1)[asked.questions]
    # One ascending number for (item, time): how many are smaller says how many are earlier.
    row = len(moments) + 1
    keys = np.sort(known.items * row + np.searchsorted(moments, known.timestamps))
    first, last = (
        np.searchsorted(keys, asked.items * row + np.searchsorted(moments, time))
        for time in (now - settings.days * MS_PER_DAY, now)
    )
    counts: Floats = (last - first).astype(np.float64)
    return counts


BASELINE = Baseline(
    label="recent popularity",
    stage="baselines",
    order=150,
    params=RecentPopularityParams,
    score=score,
    personal=False,
    grid=({"days": [1, 3, 7, 30, 90, 365]},),
)

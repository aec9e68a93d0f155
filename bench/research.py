"""The way research code makes candidates: pandas until nothing changes, a Python loop over users.

Our own plain rendering, for comparison only.
"""

import numpy as np
import pandas as pd

HELD_OUT_SHARE = 0.2  # of users, with twenty negatives; the others have one


def make_candidates(
    frame: pd.DataFrame, *, min_user_interactions: int, min_item_interactions: int, seed: int
) -> tuple[set[str], set[str], dict[str, list[str]]]:
    """Keep the core, then draw each user's negatives from the items that are not in the history.

    Args:
        frame: Columns user, item, position.
        min_user_interactions: Interactions of a user, at least.
        min_item_interactions: Interactions with an item, at least.
        seed: Of the draws.

    Returns:
        Users and items of the core, and each user's candidates.
    """
    before = -1
    while len(frame) != before:
        before = len(frame)
        frame = frame[frame.groupby("user")["item"].transform("count") >= min_user_interactions]
        frame = frame[frame.groupby("item")["user"].transform("count") >= min_item_interactions]
    generator = np.random.RandomState(seed)  # what numpy.random.choice draws with
    items = set(frame["item"])
    candidates = {}
    for user, history in frame.groupby("user"):
        taken = history.sort_values("position")["item"].tolist()
        negatives = 20 if generator.rand() < HELD_OUT_SHARE else 1
        untouched = list(items - set(taken))
        drawn = generator.choice(untouched, negatives, replace=False)
        candidates[str(user)] = [taken[-1], *drawn]
    return set(frame["user"]), items, candidates

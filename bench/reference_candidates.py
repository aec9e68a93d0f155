"""Reference implementation of k-core and negative sampling, for comparison only.

It works as common research code does: pandas for the k-core, and a Python loop over users.
"""

import numpy as np
import pandas as pd

HELD_OUT_SHARE = 0.2  # share of users with twenty negatives; the others have one


def make_candidates(
    frame: pd.DataFrame, *, min_user_interactions: int, min_item_interactions: int, seed: int
) -> tuple[set[str], set[str], dict[str, list[str]]]:
    """Filter to the k-core, then draw each user's negatives from the untouched items.

    Args:
        frame: Interactions with the columns user, item, position.
        min_user_interactions: Minimum interactions of a user.
        min_item_interactions: Minimum interactions of an item.
        seed: Seed of the draws.

    Returns:
        Users and items of the k-core, and each user's candidates.
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
        items_of_user = history.sort_values("position")["item"].tolist()
        negatives = 20 if generator.rand() < HELD_OUT_SHARE else 1
        untouched = list(items - set(items_of_user))
        drawn = generator.choice(untouched, negatives, replace=False)
        candidates[str(user)] = [items_of_user[-1], *drawn]
    return set(frame["user"]), items, candidates

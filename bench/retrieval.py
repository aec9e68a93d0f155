"""Time and memory of exact retrieval by vectors: the first items of a large catalogue.

Users and items have random vectors. Scores are products of one block of users with one block of
items; only the best items of the blocks so far are kept.

Example: python -m bench.retrieval --items 1000000 --users 10000
"""

import argparse
import resource
import time

import numpy as np
import numpy.typing as npt

WIDTH = 64  # of a vector
USERS_AT_ONCE, ITEMS_AT_ONCE = 1_000, 50_000  # 200 MB of scores
SEED = 2026

Vectors = npt.NDArray[np.float32]


def find_first(users: Vectors, items: Vectors, number: int) -> npt.NDArray[np.int64]:
    """Return the numbers of the items with the largest products for each user, best first.

    Args:
        users: [users, width].
        items: [items, width].
        number: Items for each user.
    """
    found = np.empty((len(users), number), dtype=np.int64)
    for start in range(0, len(users), USERS_AT_ONCE):
        block = users[start : start + USERS_AT_ONCE]
        scores = np.empty((len(block), 0), dtype=np.float32)
        numbers = np.empty((len(block), 0), dtype=np.int64)
        for first in range(0, len(items), ITEMS_AT_ONCE):
            products = block @ items[first : first + ITEMS_AT_ONCE].T
            kept = np.argpartition(-products, min(number, products.shape[1]) - 1)[:, :number]
            scores = np.hstack([scores, np.take_along_axis(products, kept, axis=1)])
            numbers = np.hstack([numbers, kept + first])
            order = np.argsort(-scores, axis=1, kind="stable")[:, :number]
            scores = np.take_along_axis(scores, order, axis=1)
            numbers = np.take_along_axis(numbers, order, axis=1)
        found[start : start + USERS_AT_ONCE] = numbers
    return found


def main() -> None:
    """Retrieve, and print seconds and the peak of memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--number", type=int, default=100)
    options = parser.parse_args()
    generator = np.random.default_rng(SEED)
    items, users = (
        generator.standard_normal((count, WIDTH), dtype=np.float32)
        for count in (options.items, options.users)
    )
    begun = time.monotonic()
    find_first(users, items, options.number)
    seconds = time.monotonic() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(
        f"{options.users:,} users, {options.items:,} items, the first {options.number}:"
        f" {seconds:,.1f} s, peak {peak:.1f} GiB"
    )


if __name__ == "__main__":
    main()

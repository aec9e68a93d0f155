"""A recommender that needs no model: p(yes) falls with an item's place in the catalogue."""

import threading
import time
from collections.abc import Callable, Sequence

from mllm_msr.core.errors import ParamsError, UnknownError, UserError
from mllm_msr.recommendation.catalogue import Catalogue
from mllm_msr.recommendation.recommender import (
    HistoryItem,
    Query,
    Recommendation,
    Recommendations,
)

HOSTILE = "<script>document.documentElement.dataset.owned = 1</script>"
TITLES = {f"i{number}": f"Lamp {number}" for number in range(1, 30)}
TITLES |= {"i7": "Same", "i8": "Same", "i9": HOSTILE, "a/b": None}
HISTORIES = {"u1": ["i1", "i2"], "u2": ["i3"], "v1": []}


class FakeRecommender:
    """Answers as a recommender does, and records what was asked together.

    Attributes:
        batches: What was asked.
        gate: Answers wait for it.
        failing: Is raised for a batch with this user.
    """

    def __init__(self) -> None:
        popularity = {item: 100 - number for number, item in enumerate(TITLES)}
        self.catalogue = Catalogue(TITLES, {"i1": "A lamp."}, popularity)
        self.batches: list[list[Query]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failing: dict[str, Exception] = {}
        self.closed = False

    def __enter__(self) -> "FakeRecommender":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def load_weights(self) -> None:
        """Load nothing."""

    def users(self) -> list[str]:
        return sorted(HISTORIES)

    def answer(self, queries: Sequence[Query]) -> list[Recommendations | UserError]:
        self.batches.append(list(queries))
        self.gate.wait(10)
        for query in queries:
            if query.user in self.failing:
                raise self.failing[query.user]
        return [self._answer(query) for query in queries]

    def _answer(self, query: Query) -> Recommendations | UserError:
        if query.user and query.user not in HISTORIES:
            fix = "the closest one is 'u1'"
            return UnknownError(expected="a user", got=repr(query.user), where="user", fix=fix)
        history = query.history if query.history is not None else HISTORIES.get(query.user or "")
        if history is None and query.preference is None:
            return ParamsError(
                expected="a user or a history", got="neither", where="recommend", fix="name one"
            )
        if query.k > len(TITLES):
            return ParamsError(expected="1 to 30", got=str(query.k), where="k", fix="correct it")
        items = list(TITLES) if query.candidates is None else list(dict.fromkeys(query.candidates))
        if query.candidates is None and not query.keep_seen:
            items = [item for item in items if item not in (history or [])]
        items.sort(key=list(TITLES).index)
        texts = [query.preference] if query.preference else [f"likes {HOSTILE}", "likes lamps"]
        return Recommendations(
            query.user,
            [HistoryItem(item, TITLES[item]) for item in history or []],
            texts,
            [
                Recommendation(rank, item, TITLES[item], 1 / (rank + 1), 0.1, "item_knn", rank)
                for rank, item in enumerate(items[: query.k], start=1)
            ],
        )


def wait_for(happened: Callable[[], object], seconds: float = 10) -> None:
    """Wait until something has happened."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)

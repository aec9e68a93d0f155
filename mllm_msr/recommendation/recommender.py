"""Recommend items of the whole catalogue to a user or for a history.

A first-stage retriever proposes the best items that the user has not seen; the fine-tuned model
infers the preference of the history and ranks the proposals by p(yes), as in the paper's inference.

    from mllm_msr import Recommender

    with Recommender.load("data") as recommender:
        for found in recommender.recommend(user="u00021", k=10).items:
            print(found.rank, found.title, found.p_yes)
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from mllm_msr.core.errors import ParamsError, UserError
from mllm_msr.evaluation.calibration import sigmoid
from mllm_msr.recommendation.bundle import open_run
from mllm_msr.recommendation.catalogue import Catalogue, UserHistories, read_catalogue
from mllm_msr.recommendation.full_catalogue import POPULARITY
from mllm_msr.recommendation.models import Models, Pair
from mllm_msr.recommendation.new_items import NewItem, clean_items
from mllm_msr.recommendation.retrieval import (
    DEFAULT,
    Asked,
    PopularityRetriever,
    Retriever,
    open_retriever,
    retrieve,
)

CANDIDATES = 100  # of the first stage
USERS_AT_ONCE = 64  # whose preferences and pairs run in one batch


class Recommendation(NamedTuple):
    """A recommended item.

    Attributes:
        rank: From 1.
        item: Its id.
        title: Its title; None where it has none.
        p_yes: p(yes) of the model, 0 to 1; None where no model ranked it.
        log_odds: Log-odds of yes against no, of which p_yes is the sigmoid.
        retriever: Which retriever proposed it; None for candidates of the caller and new items.
        retriever_rank: Its rank among the proposals, from 1.
    """

    rank: int
    item: str
    title: str | None
    p_yes: float | None
    log_odds: float | None
    retriever: str | None
    retriever_rank: int | None


class HistoryItem(NamedTuple):
    """An item of a history."""

    item: str
    title: str | None


@dataclass(frozen=True)
class Recommendations:
    """The answer to one request.

    Attributes:
        user: The user, if one was named.
        history: The items that the preference was inferred from, oldest first.
        preferences: The preference text after each block; empty without a model or history.
        items: The recommended items, best first.
    """

    user: str | None
    history: Sequence[HistoryItem]
    preferences: Sequence[str]
    items: Sequence[Recommendation]


class Query(NamedTuple):
    """One of several queries that :meth:`Recommender.answer` answers together.

    Attributes:
        user: A user of the run.
        history: Items, oldest first, in place of that user's.
        preference: A preference text in place of a user and a history; needs candidates.
        candidates: Items to rank; None for those of the retriever, none to infer a preference only.
        k: How many items.
        keep_seen: Whether items of the history may be recommended.
    """

    user: str | None = None
    history: Sequence[str] | None = None
    preference: str | None = None
    candidates: Sequence[str] | None = None
    k: int = 10
    keep_seen: bool = False


class _Request(NamedTuple):
    """A history, or a preference in its place, with its candidates and how many to return.

    The proposals of the retriever come first.
    """

    user: str | None
    history: list[str]
    retriever: str
    proposed: int
    candidates: list[str]
    k: int
    preference: str | None = None


class Recommender:
    """A finished run that recommends. Load it once and ask it often."""

    def __init__(
        self,
        catalogue: Catalogue,
        histories: UserHistories,
        retriever: Retriever,
        models: Models | None,
        *,
        candidates: int,
        max_history: int,
    ) -> None:
        """Take the parts; :meth:`load` makes them.

        Args:
            catalogue: The items.
            histories: Of the users of the run.
            retriever: The first stage.
            models: The models of the method; None ranks by the retriever alone.
            candidates: How many items the retriever proposes.
            max_history: How many of the last items a preference is inferred from.
        """
        self.catalogue, self.retriever = catalogue, retriever
        self._histories, self._models = histories, models
        self._candidates, self._max_history = candidates, max_history
        self._popular = PopularityRetriever(catalogue)
        self._own_items = frozenset(self._popular.items)  # without new ones
        self._opened = ExitStack()

    @classmethod
    def load(
        cls,
        data: Path | str = "data",
        *,
        params: Path | str | None = None,
        prompts: Path | str | None = None,
        retriever: str = DEFAULT,
        candidates: int = CANDIDATES,
    ) -> Self:
        """Load a finished run, or a bundle, whose files are verified.

        Args:
            data: Folder of the stages' outputs, or a bundle.
            params: Settings of the run; None: ``params.yaml`` of the working folder or the bundle.
                With ``recommender.model: null`` the retriever ranks alone.
            prompts: The file of prompt templates; None: ``prompts.yaml``, likewise.
            retriever: ``popularity``, or a baseline that learns, such as ``item_knn``.
            candidates: How many items it proposes for the model to rank.

        Raises:
            DataError: A table is missing or breaks its model, or a bundle is not as exported.
            ModelError: There is no trained model, or a package is not installed.
            ParamsError: A setting is wrong, or there is no such retriever.
        """
        if candidates < 1:
            raise ParamsError(
                expected="at least 1", got=str(candidates), where="candidates", fix="raise it"
            )
        folder = Path(data)
        run = open_run(folder, _path(params), _path(prompts))
        settings = run.settings
        with ExitStack() as opening:
            catalogue = read_catalogue(folder)
            histories = UserHistories(folder / "preprocess/interactions.parquet", catalogue)
            opening.callback(histories.close)
            models = None
            if settings.recommender.model is not None:
                models = Models(folder, run, catalogue)
                opening.push(models)
            loaded = cls(
                catalogue,
                histories,
                open_retriever(retriever, folder, settings, catalogue, run.retrievers),
                models,
                candidates=candidates,
                max_history=settings.filter_sequences.max_history,
            )
            loaded._opened = opening.pop_all()
        return loaded

    def __enter__(self) -> Self:
        """Return the recommender."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close tables and the response store."""
        self.close()

    def close(self) -> None:
        """Close tables and the response store."""
        self._opened.close()

    def recommend(
        self,
        *,
        user: str | None = None,
        history: Sequence[str] | None = None,
        k: int = 10,
        keep_seen: bool = False,
        new_items: Sequence[NewItem] = (),
    ) -> Recommendations:
        """Recommend items of the whole catalogue, and of items new to it.

        Args:
            user: A user of the run, whose history is all of that user's interactions.
            history: Items, oldest first, in place of a user's; with a user, in place of that
                user's own. An empty one gets popular items, in the order of popularity.
            k: How many items.
            keep_seen: Whether items of the history may be recommended.
            new_items: Items that are not in the catalogue. The history may name them; the others
                are ranked with the proposals. The model summarizes them now.

        Raises:
            DataError: The user or an item is unknown; names the closest id. Or a new item is of
                the catalogue, or lacks what the settings require.
            ParamsError: Neither user nor history is given, k is out of range, or there are new
                items and the run has no model.
        """
        with self._with_items(new_items) as new:
            request = self._request(user, history, k, keep_seen=keep_seen, new=new)
            return self._answer([request], show_progress=False)[0]

    def answer(self, queries: Sequence[Query]) -> list[Recommendations | UserError]:
        """Answer several queries together, so that they share forwards.

        Each gets what :meth:`recommend`, :meth:`rank` and :meth:`preference` return for it alone,
        or the error that they raise.

        Raises:
            UserError: The models cannot answer one that has passed these checks.
        """
        prepared = [self._prepare(query) for query in queries]
        requests = [each for each in prepared if isinstance(each, _Request)]
        answers = iter(self._answer(requests, show_progress=False))
        return [next(answers) if isinstance(each, _Request) else each for each in prepared]

    def users(self) -> list[str]:
        """Return the ids of all users, sorted."""
        return self._histories.users()

    def load_weights(self) -> None:
        """Load the models' weights now, and not with the first request that needs them."""
        if self._models:
            self._models.load_weights()

    def recommend_all(
        self, *, k: int = 10, keep_seen: bool = False, show_progress: bool = False
    ) -> Iterator[Recommendations]:
        """Recommend to every user of the run, in the order of ids.

        Users run in batches that share model forwards. Responses are stored as they come, so a
        run that was killed resumes where it was.

        Args:
            k: How many items to each; fewer where a user has seen nearly all, and a user who has
                seen all is left out.
            keep_seen: Whether items of a user's history may be recommended.
            show_progress: Whether to show progress bars of the model calls.
        """
        requests = (
            self._request(user, history, min(k, left), keep_seen=keep_seen)
            for user, history in self._histories.all()
            if (left := self._count_left([] if keep_seen else history))
        )
        while some := list(islice(requests, USERS_AT_ONCE)):
            yield from self._answer(some, show_progress=show_progress)

    def preference(self, history: Sequence[str]) -> list[str]:
        """Infer the preference text after each block of a history.

        Args:
            history: Items of the catalogue, oldest first; of a long one, the last
                ``filter_sequences.max_history`` count.

        Raises:
            DataError: An item is unknown.
            ParamsError: The history is empty, or the run has no model.
        """
        answer = self._answer([self._inference(history)], show_progress=False)[0]
        return list(answer.preferences)

    def rank(
        self,
        history: Sequence[str],
        candidates: Sequence[str],
        *,
        new_items: Sequence[NewItem] = (),
    ) -> Recommendations:
        """Rank candidates of the caller by p(yes).

        Args:
            history: Items of the catalogue or new ones, oldest first; at least one.
            candidates: Likewise; a repeated one is ranked once.
            new_items: Items that are not in the catalogue, which the model summarizes now.

        Raises:
            DataError: An item is unknown.
            ParamsError: The history is empty, there is no candidate, or the run has no model.
        """
        with self._with_items(new_items):
            query = Query(history=history, candidates=candidates, k=len(candidates))
            return self._answer([self._ranking(query)], show_progress=False)[0]

    def _prepare(self, query: Query) -> _Request | UserError:
        """Check a query and retrieve its candidates; return the error of a wrong one."""
        try:
            if query.candidates is None:
                return self._request(query.user, query.history, query.k, keep_seen=query.keep_seen)
            if query.candidates or query.preference is not None:
                return self._ranking(query)
            return self._inference(query.history or [])
        except UserError as error:
            return error

    def _inference(self, history: Sequence[str]) -> _Request:
        """Check a history whose preference alone is asked for."""
        self._require_models()
        read = self._read_history(history)
        if not read:
            raise ParamsError(
                expected="a history", got="none", where="history", fix="name at least one item"
            )
        return _Request(None, read, POPULARITY, 0, [], 0)

    def _ranking(self, query: Query) -> _Request:
        """Check a history or a preference, and the candidates to rank for it."""
        self._require_models()
        candidates = query.candidates or []
        self.catalogue.check(candidates, "candidates")
        history = query.history or []
        if query.user is not None and query.history is None:
            history = self._histories.of(query.user)
        read = self._read_history(history)
        known = read if query.preference is None else [query.preference]
        for given, where in ((known, "history"), (candidates, "candidates")):
            if not given:
                raise ParamsError(
                    expected="at least one item", got="none", where=where, fix="name one"
                )
        ranked = list(dict.fromkeys(candidates))
        return _Request(query.user, read, POPULARITY, 0, ranked, query.k, query.preference)

    @contextmanager
    def _with_items(self, items: Sequence[NewItem]) -> Iterator[list[str]]:
        """Have new items in the catalogue in the block; yield their ids."""
        if not items:
            yield []
            return
        own = self.catalogue
        cleaned = clean_items(items, own)
        with self._require_models().with_items(cleaned) as extended:
            self.catalogue = extended
            try:
                yield [item.item for item in cleaned]
            finally:
                self.catalogue = own

    def _request(
        self,
        user: str | None,
        history: Sequence[str] | None,
        k: int,
        *,
        keep_seen: bool,
        new: Sequence[str] = (),
    ) -> _Request:
        """Check a request, and retrieve its candidates."""
        if history is None:
            if user is None:
                raise ParamsError(
                    expected="a user or a history",
                    got="neither",
                    where="recommend",
                    fix="name a user of the run, or give the items of a history",
                )
            history = self._histories.of(user)
        else:
            self.catalogue.check(history, "history")
        excluded: set[str] = set() if keep_seen else set(history)
        others = [item for item in new if item not in excluded] if history else []
        most = self._count_left(excluded) + len(others)
        if not 1 <= k <= most:
            raise ParamsError(
                expected=f"1 to {most:,}, the items that can be recommended",
                got=f"{k:,}",
                where="k",
                fix="correct it",
            )
        asked = Asked(user, history, excluded)
        used, found = retrieve(self.retriever, self._popular, asked, max(k, self._candidates))
        read = list(history[-self._max_history :])
        return _Request(user, read, used, len(found), [*found, *others], k)

    def _count_left(self, excluded: Collection[str]) -> int:
        """Return how many items of the catalogue are left to recommend."""
        return len(self._own_items) - sum(item in self._own_items for item in set(excluded))

    def _answer(
        self, requests: Sequence[_Request], *, show_progress: bool
    ) -> list[Recommendations]:
        """Rank the candidates of requests together, so that they share forwards."""
        asked = [each for each in requests if each.history or each.preference is not None]
        texts: list[list[str]] = []
        scores: Iterator[float] = iter(())
        if self._models and asked:
            texts = self._find_preferences(self._models, asked, show_progress=show_progress)
            pairs = [
                Pair(number, candidate)
                for number, each in enumerate(asked)
                for candidate in each.candidates
            ]
            last = [blocks[-1] for blocks in texts]
            scores = iter(self._models.score(last, pairs, show_progress=show_progress))
        answers, inferred = [], iter(texts)
        for each in requests:
            scored = bool(self._models and (each.history or each.preference is not None))
            log_odds = [next(scores) if scored else None for _ in each.candidates]
            preferences = next(inferred) if scored else []
            items = self._order(each, log_odds)[: each.k]
            history = [HistoryItem(item, self.catalogue.titles[item]) for item in each.history]
            answers.append(Recommendations(each.user, history, preferences, items))
        return answers

    def _find_preferences(
        self, models: Models, requests: Sequence[_Request], *, show_progress: bool
    ) -> list[list[str]]:
        """Return the preferences after each block, or the one that was given, by request."""
        histories = [each.history for each in requests if each.preference is None]
        inferred = iter(models.infer(histories, show_progress=show_progress) if histories else ())
        return [
            next(inferred) if each.preference is None else [each.preference] for each in requests
        ]

    def _order(self, request: _Request, log_odds: Iterable[float | None]) -> list[Recommendation]:
        """Order candidates by log-odds; equal ones, and those without, as they were retrieved."""
        placed = list(enumerate(zip(request.candidates, log_odds, strict=True), start=1))
        placed.sort(key=lambda each: -(each[1][1] or 0.0))
        return [
            Recommendation(
                rank,
                candidate,
                self.catalogue.titles[candidate],
                None if value is None else float(sigmoid(np.asarray(value))),
                value,
                request.retriever if place <= request.proposed else None,
                place if place <= request.proposed else None,
            )
            for rank, (place, (candidate, value)) in enumerate(placed, start=1)
        ]

    def _read_history(self, history: Sequence[str]) -> list[str]:
        self.catalogue.check(history, "history")
        return list(history[-self._max_history :])

    def _require_models(self) -> Models:
        if self._models is None:
            raise ParamsError(
                expected="a run with a model",
                got="null",
                where="recommender.model",
                fix="name a model in params.yaml and run dvc repro",
            )
        return self._models


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given)

"""The method's two models for any history: preference texts, and log-odds of yes against no.

Prompts, recurrence and scoring are those of the stages ``infer_preferences`` and ``score``, behind
the same response store, so equal inputs give equal figures, and what was asked before is not
computed again.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from mllm_msr.core.errors import DataError
from mllm_msr.core.params import Params
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.response_store import open_store
from mllm_msr.method import preferences
from mllm_msr.method.examples import Question, open_recommender
from mllm_msr.method.inference import CachedEngine, greedy_engine
from mllm_msr.method.prompts import load_prompts
from mllm_msr.method.scoring import open_scoring_model, score_examples, scoring_engine
from mllm_msr.recommendation.catalogue import Catalogue


class Pair(NamedTuple):
    """A history and an item to score for it.

    Attributes:
        history: Index of the history.
        item: An item of the catalogue.
    """

    history: int
    item: str


class Models:
    """Infers preferences and scores items for histories that need not be in any table."""

    def __init__(self, data: Path, params: Params, prompts: Path, catalogue: Catalogue) -> None:
        """Open the models of a run; weights are loaded when they are first needed.

        Args:
            data: Folder of the stages' outputs.
            params: Settings of the run.
            prompts: The file of prompt templates.
            catalogue: Its items.

        Raises:
            ModelError: There is no trained model, or it is one of another base model.
        """
        self._catalogue, self._settings = catalogue, params.infer_preferences
        self._templates = load_prompts("infer_preferences", prompts)
        with contextlib.ExitStack() as opening:  # closes what is open if the next fails
            inputs = opening.enter_context(
                open_recommender(
                    params.recommender,
                    load_prompts("recommender", prompts),
                    data / "infer_preferences/preferences.parquet",
                    data / "filter_sequences/items.parquet",
                    data / "fetch_images/images.parquet",
                )
            )
            scoring = open_scoring_model(inputs, data / "sft")
            store = opening.enter_context(open_store())
            self._builder, self._scoring = inputs.builder, scoring
            self._scores = scoring_engine(scoring, store, self._builder.limit)
            self._texts: CachedEngine | None = None
            if self._settings.mode != "none":
                assert self._settings.model, "checked with the settings: recommender.model needs it"
                name, revision = self._settings.model, self._settings.revision
                encoder = Encoder(name, revision, None, self._settings.system_message)
                model = LocalModel(encoder)
                self._texts = greedy_engine(model, store, self._settings.max_new_tokens)
            self._opened = opening.pop_all()

    def __enter__(self) -> Self:
        """Return the models."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the response store and the images."""
        self._opened.close()

    def load_weights(self) -> None:
        """Load the weights, which otherwise the first prompt without a stored response does."""
        _ = self._scoring.weights
        if self._texts is not None:
            _ = self._texts.model.weights

    def infer(
        self, histories: Sequence[Sequence[str]], *, show_progress: bool = False
    ) -> list[list[str]]:
        """Infer the preference text after each block of each history.

        Args:
            histories: Items of the catalogue, oldest first; at least one each.
            show_progress: Whether to show a progress bar.

        Returns:
            By history, a text for each block; with ``infer_preferences.mode: none`` the titles.

        Raises:
            DataError: An item of a history has no summary.
        """
        if self._texts is None:
            titles = {
                number: [self._catalogue.titles[item] or "" for item in history]
                for number, history in enumerate(histories)
            }
            return [[row.preference] for row in preferences.list_titles(titles, self._templates)]
        texts = {
            number: [self._summary(item) for item in history]
            for number, history in enumerate(histories)
        }
        inferrer = preferences.PreferenceInferrer(self._texts, self._templates)
        found: list[list[str]] = [[] for _ in histories]
        mode, size = self._settings.mode, self._settings.block_size
        for row in inferrer.infer(texts, mode, size, show_progress=show_progress):
            found[row.sequence].append(row.preference)
        return found

    def score(
        self, texts: Sequence[str], pairs: Sequence[Pair], *, show_progress: bool = False
    ) -> list[float]:
        """Compute the log-odds of yes against no of each pair.

        Args:
            texts: The preference by history.
            pairs: Histories and items.
            show_progress: Whether to show a progress bar.
        """
        builder = replace(self._builder, preferences=dict(enumerate(texts)))
        asked = [builder.build(Question(pair.history, pair.item, label=False)) for pair in pairs]
        scores = score_examples({"recommend": asked}, self._scores, show_progress=show_progress)
        return [score.log_odds for score in scores]

    def _summary(self, item: str) -> str:
        if item not in self._catalogue.summaries:
            raise DataError(
                expected=f"a summary of item {item}",
                got="none",
                where="data/summarize_items/summaries.parquet",
                fix="run the stage summarize_items on this catalogue",
            )
        return self._catalogue.summaries[item]

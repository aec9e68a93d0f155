"""The method's two models for any history: preference texts, and log-odds of yes against no.

Prompts, recurrence and scoring are those of the stages ``infer_preferences`` and ``score``, behind
the same response store, so equal inputs give equal figures, and what was asked before is not
computed again.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from mllm_msr.core.errors import DataError, ModelError
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.response_store import open_store
from mllm_msr.images.gallery import Gallery
from mllm_msr.method import preferences
from mllm_msr.method.examples import (
    ExampleBuilder,
    Question,
    RecommenderInputs,
    find_answer_token_ids,
)
from mllm_msr.method.inference import (
    Engine,
    GeneratingModel,
    StoringEngine,
    greedy_engine,
    open_generator,
)
from mllm_msr.method.prompts import load_prompts
from mllm_msr.method.scoring import open_scoring_model, score_examples, scoring_engine
from mllm_msr.method.summaries import Item, Summarizer, choose_inputs, copy_texts, item_text
from mllm_msr.recommendation.bundle import Run
from mllm_msr.recommendation.catalogue import Catalogue
from mllm_msr.recommendation.new_items import ExtendedGallery, NewItem, shrink_images


class Pair(NamedTuple):
    """A history and an item to score for it.

    Attributes:
        history: Index of the history.
        item: An item of the catalogue.
    """

    history: int
    item: str


class Models:
    """Infers preferences and scores items for histories that need not be in any table.

    Attributes:
        texts: The engine whose responses are preferences; None with the mode ``none``.
        scores: The engine whose responses are log-odds.
    """

    def __init__(
        self, data: Path, run: Run, catalogue: Catalogue, *, read_only: bool = False
    ) -> None:
        """Open the models of a run; weights are loaded when they are first needed.

        Args:
            data: Folder of the stages' outputs, or a bundle.
            run: Settings and prompts.
            catalogue: Its items.
            read_only: Whether to leave the response store as it is.

        Raises:
            ModelError: There is no trained model, or it is one of another base model.
        """
        self._catalogue, self._run = catalogue, run
        self._gallery: ExtendedGallery | None = None
        self._settings = run.settings.infer_preferences
        self._templates = load_prompts("infer_preferences", run.prompts)
        with contextlib.ExitStack() as opening:  # closes what is open if the next fails
            self._store = store = opening.enter_context(open_store(read_only))
            if run.settings.recommender.image or run.settings.summarize_items.image:
                images = data / "fetch_images/images.parquet"
                self._gallery = opening.enter_context(ExtendedGallery(images))
            self.scores: Engine = self._open_scores(data / "sft")
            self.texts: Engine | None = None
            self._writer: GeneratingModel | None = None
            if self._settings.mode != "none":
                self._writer = self._open_generator("infer_preferences", None)
                self.texts = greedy_engine(self._writer, store, self._settings.max_new_tokens)
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
        """Load the weights, which otherwise the first prompt without a stored response does.

        Those of a server are its own concern.
        """
        if self._run.settings.recommender.engine == "local":
            _ = self._scoring.weights
        if isinstance(self._writer, LocalModel):
            _ = self._writer.weights

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
        if self.texts is None:
            titles = {
                number: [self._catalogue.titles[item] or "" for item in history]
                for number, history in enumerate(histories)
            }
            return [[row.preference] for row in preferences.list_titles(titles, self._templates)]
        texts = {
            number: [self._summary(item) for item in history]
            for number, history in enumerate(histories)
        }
        inferrer = preferences.PreferenceInferrer(self.texts, self._templates)
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
        titles = self._catalogue.titles
        builder = replace(self._builder, preferences=dict(enumerate(texts)), titles=titles)
        asked = [builder.build(Question(pair.history, pair.item, label=False)) for pair in pairs]
        with warnings.catch_warnings():
            # peft's, where the model's folder has moved; its identity was compared.
            warnings.filterwarnings("ignore", message=".*base_model_name_or_path.*")
            scores = score_examples({"recommend": asked}, self.scores, show_progress=show_progress)
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

    @contextlib.contextmanager
    def with_items(self, items: Sequence[NewItem]) -> Iterator[Catalogue]:
        """Have new items in the block, with summaries by the run's model; yield the catalogue.

        Args:
            items: Not in the catalogue, with cleaned texts.

        Raises:
            DataError: An image is damaged, or an item lacks a text or an image that the settings
                require.
        """
        own = self._catalogue
        images = shrink_images(items, self._run.settings.fetch_images.image_side)
        holding = self._gallery.with_images(images) if self._gallery else contextlib.nullcontext()
        with holding:
            titles = {item.item: item.title for item in items}
            self._catalogue = own.extended(titles, self._summarize(items))
            try:
                yield self._catalogue
            finally:
                self._catalogue = own

    def _summarize(self, items: Sequence[NewItem]) -> dict[str, str]:
        """Return the summaries of new items, as the stage summarize_items makes them."""
        settings, gallery = self._run.settings.summarize_items, self._gallery
        if self.texts is None:  # titles take the place of summaries
            return {}
        given = [
            Item(
                item.item,
                item_text(item.title, item.description),
                gallery.image_ref(item.item) if gallery else None,
            )
            for item in items
        ]
        chosen = choose_inputs(given, settings.text != "none", settings.image, settings.missing)
        if settings.copies_texts:
            return {row.item: row.summary for row in copy_texts(chosen)}
        model = self._open_generator("summarize_items", gallery)
        engine = greedy_engine(model, self._store, settings.max_new_tokens)
        templates = load_prompts("summarize_items", self._run.prompts)
        raw_text = settings.text == "raw"
        summarizer = Summarizer(engine, templates, settings.fusion, raw_text=raw_text)
        return {row.item: row.summary for row in summarizer.summarize(chosen)}

    def _open_scores(self, trained: Path) -> StoringEngine:
        """Open the builder of prompts and the fine-tuned model, and return its engine.

        As :func:`mllm_msr.method.examples.open_recommender`, without the table Preferences.
        """
        settings = self._run.settings.recommender
        templates = load_prompts("recommender", self._run.prompts)
        gallery = self._gallery if settings.image else None
        encoder = self._open_encoder("recommender", gallery)
        answers = find_answer_token_ids(encoder, templates)
        limit = min(settings.max_prompt_tokens, encoder.context)
        titles = self._catalogue.titles
        self._builder = ExampleBuilder(encoder, templates, {}, titles, gallery, limit)
        model = LocalModel(encoder, settings.four_bit)
        inputs = RecommenderInputs(model, self._builder, answers)
        self._scoring = open_scoring_model(inputs, trained)
        return scoring_engine(self._scoring, self._store, limit, settings.engine)

    def _open_generator(self, section: str, gallery: Gallery | None) -> GeneratingModel:
        """Open the model that generates a section's texts."""
        engine = getattr(self._run.settings, section).engine
        return open_generator(self._open_encoder(section, gallery), section, engine)

    def _open_encoder(self, section: str, gallery: Gallery | None) -> Encoder:
        """Open the encoder of a section's model, the one that a bundle names."""
        settings = getattr(self._run.settings, section)
        encoder = Encoder(settings.model, settings.revision, gallery, settings.system_message)
        expected = self._run.identities.get(section, encoder.identity)
        if encoder.identity != expected:
            raise ModelError(
                expected=f"the base model {expected}, from which the bundle was made",
                got=encoder.identity,
                where=f"{section}.model, {encoder.name}",
                fix="put that model there, or export the bundle with --with-base",
            )
        return encoder

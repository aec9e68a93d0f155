"""What the model stages of a run would compute: prompts, tokens, and responses already stored.

The prompts are built by the steps of the method themselves, with a :class:`CountingEngine` in place
of a model. No weights are loaded. A prompt that depends on a response that is not stored yet is
counted with one of the greatest length in its place.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from mllm_msr.baselines.feature_extraction import read_summaries
from mllm_msr.core.params import Params
from mllm_msr.core.schemas import Retrieved
from mllm_msr.core.tables import read_rows
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import ResponseStore, open_store
from mllm_msr.images.gallery import Gallery
from mllm_msr.method.adapters import ADAPTER_FILES
from mllm_msr.method.examples import (
    Question,
    RecommenderInputs,
    group_retrieved,
    open_recommender,
    read_questions,
)
from mllm_msr.method.inference import CountingEngine, greedy_engine, open_generator
from mllm_msr.method.preferences import PreferenceInferrer, read_histories
from mllm_msr.method.prompts import load_prompts
from mllm_msr.method.scoring import ScoringModel, score_examples, scoring_engine
from mllm_msr.method.summaries import Summarizer, choose_inputs, read_items
from mllm_msr.training.finetuning import sample_sequences
from mllm_msr.training.schedule import count_validations

SAMPLE = 500  # prompts of a stage whose tokens are counted
SEED = 0  # of the sample
Input = TypeVar("Input")
BACKWARD = 2  # a backward takes the time of so many forwards at most, with recomputed activations


class StagePlan(NamedTuple):
    """What a stage would compute.

    Attributes:
        stage: Its name.
        prompts: All of them; of fine-tuning the pairs of all epochs, of features the inputs.
        stored: Those whose response is stored.
        prompt_tokens: Of the others, by the mean of a sample.
        new_tokens: The most that a model generates for them.
        forwards: How many forwards take the time of computing a token.
    """

    stage: str
    prompts: int
    stored: int
    prompt_tokens: int
    new_tokens: int
    forwards: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of all forwards, at most: those of prompts and responses, and of backwards."""
        return (self.prompt_tokens + self.new_tokens) * self.forwards


class _Lookup:
    """Looks prompts up in the store for a counting engine, and keeps those without a response."""

    def __init__(self, find_stored: Callable[[Sequence[Prompt]], Sequence[str | None]]) -> None:
        self.missing: list[Prompt] = []
        self._find_stored = find_stored

    def __call__(self, prompts: Sequence[Prompt]) -> Sequence[str | None]:
        """Return the stored responses."""
        found = self._find_stored(prompts)
        self.missing += [p for p, text in zip(prompts, found, strict=True) if text is None]
        return found


def plan_stages(data: Path, settings: Params, prompts: Path) -> Iterator[StagePlan]:
    """Yield the plan of each stage that runs a model, in the order of the pipeline; write nothing.

    Args:
        data: Folder of the stages' outputs, of which ``filter_sequences`` and ``fetch_images`` have
            run. Stages after one whose outputs are missing are left out.
        settings: Of the run.
        prompts: The file of prompt templates.

    Raises:
        DataError: A table of ``filter_sequences`` or ``fetch_images`` is missing.
        ModelError: A model cannot be used as configured.
    """
    summarized = (data / "summarize_items/summaries.parquet").is_file()
    inferred = (data / "infer_preferences/preferences.parquet").is_file()
    with open_store(read_only=True) as store:
        if settings.summarize_items.model and not settings.summarize_items.copies_texts:
            yield _plan_summaries(data, settings, prompts, store)
        if settings.encode_items.model and summarized:
            yield _plan_features(data, settings)
        own = settings.infer_preferences
        if own.model and own.mode != "none" and summarized:
            yield _plan_preferences(data, settings, prompts, store)
        if settings.recommender.model and inferred:
            yield from _plan_training(data, settings, prompts)
            yield _plan_scores("score", _read_scored(data), data, settings, prompts, store)
            retrieved = _read_retrieved(data) if settings.retrieve.retriever else {}
            if any(retrieved.values()):
                yield _plan_scores("rerank", retrieved, data, settings, prompts, store)


def _plan_summaries(data: Path, settings: Params, prompts: Path, store: ResponseStore) -> StagePlan:
    own = settings.summarize_items
    assert own.model, "checked by the caller"
    with Gallery(data / "fetch_images/images.parquet") as gallery:
        items = read_items(data / "filter_sequences/items.parquet", gallery)
        chosen = choose_inputs(items, own.text != "none", own.image, own.missing)
        encoder = Encoder(own.model, own.revision, gallery, own.system_message)
        model = open_generator(encoder, "summarize_items", own.engine)
        engine = greedy_engine(model, store, own.max_new_tokens)
        lookup = _Lookup(engine.find_stored)
        counting = CountingEngine(encoder, engine.limit, lookup, _longest(own.max_new_tokens))
        templates = load_prompts("summarize_items", prompts)
        raw_text = own.text == "raw"
        Summarizer(counting, templates, own.fusion, raw_text=raw_text).summarize(chosen)
        return _measure("summarize_items", counting, lookup, own.max_new_tokens)


def _plan_features(data: Path, settings: Params) -> StagePlan:
    """Plan ``encode_items``: a vector of each image, and one of each summary."""
    own = settings.encode_items
    assert own.model, "checked by the caller"
    texts = read_summaries(
        data / "filter_sequences/items.parquet", data / "summarize_items/summaries.parquet"
    )
    encoder = Encoder(own.model, own.revision, None)
    images = 0
    if encoder.takes_images:
        with Gallery(data / "fetch_images/images.parquet") as gallery:
            images = sum(gallery.image_ref(item) is not None for item in texts)
    written = [text for text in texts.values() if text]
    tokens = _extrapolate(written, lambda text: len(encoder.tokenizer(text)["input_ids"]))
    return StagePlan("encode_items", images + len(written), 0, tokens, new_tokens=0)


def _plan_preferences(
    data: Path, settings: Params, prompts: Path, store: ResponseStore
) -> StagePlan:
    own = settings.infer_preferences
    assert own.model, "checked by the caller"
    texts = read_histories(
        data / "filter_sequences/histories.parquet",
        data / "filter_sequences/items.parquet",
        data / "summarize_items/summaries.parquet",
    )
    encoder = Encoder(own.model, own.revision, None, own.system_message)
    model = open_generator(encoder, "infer_preferences", own.engine)
    engine = greedy_engine(model, store, own.max_new_tokens)
    lookup = _Lookup(engine.find_stored)
    counting = CountingEngine(encoder, engine.limit, lookup, _longest(own.max_new_tokens))
    inferrer = PreferenceInferrer(counting, load_prompts("infer_preferences", prompts))
    inferrer.infer(texts, own.mode, own.block_size, show_progress=False)
    return _measure("infer_preferences", counting, lookup, own.max_new_tokens)


def _plan_training(data: Path, settings: Params, prompts: Path) -> Iterator[StagePlan]:
    """Plan ``sft``: the pairs of all epochs, and those of the validations."""
    filtered, own = data / "filter_sequences", settings.sft
    train = read_questions(filtered / "train_candidates.parquet")
    selection = read_questions(filtered / "selection_candidates.parquet")
    checks = sample_sequences(selection, own.validation_sequences, own.seed)
    with _open_recommender(data, settings, prompts) as inputs:
        builder = inputs.builder
        for part, questions, passes, forwards in (
            ("training", train, own.epochs, 1 + BACKWARD),
            ("validation", checks, count_validations(own.epochs), 1),
        ):
            tokens = passes * _extrapolate(
                questions,
                lambda question: builder.encoder.count_tokens(builder.build(question).prompt),
            )
            yield StagePlan(f"sft, {part}", passes * len(questions), 0, tokens, 0, forwards)


def _plan_scores(
    stage: str,
    questions: Mapping[str, Sequence[Question]],
    data: Path,
    settings: Params,
    prompts: Path,
    store: ResponseStore,
) -> StagePlan:
    """Plan a stage that scores.

    Args:
        stage: Its name.
        questions: By split.
        data: Folder of the stages' outputs.
        settings: Of the run.
        prompts: The file of prompt templates.
        store: The response store.
    """
    adapter = data / "sft/adapter"
    with _open_recommender(data, settings, prompts) as inputs:
        builder, find_stored = inputs.builder, _find_nothing
        if all((adapter / name).is_file() for name in ADAPTER_FILES):
            model = ScoringModel(inputs.model, adapter, inputs.answer_token_ids, trained=False)
            engine = settings.recommender.engine
            find_stored = scoring_engine(model, store, builder.limit, engine).find_stored
        lookup = _Lookup(find_stored)
        counting = CountingEngine(builder.encoder, builder.limit, lookup, placeholder="0")
        examples = {split: list(map(builder.build, some)) for split, some in questions.items()}
        score_examples(examples, counting, show_progress=False)
        return _measure(stage, counting, lookup, max_new_tokens=0)


def _read_scored(data: Path) -> dict[str, list[Question]]:
    """Return the candidates of ``score`` by split."""
    folder = data / "filter_sequences"
    return {
        split: read_questions(folder / f"{split}_candidates.parquet") for split in ("valid", "test")
    }


def _read_retrieved(data: Path) -> dict[str, list[Question]]:
    """Return the candidates of ``rerank`` by split; none before ``retrieve`` has run."""
    path = data / "retrieve/candidates.parquet"
    rows = read_rows(Retrieved, path, order="sequence, rank") if path.is_file() else ()
    return group_retrieved(rows)


def _open_recommender(
    data: Path, settings: Params, prompts: Path
) -> contextlib.AbstractContextManager[RecommenderInputs]:
    return open_recommender(
        settings.recommender,
        load_prompts("recommender", prompts),
        data / "infer_preferences/preferences.parquet",
        data / "filter_sequences/items.parquet",
        data / "fetch_images/images.parquet",
    )


def _longest(tokens: int) -> str:
    """Return a text of about so many tokens, in place of a response."""
    return " ".join(["a"] * tokens)


def _find_nothing(prompts: Sequence[Prompt]) -> list[str | None]:
    """Return that nothing is stored: an adapter that is not trained yet has no scores."""
    return [None] * len(prompts)


def _measure(
    stage: str, counting: CountingEngine, lookup: _Lookup, max_new_tokens: int
) -> StagePlan:
    """Count the tokens of a sample of the prompts without a response."""
    tokens = _extrapolate(lookup.missing, counting.encoder.count_tokens)
    return StagePlan(
        stage,
        counting.calls,
        counting.calls - len(lookup.missing),
        tokens,
        max_new_tokens * len(lookup.missing),
    )


def _extrapolate(inputs: Sequence[Input], count_tokens: Callable[[Input], int]) -> int:
    """Return the tokens of all inputs by the mean of a sample."""
    sample = random.Random(SEED).sample(inputs, min(SAMPLE, len(inputs)))  # noqa: S311
    return round(sum(map(count_tokens, sample)) * len(inputs) / max(1, len(sample)))

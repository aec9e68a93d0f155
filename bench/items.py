"""Summaries and features of items by the stages, and summaries by the reference implementation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from tqdm import tqdm

from bench.cutoff import LimitedEngine, OutOfTime, Round, Watch, until
from bench.pipeline import DATA, make_reference, necessary_tokens, open_model
from bench.timing import (
    Measured,
    Options,
    Run,
    TokenCount,
    decoder_layers,
    share_of_matrix_rate,
    timed,
)
from mllm_msr.baselines.feature_extraction import encode_images, encode_texts, read_summaries
from mllm_msr.core.params import EncodeItemsParams, SummarizeItemsParams, load_params
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import ResponseStore
from mllm_msr.images.gallery import Gallery
from mllm_msr.method import prompts
from mllm_msr.method.inference import greedy_engine
from mllm_msr.method.prompts import load_prompts
from mllm_msr.method.summaries import Item, Summarizer, read_items

ITEMS = DATA / "filter_sequences/items.parquet"
IMAGES = DATA / "fetch_images/images.parquet"
SUMMARIES = DATA / "summarize_items/summaries.parquet"
STEPS = ("text summaries", "image descriptions", "fusions")


class DistinctResponses(LimitedEngine):
    """An engine that numbers its responses.

    Those of random weights are much alike, and equal fusion prompts would be computed once.
    """

    def respond(self, prompts: Sequence[Prompt], progress: "tqdm[Any]") -> list[str]:
        """Return the text of the response to each prompt, after its number."""
        responses = super().respond(prompts, progress)
        return [f"{number} {text}" for number, text in enumerate(responses)]


def summarize(options: Options) -> dict[str, Measured]:
    """Summarize items as the stage does; return the measurement of each step."""
    settings = load_params(SummarizeItemsParams)
    with open_items(settings, options) as (model, items):
        count = TokenCount(model.weights)
        with TemporaryDirectory() as name, ResponseStore(Path(name) / "r.sqlite") as store:
            asker = DistinctResponses(
                greedy_engine(model, store, settings.max_new_tokens),
                count,
                options.seconds and options.seconds / len(STEPS),
                response="",
            )
            Summarizer(asker, load_prompts("summarize_items"), "model").summarize(items)
        rounds = zip(STEPS, asker.rounds, strict=True)
        return {step: measure_step(model, one) for step, one in rounds}


def measure_step(model: LocalModel, step: Round) -> Measured:
    """Return the measurement of one step of the summaries."""
    layers = decoder_layers(model.weights)
    return Measured(
        Run(step.seconds, None, step.peak_gb),
        len(step.finished),
        step.asked,
        sum(map(model.encoder.count_tokens, step.finished)),
        step.tokens,
        necessary_tokens(model.encoder, model.weights, [step.finished]) + step.generated,
        notes=share_of_matrix_rate(model, layers, step.tokens, step.seconds),
    )


def summarize_by_reference(options: Options) -> Measured:
    """Summarize some items, one prompt at a time."""
    settings = load_params(SummarizeItemsParams)
    templates = load_prompts("summarize_items")
    with open_items(settings, options) as (model, items):
        chosen = items[: options.reference_count or 3]
        reference = make_reference(model.encoder, model.weights)
        count = TokenCount(model.weights)
        asked: list[Prompt] = []

        def ask(prompt: Prompt) -> str:
            asked.append(prompt)
            return reference.infer(prompt, settings.max_new_tokens)

        def summarize_all() -> list[str]:
            summaries = []
            for item in until(chosen, options.seconds):
                assert item.text, "every item of the benchmark has one"
                assert item.image_ref, "every item of the benchmark has one"
                text = ask(prompts.text_summary(templates, item.text))
                image = ask(prompts.image_description(templates, item.image_ref))
                summaries.append(ask(prompts.fusion(templates, text, image)))
            return summaries

        run = timed(summarize_all)
        necessary = necessary_tokens(model.encoder, model.weights, [asked]) + count.generated
        length = sum(map(model.encoder.count_tokens, asked))
        return Measured(run, len(run.result), len(chosen), length, count.tokens, necessary)


def encode_item_images(options: Options) -> Measured:
    """Compute the features of images as the stage does; tokens are the vision tower's patches."""
    with open_items(load_params(EncodeItemsParams), options) as (model, items):
        image_refs = {item.item: item.image_ref for item in items if item.image_ref}
        tower = model.weights.base_model.vision_tower
        patches: list[int] = []
        tower.register_forward_hook(
            lambda *passed: patches.append(passed[-1].last_hidden_state.shape[:-1].numel())
        )
        run, count = run_limited(
            lambda watch: encode_images(model, image_refs, watch), options.seconds
        )
        return measure_features(model, tower, run, count, len(image_refs), sum(patches), None)


def encode_item_summaries(options: Options) -> Measured:
    """Compute the features of summaries as the stage does."""
    with open_items(load_params(EncodeItemsParams), options) as (model, items):
        known = read_summaries(ITEMS, SUMMARIES)
        texts = {item.item: known[item.item] for item in items}
        counter = TokenCount(model.weights)
        run, count = run_limited(lambda watch: encode_texts(model, texts, watch), options.seconds)
        layers, tokens = decoder_layers(model.weights), counter.tokens
        return measure_features(model, layers, run, count, len(texts), tokens, tokens)


@contextmanager
def open_items(
    settings: SummarizeItemsParams | EncodeItemsParams, options: Options
) -> Iterator[tuple[LocalModel, list[Item]]]:
    """Open the model of a stage, and the first items of the catalogue."""
    with Gallery(IMAGES) as gallery:
        name = options.model or str(settings.model)
        message = getattr(settings, "system_message", None)
        encoder = Encoder(name, settings.revision, gallery, message)
        yield open_model(encoder), read_items(ITEMS, gallery)[: options.sequences]


def run_limited(work: Callable[[Any], Any], seconds: float | None) -> tuple[Run, int]:
    """Time work that advances a progress bar; return how far it came within the seconds."""

    def count() -> int:
        watch = Watch(seconds)
        with suppress(OutOfTime):
            work(watch)
        return watch.done

    run = timed(count)
    return run, run.result


def measure_features(
    model: LocalModel,
    layers: nn.Module,
    run: Run,
    count: int,
    asked: int,
    tokens: int,
    prompt_tokens: int | None,
) -> Measured:
    """Return the measurement of features."""
    share = share_of_matrix_rate(model, layers, tokens, run.seconds)
    return Measured(run, count, asked, prompt_tokens, tokens, tokens, notes=share)

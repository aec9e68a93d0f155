"""Inputs of the model benchmarks: the pipeline's settings, prompts and adapter."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.reference import Reference
from bench.shapes import RandomModel
from bench.timing import Options
from mllm_msr.core.params import RecommenderParams, SftParams, load_params
from mllm_msr.engines.encoding import Encoder, load_config
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.packing import Packer
from mllm_msr.engines.prefixes import count_necessary
from mllm_msr.engines.processors import takes_images
from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import Gallery
from mllm_msr.method.adapters import add_adapter
from mllm_msr.method.examples import Example, RecommenderInputs, open_recommender, read_questions
from mllm_msr.method.prompts import load_prompts

DATA = Path("data")


@contextmanager
def recommender(model: str | None) -> Iterator[RecommenderInputs]:
    """Open the pipeline's recommender, or another model with its settings."""
    settings = load_params(RecommenderParams)
    if model:
        shows = settings.image and takes_images(load_config(model, None))
        changes = {"model": model, "max_prompt_tokens": 8_192, "image": shows}
        settings = settings.model_copy(update=changes)
    with open_recommender(
        settings,
        load_prompts("recommender"),
        DATA / "infer_preferences/preferences.parquet",
        DATA / "filter_sequences/items.parquet",
        DATA / "fetch_images/images.parquet",
    ) as inputs:
        yield dataclasses.replace(inputs, model=open_model(inputs.model.encoder))


def open_model(encoder: Encoder) -> LocalModel:
    """Return a model; one whose folder has no weights gets random ones."""
    folder = Path(encoder.name)
    without = folder.is_dir() and not any(folder.glob("*.safetensors"))
    return RandomModel(encoder) if without else LocalModel(encoder)


def read_examples(options: Options, split: str, sequences: int | None) -> list[Example]:
    """Build examples with a temporary encoder, whose token cache is then discarded."""
    with recommender(options.model) as inputs:
        return build(inputs, split, sequences)


def build(inputs: RecommenderInputs, split: str, sequences: int | None) -> list[Example]:
    """Build the examples of a split's first sequences, or of all if None."""
    questions = read_questions(DATA / f"filter_sequences/{split}_candidates.parquet")
    chosen = set(sorted({question.sequence for question in questions})[:sequences])
    return [inputs.builder.build(question) for question in questions if question.sequence in chosen]


def read_sft(options: Options) -> SftParams:
    """Load the settings of fine-tuning, with the batch size of the command line."""
    settings = load_params(SftParams)
    size = options.batch_size or settings.batch_size
    return settings.model_copy(update={"batch_size": size})


def load_adapted_model(inputs: RecommenderInputs, settings: SftParams) -> Any:
    """Load the model with a new adapter, in training mode."""
    lora = settings.lora
    bare = inputs.model.load()
    adapted = add_adapter(bare, lora.rank, lora.alpha, lora.dropout, lora.layers).train()
    if inputs.model.device.type == "cuda":
        adapted.activation_checkpointing_enable({"use_reentrant": False})
    return adapted


def make_reference(encoder: Encoder, model: Any) -> Reference:
    """Return a reference implementation with all images decoded in memory."""
    with Gallery(DATA / "fetch_images/images.parquet") as gallery:
        image_refs = gallery.image_refs
        images = dict(zip(image_refs, gallery.images(image_refs), strict=True))
    return Reference(encoder, images, model)


def necessary_tokens(encoder: Encoder, model: Any, batches: Iterable[Sequence[Prompt]]) -> int:
    """Return the tokens that batches need if each computes every shared prefix once.

    Args:
        encoder: The model's encoder.
        model: The model without adapter.
        batches: The prompts of each batch.
    """
    packer = Packer(encoder, model)
    return sum(count_necessary([packer.distinct_tokens(p) for p in batch]) for batch in batches)

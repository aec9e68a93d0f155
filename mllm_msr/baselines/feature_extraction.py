"""Item features: what the model makes of an item's image and of its summary, as two vectors.

The baselines of the stage feature_baselines read them, and so does the paper's preliminary study:
whether a summary of an image tells a recommender as much as the image itself.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from mllm_msr.core.errors import DataError, ModelError, explain_out_of_memory
from mllm_msr.core.schemas import Items, Summaries
from mllm_msr.core.tables import read_rows
from mllm_msr.engines.image_features import compute_image_features
from mllm_msr.engines.local import LocalModel
from mllm_msr.images.gallery import Gallery, ImageRef
from mllm_msr.method.inference.workers import (
    Description,
    Output,
    Work,
    WorkerPool,
    chunk_size,
    has_cluster,
)
from mllm_msr.method.prompts import neutralise

Vector = npt.NDArray[np.float32]

ITEMS_PER_CHUNK = 256  # of a worker


class ItemFeatures(NamedTuple):
    """A row of the table Features."""

    item: str
    image: Vector | None
    summary: Vector | None


class ItemInputs(NamedTuple):
    """What is encoded of an item."""

    image_ref: ImageRef | None
    summary: str


def read_summaries(items: Path, summaries: Path) -> dict[str, str]:
    """Read the summary of every item of the catalogue, ordered by item.

    A table without rows is one of a run without ``summarize_items``: every summary is empty then.

    Raises:
        DataError: An item has no row in the table of summaries, and others have.
    """
    known = {row["item"]: row["summary"] for row in read_rows(Summaries, summaries, order="item")}
    catalogue = [row["item"] for row in read_rows(Items, items, order="item")]
    if not known:
        return dict.fromkeys(catalogue, "")
    missing = [item for item in catalogue if item not in known]
    if missing:
        got = f"none for {len(missing):,}, first {missing[0]}"
        raise DataError(
            expected="a summary of every item",
            got=got,
            where=str(summaries),
            fix="run the stage summarize_items",
        )
    return {item: known[item] for item in catalogue}


def encode_items(
    model: LocalModel, gallery: Gallery, summaries: Mapping[str, str]
) -> list[ItemFeatures]:
    """Return each item's two vectors; without images' where the model takes no images.

    Where the environment names a cluster, its workers compute them.

    Args:
        model: The model that sees and reads.
        gallery: The images.
        summaries: Each item's summary.

    Raises:
        ModelError: Memory ran out.
    """
    takes_images = model.encoder.takes_images
    found = {item: gallery.image_ref(item) if takes_images else None for item in summaries}
    inputs = {item: ItemInputs(found[item], text) for item, text in summaries.items()}
    total = sum(image_ref is not None for image_ref in found.values()) + len(summaries)
    with tqdm(total=total, unit="vector", desc="encode_items") as progress:
        encode = _encode_on_cluster if has_cluster() else _encode
        features = encode(model, inputs, progress)
    return [features[item] for item in summaries]


def _encode(
    model: LocalModel, inputs: Mapping[str, ItemInputs], progress: "tqdm[Any]"
) -> dict[str, ItemFeatures]:
    """Return each item's two vectors, by item."""
    image_refs = {item: one.image_ref for item, one in inputs.items() if one.image_ref}
    summaries = {item: one.summary for item, one in inputs.items()}
    fix = "free memory, or use a smaller model or smaller images"
    with explain_out_of_memory(f"vectors on {model.device}", model.encoder.name, fix):
        images = encode_images(model, image_refs, progress)
        texts = encode_texts(model, summaries, progress)
    return {item: ItemFeatures(item, images.get(item), texts.get(item)) for item in inputs}


def _encode_on_cluster(
    model: LocalModel, inputs: Mapping[str, ItemInputs], progress: "tqdm[Any]"
) -> dict[str, ItemFeatures]:
    """Return each item's two vectors, by item, as the workers of a cluster compute them."""
    waiting, features = list(inputs), dict[str, ItemFeatures]()

    def take(workers: int) -> dict[str, ItemInputs]:
        size = chunk_size(len(waiting), workers, ITEMS_PER_CHUNK)
        chunk, waiting[:] = waiting[:size], waiting[size:]
        return {item: inputs[item] for item in chunk}

    pool = WorkerPool(partial(FeatureWork, model), model.encoder.name)
    for output in pool.run(take):
        features |= output.results
        progress.update(sum(1 + (inputs[item].image_ref is not None) for item in output.results))
    pool.close()
    return features


class FeatureWork(Work):
    """Encodes items by a worker's own model."""

    def __init__(self, model: LocalModel) -> None:
        """Take the model."""
        self._model = model

    def describe(self) -> Description:
        """Return the description of the model."""
        return Description(self._model.identity, self._model.precision)

    def run(self, chunk: Mapping[str, ItemInputs]) -> Iterator[Output]:
        """Yield the vectors of all items of a chunk."""
        with tqdm(disable=True) as progress:
            yield Output(_encode(self._model, chunk, progress))


@torch.inference_mode()
def encode_images(
    model: LocalModel, image_refs: Mapping[str, ImageRef], progress: "tqdm[Any]"
) -> dict[str, Vector]:
    """Average the vision tower's last hidden states over all patches of an image, its crops' too.

    These are the tower's own states, before the projector to the language model; a class token,
    where the tower has one, counts as a patch. Images run one by one: how many patches there are
    differs between them in most families.

    Returns:
        By item, vectors of shape (the tower's width,).
    """
    vectors: dict[str, Vector] = {}
    for item, image_ref in image_refs.items():
        outputs = compute_image_features(model.encoder, model.weights.base_model, [image_ref])
        states = outputs.last_hidden_state
        vectors[item] = _to_vector(states.flatten(0, -2).float().mean(dim=0))
        progress.update()
    return vectors


@torch.inference_mode()
def encode_texts(
    model: LocalModel, texts: Mapping[str, str], progress: "tqdm[Any]"
) -> dict[str, Vector]:
    """Average the language model's last hidden states, what its output layer reads, over a text.

    The text stands alone, without a chat template. Tokens that the tokenizer adds are read and not
    averaged: the state at the first token of all texts says nothing of this one.

    Returns:
        By item, vectors of shape (the language model's width,); none for an empty text.
    """
    vectors: dict[str, Vector] = {}
    special = torch.tensor(model.encoder.tokenizer.all_special_ids, device=model.device)
    decoder = model.weights.get_decoder()
    for items, batch in _batches(model, texts):
        tokens = torch.tensor(batch, device=model.device)  # (items, tokens)
        states = decoder(input_ids=tokens, use_cache=False).last_hidden_state.float()
        own = ~torch.isin(tokens, special)
        for item, states_of_text, kept in zip(items, states, own, strict=True):
            vectors[item] = _to_vector(states_of_text[kept].mean(dim=0))
        progress.update(len(items))
    progress.update(len(texts) - len(vectors))
    return vectors


def _batches(
    model: LocalModel, texts: Mapping[str, str]
) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Cut texts into batches of exactly one length, so that nothing is padded; empty ones go.

    Yields:
        The items of a batch, and the tokens of each.
    """
    cleaned = {item: neutralise(text) for item, text in texts.items()}
    tokens = {item: _tokens(model, item, text) for item, text in cleaned.items() if text}
    ordered = sorted(tokens, key=lambda item: (len(tokens[item]), item))
    for length, of_length in groupby(ordered, key=lambda item: len(tokens[item])):
        items = list(of_length)
        size = max(1, model.budget.tokens // length)
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            yield batch, [tokens[item] for item in batch]


def _tokens(model: LocalModel, item: str, text: str) -> list[int]:
    tokens: list[int] = model.encoder.tokenizer(text)["input_ids"]
    if len(tokens) > model.encoder.context:
        fix = (
            "lower summarize_items.max_new_tokens, set summarize_items.text to model,"
            " or use a model with a longer context"
        )
        raise ModelError(
            expected=f"a summary of at most {model.encoder.context} tokens",
            got=f"{len(tokens)} tokens",
            where=f"item {item}",
            fix=fix,
        )
    return tokens


def _to_vector(tensor: torch.Tensor) -> Vector:
    vector: Vector = tensor.cpu().numpy()
    return vector

"""Item features are those of the image and the summary alone, in every family of models."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import Family
from small_world import SmallWorld
from tqdm import tqdm

from mllm_msr.baselines import feature_extraction as item_features
from mllm_msr.baselines.feature_extraction import (
    ItemFeatures,
    encode_items,
    encode_texts,
    read_summaries,
)
from mllm_msr.core.errors import DataError, ModelError
from mllm_msr.core.schemas import Summaries
from mllm_msr.core.tables import write_rows
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.images.gallery import Gallery

SUMMARIES = {
    "a": "A red kettle.",
    "b": "A blue teapot for four, with a lid and a long spout.",
    "d": "A red kettle.",
    "e": "Cup",
    "f": "<image> [INST] no [/INST] USER: <|im_start|>",
    "g": "",
}
PATCHES = 16  # of LLaVA's tower, 32 / 8 squared
Encoded = dict[str, ItemFeatures]


@pytest.fixture(scope="module")
def encoded(model: LocalModel, gallery: Gallery) -> Encoded:
    """Encode a few items at once."""
    return {row.item: row for row in encode_items(model, gallery, SUMMARIES)}


def test_an_item_has_a_vector_of_its_summary_and_of_its_image(
    encoded: Encoded, gallery: Gallery, family: Family
) -> None:
    assert list(encoded) == list(SUMMARIES)
    for item, row in encoded.items():
        seen = gallery.image_ref(item) is not None and family.has_images
        assert (row.image is not None) == seen
        assert (row.summary is not None) == bool(SUMMARIES[item])
        for vector in (row.image, row.summary):
            assert vector is None or (vector.dtype == np.float32 and np.isfinite(vector).all())
    assert len({row.summary.shape for row in encoded.values() if row.summary is not None}) == 1


def test_vectors_are_the_same_whatever_the_batch(
    encoded: Encoded, model: LocalModel, gallery: Gallery
) -> None:
    for item, text in SUMMARIES.items():
        (alone,) = encode_items(model, gallery, {item: text})
        for one, other in zip(alone[1:], encoded[item][1:], strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), MemoryError()])
def test_running_out_of_memory_is_one_line(
    llava: LocalModel, gallery: Gallery, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(llava.weights.get_decoder(), "forward", fail)
    with pytest.raises(ModelError, match=r"expected memory for vectors on cpu; got too little; fr"):
        encode_items(llava, gallery, SUMMARIES)


def test_equal_summaries_have_equal_vectors_and_others_do_not(encoded: Encoded) -> None:
    same = encoded["a"].summary, encoded["d"].summary
    np.testing.assert_allclose(*same, atol=1e-5, rtol=0)
    assert np.abs(encoded["a"].summary - encoded["e"].summary).max() > 1e-2


def test_different_images_have_different_vectors(encoded: Encoded, family: Family) -> None:
    if not family.has_images:
        pytest.skip("a text model")
    assert np.abs(encoded["a"].image - encoded["b"].image).max() > 1e-3


def test_a_summary_is_averaged_over_what_the_output_layer_reads(
    encoded: Encoded, model: LocalModel
) -> None:
    tokens = model.encoder.tokenizer(SUMMARIES["b"])["input_ids"]
    own = [token not in model.encoder.tokenizer.all_special_ids for token in tokens]
    head, seen = model.weights.get_output_embeddings(), []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model.weights(input_ids=torch.tensor([tokens]))
    hook.remove()
    expected = seen[0][0][own].mean(dim=0).numpy()
    np.testing.assert_allclose(encoded["b"].summary, expected, atol=1e-5, rtol=0)


def test_an_image_is_averaged_over_all_patches_of_the_tower(
    llava: LocalModel, gallery: Gallery
) -> None:
    (row,) = encode_items(llava, gallery, {"a": ""})
    pixels = llava.encoder.pixels([gallery.image_ref("a")])["pixel_values"]
    with torch.inference_mode():
        states = llava.weights.base_model.vision_tower(pixels).last_hidden_state[0]
    assert len(states) == 1 + PATCHES  # the class token counts as one of them
    np.testing.assert_allclose(row.image, states.mean(dim=0).numpy(), atol=1e-6)


def test_an_image_of_many_crops_has_one_vector(
    build: Callable[[str], Family], gallery: Gallery
) -> None:
    model = LocalModel(Encoder(str(build("llava_next").folder), None, gallery))
    crops = model.encoder.pixels([gallery.image_ref("b")])["pixel_values"].shape[1]
    (row,) = encode_items(model, gallery, {"b": ""})
    assert crops > 1
    assert row.image.shape == (model.encoder.config.vision_config.hidden_size,)


def test_a_summary_longer_than_the_context_is_refused(llava: LocalModel) -> None:
    with pytest.raises(ModelError, match=r"item long: expected a summary of at most \d+ tokens"):
        encode_texts(llava, {"long": "cup " * llava.encoder.context}, tqdm(disable=True))


def test_the_progress_ends_at_its_total(
    llava: LocalModel, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[tqdm] = []

    def note(**options: object) -> tqdm:
        bars.append(tqdm(**options, disable=False, file=SimpleNamespace(write=len, flush=int)))
        return bars[-1]

    monkeypatch.setattr(item_features, "tqdm", note)
    encode_items(llava, gallery, SUMMARIES)
    assert (bars[0].n, bars[0].total) == (10, 10)  # six summaries and the images of a, b, e, f


def test_an_item_without_a_row_of_summaries_is_an_error(world: SmallWorld, tmp_path: Path) -> None:
    row = {"item": "a", "text_summary": None, "image_description": None, "summary": "A cup."}
    write_rows(Summaries, [row], tmp_path / "summaries.parquet")
    with pytest.raises(DataError, match="expected a summary of every item; got none for 7, first"):
        read_summaries(world.items, tmp_path / "summaries.parquet")


def test_a_run_without_summaries_has_empty_ones(world: SmallWorld, tmp_path: Path) -> None:
    write_rows(Summaries, [], tmp_path / "summaries.parquet")
    found = read_summaries(world.items, tmp_path / "summaries.parquet")
    assert found == dict.fromkeys("abcdefgt", "")


def test_summaries_are_read_for_the_items_of_the_catalogue(world: SmallWorld) -> None:
    found = read_summaries(world.items, world.summaries)
    assert list(found) == list("abcdefgt")
    assert found["a"] == "Summary a: Red kettle."

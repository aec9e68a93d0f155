"""Continuous batching generates what transformers generates for each prompt alone."""

from collections.abc import Iterator

import pytest
import torch
from generating import generate

from mllm_msr.engines import decoding
from mllm_msr.engines.image_features import ImageFeatureCache
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import Response
from mllm_msr.images.gallery import Gallery

LONGEST = 9  # new tokens


@pytest.fixture
def prompts(model: LocalModel, gallery: Gallery) -> list[Prompt]:
    prompts = [Prompt("The user likes " + "red cats, " * n) for n in range(9)]
    if model.encoder.takes_images:
        prompts += [Prompt("Describe", gallery.image_ref(item), f" no. {item}") for item in "abcef"]
    return prompts


@pytest.fixture(params=[1, 3, 64])
def slots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Set fewer slots than prompts, so that sequences wait for one, and enough slots."""
    monkeypatch.setattr(decoding, "SLOTS", request.param)
    return request.param


def plain_response(model: LocalModel, prompt: Prompt, end: int) -> Response:
    inputs = model.move(model.encoder.encode([prompt]))
    [output] = model.weights.generate(**inputs, max_new_tokens=LONGEST, eos_token_id=end)
    tokens = output[inputs["input_ids"].shape[1] :].tolist()
    text = model.encoder.tokenizer.decode(tokens, skip_special_tokens=True)
    return Response(text.strip(), end in tokens)


def test_response_store_equal_those_of_transformers_one_at_a_time(
    model: LocalModel,
    prompts: list[Prompt],
    slots: int,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A token in the middle of some responses, so that sequences end at different steps.
    first = model.move(model.encoder.encode([prompts[0]]))
    with torch.no_grad():
        length = first["input_ids"].shape[1]
        end = int(model.weights.generate(**first, max_new_tokens=LONGEST)[0, length + 3])
    monkeypatch.setattr(model.weights.generation_config, "eos_token_id", [end])
    decoder = decoding.Decoder(model.encoder, model.weights)
    found = generate(decoder, prompts, LONGEST)
    assert found == [plain_response(model, prompt, end) for prompt in prompts]
    assert any(response.complete for response in found)


def test_images_of_all_admitted_prompts_are_computed_together(
    llava: LocalModel, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [Prompt("Describe", gallery.image_ref(item), f" no. {item}") for item in "abcef"]
    decoder = decoding.Decoder(llava.encoder, llava.weights)
    monkeypatch.setattr(type(decoder._packer.budget), "tokens", 1)  # a forward for each
    sizes = []
    compute = ImageFeatureCache._compute
    monkeypatch.setattr(
        ImageFeatureCache,
        "_compute",
        lambda self, refs: sizes.append(len(refs)) or compute(self, refs),
    )
    generate(decoder, prompts, 2)
    assert sizes == [5]


def test_no_prompts_give_no_responses(llava: LocalModel) -> None:
    assert generate(decoding.Decoder(llava.encoder, llava.weights), [], 5) == []


def test_one_new_token_is_the_most_likely(llava: LocalModel, prompts: list[Prompt]) -> None:
    decoder = decoding.Decoder(llava.encoder, llava.weights)
    assert all(len(response.text.split()) <= 1 for response in generate(decoder, prompts[:3], 1))


def test_slots_are_as_many_as_a_quarter_of_the_free_memory_holds(
    llava: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoding.Decoder(llava.encoder, llava.weights)
    text = llava.encoder.config.get_text_config()
    width = text.hidden_size // text.num_attention_heads
    bytes_of_a_token = 2 * text.num_hidden_layers * text.num_key_value_heads * width * 4
    for free, slots in ((0, 1), (4 * 100 * 5 * bytes_of_a_token, 5), (10**15, decoding.SLOTS)):
        monkeypatch.setattr(decoding, "free_memory", lambda _, free=free: free)
        assert decoder._count_slots(slot_tokens=100) == slots

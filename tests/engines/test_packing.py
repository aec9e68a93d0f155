"""Packed forwards equal plain forwards of each prompt, in every family."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import WINDOW, WINDOWED, Family
from generating import generate

from mllm_msr.core.errors import ModelError
from mllm_msr.engines import families, image_features
from mllm_msr.engines.budgets import Budget
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.families import ModelFamily, find_family, supports_packing
from mllm_msr.engines.image_features import IMAGES_PER_BATCH, ImageFeatureCache
from mllm_msr.engines.local import LocalModel, load_weights
from mllm_msr.engines.packing import Packer, WholePrompts, make_packer
from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import Gallery, ImageRef
from mllm_msr.method.adapters import add_adapter
from mllm_msr.method.scoring import ScoringModel
from mllm_msr.training.losses import listwise_loss, yes_no_loss

ITEMS = ["a", "b", "c", "e", "f"]  # images of five sizes
LIKINGS = ["Likes red.", "Likes red and blue things, cats, travel.", "Likes nothing that is red."]
QUESTION = "Will the user like this item? Answer yes or no."


def image_first(image_ref: ImageRef | None, liking: str) -> Prompt:
    return Prompt("", image_ref, f"{liking} {QUESTION}") if image_ref else Prompt(liking + QUESTION)


def liking_first(image_ref: ImageRef | None, liking: str) -> Prompt:
    return Prompt(f"{liking} ", image_ref, QUESTION) if image_ref else Prompt(liking + QUESTION)


@pytest.fixture(params=[image_first, liking_first])
def prompts(request: pytest.FixtureRequest, encoder: Encoder, gallery: Gallery) -> list[Prompt]:
    image_refs = [
        gallery.image_ref(item) if encoder.takes_images else None for item in [*ITEMS, "d"]
    ]
    asked = [request.param(image_ref, liking) for image_ref in image_refs for liking in LIKINGS]
    return random.Random(0).sample(asked, len(asked))


@torch.no_grad()
def plain_logits(model: LocalModel, prompts: list[Prompt]) -> torch.Tensor:
    return torch.stack(
        [model.weights(**model.encoder.encode([prompt])).logits[0, -1] for prompt in prompts]
    )


def test_packed_logits_equal_those_of_each_prompt_alone(
    model: LocalModel, prompts: list[Prompt]
) -> None:
    packer = Packer(model.encoder, model.weights)
    packed = packer.pack(prompts)
    whole = sum(len(packer.tokenize(prompt).tokens) for prompt in prompts)
    assert packed.inputs["input_ids"].shape[1] < whole  # something is shared
    with torch.no_grad():
        logits = packer.run(model.weights, packed)
    expected = plain_logits(model, prompts)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    yes, no = 5, 6
    assert torch.equal(
        (logits[:, yes] - logits[:, no]).argsort(), (expected[:, yes] - expected[:, no]).argsort()
    )


def test_each_image_is_computed_once(model: LocalModel, prompts: list[Prompt]) -> None:
    packer = Packer(model.encoder, model.weights)
    for _ in range(2):
        packer.run(model.weights, packer.pack(prompts))
    shown = {prompt.image.digest for prompt in prompts if prompt.image}
    assert packer.image_features.computed == len(shown)


def test_a_plain_forward_computes_pixels_afterwards(
    model: LocalModel, prompts: list[Prompt]
) -> None:
    before = plain_logits(model, prompts[:3])
    packer = Packer(model.encoder, model.weights)
    packer.run(model.weights, packer.pack(prompts))
    assert torch.equal(plain_logits(model, prompts[:3]), before)


def test_logits_are_computed_for_the_last_tokens_only(
    model: LocalModel, prompts: list[Prompt]
) -> None:
    seen: list[int] = []
    output = model.weights.get_output_embeddings()
    packer = Packer(model.encoder, model.weights)
    watch = output.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    with torch.no_grad():
        packer.run(model.weights, packer.pack(prompts))
    watch.remove()
    assert seen == [len(prompts)]


def pairwise_loss(logits: torch.Tensor) -> torch.Tensor:
    return yes_no_loss(logits, torch.tensor([5, 6, 6] * 6))


def listwise(logits: torch.Tensor) -> torch.Tensor:
    first = torch.tensor([True, False, False] * 6)
    return listwise_loss(logits[:, 5] - logits[:, 6], first, torch.arange(18) // 3)


def assert_gradients_match(
    encoder: Encoder,
    prompts: list[Prompt],
    way: type[Packer],
    lose: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    def measure(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = lose(logits)
        return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])

    adapted = add_adapter(load_weights(encoder, torch.float32), 4, 8, 0.0, ["q_proj", "v_proj"])
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    torch.manual_seed(0)
    for parameter in trained:  # a fresh adapter's second matrix is zero
        torch.nn.init.normal_(parameter, std=0.02)
    packer = way(encoder, adapted.get_base_model())
    loss, gradient = measure(packer.run(adapted, packer.pack(prompts)))
    rows = [adapted(**encoder.encode([prompt])).logits[0, -1] for prompt in prompts]
    plain_loss, plain_gradient = measure(torch.stack(rows))
    torch.testing.assert_close(loss, plain_loss, atol=0, rtol=1e-4)
    assert (gradient - plain_gradient).norm() < 1e-4 * plain_gradient.norm()


@pytest.mark.parametrize("lose", [pairwise_loss, listwise])
@pytest.mark.parametrize("way", [Packer, WholePrompts])
def test_loss_and_gradients_equal_those_of_the_prompts_one_by_one(
    encoder: Encoder,
    prompts: list[Prompt],
    way: type[Packer],
    lose: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    assert_gradients_match(encoder, prompts, way, lose)


def test_batches_hold_every_prompt_once(model: LocalModel, prompts: list[Prompt]) -> None:
    packer = Packer(model.encoder, model.weights)
    for most in (1, 300, 100_000):
        batches = list(packer.batches(prompts, most))
        assert sorted(index for batch in batches for index in batch) == list(range(len(prompts)))


def test_a_budget_bounds_the_tokens_of_a_batch_with_several_rows(
    llava: LocalModel, gallery: Gallery
) -> None:
    prompts = [image_first(gallery.image_ref(item), liking) for item in ITEMS for liking in LIKINGS]
    packer = Packer(llava.encoder, llava.weights)
    budget, sizes = 200, []
    for batch in packer.batches(prompts, budget):
        chosen = [prompts[index] for index in batch]
        tokens = packer.pack(chosen).inputs["input_ids"].shape[1]
        sizes.append((len(packer.plan(chosen)), tokens))
    assert any(rows > 1 for rows, _ in sizes)
    assert all(rows == 1 or tokens <= budget for rows, tokens in sizes)


def test_a_budget_bounds_the_tokens_of_a_padded_batch(llava: LocalModel, gallery: Gallery) -> None:
    prompts = [image_first(gallery.image_ref(item), liking) for item in ITEMS for liking in LIKINGS]
    packer, budget = WholePrompts(llava.encoder, llava.weights), 200
    batches = list(packer.batches(prompts, budget))
    sizes = [packer.pack([prompts[n] for n in b]).inputs["input_ids"].shape for b in batches]
    assert any(rows > 1 for rows, _ in sizes)
    assert all(rows == 1 or rows * longest <= budget for rows, longest in sizes)


def test_the_tokens_of_an_image_are_replaced_by_a_negative_id_of_its_own(
    llava: LocalModel, gallery: Gallery
) -> None:
    packer = Packer(llava.encoder, llava.weights)
    found = set()
    for item in ("a", "b"):
        prompt = image_first(gallery.image_ref(item), LIKINGS[0])
        tokens, distinct = llava.encoder.tokens(prompt), packer.distinct_tokens(prompt)
        is_image = [token == llava.encoder.image_token_id for token in tokens]
        [image_id] = {new for new, image in zip(distinct, is_image, strict=True) if image}
        others = [image_id if image else t for t, image in zip(tokens, is_image, strict=True)]
        assert image_id < 0
        assert distinct == others
        found.add(image_id)
    assert len(found) == 2


@pytest.mark.parametrize("undeclared", ["llava", "llama"])
def test_a_packer_refuses_a_model_or_language_model_of_an_undeclared_family(
    llava: LocalModel, monkeypatch: pytest.MonkeyPatch, undeclared: str
) -> None:
    declared = tuple(f for f in families.FAMILIES if undeclared not in f.model_types)
    monkeypatch.setattr(families, "FAMILIES", declared)
    with pytest.raises(ModelError) as error:
        Packer(llava.encoder, llava.weights)
    assert str(error.value) == (
        f"{llava.encoder.name}: expected a model of a declared family; got model type llava;"
        " declare it in mllm_msr/engines/families.py"
    )


def make_cache(
    model: LocalModel,
    capacity: int | None = None,
    main_capacity: int | None = None,
    budget: Budget | None = None,
) -> ImageFeatureCache:
    budget = budget or Budget(model.encoder.config, model.dtype, model.device)
    family = find_family(model.encoder.config)
    assert family
    return ImageFeatureCache(model.encoder, model.weights, family, budget, capacity, main_capacity)


def test_queued_images_are_computed_with_the_first(llava: LocalModel, gallery: Gallery) -> None:
    image_refs = [image_ref for item in ITEMS if (image_ref := gallery.image_ref(item))]
    alone = make_cache(llava).get(image_refs)
    cache = make_cache(llava)
    cache.enqueue(image_refs)
    first = cache.get(image_refs[:1])
    assert cache.computed == len(image_refs)
    found = first + cache.get(image_refs[1:])
    assert cache.computed == len(image_refs)
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one.tokens[0], other.tokens[0])


def test_main_memory_that_others_use_takes_no_features(
    llava: LocalModel, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_refs = [image_ref for item in ITEMS if (image_ref := gallery.image_ref(item))]
    free = 10**9
    monkeypatch.setattr(image_features, "free_memory", lambda _: free)
    cache = make_cache(llava, capacity=1, main_capacity=10**9)
    cache.get(image_refs)
    assert cache.computed == len(image_refs)
    cache.get(image_refs)
    assert cache.computed == len(image_refs)
    free, cache = 10**9, make_cache(llava, capacity=1, main_capacity=10**9)
    free = 4 * 10**8
    cache.get(image_refs)
    cache.get(image_refs)
    assert cache.computed == 2 * len(image_refs)


def test_images_of_the_batches_that_follow_are_computed_ahead(
    llava: LocalModel, gallery: Gallery
) -> None:
    prompts = [image_first(gallery.image_ref(item), LIKINGS[0]) for item in ITEMS]
    packer = Packer(llava.encoder, llava.weights)
    planned = list(packer.batches(prompts, most=1))
    packer.image_features.get([prompts[0].image])
    assert packer.image_features.computed == 1  # to plan queues nothing
    batches = packer.prefetch(prompts, most=1)
    first = next(batches)
    packer.image_features.get([prompts[index].image for index in first])
    assert packer.image_features.computed == len(ITEMS)
    assert [first, *batches] == planned


def test_features_that_do_not_fit_are_computed_again(llava: LocalModel, gallery: Gallery) -> None:
    image_refs = [image_ref for item in ITEMS if (image_ref := gallery.image_ref(item))]
    cache = make_cache(llava, capacity=1)
    first = [cache.get([image_ref])[0].tokens[0] for image_ref in image_refs]
    again = [cache.get([image_ref])[0].tokens[0] for image_ref in image_refs]
    assert cache.computed == 2 * len(image_refs)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_features_that_do_not_fit_move_to_main_memory_and_back(
    model: LocalModel, gallery: Gallery
) -> None:
    if not model.encoder.takes_images:
        return
    image_refs = [image_ref for item in ITEMS if (image_ref := gallery.image_ref(item))]
    found = make_cache(model).get(image_refs)
    cache = make_cache(model, capacity=found[0].bytes, main_capacity=10**9)
    for _ in range(2):
        for image_ref, whole in zip(image_refs, found, strict=True):
            [again] = cache.get([image_ref])
            for one, other in zip(again.layers, whole.layers, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
            for one, other in zip(again.tokens, whole.tokens, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert cache.computed == len(image_refs)


def test_main_memory_evicts_the_least_recently_used(llava: LocalModel, gallery: Gallery) -> None:
    first, second, third = [image_ref for item in "abc" if (image_ref := gallery.image_ref(item))]
    [one] = make_cache(llava).get([first])
    cache = make_cache(llava, capacity=one.bytes, main_capacity=one.bytes)
    for image_ref in (first, second, third):  # near: the third, far: the second
        cache.get([image_ref])
    cache.get([second])
    assert cache.computed == 3
    cache.get([first])
    assert cache.computed == 4


def test_no_more_images_are_computed_ahead_than_fit(llava: LocalModel, gallery: Gallery) -> None:
    image_refs = [image_ref for item in ITEMS if (image_ref := gallery.image_ref(item))]
    [one] = make_cache(llava).get(image_refs[:1])
    cache = make_cache(llava, capacity=3 * one.bytes)
    cache.get(image_refs[:1])
    cache.enqueue(image_refs[1:])
    for image_ref in image_refs[1:]:
        cache.get([image_ref])
    assert cache.computed == len(image_refs)  # none was forgotten before it was asked for


def test_the_vision_tower_has_smaller_batches_after_memory_ran_out(
    llava: LocalModel, gallery: Gallery
) -> None:
    image_refs = [image_ref for item in ITEMS if (image_ref := gallery.image_ref(item))]
    budget = Budget(llava.encoder.config, llava.dtype, llava.device)
    cache = make_cache(llava, budget=budget)
    while budget.scale(IMAGES_PER_BATCH) > 2:
        budget.halve()
    cache.enqueue(image_refs)
    cache.get(image_refs[:1])
    assert cache.computed == 2


def test_features_of_a_batch_equal_those_of_each_image(
    encoder: Encoder, model: LocalModel, gallery: Gallery
) -> None:
    if not encoder.takes_images:
        return
    image_refs = [image_ref for item in "abacef" if (image_ref := gallery.image_ref(item))]
    together = make_cache(model).get(image_refs)
    for image_ref, found in zip(image_refs, together, strict=True):
        [alone] = make_cache(model).get([image_ref])
        torch.testing.assert_close(found.tokens[0], alone.tokens[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "packs"),
    [
        ({}, True),
        ({"sliding_window": 4096}, False),
        ({"layer_types": ["full_attention", "sliding_attention"]}, False),
        ({"layer_types": ["linear_attention", "full_attention"]}, False),
        ({"layer_types": ["full_attention", "full_attention"]}, True),
        ({"model_type": "bloom"}, False),
    ],
    ids=["full", "window", "windows in some layers", "hybrid", "no windows", "undeclared"],
)
def test_packing_needs_declared_families_and_full_attention(
    changes: dict[str, object], packs: bool
) -> None:
    text = SimpleNamespace(model_type="llama", sliding_window=None)
    text.__dict__.update(changes)
    config = SimpleNamespace(model_type="llava", get_text_config=lambda: text)
    assert supports_packing(config) is packs  # type: ignore[arg-type]


def test_a_folder_that_asks_for_eager_attention_gets_the_same_logits(
    build: Callable[[str], Family], gallery: Gallery, tmp_path: Path
) -> None:
    # Eager attention adds a mask of truth values; a model's folder may ask for it.
    folder = shutil.copytree(build("llava").folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["_attn_implementation"] = "eager"
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "eager"}))
    model = LocalModel(Encoder(str(folder), None, gallery))
    prompts = [image_first(gallery.image_ref(item), liking) for item in "ab" for liking in LIKINGS]
    packer = Packer(model.encoder, model.weights)
    with torch.no_grad():
        found = packer.run(model.weights, packer.pack(prompts))
    torch.testing.assert_close(found, plain_logits(model, prompts), atol=1e-4, rtol=0)


@pytest.fixture(params=WINDOWED)
def windowed(
    request: pytest.FixtureRequest, build: Callable[[str], Family], gallery: Gallery
) -> LocalModel:
    return LocalModel(Encoder(str(build(request.param).folder), None, gallery))


def windowed_prompts(model: LocalModel, gallery: Gallery) -> list[Prompt]:
    """Return prompts longer than the window, with a shared prefix."""
    image_refs = [
        gallery.image_ref(item) if model.encoder.takes_images else None for item in [*ITEMS, "d"]
    ]
    asked, ends = (
        f"{QUESTION} " * 4,
        [f" {number} {liking}" for number, liking in enumerate(LIKINGS)],
    )
    return [
        Prompt(asked, image_ref, end) if image_ref else Prompt(asked + end)
        for image_ref in image_refs
        for end in ends
    ]


def test_scores_with_sliding_windows_equal_those_of_each_prompt_alone(
    windowed: LocalModel, gallery: Gallery, tmp_path: Path
) -> None:
    assert not supports_packing(windowed.encoder.config)
    prompts = windowed_prompts(windowed, gallery)
    assert min(map(windowed.encoder.count_tokens, prompts)) > 2 * WINDOW
    adapted = add_adapter(windowed.load(), 2, 4, 0.0, ["q_proj"])
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    recommender = ScoringModel(windowed, tmp_path, (5, 6), trained=False)
    batches = list(recommender.batches(prompts))
    assert sorted(index for batch in batches for index in batch) == list(range(len(prompts)))
    scores = torch.empty(len(prompts))
    for batch in batches:
        responses = recommender.score_batch([prompts[index] for index in batch])
        scores[batch] = torch.tensor([float(response.text) for response in responses])
    plain = plain_logits(windowed, prompts)
    torch.testing.assert_close(scores, plain[:, 5] - plain[:, 6], atol=1e-4, rtol=0)
    assert scores.std() > 1e-2
    assert len(batches) < len(prompts)
    if windowed.encoder.takes_images:
        assert recommender.packer is not None
        assert recommender.packer.image_features.computed == len(ITEMS)


def test_gradients_with_sliding_windows_equal_those_of_the_prompts_one_by_one(
    build: Callable[[str], Family], gallery: Gallery
) -> None:
    model = LocalModel(Encoder(str(build("windowed_llava_next").folder), None, gallery))
    prompts = windowed_prompts(model, gallery)
    assert_gradients_match(model.encoder, prompts, WholePrompts, pairwise_loss)


def test_packed_logits_with_sliding_windows_would_differ(
    windowed: LocalModel, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    gemma = ModelFamily("Gemma 3", ("gemma3_text",))
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, gemma))
    prompts = windowed_prompts(windowed, gallery)
    packer = Packer(windowed.encoder, windowed.weights)
    with torch.no_grad():
        shared = packer.run(windowed.weights, packer.pack(prompts))
    assert (shared - plain_logits(windowed, prompts)).abs().max() > 1e-2


def test_response_store_with_sliding_windows_equal_those_of_each_prompt_alone(
    windowed: LocalModel, gallery: Gallery
) -> None:
    prompts = windowed_prompts(windowed, gallery)
    chosen = [prompts[index] for index in next(iter(windowed.batches(prompts)))]
    responses = generate(windowed, chosen, max_new_tokens=6)
    assert responses == [generate(windowed, [prompt], max_new_tokens=6)[0] for prompt in chosen]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_gradients_are_the_same_with_activation_checkpointing(
    build: Callable[[str], Family], gallery: Gallery, name: str
) -> None:
    encoder = Encoder(str(build(name).folder), None, gallery)
    prompts = [image_first(gallery.image_ref(item), liking) for item in "ab" for liking in LIKINGS]

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        adapted = add_adapter(load_weights(encoder, torch.float32), 2, 4, 0.0, ["q_proj", "v_proj"])
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        if checkpointing:
            adapted.activation_checkpointing_enable({"use_reentrant": False})
        packer = Packer(encoder, adapted.get_base_model())
        adapted.train()
        runs = 0

        def count(*_: object) -> None:
            nonlocal runs
            runs += 1

        adapted.get_base_model().get_decoder().layers[0].input_layernorm.register_forward_hook(
            count
        )
        logits = packer.run(adapted, packer.pack(prompts))
        logits.log_softmax(dim=-1)[:, 5].sum().backward()
        assert runs == 1 + checkpointing
        return {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    assert all(gradient.abs().max() > 0 for gradient in plain.values())


PACKERS = {
    "llava": Packer,
    "llava_next": Packer,
    "qwen2_5_vl": Packer,
    "qwen3_vl": Packer,
    "smolvlm": Packer,
    "llama3": Packer,
}


def test_each_family_gets_its_packer(family: Family, model: LocalModel) -> None:
    assert type(make_packer(model.encoder, model.weights)) is PACKERS[family.name]


WINDOWED_PACKERS = {
    "windowed_mistral": type(None),  # padded, by its processor
    "gemma3": type(None),
    "windowed_llava_next": WholePrompts,
}


@pytest.mark.parametrize("name", WINDOWED)
def test_each_family_with_sliding_windows_gets_its_packer(
    build: Callable[[str], Family], gallery: Gallery, name: str
) -> None:
    model = LocalModel(Encoder(str(build(name).folder), None, gallery))
    assert type(make_packer(model.encoder, model.weights)) is WINDOWED_PACKERS[name]

"""The shipped pocket model: its size, tokenizer, decoding and skills."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_msr.pocket
from mllm_msr.method import prompts
from mllm_msr.pocket import lessons
from mllm_msr.pocket.measure import FRESH_SEED, Asker, share_mentioned
from mllm_msr.pocket.world import ATTRIBUTES, IMAGE_ATTRIBUTES, make_items

HOME = Path(mllm_msr.pocket.__file__).parent
MODEL = HOME / "model"
PROMPTS = HOME.parents[1] / "prompts.yaml"


@pytest.fixture(scope="module")
def asker() -> Asker:
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    return Asker(model, AutoProcessor.from_pretrained(MODEL))


@pytest.fixture(scope="module")
def templates() -> lessons.Templates:
    return lessons.Templates.load(PROMPTS)


def test_a_value_is_mentioned_by_its_word() -> None:
    items = make_items(np.random.default_rng(0), 100)
    red = next(item for item in items if item.values["colour"] == "red")
    texts = ["a checkered mug", "a mug, red", "Red."]
    assert share_mentioned([red] * 3, texts, ["colour"]) == {"colour": 1 / 3}


def test_the_folder_is_small_and_has_safetensors_only() -> None:
    files = [file for file in MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16 * 1024**2
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert (MODEL / "model.safetensors").is_file()


def test_it_is_a_llava_with_two_to_eight_million_parameters(asker: Asker) -> None:
    assert asker.model.config.model_type == "llava"
    assert 2e6 <= asker.model.num_parameters() <= 8e6
    assert asker.model.config.text_config.max_position_embeddings >= 2048


def test_it_decodes_greedily_and_stops_at_the_end_of_a_turn(asker: Asker) -> None:
    settings = asker.model.generation_config
    assert not settings.do_sample
    assert settings.eos_token_id == asker.chats.tokenizer.convert_tokens_to_ids("<|end|>")
    assert settings.pad_token_id == asker.chats.tokenizer.pad_token_id


@pytest.mark.parametrize("answer", ["yes", "no"])
def test_each_answer_is_one_token_after_the_question(asker: Asker, answer: str) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Does it fit?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    processor, tokenizer = asker.chats.processor, asker.chats.tokenizer
    asked = processor.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = processor.apply_chat_template(messages, tokenize=False)
    before, after = tokenizer(asked)["input_ids"], tokenizer(whole)["input_ids"]
    assert after[: len(before)] == before
    assert tokenizer.convert_ids_to_tokens(after[len(before) :]) == [answer, "<|end|>"]


def test_every_word_of_the_world_is_one_token(asker: Asker) -> None:
    for value in (value for values in ATTRIBUTES.values() for value in values):
        assert len(asker.chats.tokenizer(f" {value}")["input_ids"]) == 1


@pytest.mark.parametrize("text", ["naïve 你好 🎉 €5", "\ttabs and\nlines", "ſ𝔘"])
def test_any_text_is_decoded_from_its_tokens_unchanged(asker: Asker, text: str) -> None:
    tokenizer = asker.chats.tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_describes_images_of_a_fresh_world(asker: Asker, templates: lessons.Templates) -> None:
    items = make_items(np.random.default_rng(FRESH_SEED + 1), 40)
    texts = asker.ask([lessons.teach_description(templates, item) for item in items])
    for share in share_mentioned(items, texts, tuple(IMAGE_ATTRIBUTES)).values():
        assert share > 0.7  # chance is a sixth at most


def test_its_preferences_start_as_in_the_paper(asker: Asker, templates: lessons.Templates) -> None:
    items = make_items(np.random.default_rng(FRESH_SEED + 2), 3)
    block = [lessons.fuse(item) for item in items]
    prompt = prompts.preference(templates.preferences, block)
    answer = asker.ask([lessons.Lesson([lessons.Turn(prompt, "")])])[0]
    assert answer.startswith(lessons.PREFERENCE_START)


def test_the_card_has_the_measured_figures() -> None:
    figures = json.loads((HOME / "figures.json").read_text(encoding="utf-8"))
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    for skill, by_name in figures.items():
        for name, value in by_name.items():
            assert f"| {skill} | {name.replace('_', ' ')} | {value:.3f} |" in card

"""Prompts contain their fields, and no markers from catalogue texts."""

import re
import string
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mllm_msr.core.errors import ModelError, ParamsError
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import Gallery, ImageRef
from mllm_msr.method import prompts
from mllm_msr.method.prompts import FIELDS, fit, load_prompts, neutralise

WORDS = ["USER:", "ASSISTANT:", "User:", "Assistant :", "system:"]
MARKERS = [
    *["<image>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "</s>", "<s>"],
    *["<<SYS>>", "<</SYS>>", "<end_of_utterance>", "<|image_pad|>", "<|vision_start|>"],
    *["<|start_header_id|>", "<row_1_col_1>", "<fake_token_around_image>", "<unk>", "[IMG]"],
    *["### Human:", "###", *WORDS],
]
HIDDEN = [
    "\x00",
    "\x07",
    "\x1b",
    "\x7f",
    "\u200b",
    "\u200d",
    "\u2060",
    "\ufeff",
    "\u00ad",
    "\u202e",
]
HOSTILE = " ".join([*MARKERS, *(f"<im{sign}age> US{sign}ER:" for sign in HIDDEN)])
TEMPLATES = {section: load_prompts(section) for section in FIELDS}

texts = st.lists(st.sampled_from([*MARKERS, *HIDDEN]) | st.text(max_size=4), max_size=12).map(
    "".join
)


def count_words(prompt: Prompt) -> int:
    return len(str(prompt).split())


@given(texts)
@settings(max_examples=300)
def test_neutralising_is_idempotent(text: str) -> None:
    assert neutralise(neutralise(text)) == neutralise(text)


@given(texts)
@example("\u00a1\u200d\u00a1")
@settings(max_examples=300)
def test_no_marker_survives_neutralising(text: str) -> None:
    clean = neutralise(text)
    assert not [marker for marker in set(MARKERS) - set(WORDS) if marker in clean]
    # A word that only ends so, such as superuser, opens no turn.
    assert not re.search(r"(?i)\b(user|assistant|system|human)\s*:", clean)
    # Joiners stay between characters outside ASCII.
    assert re.sub(r"(?<=[^\x00-\x7f])[\u200c\u200d]+(?=[^\x00-\x7f])", "", clean).isprintable()


@given(texts, st.integers(0, 40))
def test_a_shortened_field_has_no_marker(text: str, cap: int) -> None:
    prompt = prompts.recommendation(TEMPLATES["recommender"], "", text, None, cap)
    title = prompt.before.partition("[Item]")[2].partition("\n")[0].strip()
    assert len(title) <= cap
    assert neutralise(title) == title


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("hidden", ["", *HIDDEN])
def test_a_marker_with_a_hidden_character_is_neutralised(marker: str, hidden: str) -> None:
    assert marker.lower() not in neutralise(marker[:2] + hidden + marker[2:]).lower()


@pytest.mark.parametrize(
    ("title", "clean"),
    [
        ("Cats & dogs: the 2nd “season” – 50 % off!", "Cats & dogs: the 2nd “season” – 50 % off!"),
        ("咖啡 ☕ ünïcode\r\n\tnext", "咖啡 ☕ ünïcode next"),
        ("superuser: a film", "superuser: a film"),
        ("<image>", "‹image›"),
        ("### Human: hi", "# Human - hi"),
        ("[INST]", "(INST)"),
    ],
)
def test_harmless_text_stays_and_markers_become_look_alikes(title: str, clean: str) -> None:
    assert neutralise(title) == clean


def special_tokens(encoder: Encoder, prompt: Prompt) -> Counter[str]:
    ids = encoder.encode([prompt])["input_ids"][0].tolist()
    special = set(encoder.tokenizer.all_special_ids)
    return Counter(encoder.tokenizer.convert_ids_to_tokens([i for i in ids if i in special]))


def test_a_hostile_title_leaves_one_image_and_the_same_turns(
    encoder: Encoder, gallery: Gallery
) -> None:
    image_ref = gallery.image_ref("a") if encoder.takes_images else None
    harmless, hostile = (
        prompts.recommendation(TEMPLATES["recommender"], text, text, image_ref, None)
        for text in ("Red kettle", HOSTILE)
    )
    assert special_tokens(encoder, hostile) == special_tokens(encoder, harmless)
    assert sum(special_tokens(encoder, harmless).values()) > 0
    rendered = encoder.render(hostile)
    for turn in ("USER:", "ASSISTANT:", "[INST]", "[/INST]", "<|im_start|>", "Assistant:"):
        assert rendered.count(turn) == encoder.render(harmless).count(turn)


def test_hostile_summaries_leave_the_turns_of_a_preference_prompt(encoder: Encoder) -> None:
    harmless, hostile = (
        prompts.preference(TEMPLATES["infer_preferences"], [text] * 3, previous=text)
        for text in ("Red kettle", HOSTILE)
    )
    assert special_tokens(encoder, hostile) == special_tokens(encoder, harmless)


def test_braces_in_a_title_are_text() -> None:
    prompt = prompts.recommendation(TEMPLATES["recommender"], "{title}", "{image} {0}", None, None)
    assert "{title}" in prompt.before
    assert "{image} {0}" in prompt.before


def test_the_image_replaces_its_field() -> None:
    templates = {"question": "Look: {image} {preference} {title}"}
    image_ref = ImageRef("a", "0" * 64)
    assert prompts.recommendation(templates, "p", "t", image_ref, None) == Prompt(
        "Look:", image_ref, "p t"
    )
    assert prompts.recommendation(templates, "p", "t", None, None) == Prompt("Look:\np t")


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        ("{{image}} {image} {preference} {title}", "{image}", "p t"),
        ("{image} {preference} {{image}} {title}", "", "p {image} t"),
        ("{{{image}}} {preference} {title}", "{", "} p t"),
        ("{{ {image} {preference} {title} }}", "{", "p t }"),
    ],
)
def test_double_braces_around_the_word_image_are_text(
    tmp_path: Path, template: str, before: str, after: str
) -> None:
    path = write_prompts(tmp_path, "recommender", question=template)
    templates, image_ref = load_prompts("recommender", path), ImageRef("a", "0" * 64)
    shown = prompts.recommendation(templates, "p", "t", image_ref, None)
    assert shown == Prompt(before, image_ref, after)
    alone = prompts.recommendation(templates, "p", "t", None, None)
    assert alone == Prompt(f"{before}\n{after}".strip())


def test_an_error_in_the_prompts_of_another_stage_is_found(tmp_path: Path) -> None:
    path = write_prompts(tmp_path, "recommender", answer_yes=True)
    with pytest.raises(ParamsError, match=r"recommender\.answer_yes: expected a text; got True"):
        load_prompts("summarize_items", path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("\n  answer_no: n\n", "got the key answer_no twice"),
        ("\nrecomender:\n  answer_yes: y\n", "got unknown section recomender"),
    ],
)
def test_a_duplicate_or_unknown_key_is_an_error(tmp_path: Path, more: str, message: str) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(Path("prompts.yaml").read_text(encoding="utf-8").rstrip() + more)
    with pytest.raises(ParamsError, match=message):
        load_prompts("infer_preferences", path)


def test_items_of_a_block_are_numbered_oldest_first_before_the_preference() -> None:
    first = prompts.preference(TEMPLATES["infer_preferences"], ["old", "new"]).before
    assert "1. old\n2. new" in first
    assert "Previous Preference" not in first
    update = prompts.preference(TEMPLATES["infer_preferences"], ["next"], "likes red").before
    assert "[User's Previous Preference] likes red" in update


def test_a_prompt_that_fits_is_unchanged() -> None:
    fitted = fit(lambda _: Prompt("one two"), count_words, 2, "item a")
    assert fitted == (Prompt("one two"), False)


def test_the_longest_field_is_shortened_first() -> None:
    def render(cap: int | None) -> Prompt:
        preference, title = " ".join(["likes"] * 50), "Red kettle"
        return prompts.recommendation(
            TEMPLATES["recommender"], preference, title, ImageRef("a", "0" * 64), cap
        )

    fitted = fit(render, count_words, 60, "item a")
    assert fitted.shortened
    assert count_words(fitted.prompt) <= 60
    assert "[Item] Red kettle\n" in str(fitted.prompt)
    assert fitted.prompt.image == ImageRef("a", "0" * 64)
    assert str(fitted.prompt).endswith("Only answer yes or no.")
    assert str(fitted.prompt).count("likes") > 10


@given(st.integers(0, 60), st.integers(0, 60), st.integers(30, 120))
@settings(max_examples=60)
def test_a_shortened_prompt_is_as_long_as_possible(first: int, second: int, limit: int) -> None:
    def render(cap: int | None) -> Prompt:
        fields = ("x" * first, "y" * second)
        return prompts.fusion({"fusion": "Text: {text} Image: {image_description}"}, *fields, cap)

    fitted = fit(render, lambda prompt: len(str(prompt)), limit, "item a")
    assert len(str(fitted.prompt)) <= limit
    whole = len(str(render(None)))
    assert fitted.shortened == (whole > limit)
    assert len(str(fitted.prompt)) >= min(whole, limit - 1)


def test_a_title_of_6000_characters_is_shortened_to_fit(encoder: Encoder, gallery: Gallery) -> None:
    image_ref = gallery.image_ref("c") if encoder.takes_images else None

    def render(cap: int | None) -> Prompt:
        return prompts.recommendation(
            TEMPLATES["recommender"], "Likes red.", "Red kettle " * 545, image_ref, cap
        )

    fitted = fit(render, encoder.count_tokens, 512, "item c")
    assert fitted.shortened
    inputs = encoder.encode([fitted.prompt])["input_ids"]
    assert 480 < inputs.shape[1] <= 512
    assert "Likes red." in str(fitted.prompt)
    short = prompts.recommendation(TEMPLATES["recommender"], "Likes red.", "Red", image_ref, None)
    assert special_tokens(encoder, fitted.prompt) == special_tokens(encoder, short)


def test_a_prompt_too_long_without_its_fields_is_an_error_that_names_the_length() -> None:
    with pytest.raises(ModelError, match=r"item a: expected .* 5 tokens; got 9 tokens with every"):
        fit(lambda cap: Prompt("word " * (9 if cap == 0 else 20)), count_words, 5, "item a")


def write_prompts(folder: Path, section: str, **changes: object) -> Path:
    document = yaml.safe_load(Path("prompts.yaml").read_text(encoding="utf-8"))
    document[section] |= changes
    path = folder / "prompts.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


@pytest.mark.parametrize("section", FIELDS)
def test_the_shipped_prompts_load(section: str) -> None:
    found = {
        name: {field for _, field, _, _ in string.Formatter().parse(template) if field}
        for name, template in load_prompts(section).items()
    }
    assert found == FIELDS[section]


@pytest.mark.parametrize(
    ("name", "template", "message"),
    [
        ("question", "{image} {preference}", r"question: expected \{image\}, \{preference\}, "),
        ("question", "{image} {preference} {title} {user}", r"got .*\{user\}"),
        ("question", "{image} {preference} {title} {image}", "question: expected"),
        ("question", "{image} {preference} {title!x}", "question: expected"),
        ("question", "{image} {preference} {title:>9}", "question: expected"),
        ("question", "{image} {preference} {title.upper}", "question: expected"),
        ("question", "{image} {preference} {title} {", "question: expected a template"),
        ("question", "{image} {preference} {title} {}", "question: expected"),
        ("answer_yes", True, "answer_yes: expected a text; got True; put it into quotes"),
        ("answer_no", None, "answer_no: expected a text; got None"),
        ("answer_no", " ", "answer_no: expected a text; got ' '"),
        ("maybe", "perhaps", "expected the prompts question, answer_yes, answer_no; got .*maybe"),
    ],
)
def test_a_template_that_cannot_be_filled_in_is_an_error(
    tmp_path: Path, name: str, template: object, message: str
) -> None:
    path = write_prompts(tmp_path, "recommender", **{name: template})
    with pytest.raises(ParamsError, match=message):
        load_prompts("recommender", path)


def test_yes_without_quotes_is_an_error_that_says_quotes(tmp_path: Path) -> None:
    shipped = Path("prompts.yaml").read_text(encoding="utf-8")
    text = shipped.replace('answer_yes: "yes"', "answer_yes: yes")
    (tmp_path / "prompts.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ParamsError, match="got True; put it into quotes"):
        load_prompts("recommender", tmp_path / "prompts.yaml")


@pytest.mark.parametrize("content", ["", "recommender: [1]", "recommender: {question: a}", "- x"])
def test_missing_prompts_are_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ParamsError, match=r"prompts\.yaml"):
        load_prompts("recommender", path)


@pytest.mark.parametrize("text", ["می\u200cخواهم", "ക്\u200dഷ", "👩\u200d🍳 👨🏽\u200d🍳"])
def test_joiners_that_a_script_needs_are_kept(text: str) -> None:
    assert neutralise(text) == text


@pytest.mark.parametrize("joiner", ["\u200c", "\u200d", "\u200c\u200d"])
def test_no_marker_is_hidden_by_joiners(joiner: str) -> None:
    for marker in MARKERS:
        assert neutralise(joiner.join(marker)) == neutralise(marker)
        assert neutralise(f"é{joiner}{marker}{joiner}é") == neutralise(f"é{marker}é")

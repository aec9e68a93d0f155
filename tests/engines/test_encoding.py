"""Encoded prompts of every family: complete, without doubled tokens, and counted correctly."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import Family
from PIL import Image

from mllm_msr.core.errors import ModelError, ParamsError
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import Gallery, ImageRef
from mllm_msr.method import prompts
from mllm_msr.method.prompts import load_prompts

ITEMS = ["a", "b", "c", "e", "f"]  # images of five sizes
TEMPLATES = load_prompts("recommender")


def shown(encoder: Encoder, gallery: Gallery, item: str) -> ImageRef | None:
    return gallery.image_ref(item) if encoder.takes_images else None


def ask(encoder: Encoder, gallery: Gallery, item: str, title: str = "Red kettle") -> Prompt:
    image_ref = shown(encoder, gallery, item)
    return prompts.recommendation(TEMPLATES, "Likes bright colours.", title, image_ref, None)


def ids(encoder: Encoder, prompt: Prompt) -> list[int]:
    return encoder.encode([prompt])["input_ids"][0].tolist()


@pytest.mark.parametrize("item", ITEMS)
def test_the_token_count_is_the_encoded_length(
    encoder: Encoder, gallery: Gallery, item: str
) -> None:
    for title in ("", "Red kettle", "咖啡 ☕ " * 20):
        prompt = ask(encoder, gallery, item, title)
        assert encoder.count_tokens(prompt) == len(ids(encoder, prompt))
        # The second time the image's tokens are cached.
        assert encoder.count_tokens(prompt) == len(ids(encoder, prompt))


def test_a_batch_is_padded_on_the_left_and_has_each_prompt_complete(
    encoder: Encoder, gallery: Gallery
) -> None:
    asked = [ask(encoder, gallery, item, "Red kettle " * n) for n, item in enumerate(ITEMS)]
    batch = encoder.encode(asked)
    for row, mask, prompt in zip(batch["input_ids"], batch["attention_mask"], asked, strict=True):
        assert row[mask.bool()].tolist() == ids(encoder, prompt)
        assert mask.tolist() == sorted(mask.tolist())


def test_a_batch_may_mix_prompts_with_and_without_an_image(
    encoder: Encoder, gallery: Gallery
) -> None:
    asked = [ask(encoder, gallery, item) for item in ("d", "a", "g", "c")]
    batch = encoder.encode(asked)
    found = [
        row[mask.bool()].tolist()
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert found == [ids(encoder, prompt) for prompt in asked]


def test_nothing_is_truncated_however_long_the_prompt(encoder: Encoder, gallery: Gallery) -> None:
    encoder.tokenizer.model_max_length, before = 64, encoder.tokenizer.model_max_length
    try:
        short, long = (ask(encoder, gallery, "c", "kettle " * n) for n in (1, 3_000))
        assert len(ids(encoder, long)) > 6_000
        assert encoder.count_tokens(long) == len(ids(encoder, long))
        image = getattr(encoder.config, "image_token_id", None)
        assert ids(encoder, long).count(image) == ids(encoder, short).count(image)
        assert ids(encoder, long)[-10:] == ids(encoder, short)[-10:]
        assert ids(encoder, long)[:3] == ids(encoder, short)[:3]
    finally:
        encoder.tokenizer.model_max_length = before


@pytest.mark.filterwarnings("ignore:`max_length` is ignored:UserWarning")  # of the saved limit
def test_a_tokenizer_saved_with_truncation_truncates_nothing(
    family: Family, gallery: Gallery, tmp_path: Path
) -> None:
    folder = shutil.copytree(family.folder, tmp_path / "model")
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    limits = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(saved | {"truncation": limits}), encoding="utf-8")
    whole, saved_short = (Encoder(str(path), None, gallery) for path in (family.folder, folder))
    prompt = ask(whole, gallery, "a")
    assert ids(saved_short, prompt) == ids(whole, prompt)
    assert saved_short.count_tokens(prompt) == whole.count_tokens(prompt) > 16


def test_the_start_token_occurs_once(encoder: Encoder, gallery: Gallery) -> None:
    start = encoder.tokenizer.bos_token_id
    if start is None:
        assert encoder.config.model_type.startswith("qwen")
        return
    assert ids(encoder, ask(encoder, gallery, "a")).count(start) == 1


def test_a_prompt_ends_where_the_answer_begins(encoder: Encoder, gallery: Gallery) -> None:
    prompt = ask(encoder, gallery, "a")
    for answer in ("yes", "no"):
        closed = encoder.process(
            [encoder.render(prompt, answer)],
            [encoder._gallery.images([prompt.image])] if prompt.image else [[]],
        )["input_ids"][0].tolist()
        opened = ids(encoder, prompt)
        assert closed[: len(opened)] == opened
        assert closed[len(opened)] == encoder.answer_token_id(prompt, answer)


def test_the_answer_token_is_the_same_after_every_prompt(
    encoder: Encoder, gallery: Gallery
) -> None:
    asked = [ask(encoder, gallery, item, title) for item in ITEMS for title in ("", "Red.", "12")]
    asked.append(prompts.recommendation(TEMPLATES, "", "", None, None))
    tokens = {(encoder.answer_token_id(p, "yes"), encoder.answer_token_id(p, "no")) for p in asked}
    assert len(tokens) == 1
    yes, no = tokens.pop()
    assert [encoder.tokenizer.decode([token]).strip() for token in (yes, no)] == ["yes", "no"]


@pytest.mark.parametrize("answer", ["absolutely certain", "yesno", " yes", "x" * 30])
def test_an_answer_of_several_tokens_is_an_error(
    encoder: Encoder, gallery: Gallery, answer: str
) -> None:
    with pytest.raises(ModelError, match=r"one token after the prompt.*choose another wording"):
        encoder.answer_token_id(ask(encoder, gallery, "a"), answer)


def test_an_image_for_a_text_model_is_an_error(
    build: Callable[[str], Family], gallery: Gallery
) -> None:
    encoder = Encoder(str(build("llama3").folder), None, gallery)
    prompt = Prompt("Look:", gallery.image_ref("a"))
    for use in (encoder.render, encoder.count_tokens, lambda p: encoder.encode([p])):
        with pytest.raises(ModelError, match="takes images; got a text-only model"):
            use(prompt)


def test_pixels_are_those_of_the_prompts_own_image(encoder: Encoder, gallery: Gallery) -> None:
    if not encoder.takes_images:
        pytest.skip("a text model")
    together = encoder.encode([ask(encoder, gallery, item) for item in ("a", "t")])
    alone = [encoder.encode([ask(encoder, gallery, item)]) for item in ("a", "t")]
    # Both are 40 x 40, so their pixels are concatenated in every family.
    pixels = torch.cat([inputs["pixel_values"] for inputs in alone])
    assert torch.equal(together["pixel_values"], pixels)
    assert not torch.equal(alone[0]["pixel_values"], alone[1]["pixel_values"])


def test_the_identity_depends_on_every_file_that_matters(family: Family, tmp_path: Path) -> None:
    def identity(folder: Path) -> str:
        return Encoder(str(folder), None, None).identity

    before = identity(family.folder)
    folder = shutil.copytree(family.folder, tmp_path / "model")
    assert identity(folder) == before
    (folder / "README.md").write_text("a card")
    assert identity(folder) == before
    found = {before}
    for file in sorted(folder.iterdir()):
        if file.suffix not in {".json", ".jinja", ".safetensors"}:
            continue
        content = file.read_bytes()
        changed = content + b" " if file.suffix != ".safetensors" else content[:-1] + b"\x7f"
        file.write_bytes(changed)
        found.add(identity(folder))
        file.write_bytes(content)
    assert len(found) > 5
    assert len(found) == 1 + len([f for f in folder.iterdir() if f.suffix != ".md"])


@pytest.mark.parametrize(
    ("start", "shown"),
    [
        ("{{ date_string or strftime_now('%d') }}", "26 Jul 2024"),
        ("{{ strftime_now('%d %B %Y, %A') }}", "26 July 2024, Friday"),
        ("{% set form = '%Y-%m-%d' %}{{ strftime_now(format=form) }}", "2024-07-26"),
        ("{{ strftime_now('%H:%M:%S') if strftime_now is defined }}", "00:00:00"),
    ],
)
@pytest.mark.parametrize("name", ["llama3", "smolvlm"])
def test_the_date_in_a_chat_template_is_fixed(
    build: Callable[[str], Family], tmp_path: Path, name: str, start: str, shown: str
) -> None:
    folder = shutil.copytree(build(name).folder, tmp_path / "model")
    before = Encoder(str(folder), None, None).render(Prompt("Hi"))
    for path in folder.glob("*.jinja"):
        path.write_text(start + path.read_text())
    assert Encoder(str(folder), None, None).render(Prompt("Hi")) == shown + before


def test_responses_to_prompts_with_a_date_of_another_day_are_not_found(
    build: Callable[[str], Family], tmp_path: Path
) -> None:
    folder = shutil.copytree(build("qwen2").folder, tmp_path / "model")
    path = folder / "chat_template.jinja"
    template = path.read_text()
    starts = {"": True, "{{ date_string }}": True, "{{ strftime_now('') }}": False}
    for start, is_same in starts.items():
        path.write_text(start + template)
        encoder = Encoder(str(folder), None, None)
        assert (encoder.identity == encoder._model_identity()) is is_same


def test_of_several_chat_templates_the_default_is_used(
    build: Callable[[str], Family], tmp_path: Path
) -> None:
    folder = shutil.copytree(build("qwen2").folder, tmp_path / "model")
    before = Encoder(str(folder), None, None).render(Prompt("Hi"))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    encoder = Encoder(str(folder), None, None)
    assert encoder.render(Prompt("Hi")) == before
    assert encoder.chat_template == (folder / "chat_template.jinja").read_text()


@pytest.fixture
def thinking(build: Callable[[str], Family], tmp_path: Path) -> str:
    """Return a text model that thinks before it answers unless it is told not to, as Qwen3."""
    folder = shutil.copytree(build("qwen2").folder, tmp_path / "model")
    turn = "'<|im_start|>' + message.role + '\\n'"
    (folder / "chat_template.jinja").write_text(
        "{%- for message in messages %}{{ " + turn + " }}"
        "{%- if message.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
        "{{ message.content + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}"
        "{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
    )
    return str(folder)


def test_a_model_that_can_think_answers_at_once(thinking: str) -> None:
    encoder = Encoder(thinking, None, None)
    assert encoder.render(Prompt("Hi")) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    token = encoder.answer_token_id(Prompt("Hi"), "yes")
    assert encoder.tokenizer.decode([token]) == "yes"


def test_responses_with_thoughts_are_not_found(
    build: Callable[[str], Family], thinking: str
) -> None:
    encoder = Encoder(thinking, None, None)
    assert encoder.identity != encoder._model_identity()
    other = Encoder(str(build("qwen2").folder), None, None)
    assert other.identity == other._model_identity()
    assert not other.template_variables


# -- system messages -------------------------------------------------------------------------------


@pytest.fixture
def with_default(build: Callable[[str], Family], tmp_path: Path) -> str:
    """Return a text model whose chat template has a system message of its own, as SmolLM2's."""
    folder = shutil.copytree(build("qwen2").folder, tmp_path / "model")
    path = folder / "chat_template.jinja"
    default = "{{ '<|im_start|>system\\nYou are a helpful model.<|im_end|>\\n' }}"
    path.write_text(
        "{%- if messages[0]['role'] != 'system' %}" + default + "{%- endif %}" + path.read_text()
    )
    return str(folder)


@pytest.mark.parametrize(
    ("message", "shown"),
    [(None, "You are a helpful model."), ("Recommend items.", "Recommend items."), ("", "")],
)
def test_the_default_system_message_is_kept_replaced_or_emptied(
    with_default: str, message: str | None, shown: str
) -> None:
    text = Encoder(with_default, None, None, message).render(Prompt("Hi"))
    assert text == (
        f"<|im_start|>system\n{shown}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_system_message_is_in_tokens_and_answers(family: Family, gallery: Gallery) -> None:
    encoder = Encoder(str(family.folder), None, gallery, "Recommend items.")
    prompt = ask(encoder, gallery, "a")
    assert "Recommend items." in encoder.render(prompt)
    assert encoder.count_tokens(prompt) == len(ids(encoder, prompt))
    assert encoder.answer_token_id(prompt, "yes") != encoder.answer_token_id(prompt, "no")


def test_a_system_message_is_part_of_the_identity(with_default: str) -> None:
    texts = (None, "", "Recommend items.")
    found = [Encoder(with_default, None, None, text).identity for text in texts]
    assert len(set(found)) == 3
    assert found[0] == Encoder(with_default, None, None).identity


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (
            "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}",
            "TemplateError: no system",
        ),
        ("{%- set messages = messages | rejectattr('role', 'equalto', 'system') %}", "drops it"),
    ],
)
@pytest.mark.parametrize("message", ["", "Recommend items."])
def test_a_template_without_a_system_role_is_an_error(
    build: Callable[[str], Family], tmp_path: Path, start: str, said: str, message: str
) -> None:
    folder = shutil.copytree(build("qwen2").folder, tmp_path / "model")
    path = folder / "chat_template.jinja"
    path.write_text(start + path.read_text())
    Encoder(str(folder), None, None)
    with pytest.raises(ModelError, match=f"shows a system message; got .*{said}; set system_mess"):
        Encoder(str(folder), None, None, message)


AS_TEXT = "{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"


@pytest.mark.parametrize("shown", ["{{ system }}", "{{ '<s>' + messages[0].content }}"])
def test_a_template_may_need_the_system_message_as_text(
    build: Callable[[str], Family], tmp_path: Path, shown: str
) -> None:
    folder = shutil.copytree(build("llava").folder, tmp_path / "model")
    path = folder / "chat_template.jinja"
    template = path.read_text()
    before = Encoder(str(folder), None, None).render(Prompt("Hi"))
    start = AS_TEXT + "{{ system }}" if shown == "{{ system }}" else shown + AS_TEXT
    path.write_text("{%- if messages[0]['role'] == 'system' %}" + start + "{%- endif %}" + template)
    encoder = Encoder(str(folder), None, None, "Answer briefly.")
    assert encoder.render(Prompt("Hi")).endswith("Answer briefly." + before)
    plain = Encoder(str(folder), None, None)
    assert plain.render(Prompt("Hi")) == before
    assert plain.identity == plain._model_identity()


def test_a_template_that_prints_a_system_message_as_a_list_is_an_error(
    build: Callable[[str], Family], tmp_path: Path
) -> None:
    folder = shutil.copytree(build("llava").folder, tmp_path / "model")
    path = folder / "chat_template.jinja"
    printed = "{{ [{'type': 'text', 'text': 'instruction'}] }}"
    path.write_text(
        "{%- if messages[0]['role'] == 'system' %}"
        + (printed + AS_TEXT)
        + "{%- endif %}"
        + path.read_text()
    )
    with pytest.raises(ModelError, match="got one that prints it as a list; set system_message"):
        Encoder(str(folder), None, None, "Answer briefly.")


def test_an_image_placeholder_in_a_system_message_is_an_error(
    build: Callable[[str], Family], gallery: Gallery
) -> None:
    with pytest.raises(ParamsError, match="expected a text without <image>"):
        Encoder(str(build("llava").folder), None, gallery, "See <image>")


# -- incomplete models -----------------------------------------------------------------------------


def test_a_model_without_a_chat_template_is_an_error(
    build: Callable[[str], Family], tmp_path: Path
) -> None:
    folder = shutil.copytree(build("llama3").folder, tmp_path / "model")
    for path in folder.glob("*.jinja"):
        path.unlink()
    with pytest.raises(ModelError, match="expected a chat template; got none"):
        Encoder(str(folder), None, None)


def test_a_family_whose_processor_expands_the_image_is_refused_with_the_reason(
    build: Callable[[str], Family], tmp_path: Path
) -> None:
    folder = shutil.copytree(build("llava").folder, tmp_path / "model")
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<image>", "<start_of_image>"))
    with pytest.raises(ModelError, match="got one that drops the text or the image"):
        Encoder(str(folder), None, None)
    path = folder / "tokenizer_config.json"
    tokens = {"extra_special_tokens": {"boi_token": "<start_of_image>"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | tokens))
    with pytest.raises(ModelError, match="got <start_of_image>, which only the processor expands"):
        Encoder(str(folder), None, None)


@pytest.mark.parametrize(
    "lost", ["config.json", "tokenizer.json", "preprocessor_config.json", "everything"]
)
def test_a_folder_that_is_no_model_is_one_line(
    build: Callable[[str], Family], tmp_path: Path, lost: str
) -> None:
    folder = shutil.copytree(build("llava").folder, tmp_path / "model")
    for path in folder.iterdir():
        if lost in {path.name, "everything"}:
            path.unlink()
    with pytest.raises(ModelError) as caught:
        Encoder(str(folder), None, None)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_not_json_is_one_line(
    build: Callable[[str], Family], tmp_path: Path
) -> None:
    folder = shutil.copytree(build("llava").folder, tmp_path / "model")
    for content in ("{", '{"model_type": "nonsense"}'):
        (folder / "config.json").write_text(content)
        with pytest.raises(ModelError, match="expected a model; got"):
            Encoder(str(folder), None, None)


HUB = """
import sys
from mllm_msr.engines.encoding import Encoder
encoder = Encoder("tiny/llama", sys.argv[1] or None, None)
print(encoder.identity, encoder.revision)
"""


@pytest.mark.parametrize("name", ["models/absent", "./absent", "/absent", "~/absent"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match=rf"{name}: expected a model; got no such folder; import"):
        Encoder(name, None, None)


@pytest.mark.slow
def test_the_identity_of_a_hub_model_is_its_commit(
    build: Callable[[str], Family], tmp_path: Path
) -> None:
    # The hub's cache as huggingface_hub writes it.
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--tiny--llama"
    shutil.copytree(build("llama3").folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    for revision in ("", "main", commit):
        said = subprocess.run(
            [sys.executable, "-c", HUB, revision],
            env=environment,
            capture_output=True,
            check=True,
            text=True,
        ).stdout.splitlines()[-1]
        assert said == f"tiny/llama@{commit} {commit}"


def test_pixels_equal_those_of_an_encoded_prompt(encoder: Encoder, gallery: Gallery) -> None:
    if not encoder.takes_images:
        return
    image_refs = [image_ref for item in "abce" if (image_ref := gallery.image_ref(item))]
    for image_ref in image_refs:
        whole, alone = (
            encoder.encode([Prompt("", image_ref, "What is it?")]),
            encoder.pixels([image_ref]),
        )
        assert alone.keys() == whole.keys() - {"input_ids", "attention_mask", "mm_token_type_ids"}
        assert all(torch.equal(alone[name], whole[name]) for name in alone)


@pytest.mark.parametrize("size", [(600, 3), (3, 600), (1, 200), (200, 1), (1, 1), (3, 3)])
def test_a_strip_of_an_image_keeps_its_colours_in_every_family(
    encoder: Encoder, gallery: Gallery, size: tuple[int, int]
) -> None:
    # Code may mistake a side of 1 or 3 pixels for the channels.
    if not encoder.takes_images:
        pytest.skip("text only")
    text = encoder.render(ask(encoder, gallery, "a"))
    strip, square = (
        encoder.process([text], [[Image.new("RGB", shape, (200, 30, 40))]])["pixel_values"]
        for shape in (size, (64, 64))
    )
    assert torch.allclose(brightest(strip), brightest(square), atol=1e-3)


def brightest(pixels: torch.Tensor) -> torch.Tensor:
    """Return the largest value of each channel, of tiles or of patches that begin with channels."""
    if pixels.dim() == 2:
        return pixels.unflatten(1, (3, -1)).amax((0, 2))
    return pixels.flatten(0, -4).amax((0, 2, 3))

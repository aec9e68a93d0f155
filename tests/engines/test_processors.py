"""Processors of every family load without torchvision, and batches equal single prompts."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, build_family, draw_image, user_turn
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from mllm_msr.core.errors import ModelError
from mllm_msr.engines.processors import NoVideo, load_processor

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
SIZES = [(40, 40), (90, 50), (30, 110)]
QUESTIONS = [
    "Will the user like this item? Answer yes or no.",
    "Describe.",
    "The user likes cats and travel. Answer yes or no, please, now.",
]
# Image tokens of each of SIZES, worked out by hand from the families' settings.
IMAGE_TOKENS = {
    # (32 / 8)^2, whatever the size.
    "llava": [16, 16, 16],
    # The whole image (16), and the grid: 8 x 8 of 2 x 2 tiles with 8 row ends; 4 x 8 of one row of
    # two, cut to no less, with 4; 12 x 4 of three rows, cut to no less, with 12.
    "llava_next": [16 + 64 + 8, 16 + 4 * 8 + 4, 16 + 12 * 4 + 12],
    # 56 x 56, 56 x 84 and 112 x 28 pixels, one token per 28 x 28.
    "qwen2_5_vl": [4, 6, 4],
    # 64 x 64, 64 x 96 and 96 x 32 pixels, one token per 32 x 32.
    "qwen3_vl": [4, 6, 3],
    # 3 x 3, 2 x 3 and 3 x 1 tiles and the whole, four tokens each.
    "smolvlm": [(9 + 1) * 4, (6 + 1) * 4, (3 + 1) * 4],
}


class Loaded:
    """A family's model with its processor."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.processor = load_processor(str(family.folder))
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        auto = AutoModelForImageTextToText if family.has_images else AutoModelForCausalLM
        self.model = auto.from_pretrained(family.folder).eval()

    def render(self, question: str, has_image: bool, answer: str | None = None) -> str:
        """Render one prompt, or the whole conversation where an answer is given."""
        turns = user_turn(question, has_image)
        if answer is not None:
            turns += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        if not self.family.has_images:
            turns = [turn | {"content": turn["content"][0]["text"]} for turn in turns]
        return self.processor.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=answer is None
        )

    def encode(self, texts: list[str], images: list[Image.Image | None]) -> Any:
        """Encode a left-padded batch; the beginning-of-text token is never written twice."""
        begin = self.tokenizer.bos_token
        settings: dict[str, Any] = {
            "padding": True,
            "padding_side": "left",
            "return_tensors": "pt",
            "add_special_tokens": not (begin and texts[0].startswith(begin)),
        }
        if self.family.has_images:
            nested = [[image] if image is not None else [] for image in images]
            settings["images"] = nested if any(nested) else None
        return self.processor(text=texts, **settings)

    def batch(self, has_image: list[bool]) -> Any:
        """Encode the questions, with an image of another size each where one is asked for."""
        images = [
            draw_image(*size, seed) if shown else None
            for seed, (size, shown) in enumerate(zip(SIZES, has_image, strict=True))
        ]
        texts = [self.render(*pair) for pair in zip(QUESTIONS, has_image, strict=True)]
        return self.encode(texts, images)

    def single(self, index: int, has_image: bool) -> Any:
        """Encode one of the questions alone."""
        image = draw_image(*SIZES[index], index) if has_image else None
        return self.encode([self.render(QUESTIONS[index], has_image)], [image])

    @torch.inference_mode()
    def last_logits(self, inputs: Any) -> torch.Tensor:
        """Score the next token: (prompts, vocabulary)."""
        return self.model(**inputs, logits_to_keep=1).logits[:, -1]

    @torch.inference_mode()
    def generate(self, inputs: Any) -> list[list[int]]:
        """Generate greedily; return the token ids of each response up to its end-of-text token."""
        tokens = self.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        responses = tokens[:, inputs["input_ids"].shape[1] :].tolist()
        end = self.tokenizer.eos_token_id
        return [ids[: ids.index(end)] if end in ids else ids for ids in responses]


@pytest.fixture(scope="module")
def loaded(family: Family) -> Loaded:
    return Loaded(family)


def test_a_build_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, second = (build_family("qwen3_vl", tmp_path / name) for name in "ab")
    weights = [item.folder / "model.safetensors" for item in (first, second)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert weights[0].stat().st_size < 4 * 500_000


@pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is installed")
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_the_plain_way_needs_torchvision_for_a_video_part(name: str, tmp_path: Path) -> None:
    folder = build_family(name, tmp_path / name).folder
    with pytest.raises(ImportError, match="Torchvision"):
        AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("name", ["llava", "llava_next", "llama3"])
def test_the_plain_way_and_ours_agree_without_a_video_part(name: str, tmp_path: Path) -> None:
    family = build_family(name, tmp_path / name)
    plain, ours = AutoProcessor.from_pretrained(family.folder), load_processor(str(family.folder))
    assert type(plain) is type(ours)
    question = {"text": "Describe." + " <image>" * family.has_images, "return_tensors": "pt"}
    if family.has_images:
        question["images"] = draw_image(90, 50, 0)
    expected, found = plain(**question), ours(**question)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_no_warning_of_a_missing_backend(family: Family, capfd: pytest.CaptureFixture[str]) -> None:
    load_processor(str(family.folder))
    assert capfd.readouterr().err == ""


def test_a_video_is_refused(loaded: Loaded) -> None:
    part = getattr(loaded.processor, "video_processor", None)
    if part is None:
        pytest.skip("this family's processor has no video part")
    assert isinstance(part, NoVideo)
    with pytest.raises(ModelError, match="text and images only"):
        part([])


def test_a_processor_saved_and_loaded_again_is_the_same(loaded: Loaded, tmp_path: Path) -> None:
    loaded.processor.save_pretrained(tmp_path)
    loaded.model.config.save_pretrained(tmp_path)
    again = load_processor(str(tmp_path))
    assert type(again).__name__ == type(loaded.processor).__name__
    assert again.chat_template == loaded.processor.chat_template


def test_an_unknown_processor_class_is_a_clear_error(tmp_path: Path) -> None:
    folder = build_family("llava", tmp_path / "llava").folder
    (folder / "processor_config.json").write_text('{"processor_class": "FooProcessor"}')
    with pytest.raises(ModelError, match="got FooProcessor"):
        load_processor(str(folder))


def test_logits_of_a_batch_equal_those_of_single_prompts(loaded: Loaded) -> None:
    shown = [loaded.family.has_images] * 3
    together = loaded.last_logits(loaded.batch(shown))
    alone = torch.cat([loaded.last_logits(loaded.single(row, shown[row])) for row in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_greedy_answers_of_a_batch_equal_those_of_single_prompts(loaded: Loaded) -> None:
    shown = [loaded.family.has_images] * 3
    together = loaded.generate(loaded.batch(shown))
    assert together == [loaded.generate(loaded.single(row, shown[row]))[0] for row in range(3)]


def test_a_batch_may_mix_prompts_with_and_without_an_image(loaded: Loaded) -> None:
    if not loaded.family.has_images:
        pytest.skip("a text model")
    shown = [True, False, True]
    together = loaded.last_logits(loaded.batch(shown))
    alone = torch.cat([loaded.last_logits(loaded.single(row, shown[row])) for row in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_a_text_only_prompt_works(loaded: Loaded) -> None:
    logits = loaded.last_logits(loaded.single(0, has_image=False))
    assert logits.isfinite().all()


def test_the_image_matters(loaded: Loaded) -> None:
    if not loaded.family.has_images:
        pytest.skip("a text model")
    text = loaded.render("Describe.", has_image=True)
    first, second = (
        loaded.last_logits(loaded.encode([text], [draw_image(64, 64, seed)])) for seed in (1, 2)
    )
    assert (first - second).abs().max() > 1e-3


def test_image_tokens_are_as_many_as_worked_out_by_hand(loaded: Loaded) -> None:
    if not loaded.family.has_images:
        pytest.skip("a text model")
    inputs = loaded.batch([True] * 3)
    counts = (inputs["input_ids"] == loaded.model.config.image_token_id).sum(dim=1)
    assert counts.tolist() == IMAGE_TOKENS[loaded.family.name]


def test_the_beginning_of_text_is_written_once_at_most(loaded: Loaded) -> None:
    inputs = loaded.single(0, loaded.family.has_images)
    if loaded.tokenizer.bos_token_id is None:
        assert loaded.family.name.startswith("qwen")
    else:
        assert (inputs["input_ids"] == loaded.tokenizer.bos_token_id).sum() == 1


@pytest.mark.parametrize("answer", ["yes", "no", "Yes", "No"])
def test_an_answer_in_its_context_is_one_token_after_the_prompt(
    loaded: Loaded, answer: str
) -> None:
    shown = loaded.family.has_images
    image = draw_image(*SIZES[0], 0) if shown else None
    texts = [loaded.render(QUESTIONS[0], shown), loaded.render(QUESTIONS[0], shown, answer)]
    prompt, whole = (loaded.encode([text], [image])["input_ids"][0].tolist() for text in texts)
    assert whole[: len(prompt)] == prompt
    token = loaded.tokenizer.convert_ids_to_tokens(whole[len(prompt)])
    lead = {"llava": "▁", "llava_next": "▁", "smolvlm": "Ġ"}.get(loaded.family.name, "")
    assert token == lead + answer


def test_the_language_layers_are_found_apart_from_the_vision_tower(loaded: Loaded) -> None:
    names = {id(module): name for name, module in loaded.model.named_modules()}
    decoder = names[id(loaded.model.get_decoder())]
    linear = [n for n, m in loaded.model.named_modules() if isinstance(m, torch.nn.Linear)]
    language = [name for name in linear if name.startswith(f"{decoder}.layers.")]
    assert len(language) == 2 * 7
    rest = set(linear) - set(language) - {"lm_head"}
    assert bool(rest) == loaded.family.has_images
    assert not any(name.startswith(f"{decoder}.") for name in rest)


def test_the_fixture_gives_every_family() -> None:
    fixtures = Path(__file__).parents[1].joinpath("conftest.py").read_text(encoding="utf-8")
    assert all(f'"{name}"' in fixtures for name in FAMILIES)

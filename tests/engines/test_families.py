"""Every declared family has a small model that is tested, and an undeclared one works unpacked."""

import json
import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, OTHER, WINDOWED, Family
from generating import generate

from mllm_msr.engines import families
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.families import find_family, image_token_id, supports_packing
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.packing import Packer, make_packer
from mllm_msr.engines.prompt import Prompt


@pytest.fixture
def undeclared(build: Callable[[str], Family]) -> LocalModel:
    return LocalModel(Encoder(str(build("gemma3").folder), None, None))


def model_types(family: Family) -> set[str]:
    config = json.loads((family.folder / "config.json").read_text(encoding="utf-8"))
    return {config["model_type"], config.get("text_config", config)["model_type"]}


def test_every_declared_family_has_a_small_model(build: Callable[[str], Family]) -> None:
    names = [name for name in FAMILIES | WINDOWED | OTHER if name != "smolvlm"]
    tested = {"smolvlm"}.union(*(model_types(build(name)) for name in names))
    for family in families.FAMILIES:
        assert tested.intersection(family.model_types), family.name


def test_no_model_type_belongs_to_two_families() -> None:
    declared = [name for family in families.FAMILIES for name in family.model_types]
    assert len(declared) == len(set(declared))


def test_every_family_declares_what_its_model_has(family: Family, model: LocalModel) -> None:
    declared = find_family(model.encoder.config)
    assert declared
    assert declared.takes_images == family.has_images == model.encoder.takes_images
    assert declared.mrope == hasattr(model.weights.base_model, "get_rope_index")


def test_a_qwen2_model_gives_the_same_logits_packed(build: Callable[[str], Family]) -> None:
    model = LocalModel(Encoder(str(build("qwen2").folder), None, None))
    prompts = [Prompt(f"The user likes {word}.") for word in ("red cats", "travel", "red")]
    packer = make_packer(model.encoder, model.weights)
    assert type(packer) is Packer
    with torch.no_grad():
        packed = packer.run(model.weights, packer.pack(prompts))
        plain = [model.weights(**model.encoder.encode([p])).logits[0, -1] for p in prompts]
    torch.testing.assert_close(packed, torch.stack(plain), atol=1e-4, rtol=0)


def test_a_model_of_an_undeclared_family_generates_from_whole_prompts(
    undeclared: LocalModel,
) -> None:
    assert make_packer(undeclared.encoder, undeclared.weights) is None
    assert undeclared.decoder is None
    prompts = [Prompt("The user likes red."), Prompt("The user likes blue.")]
    assert len(generate(undeclared, prompts, max_new_tokens=2)) == 2


def test_an_undeclared_family_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    text = SimpleNamespace(model_type="bloom_of_this_test")
    config = SimpleNamespace(model_type="llava", get_text_config=lambda: text)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not supports_packing(config)  # type: ignore[arg-type]
    [message] = caplog.messages
    assert message.startswith("model type bloom_of_this_test: no family in")
    assert "prompts run whole" in message


def test_a_family_may_name_its_image_token(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(model_type="new", image_token_id=1, image_token_index=2)
    assert image_token_id(config) == 1  # type: ignore[arg-type]
    new = families.ModelFamily("New", ("new",), image_token="image_token_index")
    monkeypatch.setattr(families, "FAMILIES", (new,))
    assert image_token_id(config) == 2  # type: ignore[arg-type]

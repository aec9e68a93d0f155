"""QLoRA with bitsandbytes: the language model in 4 bits, everything else unchanged."""

from collections.abc import Callable

import pytest
import torch
from families import FAMILIES, Family
from torch import nn

from mllm_msr.core.errors import ModelError
from mllm_msr.core.params import SftParams, load_params
from mllm_msr.engines import quantizing
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel, load_weights
from mllm_msr.engines.packing import Packer
from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import Gallery
from mllm_msr.method.adapters import add_adapter
from mllm_msr.training.losses import yes_no_loss

LAYERS = load_params(SftParams).lora.layers
bitsandbytes = pytest.importorskip("bitsandbytes")


def linear(model: nn.Module, language: bool) -> list[nn.Module]:
    decoder = {id(module) for module in model.get_decoder().modules()}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [layer for layer in layers if (id(layer) in decoder) == language]


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_language_model_is_quantized(
    build: Callable[[str], Family], gallery: Gallery, name: str
) -> None:
    family = build(name)
    encoder = Encoder(str(family.folder), None, gallery)
    model = load_weights(encoder, torch.float32, four_bit=True)
    assert linear(model, language=True)
    for layer in linear(model, language=True):
        assert isinstance(layer, bitsandbytes.nn.Linear4bit)
        assert layer.weight.dtype == torch.uint8  # two weights to a byte
    for layer in linear(model, language=False):
        assert not isinstance(layer, bitsandbytes.nn.Linear4bit)
        assert layer.weight.dtype == torch.float32


@pytest.fixture
def four_bit(build: Callable[[str], Family], gallery: Gallery) -> LocalModel:
    return LocalModel(Encoder(str(build("llava").folder), None, gallery), four_bit=True)


def prompts(gallery: Gallery) -> list[Prompt]:
    return [
        Prompt("Look:", gallery.image_ref("b"), f"take it? {word}") for word in ("now", "later")
    ]


def test_logits_of_quantized_weights_are_close(gallery: Gallery) -> None:
    encoder = Encoder("mllm_msr/pocket/model", None, gallery)
    full, four_bit = LocalModel(encoder), LocalModel(encoder, four_bit=True)
    inputs = encoder.encode(prompts(gallery))
    with torch.inference_mode():
        exact, near = (model.weights(**inputs).logits[:, -1] for model in (full, four_bit))
    cosine = nn.functional.cosine_similarity(exact, near)
    assert (cosine > 0.97).all()
    assert not torch.equal(exact, near)


def test_training_changes_the_adapter_only(four_bit: LocalModel, gallery: Gallery) -> None:
    torch.manual_seed(0)
    adapted = add_adapter(four_bit.load(), 4, 8, 0.0, LAYERS).train()
    frozen = {n: p.detach().clone() for n, p in adapted.named_parameters() if "lora_" not in n}
    trained = [p for p in adapted.parameters() if p.requires_grad]
    packer = Packer(four_bit.encoder, adapted.get_base_model())
    packed = packer.pack(prompts(gallery))
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for _ in range(8):
        loss = yes_no_loss(packer.run(adapted, packed).float(), torch.tensor([5, 6]))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
    now = dict(adapted.named_parameters())
    assert [name for name, before in frozen.items() if not torch.equal(before, now[name])] == []


def test_quantized_weights_have_response_keys_of_their_own(four_bit: LocalModel) -> None:
    assert four_bit.precision != LocalModel(four_bit.encoder).precision


def test_without_bitsandbytes_the_error_says_what_to_install(
    four_bit: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"bitsandbytes.*qlora"):
        four_bit.load()

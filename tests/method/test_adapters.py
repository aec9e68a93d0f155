"""Adapters change the language layers only, and load completely or not at all."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import Family
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from torch import nn

from mllm_msr.core.errors import ModelError
from mllm_msr.core.params import SftParams, load_params
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import load_weights
from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import Gallery
from mllm_msr.method.adapters import (
    FusedLinear,
    adapter_identity,
    add_adapter,
    check_adapter,
    language_layers,
    load_adapter,
    read_record,
    record_adapter,
)

LAYERS = load_params(SftParams).lora.layers
NOT_LANGUAGE = re.compile(r"vision|visual|projector|connector|merger|lm_head|embed")


def bare(encoder: Encoder) -> nn.Module:
    return load_weights(encoder, torch.float32).eval()


def trained(encoder: Encoder, rank: int = 2) -> PeftModel:
    """Return a model whose adapter changes the logits, as after training."""
    torch.manual_seed(0)
    adapted = add_adapter(bare(encoder), rank, 4, 0.0, LAYERS)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted.eval()


@pytest.fixture
def saved(llava_encoder: Encoder, tmp_path: Path) -> Path:
    trained(llava_encoder).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


@pytest.fixture
def llava_encoder(build: Callable[[str], Family], gallery: Gallery) -> Encoder:
    return Encoder(str(build("llava").folder), None, gallery)


@torch.inference_mode()
def logits(model: nn.Module, encoder: Encoder) -> torch.Tensor:
    image_ref = (
        encoder._gallery.image_ref("b") if encoder.takes_images and encoder._gallery else None
    )
    return model(**encoder.encode([Prompt("Look:", image_ref, "yes?")])).logits


def test_only_language_layers_have_an_adapter(encoder: Encoder) -> None:
    model = bare(encoder)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    language = {name for name in linear if not NOT_LANGUAGE.search(name)}
    adapted = add_adapter(model, 2, 4, 0.0, LAYERS)
    touched = {
        name.removeprefix("base_model.model.").partition(".lora_")[0]
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    assert touched == language
    assert len(touched) == 2 * 7
    assert all("lora_" in n for n, p in adapted.named_parameters() if p.requires_grad)


def test_a_fresh_adapter_changes_nothing(encoder: Encoder) -> None:
    before = logits(bare(encoder), encoder)
    adapted = add_adapter(bare(encoder), 2, 4, 0.0, LAYERS).eval()
    assert torch.equal(logits(adapted, encoder), before)


def test_an_adapter_loaded_is_the_one_saved(encoder: Encoder, tmp_path: Path) -> None:
    model = trained(encoder)
    model.save_pretrained(str(tmp_path))
    expected = logits(model, encoder)
    assert (expected - logits(bare(encoder), encoder)).abs().max() > 1e-3
    ours = load_adapter(bare(encoder), tmp_path).eval()
    assert torch.equal(logits(ours, encoder), expected)
    plain = PeftModel.from_pretrained(bare(encoder), str(tmp_path)).eval()
    assert torch.equal(logits(plain, encoder), expected)


@pytest.mark.parametrize("layers", [["c_attn"], ["q_proj", "fc1"], ["patch_embedding"], []])
def test_an_unknown_layer_is_named(encoder: Encoder, layers: list[str]) -> None:
    got = ", ".join(sorted(set(layers) - {"q_proj"})) or "none"
    with pytest.raises(ModelError, match=f"expected layers among down_proj.*; got {got}; correct"):
        language_layers(bare(encoder), layers)


def lora_layer(
    bias: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> FusedLinear:
    """Return a layer of random weights whose adapter is not zero."""
    torch.manual_seed(0)
    base = nn.Linear(48, 80, bias=bias, dtype=dtype).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout)
    layer = FusedLinear(base, "default", config, r=4, lora_alpha=6)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return layer


def results(
    forward: Callable[..., torch.Tensor], layer: FusedLinear, x: torch.Tensor
) -> list[torch.Tensor]:
    """Return the output of a layer, and the gradients of its inputs and of its adapter."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # of dropout
    output = forward(layer, x)
    torch.manual_seed(2)
    output.backward(torch.randn_like(output))
    adapter = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    gradients = [one.grad for one in (x, *adapter)]
    for one in adapter:
        one.grad = None
    return [output.detach(), *gradients]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(48,), (7, 48), (2, 3, 5, 48)])
def test_the_fused_layer_computes_what_pefts_does(bias: bool, shape: tuple[int, ...]) -> None:
    layer, x = lora_layer(bias), torch.randn(shape)
    fused, plain = results(FusedLinear.forward, layer, x), results(Linear.forward, layer, x)
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_the_fused_layer_computes_what_pefts_does_in_bfloat16() -> None:
    layer, x = lora_layer(dtype=torch.bfloat16), torch.randn(5, 48)
    layer.lora_A.float(), layer.lora_B.float()  # as in fine-tuning; autocast casts them
    with torch.autocast("cpu", torch.bfloat16):
        fused, plain = results(FusedLinear.forward, layer, x), results(Linear.forward, layer, x)
    for ours, theirs in zip(fused, plain, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.1)


def merge(layer: FusedLinear) -> None:
    layer.merge()


def disable(layer: FusedLinear) -> None:
    layer.enable_adapters(False)


def add_second_adapter(layer: FusedLinear) -> None:
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False)
    layer.update_layer("second", 2, 2, config=config)
    layer.set_adapter(["default", "second"])


@pytest.mark.parametrize("change_layer", [merge, disable, add_second_adapter])
def test_pefts_own_computation_covers_the_rest(change_layer: Callable[..., None]) -> None:
    layer, x = lora_layer(), torch.randn(5, 48)
    before = layer(x)
    assert "AddLora" in type(before.grad_fn).__name__
    change_layer(layer)
    after = layer(x)
    assert torch.equal(after, Linear.forward(layer, x))
    assert torch.allclose(before, after, atol=1e-5) == (change_layer is merge)


def test_dropout_is_pefts() -> None:
    layer, x = lora_layer(dropout=0.5), torch.randn(5, 48)
    dropped = results(FusedLinear.forward, layer, x)
    for ours, theirs in zip(dropped, results(Linear.forward, layer, x), strict=True):
        assert torch.equal(ours, theirs)
    whole = results(FusedLinear.forward, layer.eval(), x)
    assert not torch.allclose(whole[0], dropped[0])


def test_adapters_use_the_fused_layer(encoder: Encoder) -> None:
    adapted = trained(encoder)
    layers = [module for module in adapted.modules() if isinstance(module, Linear)]
    assert layers
    assert {type(module) for module in layers} == {FusedLinear}


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor], str], None]) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    edit(weights, next(name for name in sorted(weights) if "lora_A" in name))
    save_file(weights, path)


def drop_key(weights: dict[str, torch.Tensor], name: str) -> None:
    del weights[name]


def add_key(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name.replace("layers.0", "layers.7")] = weights[name].clone()


def cut_shape(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = weights[name][:, :-1].clone()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop_key, r"1 missing \(.*\) and 0 unexpected"),
        (add_key, r"0 missing \(\) and 1 unexpected \(.*layers\.7"),
        (cut_shape, "size mismatch"),
    ],
)
def test_an_adapter_with_an_unexpected_or_missing_key_is_refused(
    saved: Path,
    llava_encoder: Encoder,
    edit: Callable[[dict[str, torch.Tensor], str], None],
    message: str,
) -> None:
    change(saved, edit)
    with pytest.raises(ModelError, match=f"every key fits the model; got .*{message}") as caught:
        load_adapter(bare(llava_encoder), saved)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_a_model_with_other_layers_is_refused(
    build: Callable[[str], Family], llava_encoder: Encoder, tmp_path: Path
) -> None:
    trained(Encoder(str(build("llama3").folder), None, None)).save_pretrained(str(tmp_path))
    with pytest.raises(
        ModelError, match=r"every key fits the model; .* run the stage sft"
    ) as caught:
        load_adapter(bare(llava_encoder), tmp_path)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_a_wider_model_is_refused(llava_encoder: Encoder, tmp_path: Path) -> None:
    model = bare(llava_encoder)
    model.get_decoder().layers[0].mlp.up_proj = nn.Linear(64, 96, bias=False)
    add_adapter(model, 2, 4, 0.0, LAYERS).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match=r"every key fits the model; .*size mismatch"):
        load_adapter(bare(llava_encoder), tmp_path)


def test_an_adapter_of_another_rank_than_its_configuration_is_refused(
    saved: Path, llava_encoder: Encoder
) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 3}))
    with pytest.raises(ModelError, match="size mismatch"):
        load_adapter(bare(llava_encoder), saved)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(
    saved: Path, llava_encoder: Encoder, number: float
) -> None:
    change(saved, lambda weights, name: weights[name].view(-1)[:1].fill_(number))
    with pytest.raises(ModelError, match=r"finite weights; got inf or nan in 1 of .*lora_A"):
        load_adapter(bare(llava_encoder), saved)


def test_an_adapter_is_checked_against_the_record_of_its_training(saved: Path) -> None:
    lora = load_params(SftParams).lora
    content = record_adapter(saved, "a model", lora) | {"steps": 3, "valid_auc": 0.9}
    (saved.parent / "training.json").write_text(json.dumps(content))
    record = read_record(saved.parent)
    assert (record.steps, record.model, record.lora) == (3, "a model", lora)
    (saved / "README.md").write_text("a note")  # is no part of the adapter
    check_adapter(saved, record)
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 64}))
    with pytest.raises(ModelError, match=r"sft trained; got another adapter_config\.json than"):
        check_adapter(saved, record)
    change(saved, lambda weights, name: weights[name].add_(1))
    with pytest.raises(ModelError, match=r"_config\.json and another adapter_model\.safetensors"):
        check_adapter(saved, record)


@pytest.mark.parametrize(
    "content",
    ["", "{", '{"steps": 3', "null", "[]", "{}", '{"steps": -1}', "\xff", '{"steps": "3"}'],
)
def test_a_broken_training_record_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "training.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelError, match="the record of a trained adapter; got") as caught:
        read_record(tmp_path)
    assert "run the stage sft again" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        lambda folder: (folder / "adapter_config.json").unlink(),
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99),
    ],
    ids=["no weights", "no config", "no JSON", "empty weights", "no safetensors"],
)
def test_a_broken_adapter_is_one_line(
    saved: Path, llava_encoder: Encoder, spoil: Callable[[Path], None]
) -> None:
    spoil(saved)
    with pytest.raises(ModelError) as caught:
        load_adapter(bare(llava_encoder), saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_identity_of_an_adapter_depends_on_weights_and_settings(saved: Path) -> None:
    found = {adapter_identity(saved)}
    change(saved, lambda weights, name: weights[name].add_(1))
    found.add(adapter_identity(saved))
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 8}))
    found.add(adapter_identity(saved))
    assert len(found) == 3

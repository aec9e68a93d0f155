"""Models of every family load completely and generate greedily, in a batch as alone."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family
from generating import generate
from safetensors.torch import load_file, save_file

from mllm_msr.core import cpus
from mllm_msr.core.devices import find_device, find_dtype
from mllm_msr.core.errors import ModelError, ParamsError
from mllm_msr.engines import local
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel, count_parameters, load_weights
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import Response
from mllm_msr.images.gallery import Gallery, ImageRef
from mllm_msr.method import prompts
from mllm_msr.method.prompts import load_prompts

TEMPLATES = load_prompts("recommender")
TITLES = ["Red kettle", "", "A blue teapot for four, with a lid and a long spout", "Cup", "咖啡"]


def some_prompts(model: LocalModel, gallery: Gallery, items: str = "abcef") -> list[Prompt]:
    """Return prompts of several lengths with images of several sizes."""
    return [
        prompts.recommendation(
            TEMPLATES,
            "Likes red.",
            title,
            gallery.image_ref(item) if model.encoder.takes_images else None,
            None,
        )
        for item, title in zip(items, TITLES, strict=True)
    ]


@torch.inference_mode()
def last_logits(model: LocalModel, batch: list[Prompt]) -> torch.Tensor:
    return model.weights(**model.move(model.encoder.encode(batch))).logits[:, -1]


def test_logits_of_a_batch_equal_those_of_its_prompts_alone(
    model: LocalModel, gallery: Gallery
) -> None:
    batch = some_prompts(model, gallery)
    together = last_logits(model, batch)
    alone = torch.cat([last_logits(model, [prompt]) for prompt in batch])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_logits_of_a_batch_with_and_without_images_equal_those_alone(
    model: LocalModel, gallery: Gallery
) -> None:
    batch = some_prompts(model, gallery, "dagcd")
    alone = torch.cat([last_logits(model, [prompt]) for prompt in batch])
    torch.testing.assert_close(last_logits(model, batch), alone, atol=1e-4, rtol=0)


def test_response_store_of_a_batch_equal_those_of_its_prompts_alone(
    model: LocalModel, gallery: Gallery
) -> None:
    batch = some_prompts(model, gallery)
    together = generate(model, batch, max_new_tokens=8)
    assert together == [generate(model, [prompt], max_new_tokens=8)[0] for prompt in batch]
    assert len({response.text for response in together}) > 1


def test_a_response_has_the_most_likely_token_at_each_step(
    model: LocalModel, gallery: Gallery
) -> None:
    prompt = some_prompts(model, gallery)[0]
    inputs = model.move(model.encoder.encode([prompt]))
    tokens: list[int] = []
    ends = model.weights.generation_config.eos_token_id
    while len(tokens) < 6 and ends not in tokens:
        grown = dict(inputs)
        if tokens:
            new = torch.tensor([tokens])
            grown["input_ids"] = torch.cat([inputs["input_ids"], new], dim=1)
            for name in ("attention_mask", "mm_token_type_ids"):
                if name in inputs:
                    fill = torch.full_like(new, int(name == "attention_mask"))
                    grown[name] = torch.cat([inputs[name], fill], dim=1)
        with torch.inference_mode():
            tokens.append(int(model.weights(**grown).logits[0, -1].argmax()))
    expected = model.encoder.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert generate(model, [prompt], max_new_tokens=6)[0].text == expected


def test_a_response_says_whether_it_was_truncated(model: LocalModel) -> None:
    end = model.weights.generation_config.eos_token_id
    word = model.encoder.tokenizer("red", add_special_tokens=False)["input_ids"][:2]
    assert not model._decode(torch.tensor(word)).complete
    assert model._decode(torch.tensor([*word, end])).complete
    padding = model.encoder.tokenizer.pad_token_id
    assert model._decode(torch.tensor([*word, end, padding, padding])) == model._decode(
        torch.tensor([*word, end])
    )


def test_batches_hold_every_prompt_once_the_longest_first(
    model: LocalModel, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = some_prompts(model, gallery) + some_prompts(model, gallery, "dgdgd")
    monkeypatch.setattr(local, "PROMPTS_PER_BATCH", 3)
    batches = list(model.batches(every))
    assert sorted(index for batch in batches for index in batch) == list(range(len(every)))
    lengths = [model.encoder.count_tokens(every[index]) for batch in batches for index in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert list(model.batches([])) == []


def test_padded_batches_separate_prompts_with_and_without_an_image(
    model: LocalModel, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "supports_packing", lambda _: False)
    every = some_prompts(model, gallery) + some_prompts(model, gallery, "dgdgd")
    lengths = [model.encoder.count_tokens(prompt) for prompt in every]
    monkeypatch.setattr(local, "TOKENS_PER_BATCH", 3 * max(lengths))
    batches = list(model.batches(every))
    assert sorted(index for batch in batches for index in batch) == list(range(len(every)))
    assert len(batches) > 1
    for batch in batches:
        assert len({every[index].image is None for index in batch}) == 1
        assert len(batch) * max(lengths[index] for index in batch) <= 3 * max(lengths)
        assert lengths[batch[0]] == max(lengths[index] for index in batch)


def test_a_prompt_larger_than_a_padded_batch_goes_alone(
    model: LocalModel, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "supports_packing", lambda _: False)
    monkeypatch.setattr(local, "TOKENS_PER_BATCH", 1)
    assert sorted(model.batches(some_prompts(model, gallery))) == [[n] for n in range(5)]
    assert list(model.batches([])) == []


def test_decoding_ignores_the_models_own_settings(
    family: Family, model: LocalModel, gallery: Gallery, tmp_path: Path
) -> None:
    folder = shutil.copytree(family.folder, tmp_path / "model")
    path = folder / "generation_config.json"
    hidden = {
        **{"repetition_penalty": 1.3, "do_sample": True, "temperature": 2.0, "top_k": 3},
        **{"no_repeat_ngram_size": 1, "min_new_tokens": 3, "num_beams": 1, "max_length": 5},
        **{"suppress_tokens": list(range(20, 300)), "max_new_tokens": 2},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | hidden))
    changed = LocalModel(Encoder(str(folder), None, gallery))
    batch = some_prompts(model, gallery)
    plain = generate(model, batch, max_new_tokens=12)
    assert generate(changed, batch, max_new_tokens=12) == plain
    # The settings would have changed the responses, which repeat words without them.
    assert any(len(set(answer.text)) < len(answer.text) for answer in plain)


def test_weights_are_float32_on_a_cpu_and_not_in_training(model: LocalModel) -> None:
    assert {parameter.dtype for parameter in model.weights.parameters()} == {torch.float32}
    assert not model.weights.training


def copied(build: Callable[[str], Family], folder: Path, name: str = "llava") -> Path:
    return shutil.copytree(build(name).folder, folder / "model")


def load(folder: Path) -> None:
    load_weights(Encoder(str(folder), None, None), torch.float32)


def test_a_model_folder_without_safetensors_is_refused(
    build: Callable[[str], Family], tmp_path: Path
) -> None:
    folder = copied(build, tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="weights in safetensors; got no such file; convert"):
        load(folder)


@pytest.mark.parametrize("lost", ["vision_tower", "layers.1.mlp", "lm_head"])
def test_weights_with_a_missing_key_are_refused_by_its_name(
    build: Callable[[str], Family], tmp_path: Path, lost: str
) -> None:
    folder = copied(build, tmp_path)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if lost not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"expected all weights; got none for .*{lost}"):
        load(folder)


def test_weights_of_another_shape_are_one_line(
    build: Callable[[str], Family], tmp_path: Path
) -> None:
    folder = copied(build, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights = {n: t[:-1].clone() if "lm_head" in n else t for n, t in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 100, 100_000])
def test_truncated_weights_are_one_line(
    build: Callable[[str], Family], tmp_path: Path, length: int
) -> None:
    folder = copied(build, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelError, match="expected loadable weights") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_device_and_dtype_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setenv("MLLM_MSR_DEVICE", "cpu")
    monkeypatch.setenv("MLLM_MSR_DTYPE", "bfloat16")
    assert find_device() == torch.device("cpu")
    assert find_dtype(torch.device("cpu"), 1) == torch.bfloat16
    monkeypatch.setenv("MLLM_MSR_DTYPE", "int4")
    with pytest.raises(ParamsError, match=r"MLLM_MSR_DTYPE: expected float32, .*; got int4"):
        find_dtype(torch.device("cpu"), 1)
    monkeypatch.setenv("MLLM_MSR_DEVICE", "quantum")
    with pytest.raises(ParamsError, match=r"MLLM_MSR_DEVICE: expected .*; got quantum"):
        find_device()
    torch.set_num_threads(threads)


COUNT_NEW_PAGES = """
import ctypes, resource
from mllm_msr.core import devices

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def use_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(20 * 2**20) for _ in range(10)]
    for block in blocks:
        libc.memset(block, 1, 20 * 2**20)
    for block in reversed(blocks):
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for threshold in (devices.M_TRIM_THRESHOLD, devices.M_MMAP_THRESHOLD):
    libc.mallopt(threshold, 128 * 2**10)  # the defaults
print(use_memory(), use_memory())
devices.keep_freed_memory()
print(use_memory(), use_memory())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide alone")
def test_freed_memory_is_used_again() -> None:
    # In a process of its own: the C library treats the memory of the main thread as a stage's.
    done = subprocess.run(
        [sys.executable, "-c", COUNT_NEW_PAGES], capture_output=True, text=True, check=True
    )
    before, after = ([*map(int, line.split())] for line in done.stdout.splitlines())
    assert before[1] > before[0] / 2
    assert after[1] < before[1] / 100


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux limits CPUs so")
@pytest.mark.parametrize(("text", "most"), [("100000 100000", 1), ("max 100000", 999), ("", 999)])
def test_a_containers_quota_bounds_the_cpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, most: int
) -> None:
    (tmp_path / "cpu.max").write_text(text, encoding="ascii")
    unbounded = cpus.available_cpus()
    monkeypatch.setattr(cpus, "CGROUP", tmp_path)
    assert cpus.available_cpus() == min(unbounded, most)
    (tmp_path / "cpu.max").write_text("150000 100000\n", encoding="ascii")
    assert cpus.available_cpus() == min(unbounded, 2)


def test_torch_uses_the_cpus_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, cpus = torch.get_num_threads(), os.sched_getaffinity(0)
    monkeypatch.setenv("MLLM_MSR_DEVICE", "cpu")
    torch.set_num_threads(2)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        find_device()
        assert torch.get_num_threads() == 1
    finally:
        os.sched_setaffinity(0, cpus)
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("computes_in_it", "dtype"), [(True, torch.bfloat16), (False, torch.float32)]
)
def test_weights_on_cuda_are_bfloat16_where_the_card_supports_it(
    monkeypatch: pytest.MonkeyPatch, computes_in_it: bool, dtype: torch.dtype
) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return including_emulation or computes_in_it  # every card emulates it

    monkeypatch.delenv("MLLM_MSR_DTYPE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert find_dtype(torch.device("cuda"), 1) == dtype


@pytest.mark.parametrize(
    ("instructions", "parameters", "dtype"),
    [
        (["amx_bf16"], 134_515_008, torch.bfloat16),
        (["avx512_bf16"], 134_515_008, torch.bfloat16),
        (["amx_int8", "avx512_f"], 134_515_008, torch.float32),
        (["amx_bf16", "avx512_bf16"], 50_000_000, torch.float32),
    ],
)
def test_large_models_are_bfloat16_on_a_cpu_that_computes_in_it(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    instructions: list[str],
    parameters: int,
    dtype: torch.dtype,
) -> None:
    monkeypatch.delenv("MLLM_MSR_DTYPE", raising=False)
    found = dict.fromkeys(instructions, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert find_dtype(torch.device("cpu"), parameters) == dtype
    assert ("computing in bfloat16" in caplog.text) == (dtype == torch.bfloat16)
    monkeypatch.setenv("MLLM_MSR_DTYPE", "float32")
    assert find_dtype(torch.device("cpu"), parameters) == torch.float32


def test_the_pocket_model_is_float32_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLLM_MSR_DTYPE", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    monkeypatch.setattr(local, "find_device", lambda: torch.device("cpu"))
    model = LocalModel(Encoder("mllm_msr/pocket/model", None, None))
    assert model.dtype == torch.float32


def test_the_counted_parameters_are_those_of_the_loaded_model(model: LocalModel) -> None:
    counted = count_parameters(model.encoder)
    assert counted == sum(parameter.numel() for parameter in model.weights.parameters())


def test_weights_too_large_for_memory_are_one_line(
    llava: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(local.AutoModelForImageTextToText, "from_pretrained", load)
    with pytest.raises(ModelError, match="memory for the weights on cpu; got too little") as caught:
        llava.load()
    assert "\n" not in str(caught.value)


def test_the_models_logits_depend_on_the_image(llava: LocalModel, gallery: Gallery) -> None:
    first, second = (
        Prompt("Look:", image_ref, "Describe.")
        for item in ("a", "t")
        if isinstance(image_ref := gallery.image_ref(item), ImageRef)
    )
    logits = last_logits(llava, [first, second])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


# -- broken folders --------------------------------------------------------------------------------

POCKET = Path("mllm_msr/pocket/model")
WAYS: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "garbage": lambda _: b"\x00\xff\x13{{{%" * 40,
    "null": lambda _: b"null",
    "of another model": lambda _: b'{"model_type": "llama", "other": [1]}',
}
# These files only have settings for which transformers has defaults.
HARMLESS = {
    ("generation_config.json", "of another model"),
    ("tokenizer_config.json", "of another model"),
}


def use(folder: Path, gallery: Gallery) -> list[Response]:
    model = LocalModel(Encoder(str(folder), None, gallery))
    shown = Prompt("Look:", gallery.image_ref("a"), "Describe.")
    return generate(model, [shown], max_new_tokens=4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", sorted(file.name for file in POCKET.iterdir() if file.name != "README.md")
)
def test_a_broken_file_of_a_model_is_one_line(
    tmp_path: Path, gallery: Gallery, name: str, way: str
) -> None:
    folder = shutil.copytree(POCKET, tmp_path / "model")
    (folder / name).write_bytes(WAYS[way]((folder / name).read_bytes()))
    if (name, way) in HARMLESS:
        assert use(folder, gallery) == use(POCKET, gallery)
        return
    with pytest.raises(ModelError) as caught:
        use(folder, gallery)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('not this turn') }}", "expected a chat template for one turn; got"),
        ("{{ messages[7].content }}", "expected a chat template for one turn; got"),
        ("{{ messages[0].content[0].text }}", "shows the prompt; got one that drops the text or"),
    ],
)
def test_a_chat_template_that_fails_or_drops_the_image_is_one_line(
    tmp_path: Path, gallery: Gallery, template: str, message: str
) -> None:
    folder = shutil.copytree(POCKET, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=message):
        use(folder, gallery)


def change_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= keys
    path.write_text(json.dumps(config))


def test_a_configuration_of_a_smaller_model_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(POCKET, tmp_path / "model")
    change_config(folder, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"describes; got \d+ more, first .*layers\.2"):
        load(folder)


def test_a_configuration_of_a_much_larger_model_is_refused_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(POCKET, tmp_path / "model")
    change_config(folder, num_hidden_layers=64)
    monkeypatch.delattr(local.AutoModelForImageTextToText, "from_pretrained")
    with pytest.raises(ModelError, match=r"all weights; got a configuration of \d\S+ numbers and"):
        load(folder)


def test_a_missing_shard_is_one_line(llava: LocalModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llava.encoder.name, folder)
    (folder / "model.safetensors").unlink()
    llava.load().save_pretrained(str(folder), max_shard_size="100KB")
    load(folder)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


# -- infinite numbers and NaN ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tensor", ["embed_tokens", "vision_tower", "norm", "lm_head"])
def test_weights_that_are_not_finite_are_refused_by_name(
    build: Callable[[str], Family], tmp_path: Path, tensor: str, number: float
) -> None:
    folder = copied(build, tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(weights) if tensor in name)
    weights[name].view(-1)[-1] = number
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"finite weights; got inf or nan in 1 of .*{tensor}"):
        LocalModel(Encoder(str(folder), None, None)).load()


def test_weights_that_overflow_in_the_dtype_of_the_run_are_refused(
    build: Callable[[str], Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(build, tmp_path)
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = 1e6  # float16 ends at 65,504
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    encoder = Encoder(str(folder), None, None)
    LocalModel(encoder).load()
    monkeypatch.setenv("MLLM_MSR_DTYPE", "float16")
    with pytest.raises(ModelError, match=r"finite weights; .*another dtype \(MLLM_MSR_DTYPE\)"):
        LocalModel(encoder).load()


@pytest.mark.parametrize("packs", [True, False])
def test_logits_that_are_not_finite_are_an_error(
    llava: LocalModel, gallery: Gallery, monkeypatch: pytest.MonkeyPatch, packs: bool
) -> None:
    model = LocalModel(llava.encoder)
    if not packs:
        monkeypatch.setattr(local, "supports_packing", lambda _: False)
    with torch.no_grad():
        model.weights.get_output_embeddings().weight[3, 0] = float("nan")
    with pytest.raises(ModelError, match="expected finite logits; got inf or nan; use another"):
        generate(model, some_prompts(llava, gallery), max_new_tokens=4)

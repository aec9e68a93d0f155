"""A GGUF file becomes a folder with the same weights, tokens and chats, or one line of error."""

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from families import Family
from safetensors import SafetensorError
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from mllm_msr.cli.model import app
from mllm_msr.core.errors import DataError, ModelError
from mllm_msr.core.files import file_digest
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prompt import Prompt
from mllm_msr.importing import gguf as importing
from mllm_msr.importing.gguf import WORDS, import_gguf

pytest.importorskip("gguf", reason="the extra gguf is not installed")
from generating import generate
from gguf_files import Q8_0, write_gguf

TEXTS = ["Title: summer dance 12 (2024)", " l'été — 50 %\n\n", "咖啡 と кофе 🎬", "<|eot_id|> yes"]


@pytest.fixture(scope="module")
def llama(build: Callable[[str], Family], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a GGUF file of the small Llama."""
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    return write_gguf(path, build("llama3").folder, "llama")


@pytest.fixture(scope="module")
def qwen3(build: Callable[[str], Family], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small Qwen3 with heads narrower than its default and tied weights."""
    folder = tmp_path_factory.mktemp("qwen3")
    shutil.copytree(build("qwen2").folder, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "eos_token_id")
    torch.manual_seed(3)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            **{key: config[key] for key in kept},
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=4096,
            initializer_range=0.2,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def assert_same_model(folder: Path, original: Path) -> None:
    """Compare logits and tokens of two folders."""
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (folder, original))
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    turns = [{"role": "user", "content": "Will the user like tea?"}]
    chats = [each.apply_chat_template(turns, tokenize=False) for each in (ours, theirs)]
    assert chats[0] == chats[1]
    inputs = theirs(chats[0], return_tensors="pt")["input_ids"]
    logits = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=inputs).logits
        for path in (folder, original)
    ]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_the_folder_is_the_model_that_was_converted(
    llama: Path, build: Callable[[str], Family], tmp_path: Path
) -> None:
    import_gguf(llama, tmp_path / "model", torch.float32)
    assert_same_model(tmp_path / "model", build("llama3").folder)


def test_a_qwen2_with_biases_is_imported(build: Callable[[str], Family], tmp_path: Path) -> None:
    folder = build("qwen2").folder
    import_gguf(write_gguf(tmp_path / "q.gguf", folder, "qwen2"), tmp_path / "m", torch.float32)
    assert_same_model(tmp_path / "m", folder)


def test_a_qwen3_with_tied_weights_and_narrow_heads_is_imported(
    qwen3: Path, tmp_path: Path
) -> None:
    import_gguf(write_gguf(tmp_path / "q.gguf", qwen3, "qwen3"), tmp_path / "m", torch.float32)
    assert_same_model(tmp_path / "m", qwen3)


def test_the_folder_loads_as_a_model_of_a_stage(llama: Path, tmp_path: Path) -> None:
    import_gguf(llama, tmp_path / "model", torch.bfloat16)
    model = LocalModel(Encoder(str(tmp_path / "model"), None, None))
    assert generate(model, [Prompt("Will the user like tea?")], 4)[0].text
    assert not list((tmp_path / "model").glob("*.bin"))


def test_quantized_tensors_are_counted_and_dequantized(
    build: Callable[[str], Family], tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "q8.gguf", build("llama3").folder, "llama", Q8_0)
    imported = import_gguf(source, tmp_path / "model", torch.bfloat16)
    assert imported.source.tensors == {"Q8_0": 16, "F32": 5}
    assert 8.5 <= imported.source.bits_per_weight < 9
    assert 0 < imported.logits_difference < importing.LOGITS_BOUNDS[torch.bfloat16]
    record = json.loads((tmp_path / "model" / "import.json").read_text())
    assert record["sha256"] == file_digest(source)
    assert record["tensors"] == {"Q8_0": 16, "F32": 5}
    assert record["dtype"] == "bfloat16"


def test_where_a_model_comes_from_is_not_part_of_its_identity(llama: Path, tmp_path: Path) -> None:
    import_gguf(llama, tmp_path / "model", torch.float32)
    identity = Encoder(str(tmp_path / "model"), None, None).identity
    (tmp_path / "model" / "import.json").unlink()
    assert Encoder(str(tmp_path / "model"), None, None).identity == identity


def test_the_command_prints_types_digest_and_folder(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "model"
    words = ["import", str(llama), str(folder), "--dtype", "float32"]
    said = CliRunner().invoke(app, words, catch_exceptions=False).stdout.splitlines()
    assert "F32: 21 tensors; 32.0 bits per weight" in said[-3]
    assert said[-2] == f"SHA-256 {file_digest(llama)}"
    assert said[-1].startswith(f"wrote {folder}: ")


def test_configurations_beside_the_file_are_ignored(llama: Path, tmp_path: Path) -> None:
    source = shutil.copy(llama, tmp_path / "llama.gguf")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "NoTokenizer"}')
    import_gguf(Path(source), tmp_path / "model", torch.float32)


# -- pre-tokenizers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gpt-2", "it's  2024", ["it", "'s", "Ġ", "Ġ2024"]),
        ("smollm", "it's  24", ["it", "'s", "ĠĠ", "2", "4"]),
        ("llama-bpe", "it's  2024", ["it", "'s", "Ġ", "Ġ", "202", "4"]),
        ("qwen2", "it's  24", ["it", "'s", "Ġ", "Ġ", "2", "4"]),
        ("tekken", "theEnd 12", ["the", "End", "Ġ", "1", "2"]),
    ],
)
def test_a_text_is_split_as_the_vocabulary_was_learned(
    name: str, text: str, words: list[str]
) -> None:
    backend = Tokenizer(models.BPE())
    importing._set_words(backend, WORDS[name])
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == words


# -- errors ----------------------------------------------------------------------------------------


def refuse(source: Path, folder: Path, said: str) -> None:
    """Check that an import fails with one line and writes nothing."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(ModelError, match=said) as raised:
        import_gguf(source, folder, torch.float32)
    assert "\n" not in str(raised.value)
    assert sorted(folder.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"PK\x03\x04zip", "begins with b'PK"), (b"", "begins with b''"), (None, "no such file")],
)
def test_a_file_of_another_kind_is_refused(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    source = tmp_path / "model.gguf"
    if content is not None:
        source.write_bytes(content)
    refuse(source, tmp_path / "model", f"expected a GGUF file; got .*{said}")


@pytest.mark.parametrize("share", [0.0001, 0.03, 0.2, 0.999])
def test_a_truncated_file_is_refused(llama: Path, tmp_path: Path, share: float) -> None:
    source, content = tmp_path / "model.gguf", llama.read_bytes()
    source.write_bytes(content[: max(4, int(share * len(content)))])
    refuse(source, tmp_path / "model", "expected a complete GGUF file; got .*download it again")


def test_an_unsupported_architecture_names_the_supported_ones(
    tmp_path: Path, build: Callable[[str], Family]
) -> None:
    source = write_gguf(tmp_path / "p.gguf", build("llama3").folder, "minicpm")
    refuse(source, tmp_path / "model", r"llama \(Llama and Mistral\), qwen2 .* got minicpm")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tokenizer.chat_template": ""}, "expected a chat template; got none"),
        ({"tokenizer.ggml.pre": "poro-chat"}, "a pre-tokenizer among .*; got poro-chat"),
        ({"llama.rope.scaling.type": "yarn"}, "rotary embeddings without scaling; got yarn"),
    ],
)
def test_what_would_be_lost_is_refused(
    build: Callable[[str], Family], tmp_path: Path, fields: dict[str, str], said: str
) -> None:
    source = write_gguf(tmp_path / "m.gguf", build("llama3").folder, "llama", fields=fields)
    refuse(source, tmp_path / "model", said)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rope_freqs.weight", "frequencies of its own"),
        ("blk.0.attn_q.bias", "weights, which the model uses; got "),
    ],
)
def test_tensors_that_the_model_does_not_use_are_refused(
    build: Callable[[str], Family], tmp_path: Path, name: str, said: str
) -> None:
    extra = {name: np.ones(64, np.float32)}
    source = write_gguf(tmp_path / "m.gguf", build("llama3").folder, "llama", extra=extra)
    refuse(source, tmp_path / "model", said)


def test_an_existing_folder_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    refuse(llama, tmp_path / "model", "expected a new folder; got an existing one")


def test_the_missing_package_is_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(importing, "find_spec", lambda _: None)
    refuse(
        llama, tmp_path / "model", r"the package gguf; got none; pip install -c .* -e '\.\[gguf\]'"
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError('IoError(Os { code: 28, message: "No space left on device" })'),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", fail)
    with pytest.raises(DataError, match="got a full disk"):
        import_gguf(llama, tmp_path / "model", torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_a_saved_weight_that_differs_is_noticed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = importing.load_weights

    def change(encoder: Encoder, dtype: torch.dtype) -> torch.nn.Module:
        model = load(encoder, dtype)
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
        return model

    monkeypatch.setattr(importing, "load_weights", change)
    refuse(llama, tmp_path / "model", "got others in model.layers.1.mlp.up_proj.weight")


def test_a_saved_tokenizer_that_differs_is_noticed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = importing._load_tokenizer

    def change(opened: importing._Gguf, folder: str) -> object:
        tokenizer = load(opened, folder)
        save = tokenizer.save_pretrained

        def save_changed(target: Path) -> None:
            save(target)
            path = Path(target) / "tokenizer.json"
            content = json.loads(path.read_text())
            content["normalizer"] = {"type": "Lowercase"}
            path.write_text(json.dumps(content))

        monkeypatch.setattr(tokenizer, "save_pretrained", save_changed)
        return tokenizer

    monkeypatch.setattr(importing, "_load_tokenizer", change)
    refuse(llama, tmp_path / "model", "the tokens of .* as of the source")

"""Imports GGUF files: dequantized weights, tokenizer and chat template as a safetensors folder.

A GGUF file is read by transformers and the package ``gguf``; neither runs code of the file. What
transformers would leave out without a word is an error here: tensors that the model does not use,
scaled rotary embeddings, and pre-tokenizers that it does not know. The folder is compared with the
source before it appears.
"""

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mllm_msr.core.errors import ModelError, UserError, install_command
from mllm_msr.core.files import atomic_write, file_digest
from mllm_msr.engines.encoding import PROVENANCE, Encoder
from mllm_msr.engines.local import check_finite_weights, load_weights

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Largest difference of a prompt's logits, computed in float32 from the saved weights, relative to
# the norm of the source's. Rounding to bfloat16 keeps 8 bits of each weight. The weights themselves
# are compared exactly; this covers what else the folder decides.
LOGITS_BOUNDS = {torch.bfloat16: 0.05, torch.float32: 1e-4}

# general.architecture, and the families that it stands for; llama.cpp converts Mistral to llama.
ARCHITECTURES = {"llama": "Llama and Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PROBE_TEXTS = (
    "Title: summer dance, part 12 (2024)   ",
    "  l'été à Zürich — 50 % off!\n\n\tNew",
    "咖啡 と 커피, кофе и قهوة; नमस्ते 🎬👩‍🍳",
    "e\u0301 and é; ½ cup, 3.14, x=10**-7",
)
PROBE_TURNS = (
    "What is the capital of France?",
    "A user watched: cooking for two; 咖啡 at home; cats of Zürich 2024. Will the user like tea?",
    "yes or no",
)


@dataclass(frozen=True)
class _Words:
    """How a byte-level tokenizer prepares a text before merging.

    Attributes:
        pattern: Of the words that are merged alone; None: GPT-2's.
        digits: Whether each digit is a word.
        composed: Whether the text is brought to the normal form NFC.
        whole: Whether a word of the vocabulary is never built by merges.
    """

    pattern: str | None = None
    digits: bool = False
    composed: bool = False
    whole: bool = False


# By tokenizer.ggml.pre, llama.cpp's names. Upstream: transformers>=5.23,<6 treats a name that it
# does not know as GPT-2's, and knows neither normal forms nor whole words.
WORDS = {
    "gpt-2": _Words(),
    "smollm": _Words(digits=True),
    "llama-bpe": _Words(LLAMA3_WORDS, whole=True),
    "llama3": _Words(LLAMA3_WORDS, whole=True),
    "llama-v3": _Words(LLAMA3_WORDS, whole=True),
    "tekken": _Words(TEKKEN_WORDS, whole=True),
    "qwen2": _Words(QWEN2_WORDS, composed=True),
    "deepseek-r1-qwen": _Words(QWEN2_WORDS, composed=True),
}


@dataclass(frozen=True)
class GgufInfo:
    """What a GGUF file holds.

    Attributes:
        file: Name of the file.
        sha256: Of the file.
        architecture: As the file names it.
        parameters: Number of weights.
        tensors: Number of tensors of each type, the most frequent first.
        bits_per_weight: Of all tensors together.
    """

    file: str
    sha256: str
    architecture: str
    parameters: int
    tensors: dict[str, int]
    bits_per_weight: float

    def __str__(self) -> str:
        """Return it on one line."""
        (first, count), *others = self.tensors.items()
        kinds = ", ".join([f"{first}: {count} tensors", *(f"{kind}: {n}" for kind, n in others)])
        return (
            f"{self.file}: {self.architecture}, {self.parameters / 1e6:,.1f} million parameters;"
            f" {kinds}; {self.bits_per_weight} bits per weight"
        )


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
        source: The file.
        dtype: Of the saved weights.
        size: Of the folder, in bytes.
        logits_difference: The largest difference of a probe prompt's logits from the source's in
            float32, relative to their norm.
    """

    source: GgufInfo
    dtype: str
    size: int
    logits_difference: float


class _Gguf:
    """An opened GGUF file of a supported model."""

    def __init__(self, path: Path) -> None:
        """Read the metadata and check that the model is supported.

        Raises:
            ModelError: The file is no complete GGUF file, or the model is not supported.
        """
        self.path = path
        _refuse_other_files(path)
        with _readable(path):
            from gguf import GGUFReader

            self._reader = GGUFReader(path)
        self.architecture = str(self.field("general.architecture"))
        self._refuse_unsupported()

    def field(self, key: str) -> Any:
        """Return a value of the metadata, or None."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def own(self, key: str) -> Any:
        """Return a value of the architecture, or None."""
        return self.field(f"{self.architecture}.{key}")

    def describe(self) -> GgufInfo:
        """Return what the file holds."""
        tensors = self._reader.tensors
        weights = sum(int(tensor.n_elements) for tensor in tensors)
        bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors)
        kinds = Counter(tensor.tensor_type.name for tensor in tensors)
        return GgufInfo(
            file=self.path.name,
            sha256=file_digest(self.path),
            architecture=self.architecture,
            parameters=weights,
            tensors=dict(kinds.most_common()),
            bits_per_weight=round(bits / weights, 1),
        )

    def _refuse_unsupported(self) -> None:
        """Raise an error for what an import would get wrong or leave out.

        Raises:
            ModelError: There is something of the kind.
        """
        scaling = self.own("rope.scaling.type")
        names = {tensor.name for tensor in self._reader.tensors}
        byte_level = self.field("tokenizer.ggml.model") == "gpt2"
        words = self.field("tokenizer.ggml.pre")
        known = ", ".join(f"{name} ({ARCHITECTURES[name]})" for name in ARCHITECTURES)
        checks = (
            (self.architecture in ARCHITECTURES, f"one of {known}", self.architecture),
            (scaling in {None, "none"}, "rotary embeddings without scaling", str(scaling)),
            (
                "rope_freqs.weight" not in names,
                "rotary embeddings without scaling",
                "frequencies of its own, rope_freqs.weight",
            ),
            (not self.own("attention.sliding_window"), "full attention", "a sliding window"),
            (
                not byte_level or words in WORDS,
                f"a pre-tokenizer among {', '.join(WORDS)}",
                str(words),
            ),
            (bool(self.field("tokenizer.chat_template")), "a chat template", "none"),
        )
        for supported, expected, got in checks:
            if not supported:
                fix = "import another model, or take its safetensors from the hub"
                raise ModelError(expected=expected, got=got, where=str(self.path), fix=fix)


def import_gguf(source: Path, folder: Path, dtype: torch.dtype) -> Imported:
    """Write a GGUF file's model as a folder of safetensors, tokenizer and chat template.

    Args:
        source: The GGUF file.
        folder: The folder to write, which must not exist.
        dtype: Of the written weights.

    Raises:
        ModelError: The package gguf is not installed; the file is not a complete GGUF file of a
            supported model; or the written folder differs from it.
        DataError: The disk is full.
    """
    _require_gguf()
    if folder.exists():
        fix = "name another folder, or remove this one"
        raise ModelError(expected="a new folder", got="an existing one", where=str(folder), fix=fix)
    opened = _Gguf(source)
    info = opened.describe()
    with tempfile.TemporaryDirectory() as alone, _readable(source):
        # Alone in a folder: transformers would also read the configurations beside it.
        (Path(alone) / "model.gguf").symlink_to(source.resolve())
        tokenizer = _load_tokenizer(opened, alone)
        model = _load_model(opened, alone)
    _check_all_used(model, info, source)
    check_finite_weights(model.state_dict().items(), str(source))
    with atomic_write(folder) as written:
        _save(model, tokenizer, dtype, opened, written)
        difference = _compare(model, tokenizer, dtype, str(written), opened)
        record = asdict(info) | {"dtype": _name(dtype)}
        (written / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        size = sum(file.stat().st_size for file in written.iterdir())
    return Imported(info, _name(dtype), size, difference)


def _require_gguf() -> None:
    """Raise an error if the package gguf is not installed.

    Raises:
        ModelError: It is not.
    """
    if find_spec("gguf") is None:
        raise ModelError(
            expected="the package gguf",
            got="none",
            where="mllm-msr model import",
            fix=install_command("gguf"),
        )


def _refuse_other_files(path: Path) -> None:
    """Raise an error if a file does not begin as GGUF files do.

    Raises:
        ModelError: It does not, or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise ModelError(
            expected="a GGUF file",
            got=str(error.strerror).lower(),
            where=str(path),
            fix="name a file that ends in .gguf",
        ) from error
    if start != b"GGUF":
        got = f"a file that begins with {start!r}"
        raise ModelError(
            expected="a GGUF file", got=got, where=str(path), fix="name a file that ends in .gguf"
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn any error of the block into one line; damaged files raise all kinds of errors.

    Raises:
        ModelError: The block raised anything but a ``UserError``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise ModelError(
            expected="a complete GGUF file",
            got=f"{type(error).__name__}: {error}",
            where=str(path),
            fix="download it again",
        ) from error


def _load_tokenizer(opened: _Gguf, folder: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer with the pre-tokenizer that the file names.

    Args:
        opened: The file.
        folder: Where it lies alone, as ``model.gguf``.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        folder, gguf_file="model.gguf", trust_remote_code=False
    )
    if opened.field("tokenizer.ggml.model") == "gpt2":
        _set_words(tokenizer.backend_tokenizer, WORDS[opened.field("tokenizer.ggml.pre")])
    tokenizer.chat_template = opened.field("tokenizer.chat_template")
    return tokenizer


def _set_words(backend: Any, words: _Words) -> None:
    """Set how a byte-level tokenizer prepares a text before merging."""
    parts: list[Any] = []
    if words.digits:
        parts.append(pre_tokenizers.Digits(individual_digits=True))
    if words.pattern:
        parts.append(pre_tokenizers.Split(Regex(words.pattern), "isolated"))
    merged = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.pattern is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*parts, merged])
    if words.composed:
        backend.normalizer = normalizers.NFC()
    backend.model.ignore_merges = words.whole


def _load_model(opened: _Gguf, folder: str) -> PreTrainedModel:
    """Load the dequantized model in float32.

    Args:
        opened: The file.
        folder: Where it lies alone, as ``model.gguf``.

    Raises:
        ModelError: Weights are missing or unexpected.
    """
    config = AutoConfig.from_pretrained(folder, gguf_file="model.gguf", trust_remote_code=False)
    width = opened.own("attention.key_length")
    if width is not None:  # transformers takes its default
        config.head_dim = int(width)
    if hasattr(config, "sliding_window"):  # the file has none, and Mistral's default is 4,096
        config.sliding_window = None
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file="model.gguf",
        config=config,
        dtype=torch.float32,
        trust_remote_code=False,
        output_loading_info=True,
    )
    wrong = sorted([*report["missing_keys"], *report["unexpected_keys"]])
    wrong += [str(key) for key in report["mismatched_keys"]]
    if wrong:
        raise ModelError(
            expected="the weights of the architecture",
            got=f"{len(wrong)} missing or of another shape, first {wrong[0]}",
            where=str(opened.path),
            fix="download it again, or import another model",
        )
    return model.eval()


def _check_all_used(model: PreTrainedModel, info: GgufInfo, source: Path) -> None:
    """Raise an error if the file has weights that the model does not use.

    Raises:
        ModelError: It has, as a mixture of experts would.
    """
    used = sum(parameter.numel() for parameter in model.parameters())
    if used != info.parameters:
        raise ModelError(
            expected=f"{used:,} weights, which the model uses",
            got=f"{info.parameters:,}",
            where=str(source),
            fix="import another model, or take its safetensors from the hub",
        )


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    opened: _Gguf,
    folder: Path,
) -> None:
    """Write weights, configurations, tokenizer and chat template.

    transformers refuses to save a model that was loaded from GGUF; a new one takes its weights.

    Raises:
        OSError: A file cannot be written.
    """
    config = _plain_config(model.config, dtype)
    with torch.device("meta"):  # no random weights
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = _generation_config(opened)
    try:
        plain.save_pretrained(folder)
    except SafetensorError as error:  # such as a full disk, which it reports in words
        raise OSError(str(error)) from error
    tokenizer.save_pretrained(folder)


def _plain_config(config: PretrainedConfig, dtype: torch.dtype) -> PretrainedConfig:
    """Return the configuration of the dequantized model."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    plain.name_or_path, plain.dtype = "", dtype
    return plain


def _generation_config(opened: _Gguf) -> GenerationConfig:
    """Return the tokens that start, end and pad a response."""
    ids = {
        kind: opened.field(f"tokenizer.ggml.{kind}_token_id")
        for kind in ("bos", "eos", "eot", "padding")
    }
    ends = [int(ids[kind]) for kind in ("eos", "eot") if ids[kind] is not None]
    return GenerationConfig(
        bos_token_id=ids["bos"],
        eos_token_id=ends[0] if len(set(ends)) == 1 else ends or None,
        pad_token_id=ids["padding"],
    )


def _compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    folder: str,
    opened: _Gguf,
) -> float:
    """Compare a written folder, loaded as every stage does, with its source.

    Returns:
        The largest relative difference of a probe prompt's logits.

    Raises:
        ModelError: Tokenizer, chat template, weights or logits differ.
    """
    encoder = Encoder(folder, None, None)
    chats = [_render(tokenizer, turn) for turn in PROBE_TURNS]
    read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    _compare_tokenizers(read, tokenizer, chats, opened)
    saved = load_weights(encoder, torch.float32).eval()
    check_finite_weights(saved.state_dict().items(), folder)
    expected = model.state_dict()
    for name, tensor in saved.state_dict().items():
        if not torch.equal(tensor.to(dtype), expected[name].to(dtype)):
            raise _differs("the source's weights", f"others in {name}", opened)
    bound = LOGITS_BOUNDS[dtype]
    difference = max(_logits_difference(saved, model, encoder.tokenizer, chat) for chat in chats)
    if not difference <= bound:  # NaN is not
        got = f"a relative difference of {difference:.2g}"
        raise _differs(f"the source's logits within {bound}", got, opened)
    return difference


def _compare_tokenizers(
    saved: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[str],
    opened: _Gguf,
) -> None:
    """Raise an error if a saved tokenizer encodes or decodes otherwise than that of the source.

    Raises:
        ModelError: It does, or special tokens or chat template differ.
    """
    special = " ".join(map(str, tokenizer.all_special_tokens))
    same = {
        "a vocabulary": saved.get_vocab() == tokenizer.get_vocab(),
        "special tokens": saved.special_tokens_map == tokenizer.special_tokens_map,
        "a chat template": saved.chat_template == opened.field("tokenizer.chat_template"),
        "a rendered chat": [_render(saved, turn) for turn in PROBE_TURNS] == chats,
    }
    for text in (*PROBE_TEXTS, *chats, f"a {special} b{special}"):
        for adds in (True, False):
            tokens = tokenizer(text, add_special_tokens=adds)["input_ids"]
            again = saved(text, add_special_tokens=adds)["input_ids"]
            same[f"the tokens of {text!r}"] = again == tokens
        same[f"the text of {text!r}"] = saved.decode(tokens) == tokenizer.decode(tokens)
    for what, equal in same.items():
        if not equal:
            raise _differs(f"{what} as of the source", "another", opened)


def _render(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    turns = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


@torch.inference_mode()
def _logits_difference(
    saved: PreTrainedModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> float:
    """Return the difference of a text's logits, (1, tokens, vocabulary), relative to their norm."""
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    expected = model(input_ids=inputs).logits
    difference = (saved(input_ids=inputs).logits - expected).norm() / expected.norm()
    return float(difference)


def _differs(expected: str, got: str, opened: _Gguf) -> ModelError:
    fix = "nothing was written; report it with the file's name and the version of transformers"
    return ModelError(expected=expected, got=got, where=str(opened.path), fix=fix)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

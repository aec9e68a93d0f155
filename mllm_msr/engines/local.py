"""A model of transformers' on this machine: loaded safely, decoded greedily, nothing hidden."""

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from mllm_msr.core.devices import explain_out_of_memory, find_device, find_dtype, is_out_of_memory
from mllm_msr.core.errors import ModelError, UserError
from mllm_msr.engines.budgets import Budget
from mllm_msr.engines.decoding import Decoder, refuse_non_finite_logits
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.packing import may_pack
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.quantizing import Family, four_bit_language
from mllm_msr.engines.responses import Response

PROMPTS_PER_BATCH = 256  # through the slots of one decoding; a killed run loses their answers
# Of weights that models compute themselves and some files have all the same.
COMPUTED = ("inv_freq", "position_ids")
TOKENS_PER_BATCH = 8192  # prompt tokens of one padded generation, padding included


class LocalModel:
    """A model's weights behind its encoder; they are loaded when first needed."""

    def __init__(self, encoder: Encoder, four_bit: bool = False) -> None:
        """Note the model; nothing is loaded yet.

        Args:
            encoder: Of the model.
            four_bit: Whether the language model's weights are kept in 4 bits (QLoRA).
        """
        self.encoder, self.four_bit = encoder, four_bit
        self.device = find_device()
        self.dtype = find_dtype(self.device)
        self.budget = Budget(encoder.config, self.dtype, self.device)

    @property
    def precision(self) -> str:
        """How exactly the model computes, which its answers depend on."""
        return f"{self.dtype} with nf4" if self.four_bit else str(self.dtype)

    @cached_property
    def weights(self) -> PreTrainedModel:
        """The model in evaluation mode on its device, loaded once."""
        return self.load().eval()

    def load(self) -> PreTrainedModel:
        """Load the model's weights anew, onto its device.

        Raises:
            ModelError: The weights are not safetensors, do not fit the configuration or the
                memory, or are not finite in the run's dtype.
        """
        fix = "free memory, or use a smaller model"
        with explain_out_of_memory(f"the weights on {self.device}", self.encoder.name, fix):
            model = load_weights(self.encoder, self.dtype, self.four_bit).to(self.device)
            refuse_non_finite(model.state_dict().items(), self.encoder.name)
            if self.four_bit:  # whose blocks hide what is not finite
                refuse_non_finite(_read_tensors(self.encoder), self.encoder.name)
        return model

    @cached_property
    def decoder(self) -> Decoder | None:
        """What answers many prompts at once; None for families that transformers' own way suits."""
        if not may_pack(self.encoder):
            return None
        return Decoder(self.encoder, self.weights, self.budget)

    def batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Cut prompts into batches of like length, the longest first.

        Yields:
            Indices into ``prompts``.
        """
        if may_pack(self.encoder):
            order = sorted(range(len(prompts)), key=lambda i: -self.encoder.count(prompts[i]))
            for start in range(0, len(order), PROMPTS_PER_BATCH):
                yield order[start : start + PROMPTS_PER_BATCH]
        else:
            _ = self.weights  # the budget is of the memory that they leave
            yield from self.padded_batches(prompts)

    def padded_batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Cut prompts into batches that are padded, of like kind too."""
        most = self.budget.fit(TOKENS_PER_BATCH)
        lengths = [self.encoder.count(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i].image is None, -lengths[i]))
        batch: list[int] = []
        for index in order:
            if batch and not _goes_with(prompts, lengths, batch, index, most):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Response]:
        """Answer a batch greedily.

        Args:
            prompts: All show an image, or none does.
            max_new_tokens: The longest answer, in tokens.
        """
        if self.decoder:
            return self.decoder.answer(prompts, max_new_tokens)
        inputs = self.move(self.encoder.encode(prompts))  # generate() itself keeps no gradients
        outputs = self.weights.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([self._check_logits]),
        )
        return [self._read(row) for row in outputs[:, inputs["input_ids"].shape[1] :]]

    def move(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Put a batch on the device; pixels take the weights' dtype."""
        return {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }

    def _check_logits(self, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Refuse logits that are not finite, (prompts, vocabulary); a step of ``generate``."""
        del tokens
        refuse_non_finite_logits(logits, self.encoder.name)
        return logits

    def _read(self, tokens: torch.Tensor) -> Response:
        """Turn new tokens, shape (new,), into an answer."""
        text = self.encoder.tokenizer.decode(tokens, skip_special_tokens=True)
        ends = self.weights.generation_config.eos_token_id
        stops = torch.tensor(ends if isinstance(ends, list) else [ends], device=tokens.device)
        return Response(text.strip(), bool(torch.isin(tokens, stops).any()))


def load_weights(encoder: Encoder, dtype: torch.dtype, four_bit: bool = False) -> PreTrainedModel:
    """Load safetensors weights and give the model a greedy decoding with no hidden defaults.

    Args:
        encoder: Of the model.
        dtype: Of the weights, or of what is computed with them where they have 4 bits.
        four_bit: Whether the language model's linear layers are quantized (QLoRA).

    Raises:
        ModelError: There are no safetensors, they cannot be read, or keys are missing or have no
            place in the model; or bitsandbytes is not installed and is needed.
    """
    name = encoder.name
    if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
        fix = "convert the weights to safetensors; other formats can run code and are refused"
        raise ModelError(expected="weights in safetensors", got="no such file", where=name, fix=fix)
    family = AutoModelForImageTextToText if encoder.sees else AutoModelForCausalLM
    _refuse_other_size(family, encoder)
    quantization = four_bit_language(family, encoder, dtype) if four_bit else None
    with _loadable(name):
        model, report = family.from_pretrained(
            name,
            revision=encoder.revision,
            dtype=dtype,
            quantization_config=quantization,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    _refuse_gaps(report, name)
    if (Path(name) / "generation_config.json").is_file():
        with _loadable(name):  # from_pretrained takes a broken one for none
            GenerationConfig.from_pretrained(name)
    if may_pack(encoder):  # masks of truth values mean something else to other implementations
        model.set_attn_implementation("sdpa")
    model.generation_config = _greedy(model.generation_config, encoder)
    return model


def _goes_with(
    prompts: Sequence[Prompt], lengths: Sequence[int], batch: Sequence[int], index: int, most: int
) -> bool:
    """Tell whether a prompt may join a batch whose first prompt is the longest."""
    same_kind = (prompts[batch[0]].image is None) == (prompts[index].image is None)
    return same_kind and lengths[batch[0]] * (len(batch) + 1) <= most


def refuse_non_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Refuse weights of which one is not finite, in one pass on their own device.

    The smallest and the largest of a tensor tell: both are NaN where one number is. Nothing as
    large as a tensor is made, and a device is waited for once.

    Args:
        tensors: By name.
        where: Model or folder, for the error.

    Raises:
        ModelError: A number is infinite or none.
    """
    bounds = {
        name: torch.stack([tensor.amin(), tensor.amax()]).float()
        for name, tensor in tensors
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel()
    }
    finite = torch.isfinite(torch.stack(list(bounds.values()))).all(dim=1).tolist()
    broken = [name for name, is_finite in zip(bounds, finite, strict=True) if not is_finite]
    if broken:
        got = f"inf or nan in {len(broken)} of {len(bounds)} tensors, first {broken[0]}"
        fix = "replace the file, or use another dtype (MLLM_MSR_DTYPE)"
        raise ModelError(expected="finite weights", got=got, where=where, fix=fix)


def _read_tensors(encoder: Encoder) -> Iterator[tuple[str, torch.Tensor]]:
    """Read all tensors of a model's files, one after the other."""
    for file in _weight_files(encoder):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def _weight_files(encoder: Encoder) -> list[Path]:
    folder = Path(encoder.name)
    if not folder.is_dir():
        folder = Path(cached_file(encoder.name, "config.json", revision=encoder.revision)).parent
    return sorted(folder.glob("*.safetensors"))


def _refuse_other_size(family: Family, encoder: Encoder) -> None:
    """Refuse a folder whose configuration describes a model of more than twice its weights.

    Loading it would first fill the memory with numbers drawn by chance.
    """
    if not Path(encoder.name).is_dir():
        return  # the hub keeps a model's files together
    with _loadable(encoder.name):
        with torch.device("meta"):
            shape = family.from_config(copy.deepcopy(encoder.config), trust_remote_code=False)
        numbers = 0
        for file in _weight_files(encoder):
            with safe_open(file, framework="pt") as opened:
                slices = (opened.get_slice(name) for name in opened.keys())  # noqa: SIM118
                numbers += sum(math.prod(part.get_shape()) for part in slices)
    described = sum(parameter.numel() for parameter in shape.parameters())
    if described > 2 * numbers:
        got = f"a configuration of {described:,} numbers and files of {numbers:,}"
        fix = "the folder is incomplete, or its config.json is of another model"
        raise ModelError(expected="all weights", got=got, where=encoder.name, fix=fix)


@contextlib.contextmanager
def _loadable(name: str) -> Iterator[None]:
    """Say in one line what keeps a model from being loaded; a broken file may raise anything.

    Raises:
        ModelError: Any error but one for people, or of memory.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, UserError):
            raise
        raise ModelError(
            expected="loadable weights", got=str(error), where=name, fix="check the folder"
        ) from error


def _refuse_gaps(report: Any, name: str) -> None:
    """Refuse weights that leave a layer at random, and weights that would go nowhere.

    The latter are those of a model that its configuration makes smaller than it is.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        fix = "the folder is incomplete or of another model"
        raise ModelError(
            expected="all weights", got=f"none for {', '.join(missing[:3])}", where=name, fix=fix
        )
    unexpected = sorted(key for key in report["unexpected_keys"] if not key.endswith(COMPUTED))
    if unexpected:
        fix = "its config.json is of another model"
        got = f"{len(unexpected)} more, first {unexpected[0]}"
        raise ModelError(
            expected="the weights that the configuration describes",
            got=got,
            where=name,
            fix=fix,
        )


def _greedy(own: GenerationConfig, encoder: Encoder) -> GenerationConfig:
    """Spell the decoding out, so that no default of the model's creeps in.

    Raises:
        ModelError: No token of the model's ends a response.
    """
    ends = own.eos_token_id if own.eos_token_id is not None else encoder.tokenizer.eos_token_id
    every, size = ends if isinstance(ends, list) else [ends], len(encoder.tokenizer)
    if not every or not all(isinstance(end, int) and 0 <= end < size for end in every):
        fix = "correct eos_token_id in generation_config.json or tokenizer_config.json"
        raise ModelError(
            expected="a token that ends a response", got=repr(ends), where=encoder.name, fix=fix
        )
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        bos_token_id=encoder.tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=encoder.tokenizer.pad_token_id,
    )

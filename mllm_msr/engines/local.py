"""Local models: weights loaded by transformers with strict checks, and greedy decoding."""

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

from mllm_msr.core.devices import find_device, find_dtype
from mllm_msr.core.errors import ModelError, UserError, explain_out_of_memory, is_out_of_memory
from mllm_msr.engines.budgets import Budget
from mllm_msr.engines.decoding import Decoder, check_finite_logits
from mllm_msr.engines.encoding import Encoder, model_folder
from mllm_msr.engines.families import supports_packing
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.quantizing import AutoModelClass, quantize_language_model
from mllm_msr.engines.response_store import Response, StepOutput

PROMPTS_PER_BATCH = 1_024  # of continuous batching: slots are as long as the longest of them
# Buffers that models compute themselves; some files contain them nevertheless.
COMPUTED_BUFFERS = ("inv_freq", "position_ids")
TOKENS_PER_BATCH = 8192  # prompt tokens of a padded batch, with padding


class LocalModel:
    """A model on this machine; its weights are loaded when first needed.

    Attributes:
        encoder: The model's encoder.
        four_bit: Whether the language model's weights are quantized to 4 bits (QLoRA).
        device: Of the model.
        dtype: Of the computation.
        budget: Batch sizes.
    """

    def __init__(self, encoder: Encoder, four_bit: bool = False) -> None:
        """Take a model; nothing is loaded yet.

        Args:
            encoder: The model's encoder.
            four_bit: Whether to quantize the language model's weights to 4 bits (QLoRA).

        Raises:
            ModelError: The configuration describes no model that transformers can build.
        """
        self.encoder, self.four_bit = encoder, four_bit
        self.device = find_device()
        self.dtype = find_dtype(self.device, count_parameters(encoder))
        self.budget = Budget(encoder.config, self.dtype, self.device)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what the model was opened with; a worker of a cluster chooses its own device."""
        return LocalModel, (self.encoder, self.four_bit)

    @property
    def identity(self) -> str:
        """The model's identity in response keys."""
        return self.encoder.identity

    @property
    def precision(self) -> str:
        """The precision of computation and weights, on which responses depend."""
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
            check_finite_weights(model.state_dict().items(), self.encoder.name)
            if self.four_bit:  # quantized blocks hide infinite numbers: check the files
                check_finite_weights(_read_tensors(self.encoder), self.encoder.name)
        return model

    @cached_property
    def decoder(self) -> Decoder | None:
        """The decoder with continuous batching; None where prompts cannot be packed."""
        if not supports_packing(self.encoder.config):
            return None
        return Decoder(self.encoder, self.weights, self.budget)

    def batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Group prompts into batches of similar length, the longest first.

        Yields:
            Indices of the prompts of a batch.
        """
        if supports_packing(self.encoder.config):
            lengths = [self.encoder.count_tokens(prompt) for prompt in prompts]
            order = sorted(range(len(prompts)), key=lambda index: -lengths[index])
            for start in range(0, len(order), PROMPTS_PER_BATCH):
                yield order[start : start + PROMPTS_PER_BATCH]
        else:
            _ = self.weights  # loaded first: the budget is a share of the memory that is left
            yield from self.padded_batches(prompts)

    def padded_batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Group prompts into padded batches, those with and without an image apart.

        Yields:
            Indices of the prompts of a batch.
        """
        most = self.budget.limit_tokens(TOKENS_PER_BATCH)
        lengths = [self.encoder.count_tokens(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i].image is None, -lengths[i]))
        batch: list[int] = []
        for index in order:
            if batch and not _may_join(prompts, lengths, batch, index, most):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[StepOutput]:
        """Generate the responses to a batch of prompts greedily.

        Args:
            prompts: A batch of :meth:`batches`.
            max_new_tokens: The longest response in tokens.

        Yields:
            The responses as they finish; all at once where prompts run padded.
        """
        if self.decoder:
            yield from self.decoder.generate(prompts, max_new_tokens)
            return
        inputs = self.move(self.encoder.encode(prompts))  # generate() disables gradients itself
        outputs = self.weights.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([self._check_logits]),
        )
        generated = outputs[:, inputs["input_ids"].shape[1] :]
        responses = dict(enumerate(map(self._decode, generated)))
        padding = self.weights.generation_config.pad_token_id
        yield StepOutput(responses, int((generated != padding).sum()))

    def move(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move a batch to the device; pixel values take the weights' dtype."""
        return {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }

    def _check_logits(self, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Check the logits of a step of ``generate``, (prompts, vocabulary)."""
        del tokens
        check_finite_logits(logits, self.encoder.name)
        return logits

    def _decode(self, tokens: torch.Tensor) -> Response:
        """Decode generated tokens, (new tokens,)."""
        text = self.encoder.tokenizer.decode(tokens, skip_special_tokens=True)
        ends = self.weights.generation_config.eos_token_id
        stops = torch.tensor(ends if isinstance(ends, list) else [ends], device=tokens.device)
        return Response(text.strip(), bool(torch.isin(tokens, stops).any()))


def load_weights(encoder: Encoder, dtype: torch.dtype, four_bit: bool = False) -> PreTrainedModel:
    """Load safetensors weights, and replace the model's own decoding settings by greedy ones.

    Args:
        encoder: The model's encoder.
        dtype: Of the weights; where they have 4 bits, of the computation.
        four_bit: Whether to quantize the language model's linear layers (QLoRA).

    Raises:
        ModelError: There are no safetensors, they cannot be read, or keys are missing or
            unexpected; or bitsandbytes is needed and not installed.
    """
    name = encoder.name
    if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
        fix = "convert the weights to safetensors; other formats can run code and are refused"
        raise ModelError(expected="weights in safetensors", got="no such file", where=name, fix=fix)
    auto_class = _auto_class(encoder)
    _check_size(encoder)
    quantization = quantize_language_model(auto_class, encoder, dtype) if four_bit else None
    with _loadable(name):
        model, report = auto_class.from_pretrained(
            name,
            revision=encoder.revision,
            dtype=dtype,
            quantization_config=quantization,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    _check_keys(report, name)
    if (Path(name) / "generation_config.json").is_file():
        with _loadable(name):  # from_pretrained ignores a broken one
            GenerationConfig.from_pretrained(name)
    model.generation_config = _greedy_config(model.generation_config, encoder)
    return model


def _may_join(
    prompts: Sequence[Prompt], lengths: Sequence[int], batch: Sequence[int], index: int, most: int
) -> bool:
    """Return whether a prompt may join a batch whose first prompt is the longest."""
    same_kind = (prompts[batch[0]].image is None) == (prompts[index].image is None)
    return same_kind and lengths[batch[0]] * (len(batch) + 1) <= most


def check_finite_weights(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Raise an error if a weight is not finite.

    Only minimum and maximum of each tensor are inspected: both are NaN where one number is. This
    allocates nothing of a tensor's size and waits for the device once.

    Args:
        tensors: By name, on any device.
        where: Model or folder, for the error.

    Raises:
        ModelError: A number is infinite or NaN.
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
    """Yield the tensors of a model's files one by one."""
    for file in _weight_files(encoder):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def _weight_files(encoder: Encoder) -> list[Path]:
    return sorted(model_folder(encoder).glob("*.safetensors"))


def count_parameters(encoder: Encoder) -> int:
    """Count the parameters that a model's configuration describes; no weights are loaded.

    Raises:
        ModelError: transformers cannot build a model of the configuration.
    """
    with _loadable(encoder.name), torch.device("meta"):
        config = copy.deepcopy(encoder.config)
        shape = _auto_class(encoder).from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in shape.parameters())


def _auto_class(encoder: Encoder) -> AutoModelClass:
    """Return the class that loads a model with or without images."""
    chosen: AutoModelClass = AutoModelForCausalLM
    if encoder.takes_images:
        chosen = AutoModelForImageTextToText
    return chosen


def _check_size(encoder: Encoder) -> None:
    """Raise an error if a folder's configuration describes more than twice the weights it has.

    Loading it would first fill the memory with random numbers.
    """
    if not Path(encoder.name).is_dir():
        return  # the hub keeps a model's files together
    described, numbers = count_parameters(encoder), 0
    with _loadable(encoder.name):
        for file in _weight_files(encoder):
            with safe_open(file, framework="pt") as opened:
                slices = (opened.get_slice(name) for name in opened.keys())  # noqa: SIM118
                numbers += sum(math.prod(part.get_shape()) for part in slices)
    if described > 2 * numbers:
        got = f"a configuration of {described:,} numbers and files of {numbers:,}"
        fix = "the folder is incomplete, or its config.json is of another model"
        raise ModelError(expected="all weights", got=got, where=encoder.name, fix=fix)


@contextlib.contextmanager
def _loadable(name: str) -> Iterator[None]:
    """Turn any error of the block into one line; broken files raise all kinds of errors.

    Raises:
        ModelError: The block raised anything but a ``UserError`` or an out-of-memory error.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, UserError):
            raise
        raise ModelError(
            expected="loadable weights", got=str(error), where=name, fix="check the folder"
        ) from error


def _check_keys(report: Any, name: str) -> None:
    """Raise an error if weights are missing or unexpected.

    transformers would initialise the former at random, and ignore the latter.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        fix = "the folder is incomplete or of another model"
        raise ModelError(
            expected="all weights", got=f"none for {', '.join(missing[:3])}", where=name, fix=fix
        )
    unexpected = sorted(
        key for key in report["unexpected_keys"] if not key.endswith(COMPUTED_BUFFERS)
    )
    if unexpected:
        fix = "its config.json is of another model"
        got = f"{len(unexpected)} more, first {unexpected[0]}"
        raise ModelError(
            expected="the weights that the configuration describes",
            got=got,
            where=name,
            fix=fix,
        )


def _greedy_config(own: GenerationConfig, encoder: Encoder) -> GenerationConfig:
    """Return greedy decoding settings that override all defaults of the model.

    Raises:
        ModelError: The model has no end-of-sequence token.
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

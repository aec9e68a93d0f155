"""A model of transformers' on this machine: loaded safely, decoded greedily, nothing hidden."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
)

from mllm_msr.engines.answers import Answer
from mllm_msr.engines.budgets import Budget
from mllm_msr.engines.decoding import Decoder
from mllm_msr.engines.devices import find_device, find_dtype, is_out_of_memory, memory_for
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.packing import may_pack
from mllm_msr.engines.quantizing import four_bit_language
from mllm_msr.errors import ModelError
from mllm_msr.prompts import Prompt

PROMPTS_PER_BATCH = 256  # through the slots of one decoding; a killed run loses their answers
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
            ModelError: The weights are not safetensors, or do not fit the configuration or the
                memory.
        """
        remedy = "free memory, or use a smaller model"
        with memory_for(f"the weights on {self.device}", self.encoder.name, remedy):
            return load_weights(self.encoder, self.dtype, self.four_bit).to(self.device)

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

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
        """Answer a batch greedily.

        Args:
            prompts: All show an image, or none does.
            max_new_tokens: The longest answer, in tokens.
        """
        if self.decoder:
            return self.decoder.answer(prompts, max_new_tokens)
        inputs = self.move(self.encoder.encode(prompts))  # generate() itself keeps no gradients
        outputs = self.weights.generate(**inputs, max_new_tokens=max_new_tokens)
        return [self._read(row) for row in outputs[:, inputs["input_ids"].shape[1] :]]

    def move(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Put a batch on the device; pixels take the weights' dtype."""
        return {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }

    def _read(self, tokens: torch.Tensor) -> Answer:
        """Turn new tokens, shape (new,), into an answer."""
        text = self.encoder.tokenizer.decode(tokens, skip_special_tokens=True)
        ends = self.weights.generation_config.eos_token_id
        stops = torch.tensor(ends if isinstance(ends, list) else [ends], device=tokens.device)
        return Answer(text.strip(), bool(torch.isin(tokens, stops).any()))


def load_weights(encoder: Encoder, dtype: torch.dtype, four_bit: bool = False) -> PreTrainedModel:
    """Load safetensors weights and give the model a greedy decoding with no hidden defaults.

    Args:
        encoder: Of the model.
        dtype: Of the weights, or of what is computed with them where they have 4 bits.
        four_bit: Whether the language model's linear layers are quantized (QLoRA).

    Raises:
        ModelError: There are no safetensors, they cannot be read, or keys are missing; or
            bitsandbytes is not installed and is needed.
    """
    name = encoder.name
    if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
        remedy = "convert the weights to safetensors; other formats can run code and are refused"
        raise ModelError("weights in safetensors", "no such file", name, remedy)
    family = AutoModelForImageTextToText if encoder.sees else AutoModelForCausalLM
    quantization = four_bit_language(family, encoder, dtype) if four_bit else None
    try:
        model, report = family.from_pretrained(
            name,
            revision=encoder.revision,
            dtype=dtype,
            quantization_config=quantization,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError("loadable weights", str(error), name, "check the folder") from error
    _refuse_gaps(report, name)
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


def _refuse_gaps(report: dict[str, object], name: str) -> None:
    """Refuse weights that leave a layer at random."""
    missing = sorted(report["missing_keys"])  # type: ignore[call-overload]
    if missing:
        remedy = "the folder is incomplete or of another model"
        raise ModelError("all weights", f"none for {', '.join(missing[:3])}", name, remedy)


def _greedy(own: GenerationConfig, encoder: Encoder) -> GenerationConfig:
    """Spell the decoding out, so that no default of the model's creeps in."""
    ends = own.eos_token_id if own.eos_token_id is not None else encoder.tokenizer.eos_token_id
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        bos_token_id=encoder.tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=encoder.tokenizer.pad_token_id,
    )

"""Reference implementation of scoring, preference inference and training, for comparison only.

It is our own implementation of how the authors' released code works: pairs in batches of six,
images padded with black to the largest of the batch, a generated answer to read one probability
from, preferences one prompt at a time with at most 1,024 tokens, and training on pairs with right
padding and a run of the vision tower for each. LoRA's layers are PEFT's, as in the released code.
Weights, prompts and device are the same as ours. The scores are the same too if all images have one
size; black padding changes them.

It is faster than the released code in three respects:

- all images are decoded before timing starts; the released code reads them again for each user;
- the loss covers only the answer, as ours does, and not the whole prompt;
- no second, unused model of eight billion weights is in memory.

Training uses our batch size, from ``params.yaml`` or ``--batch-size``, and not the released code's
four, so that batch sizes do not affect the comparison.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from peft.tuners.lora import Linear
from PIL import Image
from torch import nn

from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import ImageRef
from mllm_msr.method.adapters import FusedLinear

PAIRS_AT_ONCE = 6
ANSWER_TOKENS = 30
PROMPT_TOKENS = 1_024

Unit = TypeVar("Unit")


class Reference:
    """A model as the released code uses it."""

    def __init__(self, encoder: Encoder, images: dict[ImageRef, Image.Image], model: Any) -> None:
        """Store the model, its encoder and all decoded images; LoRA's layers become PEFT's."""
        self.encoder, self.images, self.model = encoder, images, model
        for module in model.modules():
            if isinstance(module, FusedLinear):
                module.__class__ = Linear

    @torch.inference_mode()
    def score(
        self, prompts: Sequence[Prompt], answers: tuple[int, int], every_token: bool
    ) -> list[float]:
        """Return the log-odds of yes against no at the first token of each generated answer.

        Args:
            prompts: One per pair.
            answers: The token ids of yes and no.
            every_token: Generate all 30 tokens, even after the end-of-sequence token.
        """
        yes, no = answers
        scores: list[float] = []
        for batch in cut(prompts, PAIRS_AT_ONCE):
            inputs = self._encode(batch, "left")
            generated = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=ANSWER_TOKENS,
                min_new_tokens=ANSWER_TOKENS if every_token else None,
                output_logits=True,
                return_dict_in_generate=True,
            )
            first = generated.logits[0].float()
            scores += (first[:, yes] - first[:, no]).tolist()
        return scores

    @torch.inference_mode()
    def infer(self, prompt: Prompt, max_new_tokens: int) -> str:
        """Return the response to one prompt; one without an image is truncated to 1,024 tokens."""
        inputs = self._encode([prompt], "left")
        if prompt.image is None:
            inputs = {name: tensor[:, :PROMPT_TOKENS] for name, tensor in inputs.items()}
        length = inputs["input_ids"].shape[1]
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        text = self.encoder.tokenizer.decode(output[0, length:], skip_special_tokens=True)
        return str(text).strip()

    def lose(self, prompts: Sequence[Prompt], right: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch's answers, from the logits of all right-padded tokens."""
        inputs = self._encode(prompts, "right")
        logits = self.model(**inputs).logits.float()  # (batch, tokens, vocabulary)
        ends = inputs["attention_mask"].sum(dim=1) - 1
        return nn.functional.cross_entropy(logits[torch.arange(len(prompts)), ends], right)

    def _encode(self, prompts: Sequence[Prompt], side: str) -> dict[str, torch.Tensor]:
        shown = [self.images[prompt.image] for prompt in prompts if prompt.image]
        padded = iter(_pad_black(shown))
        self.encoder.tokenizer.padding_side = side
        try:
            texts = [self.encoder.render(prompt) for prompt in prompts]
            images = [[next(padded)] if prompt.image else [] for prompt in prompts]
            inputs = self.encoder.process(texts, images)
        finally:
            self.encoder.tokenizer.padding_side = "left"
        floating = {name: t.is_floating_point() for name, t in inputs.items()}
        device, dtype = self.model.device, self.model.dtype
        return {n: t.to(device, dtype if floating[n] else None) for n, t in inputs.items()}


def cut(units: Sequence[Unit], size: int) -> Iterator[Sequence[Unit]]:
    """Yield batches of a size; the last may be smaller."""
    for start in range(0, len(units), size):
        yield units[start : start + size]


def _pad_black(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Pad every image with black to the size of the largest."""
    width = max((image.width for image in images), default=0)
    height = max((image.height for image in images), default=0)
    padded = []
    for image in images:
        canvas = Image.new("RGB", (width, height))
        canvas.paste(image)
        padded.append(canvas)
    return padded

"""One forward per candidate: the log-odds of yes against no (paper, section Problem).

p(yes) / (p(yes) + p(no)) is the logistic function of these log-odds. They come from the model's
last hidden state by an output layer of two rows in float32, whatever the model's own dtype is.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm

from mllm_msr.engines.adapters import adapter_identity, load_adapter
from mllm_msr.engines.answers import Answer, AnswerStore
from mllm_msr.engines.asking import Asker
from mllm_msr.engines.local import LocalModel, load_weights
from mllm_msr.errors import ModelError
from mllm_msr.examples import Example
from mllm_msr.prompts import Prompt


class Score(NamedTuple):
    """A row of the table Scores."""

    sequence: int
    item: str
    split: str
    log_odds: float


class AnswerHead(nn.Module):
    """The output layer's rows of the two answers, in float32."""

    def __init__(self, output: nn.Linear, answers: tuple[int, int]) -> None:
        """Copy the rows of yes and no from an output layer."""
        super().__init__()
        rows = list(answers)
        self.weight = nn.Parameter(output.weight.detach()[rows].float(), requires_grad=False)
        bias = None if output.bias is None else output.bias.detach()[rows].float()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Give logits of yes and no; (batch, tokens, width) -> (batch, tokens, 2)."""
        return nn.functional.linear(hidden.float(), self.weight, self.bias)


class Recommender:
    """The fine-tuned model: its weights, its adapter, and the tokens of its two answers."""

    def __init__(
        self, model: LocalModel, adapter: Path, answers: tuple[int, int], trained: bool
    ) -> None:
        """Take a model and the adapter for it; nothing is loaded yet.

        Args:
            model: The base model.
            adapter: The adapter's folder, in PEFT's format.
            answers: The token ids of yes and no.
            trained: Whether the adapter was trained; if so it must change the scores.
        """
        self.model, self.adapter, self.answers = model, adapter, answers
        self._must_change = trained

    @cached_property
    def weights(self) -> PeftModel:
        """The model with its adapter and the output layer of two rows."""
        bare = load_weights(self.model.encoder, self.model.dtype)
        adapted = load_adapter(bare, self.adapter)
        base = adapted.get_base_model()
        base.set_output_embeddings(AnswerHead(base.get_output_embeddings(), self.answers))
        return adapted.to(self.model.device).eval()

    def answer_batch(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Give the log-odds of a batch, as texts for the answer store."""
        inputs = self.model.move(self.model.encoder.encode(prompts))
        log_odds = run_forward(self.weights, inputs)
        if self._must_change:
            self._check_adapter(inputs, log_odds)
        return [Answer(repr(value), complete=True) for value in log_odds.tolist()]

    def _check_adapter(self, inputs: dict[str, torch.Tensor], log_odds: torch.Tensor) -> None:
        """Prove on the first batch that the adapter changes the scores.

        Raises:
            ModelError: The scores with and without the adapter are the same.
        """
        with self.weights.disable_adapter():
            bare = run_forward(self.weights, inputs)
        if torch.equal(bare, log_odds):
            remedy = "run the stage sft again"
            raise ModelError(
                "an adapter that changes the scores", "none", str(self.adapter), remedy
            )
        self._must_change = False


@torch.inference_mode()
def run_forward(weights: PeftModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Give the log-odds of yes against no of a batch, float32 of shape (batch,)."""
    logits: torch.Tensor = weights(**inputs, logits_to_keep=1).logits[:, -1]  # (batch, 2)
    return logits[:, 0] - logits[:, 1]


def score_asker(recommender: Recommender, store: AnswerStore, limit: int) -> Asker:
    """Ask for log-odds through the answer store."""
    return Asker(
        recommender.model,
        store,
        limit,
        recommender.answer_batch,
        decoding="log-odds",
        adapter=adapter_identity(recommender.adapter),
        answers=" ".join(map(str, recommender.answers)),
    )


def score_examples(examples: Iterable[Example], split: str, asker: Asker) -> list[Score]:
    """Score the candidates of a split, in their order."""
    examples = list(examples)
    with tqdm(total=len(examples), unit="pair", desc=f"score {split}") as progress:
        answers = asker.ask([example.prompt for example in examples], progress)
    return [
        Score(example.question.sequence, example.question.item, split, float(answer))
        for example, answer in zip(examples, answers, strict=True)
    ]

"""The log-odds of yes against no for every candidate (paper, section Problem).

p(yes) / (p(yes) + p(no)) is the logistic function of these log-odds. They come from the model's
last hidden state by an output layer of two rows in float32, whatever the model's own dtype is.
Candidates whose prompts begin alike share that beginning, where the model's family allows it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm

from mllm_msr.core.errors import ModelError
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.packing import Packer, find_packer
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.responses import Response, ResponseStore
from mllm_msr.method.adapters import adapter_identity, load_adapter
from mllm_msr.method.asking import Asker
from mllm_msr.method.examples import Example


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
        adapted = load_adapter(self.model.load(), self.adapter)
        base = adapted.get_base_model()
        base.set_output_embeddings(AnswerHead(base.get_output_embeddings(), self.answers))
        return adapted.to(self.model.device).eval()

    @cached_property
    def packer(self) -> Packer | None:
        """What lays prompts out; None for families whose processor does."""
        bare = self.weights.get_base_model()
        return find_packer(self.model.encoder, bare, self.model.budget)

    def cut_batches(self, prompts: Sequence[Prompt]) -> Iterable[list[int]]:
        """Cut prompts into batches, those that share a beginning together."""
        if self.packer:
            return self.packer.batches(prompts)
        return self.model.padded_batches(prompts)

    def answer_batch(self, prompts: Sequence[Prompt]) -> list[Response]:
        """Give the log-odds of a batch, as texts for the response store."""
        forward = self._prepare(prompts)
        if self._must_change:
            self._check_adapter(forward)
        log_odds = run_forward(forward)
        if not torch.isfinite(log_odds).all():
            fix = "use another dtype (MLLM_MSR_DTYPE), or run the stage sft again"
            raise ModelError(
                expected="finite scores", got="inf or nan", where=str(self.adapter), fix=fix
            )
        return [Response(repr(value), complete=True) for value in log_odds.tolist()]

    def _prepare(self, prompts: Sequence[Prompt]) -> Callable[[], torch.Tensor]:
        """Encode a batch; gives the forward to its logits of yes and no, (prompts, 2)."""
        weights, packer = self.weights, self.packer
        if packer is None:
            inputs = self.model.move(self.model.encoder.encode(prompts))
            return lambda: weights(**inputs, logits_to_keep=1).logits[:, -1]
        packed = packer.pack(prompts).to(self.model.device)
        return lambda: packer.run(weights, packed)

    def _check_adapter(self, forward: Callable[[], torch.Tensor]) -> None:
        """Prove on the first batch that the adapter changes the scores; then merge it, if exact.

        Raises:
            ModelError: The scores with and without the adapter are the same.
        """
        adapted = run_forward(forward)
        with self.weights.disable_adapter():
            bare = run_forward(forward)
        if torch.equal(bare, adapted):
            fix = "run the stage sft again"
            raise ModelError(
                expected="an adapter that changes the scores",
                got="none",
                where=str(self.adapter),
                fix=fix,
            )
        self._must_change = False
        # Into coarser weights much of it would be rounded away.
        if self.model.dtype == torch.float32 and not self.model.four_bit:
            self.weights.merge_adapter()


@torch.inference_mode()
def run_forward(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Give the log-odds of yes against no of a batch, float32 of shape (batch,)."""
    logits = forward()  # (batch, 2)
    return logits[:, 0] - logits[:, 1]


def score_asker(recommender: Recommender, store: ResponseStore, limit: int) -> Asker:
    """Ask for log-odds through the response store."""
    return Asker(
        recommender.model,
        store,
        limit,
        recommender.cut_batches,
        recommender.answer_batch,
        decoding="log-odds",
        adapter=adapter_identity(recommender.adapter),
        answers=" ".join(map(str, recommender.answers)),
    )


def score_examples(examples: Mapping[str, Sequence[Example]], asker: Asker) -> list[Score]:
    """Score the candidates of each split, in their order.

    All splits are asked about at once, since candidates of different splits share items too.
    """
    asked = [(split, example) for split, several in examples.items() for example in several]
    with tqdm(total=len(asked), unit="pair", desc="score") as progress:
        answers = asker.ask([example.prompt for _, example in asked], progress)
    return [
        Score(example.question.sequence, example.question.item, split, float(answer))
        for (split, example), answer in zip(asked, answers, strict=True)
    ]

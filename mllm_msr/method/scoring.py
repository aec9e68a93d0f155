"""The log-odds of yes against no for every candidate (paper, section Problem).

p(yes) / (p(yes) + p(no)) is the logistic function of these log-odds. They are computed from the
last hidden state by an output layer of two rows in float32, whatever the model's dtype. Prompts
with a shared prefix are packed where the model's family supports it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm

from mllm_msr.core.errors import ModelError
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.packing import Packer, make_packer, sort_key
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import Response, ResponseStore
from mllm_msr.method.adapters import (
    adapter_identity,
    cast_adapter,
    check_adapter,
    load_adapter,
    read_record,
)
from mllm_msr.method.examples import Example, RecommenderInputs
from mllm_msr.method.inference import CachedEngine, Engine, StoringEngine, in_one_step
from mllm_msr.method.inference.pooled import pooled_engine
from mllm_msr.method.inference.server import ServerModel
from mllm_msr.method.inference.workers import has_cluster


class Score(NamedTuple):
    """A row of the table Scores."""

    sequence: int
    item: str
    split: str
    log_odds: float


class AnswerHead(nn.Module):
    """An output layer with the rows of yes and no only, in float32."""

    def __init__(self, output: nn.Linear, answer_token_ids: tuple[int, int]) -> None:
        """Copy the rows of yes and no from an output layer."""
        super().__init__()
        rows = list(answer_token_ids)
        self.weight = nn.Parameter(output.weight.detach()[rows].float(), requires_grad=False)
        bias = None if output.bias is None else output.bias.detach()[rows].float()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of yes and no, (batch, tokens, width) -> (batch, tokens, 2)."""
        return nn.functional.linear(hidden.float(), self.weight, self.bias)


class ScoringModel:
    """The fine-tuned model: base model, adapter and answer token ids."""

    def __init__(
        self, model: LocalModel, adapter: Path, answer_token_ids: tuple[int, int], trained: bool
    ) -> None:
        """Take a model and its adapter; nothing is loaded yet.

        Args:
            model: The base model.
            adapter: The adapter's folder, in PEFT's format.
            answer_token_ids: Of yes and no.
            trained: Whether the adapter was trained; if so it must change the scores.
        """
        self.model, self.adapter, self.answer_token_ids = model, adapter, answer_token_ids
        self._must_change = trained

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what the model was made of, for the workers of a cluster."""
        parts = (self.model, self.adapter, self.answer_token_ids, self._must_change)
        return ScoringModel, parts

    @cached_property
    def weights(self) -> PeftModel:
        """The model with its adapter and an output layer of two rows."""
        adapted = load_adapter(self.model.load(), self.adapter)
        base = adapted.get_base_model()
        head = AnswerHead(base.get_output_embeddings(), self.answer_token_ids)
        base.set_output_embeddings(head)
        if self.model.dtype == torch.bfloat16:
            cast_adapter(adapted, torch.bfloat16)  # as autocast does in fine-tuning
        return adapted.to(self.model.device).eval()

    @cached_property
    def packer(self) -> Packer | None:
        """The packer; None where prompts run padded, as the model's processor prepares them."""
        base = self.weights.get_base_model()
        return make_packer(self.model.encoder, base, self.model.budget)

    def batches(self, prompts: Sequence[Prompt]) -> Iterable[list[int]]:
        """Group prompts into batches, those with a shared prefix together."""
        if self.packer:
            return self.packer.prefetch(prompts)
        return self.model.padded_batches(prompts)

    def score_batch(self, prompts: Sequence[Prompt]) -> list[Response]:
        """Return the log-odds of a batch, as texts for the response store.

        Raises:
            ModelError: A score is not finite, or a trained adapter does not change the scores.
        """
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
        """Encode a batch; return the function that computes its logits, (prompts, 2)."""
        weights, packer = self.weights, self.packer
        if packer is None:
            inputs = self.model.move(self.model.encoder.encode(prompts))
            return lambda: weights(**inputs, logits_to_keep=1).logits[:, -1]
        packed = packer.pack(prompts).to(self.model.device)
        return lambda: packer.run(weights, packed)

    def _check_adapter(self, forward: Callable[[], torch.Tensor]) -> None:
        """Check on the first batch that the adapter changes the scores; then merge it if exact.

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
        # Merged into weights of lower precision, much of the adapter would be rounded away.
        if self.model.dtype == torch.float32 and not self.model.four_bit:
            self.weights.merge_adapter()


def open_scoring_model(inputs: RecommenderInputs, folder: Path) -> ScoringModel:
    """Return the fine-tuned model; its weights are loaded when they are first needed.

    Args:
        inputs: The base model and its answers.
        folder: The stage ``sft``'s.

    Raises:
        ModelError: There is no trained model, it is damaged, or its base model is another one.
    """
    training, adapter = read_record(folder), folder / "adapter"
    if training.model != inputs.builder.encoder.identity:
        raise ModelError(
            expected="an adapter of this model",
            got="one of another",
            where=str(folder),
            fix="run the stage sft for this model",
        )
    check_adapter(adapter, training)
    trained = training.steps > 0
    return ScoringModel(inputs.model, adapter, inputs.answer_token_ids, trained=trained)


@torch.inference_mode()
def run_forward(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return the log-odds of yes against no, float32, (batch,)."""
    logits = forward()  # (batch, 2)
    return logits[:, 0] - logits[:, 1]


def scoring_engine(
    recommender: ScoringModel,
    store: ResponseStore,
    limit: int,
    engine: str = "local",
    *,
    spread: bool = False,
) -> StoringEngine:
    """Return the engine whose responses are log-odds.

    Args:
        recommender: The fine-tuned model.
        store: The response store.
        limit: The most tokens of a prompt.
        engine: ``local``, or ``server`` for a server of base model and adapter merged.
        spread: Whether to spread a local model's prompts over the cluster, where there is one.
    """
    ids = recommender.answer_token_ids
    settings = {  # the names are part of the response key
        "decoding": "log-odds",
        "adapter": adapter_identity(recommender.adapter),
        "answers": " ".join(map(str, ids)),
    }
    if engine == "server":
        server = ServerModel(recommender.model.encoder, "recommender")
        ask = partial(server.score, answer_token_ids=ids)
        return CachedEngine(server, store, limit, server.batches, ask, **settings)
    if spread and has_cluster():
        open_engine = partial(scoring_engine, recommender, limit=limit)
        encoder = recommender.model.encoder
        return pooled_engine(encoder, open_engine, store, limit, sort_key, **settings)
    run = in_one_step(recommender.score_batch)
    return CachedEngine(recommender.model, store, limit, recommender.batches, run, **settings)


def score_examples(
    examples: Mapping[str, Sequence[Example]], engine: Engine, *, show_progress: bool = True
) -> list[Score]:
    """Score the candidates of each split, in their order.

    All splits run together, since candidates of different splits share items.

    Args:
        examples: By split.
        engine: Computes the log-odds.
        show_progress: Whether to show a progress bar.
    """
    pairs = [(split, example) for split, of_split in examples.items() for example in of_split]
    bar = tqdm(total=len(pairs), unit="pair", desc="score", disable=not show_progress)
    with bar as progress:
        responses = engine.respond([example.prompt for _, example in pairs], progress)
    return [
        Score(example.question.sequence, example.question.item, split, float(response))
        for (split, example), response in zip(pairs, responses, strict=True)
    ]

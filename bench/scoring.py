"""Scoring by the stage and by the reference implementation."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from bench.pipeline import (
    DATA,
    load_adapted_model,
    make_reference,
    necessary_tokens,
    read_examples,
    recommender,
)
from bench.timing import Measured, Options, TokenCount, timed
from mllm_msr.core.params import SftParams, load_params
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prefixes import count_necessary
from mllm_msr.engines.response_store import ResponseStore
from mllm_msr.method.adapters import load_adapter
from mllm_msr.method.examples import RecommenderInputs
from mllm_msr.method.scoring import ScoringModel, score_examples, scoring_engine


def score(options: Options) -> Measured:
    """Score the test candidates as the stage does."""
    examples = read_examples(options, "test", options.sequences or 100)
    with recommender(options.model) as inputs, TemporaryDirectory() as folder:
        adapter = find_adapter(options, inputs, Path(folder))
        ours = ScoringModel(
            inputs.model, adapter, inputs.answer_token_ids, trained=not options.model
        )
        packer = ours.packer  # loads the weights
        assert packer is not None
        count = TokenCount(ours.weights.get_base_model())
        with ResponseStore(Path(folder) / "responses.sqlite") as store:
            asker = scoring_engine(ours, store, inputs.builder.limit)
            run = timed(lambda: score_examples({"test": examples}, asker))
        achieved = 2 * linear_weights(ours.weights) * count.tokens / run.seconds
        return Measured(
            run,
            len(examples),
            count.tokens,
            count_necessary([packer.distinct_tokens(example.prompt) for example in examples]),
            {(row.sequence, row.item): row.log_odds for row in run.result},
            {"share_of_matrix_rate": round(achieved / matrix_rate(inputs.model), 2)},
        )


def score_by_reference(options: Options, every_token: bool) -> Measured:
    """Score the candidates of some sequences by generating an answer for each."""
    examples = read_examples(options, "test", options.reference_count or 20)
    with recommender(options.model) as inputs, TemporaryDirectory() as folder:
        adapter = find_adapter(options, inputs, Path(folder))
        adapted = load_adapter(inputs.model.load(), adapter).to(inputs.model.device).eval()
        reference = make_reference(inputs.model.encoder, adapted)
        count = TokenCount(adapted.get_base_model())
        prompts = [example.prompt for example in examples]
        run = timed(lambda: reference.score(prompts, inputs.answer_token_ids, every_token))
        asked = [(example.question.sequence, example.question.item) for example in examples]
        return Measured(
            run,
            len(examples),
            count.tokens,
            necessary_tokens(inputs.model.encoder, adapted, [prompts]),
            dict(zip(asked, run.result, strict=True)),
        )


def find_adapter(options: Options, inputs: RecommenderInputs, folder: Path) -> Path:
    """Return the pipeline's adapter, or a new one for another model."""
    if options.model is None:
        return DATA / "sft/adapter"
    load_adapted_model(inputs, load_params(SftParams)).save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def compare_scores(
    ours: Mapping[Any, float], reference: Mapping[Any, float]
) -> dict[str, float | int]:
    """Return the maximum difference of the log-odds over the pairs of both sides."""
    largest = max(abs(ours[pair] - reference[pair]) for pair in reference.keys() & ours.keys())
    return {"largest_difference": float(f"{largest:.1e}")}


def linear_weights(model: Any) -> int:
    """Return the number of weights of the language model's linear layers.

    They determine the operations per token, except those of the adapter (merged or small), of
    attention and of the vision tower.
    """
    layers = model.get_base_model().get_decoder().layers
    return sum(
        module.in_features * module.out_features
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    )


def matrix_rate(model: LocalModel) -> float:
    """Return the measured operations per second of a matrix product on the model's device."""
    side = 8_192 if model.device.type == "cuda" else 2_048
    one, other = (torch.randn(side, side, device=model.device).to(model.dtype) for _ in "ab")
    return float(2 * side**3 / min(timed(lambda: one @ other).seconds for _ in range(5)))

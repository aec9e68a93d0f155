"""Scoring by the stage and by the reference implementation."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.cutoff import LimitedEngine, until
from bench.pipeline import (
    DATA,
    load_adapted_model,
    make_reference,
    necessary_tokens,
    read_examples,
    recommender,
)
from bench.reference import PAIRS_AT_ONCE, cut
from bench.timing import (
    Measured,
    Options,
    TokenCount,
    decoder_layers,
    release_memory,
    share_of_matrix_rate,
    timed,
)
from mllm_msr.core.params import SftParams, load_params
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
        base = ours.weights.get_base_model()
        count = TokenCount(base)
        with ResponseStore(Path(folder) / "responses.sqlite") as store:
            engine = scoring_engine(ours, store, inputs.builder.limit)
            asker = LimitedEngine(engine, count, options.seconds, response="0.0")
            run = timed(lambda: score_examples({"test": examples}, asker))
        prompts = asker.finished
        return Measured(
            run,
            len(prompts),
            len(examples),
            sum(map(inputs.model.encoder.count_tokens, prompts)),
            count.tokens,
            count_necessary([packer.distinct_tokens(prompt) for prompt in prompts]),
            {(row.sequence, row.item): row.log_odds for row in run.result},
            share_of_matrix_rate(inputs.model, decoder_layers(base), count.tokens, run.seconds),
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

        def score_all() -> list[float]:
            batches = until(cut(prompts, PAIRS_AT_ONCE), options.seconds)
            scored = (reference.score(b, inputs.answer_token_ids, every_token) for b in batches)
            return [score for scores in scored for score in scores]

        run = timed(score_all)
        asked = [(example.question.sequence, example.question.item) for example in examples]
        finished = prompts[: len(run.result)]
        return Measured(
            run,
            len(finished),
            len(examples),
            sum(map(inputs.model.encoder.count_tokens, finished)),
            count.tokens,
            necessary_tokens(inputs.model.encoder, adapted.get_base_model(), [finished]),
            dict(zip(asked, run.result, strict=False)),
        )


def find_adapter(options: Options, inputs: RecommenderInputs, folder: Path) -> Path:
    """Return the pipeline's adapter, or a new one for another model."""
    if options.model is None:
        return DATA / "sft/adapter"
    load_adapted_model(inputs, load_params(SftParams)).save_pretrained(str(folder / "adapter"))
    release_memory()  # before the model is loaded again
    return folder / "adapter"


def compare_scores(
    ours: Mapping[Any, float], reference: Mapping[Any, float]
) -> dict[str, float | int]:
    """Return the maximum difference of the log-odds over the pairs of both sides."""
    largest = max(abs(ours[pair] - reference[pair]) for pair in reference.keys() & ours.keys())
    return {"largest_difference": float(f"{largest:.1e}")}

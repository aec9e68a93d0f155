"""Fine-tuning on packed rows and by the reference implementation, with the same training loop."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from bench.cutoff import until
from bench.pipeline import (
    load_adapted_model,
    make_reference,
    necessary_tokens,
    read_examples,
    read_sft,
    recommender,
)
from bench.reference import cut
from bench.timing import (
    Measured,
    Options,
    TokenCount,
    decoder_layers,
    share_of_matrix_rate,
    timed,
)
from mllm_msr.core.arrays import Floats
from mllm_msr.core.params import EvaluateParams, SftParams, load_params
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.packing import Packer, WholePrompts
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import ResponseStore
from mllm_msr.evaluation.metrics import bootstrap_interval
from mllm_msr.method.examples import Example
from mllm_msr.method.scoring import ScoringModel, score_examples, scoring_engine
from mllm_msr.ranking import auc, rank_targets
from mllm_msr.training.batching import GroupSampler
from mllm_msr.training.finetuning import PAIRS_PER_IMAGE, FineTuning, collate, sample_sequences
from mllm_msr.training.losses import yes_no_loss


def train_packed(options: Options) -> Measured:
    """Train on packed rows for all epochs of the pipeline, which share cached image features."""
    settings = read_sft(options)
    examples = read_examples(options, "train", options.sequences)
    with recommender(options.model) as inputs:
        encoder = inputs.model.encoder
        adapted = load_adapted_model(inputs, settings)
        packer = Packer(encoder, adapted.get_base_model())

        def lose(batch: Sequence[Example]) -> torch.Tensor:
            packed = collate(encoder, packer, inputs.answer_token_ids, batch)
            logits = packer.run(adapted, packed["packed"].to(inputs.model.device)).float()
            return yes_no_loss(logits, packed["answer_token_ids"].to(logits.device))

        def order_and_train() -> list[Sequence[Example]]:
            batches = until(order_packed(examples, encoder, settings), options.seconds)
            return train(adapted, lose, batches, settings.learning_rate)

        base = adapted.get_base_model()
        count = TokenCount(base)
        run = timed(order_and_train)
        prompts = [[example.prompt for example in batch] for batch in run.result]
        on_cuda = inputs.model.device.type == "cuda"
        passes = 3 if on_cuda else 2  # forward and backward; on CUDA activations are recomputed
        layers, tokens = decoder_layers(base), count.tokens
        return Measured(
            run,
            sum(map(len, prompts)),
            settings.epochs * len(examples),
            count_tokens(encoder, prompts),
            tokens,
            necessary_tokens(encoder, base, prompts),
            notes={
                "epochs": settings.epochs,
                "batch_size": settings.batch_size,
                **share_of_matrix_rate(inputs.model, layers, tokens, run.seconds, passes),
            },
        )


def order_packed(
    examples: Sequence[Example], encoder: Encoder, settings: SftParams
) -> Iterator[Sequence[Example]]:
    """Yield the batches of all epochs, in the order of the stage."""
    images = [example.prompt.image for example in examples]
    lengths = [encoder.count_tokens(example.prompt) for example in examples]
    size, seed = settings.batch_size, settings.seed
    sampler = GroupSampler(images, lengths, PAIRS_PER_IMAGE, size, seed)
    for epoch in range(settings.epochs):
        sampler.set_epoch(epoch)
        yield from cut([examples[number] for number in sampler], settings.batch_size)


def tune_by_reference(options: Options) -> Measured:
    """Train on some batches of whole prompts; all epochs cost the same."""
    settings = read_sft(options)
    examples = read_examples(options, "train", options.sequences)
    order = np.random.default_rng(settings.seed).permutation(len(examples)).tolist()
    batches = list(cut([examples[number] for number in order], settings.batch_size))
    batches = batches[: options.reference_count or 40]
    asked = sum(map(len, batches))
    with recommender(options.model) as inputs:
        adapted = load_adapted_model(inputs, settings)
        reference = make_reference(inputs.model.encoder, adapted)
        right = {True: inputs.answer_token_ids[0], False: inputs.answer_token_ids[1]}

        def lose(batch: Sequence[Example]) -> torch.Tensor:
            wanted = torch.tensor([right[example.question.label] for example in batch])
            prompts = [example.prompt for example in batch]
            return reference.lose(prompts, wanted.to(inputs.model.device))

        count = TokenCount(adapted.get_base_model())
        some = until(batches, options.seconds)
        run = timed(lambda: train(adapted, lose, some, settings.learning_rate))
        prompts = [[example.prompt for example in batch] for batch in run.result]
        return Measured(
            run,
            sum(map(len, prompts)),
            asked,
            count_tokens(inputs.model.encoder, prompts),
            count.tokens,
            necessary_tokens(inputs.model.encoder, adapted.get_base_model(), prompts),
            notes={"batches": len(prompts), "batch_size": settings.batch_size},
        )


def count_tokens(encoder: Encoder, batches: Iterable[Sequence[Prompt]]) -> int:
    """Return the tokens of all prompts of some batches."""
    return sum(encoder.count_tokens(prompt) for batch in batches for prompt in batch)


def fine_tune(options: Options, packed: bool) -> Measured:
    """Fine-tune as the stage does, on packed rows or whole prompts; measure the validation AUC.

    The epoch is chosen on the same sequences as in the stage; the AUC is that of all validation
    sequences, with its bootstrap interval.
    """
    settings = read_sft(options)
    examples = read_examples(options, "train", options.sequences)
    valid = read_examples(options, "selection", None)
    questions = [example.question for example in valid]
    chosen = set(sample_sequences(questions, settings.validation_sequences, settings.seed))
    checks = [example for example in valid if example.question in chosen]
    with recommender(options.model) as inputs, TemporaryDirectory() as name:
        folder = Path(name)
        tuning = FineTuning(
            inputs.model, inputs.answer_token_ids, settings, folder / "work", folder
        )
        with patch("mllm_msr.training.finetuning.make_packer", Packer if packed else WholePrompts):
            run = timed(lambda: tuning.run(examples, checks))
        ours = ScoringModel(
            inputs.model, folder / "adapter", inputs.answer_token_ids, trained=False
        )
        with ResponseStore(folder / "responses.sqlite") as store:
            scores = score_examples(
                {"valid": valid}, scoring_engine(ours, store, inputs.builder.limit)
            )
    ranks = rank_targets(
        [row.sequence for row in scores],
        [row.log_odds for row in scores],
        [question.label for question in questions],
    )
    areas = auc(ranks)
    return Measured(
        run,
        settings.epochs * len(examples),
        settings.epochs * len(examples),
        None,
        None,
        None,
        dict(zip(ranks.sequences.tolist(), areas.tolist(), strict=True)),
        {"epochs": settings.epochs, "sequences": len(areas), **interval("valid_auc", areas)},
    )


def compare_areas(ours: Mapping[int, float], reference: Mapping[int, float]) -> dict[str, float]:
    """Return the mean difference of the sequences' AUC, with its bootstrap interval."""
    return interval("auc_difference", np.array([ours[s] - reference[s] for s in ours]))


def interval(name: str, values: Floats) -> dict[str, float]:
    """Return a mean over sequences with its bootstrap interval, by the settings of evaluate."""
    settings = load_params(EvaluateParams)
    low, high = bootstrap_interval(
        values[:, None], settings.bootstrap_samples, settings.confidence, settings.seed
    )
    return {
        name: round(float(values.mean()), 4),
        f"{name}_low": round(float(low[0]), 4),
        f"{name}_high": round(float(high[0]), 4),
    }


def train(
    model: Any,
    lose: Callable[[Sequence[Example]], torch.Tensor],
    batches: Iterable[Sequence[Example]],
    rate: float,
) -> list[Sequence[Example]]:
    """Train with one step per batch, and the optimizer that Trainer uses; return the batches."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, fused=True)
    mixed = model.dtype == torch.bfloat16
    trained_batches = []
    for batch in batches:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
            loss = lose(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        trained_batches.append(batch)
    return trained_batches

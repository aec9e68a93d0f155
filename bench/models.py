"""How fast the model stages are, against the way of research code, with the same weights.

    dvc repro
    python -m bench.models

One JSON line for each case; ``docs/benchmarks.md`` says what stands in it. Each side has a process
of its own, so that its peak of memory is its own, and the two take turns, so that a machine which
becomes slower does so for both. Of the turns the line has the median. Weights are loaded before the
clock starts, and prompts are made from the tables; rendering, tokenising, reading pixels and all of
the rest is inside, for both. Prompts are the pipeline's own, of ``data/`` and ``params.yaml``;
``--model`` puts another model in the place of all three (see ``bench/shapes.py``).
"""

import gc
import json
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import transformers
import typer
from torch import nn

from bench.reference import Reference
from mllm_msr.engines.adapters import add_adapter, load_adapter
from mllm_msr.engines.answers import AnswerStore
from mllm_msr.engines.asking import greedy_asker
from mllm_msr.engines.devices import find_device, find_dtype
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.losses import yes_no_loss
from mllm_msr.engines.packing import Packer, WholePrompts
from mllm_msr.engines.prefixes import count_necessary
from mllm_msr.engines.sampling import GroupSampler
from mllm_msr.examples import Example, RecommenderInputs, open_recommender, read_questions
from mllm_msr.finetuning import PAIRS_OF_AN_IMAGE, FineTuning, collate, sample_sequences
from mllm_msr.gallery import Gallery
from mllm_msr.metrics import Floats, auc, bootstrap_interval, place_targets
from mllm_msr.params import (
    EvaluateParams,
    InferPreferencesParams,
    RecommenderParams,
    SftParams,
    load_params,
)
from mllm_msr.preferences import PreferenceInferrer, cut_blocks, read_histories
from mllm_msr.prompts import Prompt, load_prompts, preference
from mllm_msr.scoring import Recommender, score_asker, score_examples

DATA = Path("data")


class Options(NamedTuple):
    """What the command line says; None: what the case has."""

    model: str | None = None
    sequences: int | None = None
    of_reference: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class Run:
    """A piece of work under the clock.

    Attributes:
        seconds: It took so many.
        result: What it gave.
        peak_gb: The peak of the device's memory meanwhile, in 10^9 bytes, or of the process so far
            where that is the CPU.
    """

    seconds: float
    result: Any
    peak_gb: float


@dataclass(frozen=True)
class Measured:
    """What a side did in one turn.

    Attributes:
        run: The run.
        many: Things that it did.
        tokens: Tokens that the language model took, padding and generated ones included; None where
            they are not counted.
        necessary: Tokens that it had to take, were every common beginning taken once.
        results: What came out, by thing.
        notes: Further fields of the side.
    """

    run: Run
    many: int
    tokens: int | None
    necessary: int | None
    results: dict[Any, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Things a second."""
        return self.many / self.run.seconds

    @property
    def waste(self) -> float | None:
        """Tokens taken over tokens that had to be taken."""
        return self.tokens / self.necessary if self.tokens and self.necessary else None


class TokenCount:
    """Counts the tokens that go into a language model.

    Attributes:
        read: In forwards of several tokens a row: prompts, padding included.
        answered: In forwards of one token a row: answers under way.
    """

    def __init__(self, model: Any) -> None:
        """Watch a model."""
        self.read = self.answered = 0
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    @property
    def tokens(self) -> int:
        """Of both kinds."""
        return self.read + self.answered

    def _count(self, _: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0].shape[-1] == 1:
            self.answered += inputs[0].numel()
        else:
            self.read += inputs[0].numel()


# Scoring


def score(options: Options) -> Measured:
    """Score the test candidates as the stage does."""
    examples = read_examples(options, "test", options.sequences or 100)
    with recommender(options.model) as inputs, TemporaryDirectory() as folder:
        adapter = find_adapter(options, inputs, Path(folder))
        ours = Recommender(inputs.model, adapter, inputs.answers, trained=not options.model)
        packer = ours.packer  # loads the weights
        assert packer is not None
        count = TokenCount(ours.weights.get_base_model())
        with AnswerStore(Path(folder) / "answers.sqlite") as store:
            asker = score_asker(ours, store, inputs.builder.limit)
            run = timed(lambda: score_examples({"test": examples}, asker))
        achieved = 2 * linear_weights(ours.weights) * count.tokens / run.seconds
        return Measured(
            run,
            len(examples),
            count.tokens,
            count_necessary([packer.distinguish(example.prompt) for example in examples]),
            {(row.sequence, row.item): row.log_odds for row in run.result},
            {"share_of_matrix_rate": round(achieved / matrix_rate(inputs.model), 2)},
        )


def score_plainly(options: Options, every_token: bool) -> Measured:
    """Score the candidates of some of the sequences by generating an answer for each."""
    examples = read_examples(options, "test", options.of_reference or 20)
    with recommender(options.model) as inputs, TemporaryDirectory() as folder:
        adapter = find_adapter(options, inputs, Path(folder))
        adapted = load_adapter(inputs.model.load(), adapter).to(inputs.model.device).eval()
        reference = make_reference(inputs.model.encoder, adapted)
        count = TokenCount(adapted.get_base_model())
        prompts = [example.prompt for example in examples]
        run = timed(lambda: reference.score(prompts, inputs.answers, every_token))
        asked = [(example.question.sequence, example.question.item) for example in examples]
        return Measured(
            run,
            len(examples),
            count.tokens,
            necessary_tokens(inputs.model.encoder, adapted, [prompts]),
            dict(zip(asked, run.result, strict=True)),
        )


def find_adapter(options: Options, inputs: RecommenderInputs, folder: Path) -> Path:
    """Give the pipeline's adapter, or a fresh one of another model."""
    if options.model is None:
        return DATA / "sft/adapter"
    adapt(inputs, load_params(SftParams)).save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def compare_scores(
    ours: Mapping[Any, float], reference: Mapping[Any, float]
) -> dict[str, float | int]:
    """Give the largest difference of the log-odds of the pairs that both have."""
    largest = max(abs(ours[pair] - reference[pair]) for pair in reference.keys() & ours.keys())
    return {"largest_difference": float(f"{largest:.1e}")}


# Preferences


class Histories(NamedTuple):
    """What a side needs to infer preferences."""

    settings: InferPreferencesParams
    templates: dict[str, str]
    texts: dict[int, list[str]]
    model: LocalModel

    def blocks(self, sequence: int) -> list[Sequence[str]]:
        """Give a history's blocks."""
        return cut_blocks(self.texts[sequence], "recurrent", self.settings.block_size)


def infer(options: Options) -> Measured:
    """Infer recurrent preferences as the stage does."""
    histories = open_histories(options.model, options.sequences or 600)
    settings, count = histories.settings, TokenCount(histories.model.weights)
    with TemporaryDirectory() as folder, AnswerStore(Path(folder) / "answers.sqlite") as store:
        asker = greedy_asker(histories.model, store, settings.max_new_tokens)
        inferrer = PreferenceInferrer(asker, histories.templates)
        run = timed(lambda: inferrer.infer(histories.texts, "recurrent", settings.block_size))
    said: dict[int, list[str]] = {}
    for row in run.result:
        said.setdefault(row.sequence, []).append(row.preference)
    return measure_preferences(run, count, histories, said)


def infer_plainly(options: Options) -> Measured:
    """Infer the preferences of some of the users, one prompt at a time."""
    histories = open_histories(options.model, options.of_reference or 30)
    reference = Reference(histories.model.encoder, {}, histories.model.weights)
    count = TokenCount(histories.model.weights)

    def infer_all() -> dict[int, list[str]]:
        said: dict[int, list[str]] = {}
        for sequence in histories.texts:
            known = said.setdefault(sequence, [])
            for block in histories.blocks(sequence):
                prompt = preference(histories.templates, block, known[-1] if known else None)
                known.append(reference.infer(prompt, histories.settings.max_new_tokens))
        return said

    run = timed(infer_all)
    return measure_preferences(run, count, histories, run.result)


def open_histories(name: str | None, sequences: int) -> Histories:
    """Read the first sequences' histories, and load the model."""
    settings = load_params(InferPreferencesParams)
    texts = read_histories(
        DATA / "filter_sequences/histories.parquet",
        DATA / "summarize_items/summaries.parquet",
        "summary",
    )
    model = LocalModel(Encoder(name or settings.model, settings.revision, None))
    chosen = {sequence: texts[sequence] for sequence in list(texts)[:sequences]}
    return Histories(settings, load_prompts("infer_preferences"), chosen, model)


def measure_preferences(
    run: Run, count: TokenCount, histories: Histories, said: Mapping[int, Sequence[str]]
) -> Measured:
    """Count what had to be read: every common beginning once, and the answers."""
    prompts = [
        preference(histories.templates, block, known)
        for sequence in said
        for block, known in zip(
            histories.blocks(sequence), [None, *said[sequence][:-1]], strict=True
        )
    ]
    necessary = count_necessary([histories.model.encoder.tokens(prompt) for prompt in prompts])
    last = {sequence: texts[-1] for sequence, texts in said.items()}
    return Measured(run, len(said), count.tokens, necessary + count.answered, last)


def answer_in_slots(options: Options) -> Measured:
    """Answer the prompts of the first blocks in our slots."""
    histories, prompts = open_first_blocks(options)
    decoder = histories.model.decoder
    assert decoder is not None
    count = TokenCount(histories.model.weights)
    run = timed(lambda: decoder.answer(prompts, histories.settings.max_new_tokens))
    return measure_answers(run, count, histories, prompts, [answer.text for answer in run.result])


def answer_continuously(options: Options) -> Measured:
    """Answer the same prompts by transformers' continuous batching."""
    histories, prompts = open_first_blocks(options)
    model = histories.model

    def answer() -> list[str]:
        asked = [list(model.encoder.tokens(prompt)) for prompt in prompts]
        outputs = model.weights.generate_batch(
            asked,
            generation_config=model.weights.generation_config,
            max_new_tokens=histories.settings.max_new_tokens,
        )
        generated = {tuple(o.prompt_ids): o.generated_tokens for o in outputs.values()}
        return [
            model.encoder.tokenizer.decode(
                generated[tuple(tokens)], skip_special_tokens=True
            ).strip()
            for tokens in asked
        ]

    run = timed(answer)
    # Its forwards have one row for all prompts: what is read and what is answered are not told
    # apart, and a graph that is replayed is not seen at all.
    return Measured(run, len(prompts), None, None, dict(enumerate(run.result)))


def open_first_blocks(options: Options) -> tuple[Histories, list[Prompt]]:
    """Give the prompts of the first blocks, each once."""
    histories = open_histories(options.model, options.sequences or 600)
    _ = histories.model.weights
    prompts = [
        preference(histories.templates, histories.blocks(sequence)[0], None)
        for sequence in histories.texts
    ]
    return histories, list(dict.fromkeys(prompts))


def measure_answers(
    run: Run,
    count: TokenCount,
    histories: Histories,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
) -> Measured:
    """Count what had to be read to answer prompts."""
    necessary = count_necessary([histories.model.encoder.tokens(prompt) for prompt in prompts])
    return Measured(
        run, len(prompts), count.tokens, necessary + count.answered, dict(enumerate(texts))
    )


def compare_texts(ours: Mapping[Any, str], reference: Mapping[Any, str]) -> dict[str, float]:
    """Give the share of the texts that are the same on both sides."""
    both = reference.keys() & ours.keys()
    return {"same_texts": round(sum(ours[k] == reference[k] for k in both) / len(both), 4)}


# Fine-tuning


def tune(options: Options) -> Measured:
    """Train packed, over as many epochs as the pipeline: image features are kept over all."""
    settings = read_sft(options)
    examples = read_examples(options, "train", options.sequences)
    with recommender(options.model) as inputs:
        encoder = inputs.model.encoder
        adapted = adapt(inputs, settings)
        packer = Packer(encoder, adapted.get_base_model())

        def lose(batch: Sequence[Example]) -> torch.Tensor:
            packed = collate(encoder, packer, inputs.answers, batch)
            logits = packer.run(adapted, packed["packed"].to(inputs.model.device)).float()
            return yes_no_loss(logits, packed["answers"].to(logits.device))

        def order_and_train() -> list[list[Example]]:
            batches = list(order_packed(examples, encoder, settings))
            train(adapted, lose, batches, settings.learning_rate)
            return batches

        count = TokenCount(adapted.get_base_model())
        run = timed(order_and_train)
        prompts = [[example.prompt for example in batch] for batch in run.result]
        return Measured(
            run,
            sum(map(len, run.result)),
            count.tokens,
            necessary_tokens(encoder, adapted, prompts),
            notes={"epochs": settings.epochs, "batch_size": settings.batch_size},
        )


def order_packed(
    examples: Sequence[Example], encoder: Encoder, settings: SftParams
) -> Iterator[list[Example]]:
    """Give the batches of all epochs, as the library orders them."""
    images = [example.prompt.image for example in examples]
    lengths = [encoder.count(example.prompt) for example in examples]
    size, seed = settings.batch_size, settings.seed
    sampler = GroupSampler(images, lengths, PAIRS_OF_AN_IMAGE, size, seed)
    for epoch in range(settings.epochs):
        sampler.set_epoch(epoch)
        yield from cut([examples[number] for number in sampler], settings.batch_size)


def tune_plainly(options: Options) -> Measured:
    """Train on some batches of whole prompts; every batch costs alike, in whatever epoch."""
    settings = read_sft(options)
    examples = read_examples(options, "train", options.sequences)
    order = np.random.default_rng(settings.seed).permutation(len(examples)).tolist()
    batches = list(cut([examples[number] for number in order], settings.batch_size))
    batches = batches[: options.of_reference or 40]
    with recommender(options.model) as inputs:
        adapted = adapt(inputs, settings)
        reference = make_reference(inputs.model.encoder, adapted)
        right = {True: inputs.answers[0], False: inputs.answers[1]}

        def lose(batch: Sequence[Example]) -> torch.Tensor:
            wanted = torch.tensor([right[example.question.label] for example in batch])
            prompts = [example.prompt for example in batch]
            return reference.lose(prompts, wanted.to(inputs.model.device))

        count = TokenCount(adapted.get_base_model())
        run = timed(lambda: train(adapted, lose, batches, settings.learning_rate))
        prompts = [[example.prompt for example in batch] for batch in batches]
        return Measured(
            run,
            sum(map(len, batches)),
            count.tokens,
            necessary_tokens(inputs.model.encoder, adapted, prompts),
            notes={"batches": len(batches), "batch_size": settings.batch_size},
        )


def tune_wholly(options: Options, packed: bool) -> Measured:
    """Fine-tune as the stage does, packed or by whole prompts, and measure the validation AUC.

    The epoch is chosen on the sequences that the stage chooses it on; the AUC is that of all
    validation sequences, with its bootstrap interval over them.
    """
    settings = read_sft(options)
    examples = read_examples(options, "train", options.sequences)
    valid = read_examples(options, "valid", None)
    questions = [example.question for example in valid]
    chosen = set(sample_sequences(questions, settings.validation_sequences, settings.seed))
    checks = [example for example in valid if example.question in chosen]
    with recommender(options.model) as inputs, TemporaryDirectory() as name:
        folder = Path(name)
        tuning = FineTuning(inputs.model, inputs.answers, settings, folder / "work", folder)
        with patch("mllm_msr.finetuning.find_packer", Packer if packed else WholePrompts):
            run = timed(lambda: tuning.run(examples, checks))
        ours = Recommender(inputs.model, folder / "adapter", inputs.answers, trained=False)
        with AnswerStore(folder / "answers.sqlite") as store:
            scores = score_examples(
                {"valid": valid}, score_asker(ours, store, inputs.builder.limit)
            )
    placements = place_targets(
        [row.sequence for row in scores],
        [row.log_odds for row in scores],
        [question.label for question in questions],
    )
    areas = auc(placements)
    return Measured(
        run,
        settings.epochs * len(examples),
        None,
        None,
        dict(zip(placements.sequences.tolist(), areas.tolist(), strict=True)),
        {"epochs": settings.epochs, "sequences": len(areas), **interval("valid_auc", areas)},
    )


def compare_areas(ours: Mapping[int, float], reference: Mapping[int, float]) -> dict[str, float]:
    """Give the mean difference of the sequences' AUC, with its bootstrap interval."""
    return interval("auc_difference", np.array([ours[s] - reference[s] for s in ours]))


def interval(name: str, values: Floats) -> dict[str, float]:
    """Give a mean over sequences with its interval, by the settings of the stage evaluate."""
    settings = load_params(EvaluateParams)
    low, high = bootstrap_interval(
        values[:, None], settings.bootstrap_samples, settings.confidence, settings.seed
    )
    return {
        name: round(float(values.mean()), 4),
        f"{name}_low": round(float(low[0]), 4),
        f"{name}_high": round(float(high[0]), 4),
    }


# The cases, and how both sides of each run


class Case(NamedTuple):
    """Two sides that do the same.

    Attributes:
        title: Of its line.
        what: The things that are counted.
        ours: Our side.
        reference: The other.
        compare: Sets the results of both beside each other.
        once: Whether turns would only repeat themselves.
    """

    title: str
    what: str
    ours: Callable[[Options], Measured]
    reference: Callable[[Options], Measured]
    compare: Callable[[Any, Any], dict[str, Any]]
    once: bool = False


CASES = {
    "scoring": Case(
        "scoring; the reference generates all 30 tokens",
        "pairs",
        score,
        partial(score_plainly, every_token=True),
        compare_scores,
    ),
    "scoring-short": Case(
        "scoring; the reference stops where the answer ends",
        "pairs",
        score,
        partial(score_plainly, every_token=False),
        compare_scores,
    ),
    "preferences": Case("recurrent preferences", "users", infer, infer_plainly, compare_texts),
    "training": Case("fine-tuning", "pairs", tune, tune_plainly, lambda *_: {}),
    "continuous": Case(
        "our slots, and transformers' continuous batching",
        "prompts",
        answer_in_slots,
        answer_continuously,
        compare_texts,
    ),
    "quality": Case(
        "validation AUC of fine-tuning packed, and by whole prompts",
        "pairs",
        partial(tune_wholly, packed=True),
        partial(tune_wholly, packed=False),
        compare_areas,
        once=True,
    ),
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
USUAL = ["scoring", "scoring-short", "preferences", "training"]


@app.command()
def main(
    case: Annotated[list[str], typer.Option(help=", ".join(CASES))] = USUAL,
    model: Annotated[str | None, typer.Option(help="Folder of another model.")] = None,
    sequences: Annotated[
        int | None, typer.Option(help="Sequences of our side: 100 to score, 600 to infer, all.")
    ] = None,
    of_reference: Annotated[
        int | None, typer.Option(help="Of the other: 20 to score, 30 to infer, 40 batches.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Of fine-tuning; as in params.yaml if not given.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Turns of each side.", min=1)] = 3,
) -> None:
    """Print one JSON line for each case."""
    options = Options(model, sequences, of_reference, batch_size)
    for name in case:
        if name not in CASES:
            raise typer.BadParameter(f"{name} is none of {', '.join(CASES)}", param_hint="--case")
        turns = 1 if CASES[name].once else repeats
        typer.echo(json.dumps(race(CASES[name], options, turns)))


def race(case: Case, options: Options, turns: int) -> dict[str, Any]:
    """Let both sides take turns, each in a process of its own; gives the line."""
    with own_process() as ours, own_process() as reference:
        measured = [
            (
                ours.submit(measure, case.ours, options).result(),
                reference.submit(measure, case.reference, options).result(),
            )
            for _ in range(turns)
        ]
    ratios = [one.rate / other.rate for one, other in measured]
    (first, other), (of_ours, of_reference) = measured[0], zip(*measured, strict=True)
    return {
        "case": case.title,
        "what": case.what,
        "ours": describe(of_ours),
        "reference": describe(of_reference),
        "ratio": round(median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "repeats": turns,
        **case.compare(first.results, other.results),
        "machine": describe_machine(),
    }


def own_process() -> Executor:
    """Start a process that does one thing after the other."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def measure(side: Callable[[Options], Measured], options: Options) -> Measured:
    """Run a side, and leave the memory to the other."""
    measured = side(options)
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no CUDA
    return measured


def describe(turns: Sequence[Measured]) -> dict[str, Any]:
    """Give a side's fields: those of its median turn, and the largest peak of memory."""
    middle = sorted(turns, key=lambda turn: turn.run.seconds)[len(turns) // 2]
    return {
        "many": middle.many,
        "seconds": round(middle.run.seconds, 2),
        "per_second": round(middle.rate, 1),
        "tokens": middle.tokens,
        "necessary_tokens": middle.necessary,
        "computed_over_necessary": middle.waste and round(middle.waste, 3),
        "peak_gb": round(max(turn.run.peak_gb for turn in turns), 2),
        **middle.notes,
    }


def describe_machine() -> dict[str, str]:
    """Say what ran where."""
    device = find_device()
    threads = f"{torch.get_num_threads()} threads of a CPU"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
        "dtype": str(find_dtype(device)).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# What the cases share


@contextmanager
def recommender(model: str | None) -> Iterator[RecommenderInputs]:
    """Open the pipeline's recommender, or another model in its place."""
    settings = load_params(RecommenderParams)
    if model:
        settings = settings.model_copy(update={"model": model, "max_prompt_tokens": 8_192})
    with open_recommender(
        settings,
        load_prompts("recommender"),
        DATA / "infer_preferences/preferences.parquet",
        DATA / "filter_sequences/items.parquet",
        DATA / "fetch_images/images.parquet",
    ) as inputs:
        yield inputs


def read_examples(options: Options, split: str, sequences: int | None) -> list[Example]:
    """Build examples with an encoder that is then given up, and with it the tokens it knows."""
    with recommender(options.model) as inputs:
        return build(inputs, split, sequences)


def build(inputs: RecommenderInputs, split: str, sequences: int | None) -> list[Example]:
    """Build the examples of a split's first sequences, of all where None."""
    questions = read_questions(DATA / f"filter_sequences/{split}_candidates.parquet")
    kept = set(sorted({question.sequence for question in questions})[:sequences])
    return [inputs.builder.build(question) for question in questions if question.sequence in kept]


def read_sft(options: Options) -> SftParams:
    """Read the settings of fine-tuning."""
    settings = load_params(SftParams)
    size = options.batch_size or settings.batch_size
    return settings.model_copy(update={"batch_size": size})


def adapt(inputs: RecommenderInputs, settings: SftParams) -> Any:
    """Load the model with a fresh adapter, to be trained as the library trains it."""
    lora = settings.lora
    bare = inputs.model.load()
    adapted = add_adapter(bare, lora.rank, lora.alpha, lora.dropout, lora.layers).train()
    if inputs.model.device.type == "cuda":
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted


def make_reference(encoder: Encoder, model: Any) -> Reference:
    """Give research code all images in memory, decoded, which it would read again and again."""
    with Gallery(DATA / "fetch_images/images.parquet") as gallery:
        pictures = gallery.pictures
        images = dict(zip(pictures, gallery.images(pictures), strict=True))
    return Reference(encoder, images, model)


def train(
    model: Any,
    lose: Callable[[Sequence[Example]], torch.Tensor],
    batches: Iterable[Sequence[Example]],
    rate: float,
) -> None:
    """Take a step for each batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    mixed = model.dtype == torch.bfloat16
    for batch in batches:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
            loss = lose(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def cut(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Cut examples into batches."""
    for start in range(0, len(examples), size):
        yield list(examples[start : start + size])


def necessary_tokens(encoder: Encoder, model: Any, batches: Iterable[Sequence[Prompt]]) -> int:
    """Count the tokens that batches have to take if each takes every common beginning once."""
    packer = Packer(encoder, model.get_base_model())
    return sum(count_necessary([packer.distinguish(p) for p in batch]) for batch in batches)


def linear_weights(model: Any) -> int:
    """Count the weights of the language model's linear layers, which each token meets.

    Those of an adapter are left out, for it is merged or small; so are the operations of attention
    and of the vision tower, of which a GPU has the more to do the longer prompts are.
    """
    layers = model.get_base_model().get_decoder().layers
    return sum(
        module.in_features * module.out_features
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    )


def matrix_rate(model: LocalModel) -> float:
    """Measure the operations a second of a matrix product on the model's device."""
    side = 8_192 if model.device.type == "cuda" else 2_048
    one, other = (torch.randn(side, side, device=model.device).to(model.dtype) for _ in "ab")
    return float(2 * side**3 / min(timed(lambda: one @ other).seconds for _ in range(5)))


def timed(work: Callable[[], Any]) -> Run:
    """Do a piece of work under the clock."""
    gc.collect()
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = work()
    if on_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if on_cuda:
        return Run(seconds, result, torch.cuda.max_memory_allocated() / 1e9)
    return Run(seconds, result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


if __name__ == "__main__":
    app()

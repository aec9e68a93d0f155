"""How fast the model stages are, against the way of research code, with the same weights.

    dvc repro
    python -m bench.models

One JSON line for each case: how many a second on both sides, their ratio, and tokens computed over
tokens that have to be computed. Prompts are the pipeline's own, of ``data/`` and ``params.yaml``;
``--model`` puts another model in the place of all three (see ``bench/shapes.py``).
"""

import json
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from torch import nn

from bench.reference import Reference
from mllm_msr.engines.adapters import add_adapter
from mllm_msr.engines.answers import AnswerStore
from mllm_msr.engines.asking import greedy_asker
from mllm_msr.engines.devices import most_tokens
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.losses import yes_no_loss
from mllm_msr.engines.packing import Packer
from mllm_msr.engines.prefixes import batch_rows, count_necessary
from mllm_msr.engines.sampling import GroupSampler
from mllm_msr.examples import Example, RecommenderInputs, open_recommender, read_questions
from mllm_msr.finetuning import PAIRS_OF_AN_IMAGE, collate
from mllm_msr.gallery import Gallery
from mllm_msr.params import InferPreferencesParams, RecommenderParams, SftParams, load_params
from mllm_msr.preferences import PreferenceInferrer, cut_blocks, read_histories
from mllm_msr.prompts import load_prompts, preference
from mllm_msr.scoring import Recommender, score_asker, score_examples

DATA = Path("data")
Case = Annotated[
    list[str], typer.Option("--case", help="scoring, preferences, training, continuous.")
]


def main(
    case: Case = ["scoring", "preferences", "training"],  # noqa: B006
    model: Annotated[str | None, typer.Option(help="Folder of another model.")] = None,
) -> None:
    """Print one JSON line for each case."""
    cases = {
        "scoring": scoring,
        "preferences": preferences,
        "continuous": continuous,
        "training": training,
    }
    for name in case:
        for line in cases[name](model):
            typer.echo(json.dumps(line | {"peak_gb": peak_gigabytes()}))


def scoring(
    model: str | None, sequences: int = 100, of_reference: int = 20
) -> Iterator[dict[str, Any]]:
    """Score the test candidates, by ours and by generating an answer for each pair."""
    with recommender(model) as inputs, TemporaryDirectory() as folder:
        examples = build(inputs, "test", sequences)
        adapter = DATA / "sft/adapter"
        if model:
            adapter = Path(folder) / "adapter"
            adapt(inputs, load_params(SftParams)).save_pretrained(str(adapter))
        ours = Recommender(inputs.model, adapter, inputs.answers, trained=not model)
        with AnswerStore(Path(folder) / "answers.sqlite") as store:
            asker = score_asker(ours, store, inputs.builder.limit)
            _ = ours.packer  # loads the weights, which the reference has loaded too
            seconds, scores = timed(lambda: score_examples({"test": examples}, asker))
        packer = ours.packer
        assert packer is not None
        asked = [example.prompt for example in examples]
        computed = sum(
            max(row.tokens for row in batch) * len(batch)
            for batch in batch_rows(packer.plan(asked), most_tokens(inputs.model.device))
        )
        necessary = count_necessary([packer.distinguish(prompt) for prompt in asked])
        achieved = 2 * linear_weights(ours.weights) * computed / seconds
        few = build(inputs, "test", of_reference)
        weights = Recommender(inputs.model, adapter, inputs.answers, trained=False)
        for every_token in (False, True):
            reference = make_reference(inputs.model.encoder, with_output(inputs, weights))
            prompts = [example.prompt for example in few]
            theirs, plain = timed(partial(reference.score, prompts, inputs.answers, every_token))
            largest = max(
                abs(row.log_odds - score) for row, score in zip(scores, plain, strict=False)
            )
            yield {
                "case": "scoring, " + ("all 30 tokens" if every_token else "until the answer ends"),
                **compare("pairs", len(examples) / seconds, len(few) / theirs),
                "pairs": len(examples),
                "computed_over_necessary_tokens": round(computed / necessary, 3),
                "share_of_matrix_rate": round(achieved / matrix_rate(inputs.model), 2),
                "largest_difference": float(f"{largest:.1e}"),
            }


def preferences(
    name: str | None, sequences: int = 600, of_reference: int = 30
) -> Iterator[dict[str, Any]]:
    """Infer recurrent preferences, in waves and one prompt at a time."""
    settings, templates = load_params(InferPreferencesParams), load_prompts("infer_preferences")
    encoder = Encoder(name or settings.model, settings.revision, None)
    model = LocalModel(encoder)
    histories = read_histories(
        DATA / "filter_sequences/histories.parquet",
        DATA / "summarize_items/summaries.parquet",
        "summary",
    )
    chosen = {sequence: histories[sequence] for sequence in list(histories)[:sequences]}
    _ = model.weights
    with TemporaryDirectory() as folder, AnswerStore(Path(folder) / "answers.sqlite") as store:
        inferrer = PreferenceInferrer(
            greedy_asker(model, store, settings.max_new_tokens), templates
        )
        seconds, rows = timed(lambda: inferrer.infer(chosen, "recurrent", settings.block_size))
    last = {row.sequence: row.preference for row in rows}
    reference = Reference(encoder, {}, model.weights)

    def infer_plainly() -> list[str]:
        said = []
        for sequence in list(chosen)[:of_reference]:
            known: str | None = None
            for block in cut_blocks(chosen[sequence], "recurrent", settings.block_size):
                known = reference.infer(
                    preference(templates, block, known), settings.max_new_tokens
                )
            said.append(known or "")
        return said

    theirs, plain = timed(infer_plainly)
    same = sum(last[s] == text for s, text in zip(chosen, plain, strict=False))
    yield {
        "case": "recurrent preferences",
        "users": len(chosen),
        **compare("users", len(chosen) / seconds, of_reference / theirs),
        "same_text_as_one_at_a_time": round(same / of_reference, 3),
    }


def continuous(name: str | None, prompts: int = 600) -> Iterator[dict[str, Any]]:
    """Answer the first blocks' prompts in our slots, and by transformers' continuous batching."""
    settings, templates = load_params(InferPreferencesParams), load_prompts("infer_preferences")
    model = LocalModel(Encoder(name or settings.model, settings.revision, None))
    histories = read_histories(
        DATA / "filter_sequences/histories.parquet",
        DATA / "summarize_items/summaries.parquet",
        "summary",
    )
    asked = [
        preference(templates, cut_blocks(history, "recurrent", settings.block_size)[0], None)
        for history in list(histories.values())[:prompts]
    ]
    decoder = model.decoder
    assert decoder is not None
    ours, answers = timed(lambda: decoder.answer(asked, settings.max_new_tokens))
    ids = [model.encoder.tokens(prompt) for prompt in asked]
    config = model.weights.generation_config
    theirs, outputs = timed(
        lambda: model.weights.generate_batch(
            ids, generation_config=config, max_new_tokens=settings.max_new_tokens
        )
    )
    texts = sorted(
        model.encoder.tokenizer.decode(o.generated_tokens, skip_special_tokens=True).strip()
        for o in outputs.values()
    )
    same = sum(a == b for a, b in zip(sorted(a.text for a in answers), texts, strict=True))
    yield {
        "case": "our slots, and continuous batching",
        **compare("prompts", len(asked) / ours, len(asked) / theirs),
        "same_texts": round(same / len(asked), 3),
    }


def training(model: str | None, of_reference: int = 40) -> Iterator[dict[str, Any]]:
    """Train one epoch packed, and some batches of whole prompts."""
    settings = load_params(SftParams)
    with recommender(model) as inputs:
        examples = build(inputs, "train", None)
        encoder, answers, size = inputs.model.encoder, inputs.answers, settings.batch_size
        right = {True: answers[0], False: answers[1]}

        def batches(order: Iterable[int]) -> list[list[Example]]:
            numbers = list(order)
            return [
                [examples[n] for n in numbers[start : start + size]]
                for start in range(0, len(numbers), size)
            ]

        adapted = adapt(inputs, settings)
        packer = Packer(encoder, adapted.get_base_model())

        def lose(batch: Sequence[Example]) -> torch.Tensor:
            packed = collate(encoder, packer, answers, batch)
            logits = packer.run(adapted, packed["packed"].to(inputs.model.device)).float()
            return yes_no_loss(logits, packed["answers"].to(logits.device))

        images = [example.prompt.image for example in examples]
        lengths = [encoder.count(example.prompt) for example in examples]
        sampler = GroupSampler(
            images, lengths, PAIRS_OF_AN_IMAGE, settings.batch_size, settings.seed
        )
        seconds = train(adapted, lose, batches(sampler), settings.learning_rate)
        plain = adapt(inputs, settings)
        reference = make_reference(encoder, plain)

        def lose_plainly(batch: Sequence[Example]) -> torch.Tensor:
            wanted = torch.tensor([right[example.question.label] for example in batch])
            prompts = [example.prompt for example in batch]
            return reference.lose(prompts, wanted.to(inputs.model.device))

        some = batches(torch.randperm(len(examples)).tolist())[:of_reference]
        theirs = train(plain, lose_plainly, some, settings.learning_rate)
        pairs = sum(map(len, some))
        yield {
            "case": "fine-tuning",
            "pairs": len(examples),
            **compare("pairs", len(examples) / seconds, pairs / theirs),
        }


def compare(what: str, ours: float, theirs: float) -> dict[str, float]:
    """Give both rates, in things a second, and their ratio."""
    return {
        f"{what}_per_second": round(ours, 1),
        f"reference_{what}_per_second": round(theirs, 1),
        "ratio": round(ours / theirs, 1),
    }


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


def build(inputs: RecommenderInputs, split: str, sequences: int | None) -> list[Example]:
    """Build the examples of a split's first sequences, of all where None."""
    questions = read_questions(DATA / f"filter_sequences/{split}_candidates.parquet")
    kept = sorted({question.sequence for question in questions})[:sequences]
    return [inputs.builder.build(q) for q in questions if q.sequence in set(kept)]


def adapt(inputs: RecommenderInputs, settings: SftParams) -> Any:
    """Load the model with a fresh adapter."""
    lora = settings.lora
    bare = inputs.model.load()
    return add_adapter(bare, lora.rank, lora.alpha, lora.dropout, lora.layers).train()


def with_output(inputs: RecommenderInputs, recommender: Recommender) -> Any:
    """Give the fine-tuned model with its whole output layer, which generating needs."""
    bare = inputs.model.load()
    whole = bare.get_output_embeddings().to(inputs.model.device)
    recommender.weights.get_base_model().set_output_embeddings(whole)
    return recommender.weights


def make_reference(encoder: Encoder, model: Any) -> Reference:
    """Give research code all images in memory, decoded, which it would read again and again."""
    with Gallery(DATA / "fetch_images/images.parquet") as gallery:
        pictures = gallery.pictures
        images = dict(zip(pictures, gallery.images(pictures), strict=True))
    return Reference(encoder, images, model)


def train(
    model: nn.Module,
    lose: Callable[[Sequence[Example]], torch.Tensor],
    batches: Sequence[Sequence[Example]],
    rate: float,
) -> float:
    """Take a step for each batch; gives the seconds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)

    def take_steps() -> None:
        for batch in batches:
            lose(batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

    seconds: float = timed(take_steps)[0]
    return seconds


def linear_weights(model: nn.Module) -> int:
    """Count the weights that each token of the language model meets."""
    layers = model.get_base_model().get_decoder().layers  # type: ignore[operator, union-attr]
    return sum(weight.numel() for weight in layers.parameters() if weight.ndim == 2)


def matrix_rate(model: LocalModel, side: int = 4_096) -> float:
    """Measure the operations a second of a matrix product on the model's device."""
    one, other = (torch.randn(side, side, device=model.device).to(model.dtype) for _ in "ab")
    seconds = [timed(lambda: one @ other)[0] for _ in range(8)]
    return float(2 * side**3 / min(seconds))


def peak_gigabytes() -> float:
    """Give the peak of the device's memory, or of the process where that is the CPU."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Give the seconds that a piece of work takes, and its result."""
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    typer.run(main)

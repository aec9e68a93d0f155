"""Recurrent preferences, as the stage infers them and as research code does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from bench.pipeline import DATA
from bench.racing import Measured, Options, Run, TokenCount, timed
from bench.reference import Reference
from mllm_msr.core.params import InferPreferencesParams, load_params
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prefixes import count_necessary
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.responses import ResponseStore
from mllm_msr.method.inference import greedy_engine
from mllm_msr.method.preferences import PreferenceInferrer, cut_blocks, read_histories
from mllm_msr.method.prompts import load_prompts, preference


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
    with TemporaryDirectory() as folder, ResponseStore(Path(folder) / "responses.sqlite") as store:
        asker = greedy_engine(histories.model, store, settings.max_new_tokens)
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
        DATA / "filter_sequences/items.parquet",
        DATA / "summarize_items/summaries.parquet",
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
    run = timed(lambda: decoder.generate(prompts, histories.settings.max_new_tokens))
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

"""Recurrent preference inference by the stage and by the reference implementation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from bench.pipeline import DATA
from bench.reference import Reference
from bench.timing import Measured, Options, Run, TokenCount, timed
from mllm_msr.core.params import InferPreferencesParams, load_params
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prefixes import count_necessary
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import ResponseStore
from mllm_msr.method.inference import greedy_engine
from mllm_msr.method.preferences import PreferenceInferrer, cut_blocks, read_histories
from mllm_msr.method.prompts import load_prompts, preference


class Histories(NamedTuple):
    """The inputs of preference inference: settings, templates, item texts, and the model."""

    settings: InferPreferencesParams
    templates: dict[str, str]
    texts: dict[int, list[str]]
    model: LocalModel

    def blocks(self, sequence: int) -> list[Sequence[str]]:
        """Return the blocks of a history."""
        return cut_blocks(self.texts[sequence], "recurrent", self.settings.block_size)


def infer(options: Options) -> Measured:
    """Infer recurrent preferences as the stage does."""
    histories = open_histories(options.model, options.sequences or 600)
    settings, count = histories.settings, TokenCount(histories.model.weights)
    with TemporaryDirectory() as folder, ResponseStore(Path(folder) / "responses.sqlite") as store:
        asker = greedy_engine(histories.model, store, settings.max_new_tokens)
        inferrer = PreferenceInferrer(asker, histories.templates)
        run = timed(lambda: inferrer.infer(histories.texts, "recurrent", settings.block_size))
    inferred: dict[int, list[str]] = {}
    for row in run.result:
        inferred.setdefault(row.sequence, []).append(row.preference)
    return measure_preferences(run, count, histories, inferred)


def infer_by_reference(options: Options) -> Measured:
    """Infer the preferences of some sequences, one prompt at a time."""
    histories = open_histories(options.model, options.reference_count or 30)
    reference = Reference(histories.model.encoder, {}, histories.model.weights)
    count = TokenCount(histories.model.weights)

    def infer_all() -> dict[int, list[str]]:
        inferred: dict[int, list[str]] = {}
        for sequence in histories.texts:
            known = inferred.setdefault(sequence, [])
            for block in histories.blocks(sequence):
                prompt = preference(histories.templates, block, known[-1] if known else None)
                known.append(reference.infer(prompt, histories.settings.max_new_tokens))
        return inferred

    run = timed(infer_all)
    return measure_preferences(run, count, histories, run.result)


def open_histories(name: str | None, sequences: int) -> Histories:
    """Load the histories of the first sequences, and the model."""
    settings = load_params(InferPreferencesParams)
    texts = read_histories(
        DATA / "filter_sequences/histories.parquet",
        DATA / "filter_sequences/items.parquet",
        DATA / "summarize_items/summaries.parquet",
    )
    model = LocalModel(
        Encoder(name or settings.model, settings.revision, None, settings.system_message)
    )
    chosen = {sequence: texts[sequence] for sequence in list(texts)[:sequences]}
    return Histories(settings, load_prompts("infer_preferences"), chosen, model)


def measure_preferences(
    run: Run, count: TokenCount, histories: Histories, inferred: Mapping[int, Sequence[str]]
) -> Measured:
    """Return the measurement, with the necessary tokens: each shared prefix once, and responses."""
    prompts = [
        preference(histories.templates, block, known)
        for sequence in inferred
        for block, known in zip(
            histories.blocks(sequence), [None, *inferred[sequence][:-1]], strict=True
        )
    ]
    necessary = count_necessary([histories.model.encoder.tokens(prompt) for prompt in prompts])
    last = {sequence: texts[-1] for sequence, texts in inferred.items()}
    return Measured(run, len(inferred), count.tokens, necessary + count.generated, last)


def answer_in_slots(options: Options) -> Measured:
    """Generate responses to the prompts of the first blocks by our continuous batching."""
    histories, prompts = open_first_blocks(options)
    decoder = histories.model.decoder
    assert decoder is not None
    count = TokenCount(histories.model.weights)

    def answer() -> list[str]:
        steps = decoder.generate(prompts, histories.settings.max_new_tokens)
        texts = {i: response.text for step in steps for i, response in step.finished.items()}
        return [texts[index] for index in range(len(prompts))]

    run = timed(answer)
    return measure_answers(run, count, histories, prompts, run.result)


def answer_continuously(options: Options) -> Measured:
    """Generate responses to the same prompts by transformers' continuous batching."""
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
    # No token counts: its forward passes mix prompt and generated tokens in one row, and replayed
    # CUDA graphs bypass the hook.
    return Measured(run, len(prompts), None, None, dict(enumerate(run.result)))


def open_first_blocks(options: Options) -> tuple[Histories, list[Prompt]]:
    """Return the distinct prompts of the first blocks."""
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
    """Return the measurement of responses to prompts, with the necessary tokens."""
    necessary = count_necessary([histories.model.encoder.tokens(prompt) for prompt in prompts])
    return Measured(
        run, len(prompts), count.tokens, necessary + count.generated, dict(enumerate(texts))
    )


def compare_texts(ours: Mapping[Any, str], reference: Mapping[Any, str]) -> dict[str, float]:
    """Return the share of texts that are equal on both sides."""
    both = reference.keys() & ours.keys()
    return {"same_texts": round(sum(ours[k] == reference[k] for k in both) / len(both), 4)}

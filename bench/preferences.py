"""Recurrent preference inference by the stage and by the reference implementation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from bench.cutoff import LimitedEngine, until
from bench.pipeline import DATA, open_model
from bench.reference import Reference
from bench.timing import (
    Measured,
    Options,
    Run,
    TokenCount,
    decoder_layers,
    share_of_matrix_rate,
    timed,
)
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

    @property
    def rounds(self) -> int:
        """The number of blocks of the longest history."""
        return max(len(self.blocks(sequence)) for sequence in self.texts)


def infer(options: Options) -> Measured:
    """Infer recurrent preferences as the stage does."""
    histories = open_histories(options.model, options.sequences or 600)
    settings, count = histories.settings, TokenCount(histories.model.weights)
    with TemporaryDirectory() as folder, ResponseStore(Path(folder) / "responses.sqlite") as store:
        engine = greedy_engine(histories.model, store, settings.max_new_tokens)
        seconds = options.seconds and options.seconds / histories.rounds
        asker = LimitedEngine(engine, count, seconds, response="")
        inferrer = PreferenceInferrer(asker, histories.templates)
        run = timed(lambda: inferrer.infer(histories.texts, "recurrent", settings.block_size))
    layers = decoder_layers(histories.model.weights)
    share = share_of_matrix_rate(histories.model, layers, count.tokens, run.seconds)
    last = {row.sequence: row.preference for row in run.result}
    return measure_preferences(run, count, histories, asker.finished, last, share)


def infer_by_reference(options: Options) -> Measured:
    """Infer the preferences of some sequences, one prompt at a time."""
    histories = open_histories(options.model, options.reference_count or 30)
    reference = Reference(histories.model.encoder, {}, histories.model.weights)
    count = TokenCount(histories.model.weights)

    prompts: list[Prompt] = []

    def infer_all() -> dict[int, str]:
        last: dict[int, str] = {}
        for sequence in until(histories.texts, options.seconds):
            for block in histories.blocks(sequence):
                prompts.append(preference(histories.templates, block, last.get(sequence)))
                last[sequence] = reference.infer(prompts[-1], histories.settings.max_new_tokens)
        return last

    run = timed(infer_all)
    return measure_preferences(run, count, histories, prompts, run.result)


def open_histories(name: str | None, sequences: int) -> Histories:
    """Load the histories of the first sequences, and the model."""
    settings = load_params(InferPreferencesParams)
    texts = read_histories(
        DATA / "filter_sequences/histories.parquet",
        DATA / "filter_sequences/items.parquet",
        DATA / "summarize_items/summaries.parquet",
    )
    model = open_model(
        Encoder(name or str(settings.model), settings.revision, None, settings.system_message)
    )
    chosen = {sequence: texts[sequence] for sequence in list(texts)[:sequences]}
    return Histories(settings, load_prompts("infer_preferences"), chosen, model)


def measure_preferences(
    run: Run,
    count: TokenCount,
    histories: Histories,
    prompts: Sequence[Prompt],
    last: Mapping[int, str],
    notes: Mapping[str, float] | None = None,
) -> Measured:
    """Return the measurement of the finished prompts; its results are the last preferences.

    Necessary are each shared prefix once, and responses. A user of whom only some prompts are
    finished counts by their share.
    """
    asked = sum(len(histories.blocks(sequence)) for sequence in histories.texts)
    tokens = [histories.model.encoder.tokens(prompt) for prompt in prompts]
    return Measured(
        run,
        round(len(histories.texts) * len(prompts) / asked),
        len(histories.texts),
        sum(map(len, tokens)),
        count.tokens,
        count_necessary(tokens) + count.generated,
        dict(last),
        dict(notes or {}),
    )


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
    asked = len(prompts)
    return Measured(run, asked, asked, None, None, None, dict(enumerate(run.result)))


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
    tokens = [histories.model.encoder.tokens(prompt) for prompt in prompts]
    return Measured(
        run,
        len(prompts),
        len(prompts),
        sum(map(len, tokens)),
        count.tokens,
        count_necessary(tokens) + count.generated,
        dict(enumerate(texts)),
    )


def compare_texts(ours: Mapping[Any, str], reference: Mapping[Any, str]) -> dict[str, float]:
    """Return the share of texts that are equal on both sides."""
    both = reference.keys() & ours.keys()
    return {"same_texts": round(sum(ours[k] == reference[k] for k in both) / len(both), 4)}

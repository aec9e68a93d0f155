"""Preferences follow the history block by block and contain nothing of the target."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from generating import generate
from recorder import Recorder
from small_world import HISTORIES, TARGETS, SmallWorld

from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import Items, Summaries
from mllm_msr.core.tables import read_rows, write_rows
from mllm_msr.engines import local
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import Response, ResponseStore, StepOutput
from mllm_msr.method import prompts
from mllm_msr.method.inference import CachedEngine, CountingEngine, greedy_engine, in_one_step
from mllm_msr.method.preferences import (
    Preference,
    PreferenceInferrer,
    cut_blocks,
    list_titles,
    read_histories,
)
from mllm_msr.method.prompts import load_prompts

TEMPLATES = load_prompts("infer_preferences")
TEXTS = {0: [f"s0i{n}" for n in range(7)], 1: ["s1i0", "s1i1"], 2: ["s2i0", "s2i1", "s2i2"]}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ResponseStore]:
    with ResponseStore(tmp_path / "responses.sqlite") as opened:
        yield opened


@pytest.mark.parametrize(
    ("mode", "size", "lengths"),
    [
        ("recurrent", 3, [3, 3, 1]),
        ("recurrent", 1, [1] * 7),
        ("recurrent", 7, [7]),
        ("recurrent", 9, [7]),
        ("direct", 3, [7]),
    ],
)
def test_a_history_is_cut_into_blocks_oldest_first(
    mode: str, size: int, lengths: list[int]
) -> None:
    blocks = cut_blocks(TEXTS[0], mode, size)
    assert [len(block) for block in blocks] == lengths
    assert [text for block in blocks for text in block] == TEXTS[0]


def test_every_prompt_has_the_preference_after_the_block_before(
    llava: LocalModel, store: ResponseStore
) -> None:
    recorder = Recorder(llava, store, "taste")
    rows = PreferenceInferrer(recorder.engine, TEMPLATES).infer(TEXTS, "recurrent", 3)
    assert [(row.sequence, row.block, row.items) for row in rows] == [
        *[(0, 1, 3), (0, 2, 6), (0, 3, 7)],
        *[(1, 1, 2)],
        *[(2, 1, 3)],
    ]
    asked = {(r.sequence, r.block): r.preference for r in rows}
    by_response = {f"taste{number}": prompt for number, prompt in enumerate(recorder.prompts)}
    assert len(recorder.prompts) == 5
    for (sequence, block), response in asked.items():
        texts = TEXTS[sequence][3 * (block - 1) : 3 * block]
        previous = asked[sequence, block - 1] if block > 1 else None
        assert by_response[response] == prompts.preference(TEMPLATES, texts, previous)
        assert ("Previous Preference" in by_response[response].before) == (block > 1)


def test_the_direct_mode_has_one_prompt_per_history(
    llava: LocalModel, store: ResponseStore
) -> None:
    recorder = Recorder(llava, store, "taste")
    rows = PreferenceInferrer(recorder.engine, TEMPLATES).infer(TEXTS, "direct", 3)
    assert [(row.block, row.items) for row in rows] == [(1, 7), (1, 2), (1, 3)]
    whole = {prompts.preference(TEMPLATES, texts).before for texts in TEXTS.values()}
    assert {prompt.before for prompt in recorder.prompts} == whole
    assert len(recorder.prompts) == 3


def test_without_a_model_the_titles_stand_in() -> None:
    rows = list(list_titles({4: ["Red kettle", "<image>"]}, TEMPLATES))
    text = "The user took these items, oldest first: Red kettle; ‹image›"
    assert rows == [Preference(4, 1, 2, text)]


def test_preferences_are_the_models_responses_one_by_one(
    llava: LocalModel, store: ResponseStore
) -> None:
    rows = PreferenceInferrer(greedy_engine(llava, store, 5), TEMPLATES).infer(
        TEXTS, "recurrent", 3
    )
    previous: str | None = None
    for row in rows[:3]:
        texts = TEXTS[0][row.items - (3 if row.block < 3 else 1) : row.items]
        prompt = prompts.preference(TEMPLATES, texts, previous)
        previous = generate(llava, [prompt], 5)[0].text
        assert row.preference == previous


def test_a_text_model_infers_preferences(model: LocalModel, store: ResponseStore) -> None:
    if model.encoder.takes_images:
        pytest.skip("a model that takes images")
    inferred = PreferenceInferrer(greedy_engine(model, store, 3), TEMPLATES).infer(
        TEXTS, "direct", 3
    )
    assert len(inferred) == 3


def test_a_dry_run_counts_the_prompts_of_every_block(llava: LocalModel) -> None:
    counting = CountingEngine(llava.encoder, 4_000)
    rows = PreferenceInferrer(counting, TEMPLATES).infer(TEXTS, "recurrent", 3)
    assert counting.first_prompt == prompts.preference(TEMPLATES, TEXTS[0][:3])
    assert counting.calls == len(rows) == 5


def test_histories_are_read_oldest_first_with_their_texts(world: SmallWorld) -> None:
    read = read_histories(world.histories, world.items, world.summaries)
    summary = {row["item"]: row["summary"] for row in read_rows(Summaries, world.summaries, "item")}
    assert read == {s: [summary[item] for item in items] for s, items in HISTORIES.items()}
    titles = read_histories(world.histories, world.items)
    assert titles[1] == ["Green cup", "Red kettle"]
    assert titles[0][4] == ""


def test_an_item_without_a_summary_row_is_an_error(world: SmallWorld, tmp_path: Path) -> None:
    rows = [row for row in read_rows(Summaries, world.summaries, "item") if row["item"] != "c"]
    write_rows(Summaries, rows, tmp_path / "summaries.parquet")
    fix = "run the stage summarize_items on this catalogue"
    with pytest.raises(DataError, match=f"sequence 0: .*summary of item c; got none; {fix}"):
        read_histories(world.histories, world.items, tmp_path / "summaries.parquet")


@pytest.mark.parametrize("with_summaries", [True, False])
def test_an_item_outside_the_catalogue_is_an_error_that_says_where_to_add_it(
    world: SmallWorld, tmp_path: Path, with_summaries: bool
) -> None:
    rows = [row for row in read_rows(Items, world.items, "item") if row["item"] != "c"]
    write_rows(Items, rows, tmp_path / "items.parquet")
    with pytest.raises(DataError, match=r"got item c; .*set preprocess\.unknown_items to drop or"):
        read_histories(
            world.histories,
            tmp_path / "items.parquet",
            world.summaries if with_summaries else None,
        )


def test_a_block_that_is_too_long_is_shortened_and_counted(
    llava: LocalModel, store: ResponseStore
) -> None:
    recorder = Recorder(llava, store, "taste", limit=150)
    inferrer = PreferenceInferrer(recorder.engine, TEMPLATES)
    inferrer.infer({0: ["red kettle " * 200, "cup", "blue teapot " * 200, "jug"]}, "recurrent", 3)
    assert inferrer.shortened == 1
    assert all(llava.encoder.count_tokens(prompt) <= 150 for prompt in recorder.prompts)
    assert "2. cup\n" in recorder.prompts[0].before


def leaks(texts: Sequence[str], marker: str) -> bool:
    return any(marker in text for text in texts)


@pytest.mark.parametrize("mode", ["recurrent", "direct"])
def test_no_prompt_and_no_preference_contains_the_summary_of_its_target(
    llava: LocalModel, store: ResponseStore, world: SmallWorld, mode: str
) -> None:
    """Each summary begins with a marker of its item; the model repeats its prompt."""
    histories = read_histories(world.histories, world.items, world.summaries)
    for sequence, target in TARGETS.items():
        seen: list[str] = []

        def echo(batch: Sequence[Prompt], seen: list[str] = seen) -> list[Response]:
            seen += [prompt.before for prompt in batch]
            return [Response(prompt.before, complete=True) for prompt in batch]

        engine = CachedEngine(
            llava,
            store,
            100_000,
            llava.batches,
            in_one_step(echo),
            sequence=sequence,
            mode=mode,
        )
        rows = PreferenceInferrer(engine, TEMPLATES).infer({sequence: histories[sequence]}, mode, 3)
        said = [row.preference for row in rows]
        assert not leaks([*seen, *said], f"Summary {target}:")
        # The last preference does hold the marker of every item of the history.
        assert all(leaks(said[-1:], f"Summary {item}:") for item in HISTORIES[sequence])


def test_no_list_of_titles_contains_the_title_of_its_target(world: SmallWorld) -> None:
    titles = read_histories(world.histories, world.items)
    said = {row.sequence: row.preference for row in list_titles(titles, TEMPLATES)}
    for sequence, title in {0: "Targetmarker", 1: "Targetmarker", 2: "Green cup"}.items():
        assert not leaks([said[sequence]], title)
    assert leaks([said[1]], "Green cup")


def test_a_killed_inference_resumes_with_what_is_missing(
    llava: LocalModel, store: ResponseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "PROMPTS_PER_BATCH", 1)
    first, calls = greedy_engine(llava, store, 4), []
    run_batch = first._run_batch

    def killed_at_the_fifth(batch: Sequence[Prompt]) -> Iterable[StepOutput]:
        if len(calls) == 4:  # in the second block
            raise KeyboardInterrupt
        calls.extend(batch)
        return run_batch(batch)

    first._run_batch = killed_at_the_fifth
    with pytest.raises(KeyboardInterrupt):
        PreferenceInferrer(first, TEMPLATES).infer(TEXTS, "recurrent", 3)
    second = greedy_engine(llava, store, 4)
    rows = PreferenceInferrer(second, TEMPLATES).infer(TEXTS, "recurrent", 3)
    assert second.computed == 1
    with ResponseStore(Path(store._path).with_name("other.sqlite")) as other:
        whole = PreferenceInferrer(greedy_engine(llava, other, 4), TEMPLATES)
        assert whole.infer(TEXTS, "recurrent", 3) == rows

"""Items become summaries in three steps, from what there is and from nothing else."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from generating import generate
from recorder import Recorder
from small_world import CATALOGUE

from mllm_msr.core.errors import DataError, ModelError
from mllm_msr.engines import local
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import ResponseStore, StepOutput
from mllm_msr.images.gallery import Gallery
from mllm_msr.method import prompts
from mllm_msr.method.inference import CountingEngine, greedy_engine
from mllm_msr.method.prompts import load_prompts
from mllm_msr.method.summaries import Item, Summarizer, choose_inputs, copy_texts, item_text

TEMPLATES = load_prompts("summarize_items")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ResponseStore]:
    with ResponseStore(tmp_path / "responses.sqlite") as opened:
        yield opened


@pytest.fixture
def catalogue(gallery: Gallery) -> list[Item]:
    return [Item(i, item_text(t, d), gallery.image_ref(i)) for i, t, d, _ in CATALOGUE]


def test_title_and_description_are_joined() -> None:
    assert item_text("Red kettle.", "For tea") == "Red kettle. For tea"
    assert item_text("Red kettle", None) == "Red kettle"
    assert item_text(None, "For tea.") == "For tea"


@pytest.mark.parametrize("nothing", [None, "", ".", " ... ", "\u200b", "\x00\x07"])
def test_an_empty_text_is_none(nothing: str | None) -> None:
    assert item_text(nothing, nothing) is None
    assert item_text("Red kettle", nothing) == "Red kettle"


def test_each_item_gets_its_own_text_image_and_fusion(
    llava: LocalModel, store: ResponseStore, catalogue: list[Item]
) -> None:
    engine = greedy_engine(llava, store, max_new_tokens=4)
    rows = Summarizer(engine, TEMPLATES, "model").summarize(catalogue)
    assert [row.item for row in rows] == [item.item for item in catalogue]
    for item, row in zip(catalogue, rows, strict=True):
        expected: dict[str, str | None] = {"text": None, "image": None}
        if item.text:
            prompt = prompts.text_summary(TEMPLATES, item.text)
            expected["text"] = generate(llava, [prompt], 4)[0].text
        if item.image_ref:
            prompt = prompts.image_description(TEMPLATES, item.image_ref)
            expected["image"] = generate(llava, [prompt], 4)[0].text
        text, image = expected.values()
        assert (row.text_summary, row.image_description) == (text, image)
        if text is not None and image is not None:
            prompt = prompts.fusion(TEMPLATES, text, image)
            assert row.summary == generate(llava, [prompt], 4)[0].text
        else:
            assert row.summary == (text or image or "")


def test_a_fusion_combines_the_items_own_responses(
    llava: LocalModel, store: ResponseStore, catalogue: list[Item]
) -> None:
    recorder = Recorder(llava, store, "response")
    rows = {r.item: r for r in Summarizer(recorder.engine, TEMPLATES, "model").summarize(catalogue)}
    fusions = {prompt.before for prompt in recorder.prompts if "Combine both" in prompt.before}
    assert fusions == {
        prompts.fusion(TEMPLATES, row.text_summary, row.image_description).before
        for row in rows.values()
        if row.text_summary and row.image_description
    }
    assert len(fusions) == 5
    # Images were shown one at a time and each to its own question.
    shown = [prompt.image.item for prompt in recorder.prompts if prompt.image]
    assert sorted(shown) == ["a", "b", "c", "e", "f", "t"]


def test_there_is_no_prompt_for_a_missing_input(
    llava: LocalModel, store: ResponseStore, catalogue: list[Item]
) -> None:
    recorder = Recorder(llava, store, "response")
    rows = {r.item: r for r in Summarizer(recorder.engine, TEMPLATES, "model").summarize(catalogue)}
    assert rows["d"].image_description is None
    assert rows["d"].summary == rows["d"].text_summary
    assert rows["e"].text_summary is None
    assert rows["e"].summary == rows["e"].image_description
    assert rows["g"] == ("g", None, None, "")
    assert len(recorder.prompts) == 6 + 6 + 5


@pytest.mark.parametrize(("text", "image", "calls"), [(True, False, 6), (False, True, 6)])
def test_there_is_no_prompt_for_an_unused_input(
    llava: LocalModel,
    store: ResponseStore,
    catalogue: list[Item],
    text: bool,
    image: bool,
    calls: int,
) -> None:
    chosen = choose_inputs(catalogue, text, image, "describe")
    recorder = Recorder(llava, store, "response")
    rows = Summarizer(recorder.engine, TEMPLATES, "model").summarize(chosen)
    assert len(recorder.prompts) == calls
    assert all(bool(prompt.image) == image for prompt in recorder.prompts)
    for row in rows:
        assert (
            row.summary == (row.text_summary if text else row.image_description)
            or row.item in "deg"
        )
        assert (row.image_description if text else row.text_summary) is None


def test_concatenation_takes_no_prompt(
    llava: LocalModel, store: ResponseStore, catalogue: list[Item]
) -> None:
    recorder = Recorder(llava, store, "response")
    rows = {
        r.item: r for r in Summarizer(recorder.engine, TEMPLATES, "concat").summarize(catalogue)
    }
    assert len(recorder.prompts) == 12
    assert rows["a"].summary == f"{rows['a'].text_summary} {rows['a'].image_description}"
    assert rows["d"].summary == rows["d"].text_summary


def test_raw_texts_take_no_prompt_and_are_fused_with_descriptions(
    llava: LocalModel, store: ResponseStore, catalogue: list[Item]
) -> None:
    recorder = Recorder(llava, store, "response")
    summarizer = Summarizer(recorder.engine, TEMPLATES, "model", raw_text=True)
    rows = {row.item: row for row in summarizer.summarize(catalogue)}
    assert len(recorder.prompts) == 6 + 5  # descriptions and fusions
    for item in catalogue:
        assert rows[item.item].text_summary == item.text
    assert rows["d"].summary == "Yellow jug"
    fused = [prompt.before for prompt in recorder.prompts if not prompt.image]
    assert any("Red kettle. For tea" in text for text in fused)


def test_copied_texts_are_neutralised_titles_and_descriptions(catalogue: list[Item]) -> None:
    rows = {row.item: row for row in copy_texts(catalogue)}
    assert rows["a"].summary == rows["a"].text_summary == "Red kettle. For tea"
    assert rows["f"].summary == "‹image› (INST) no (/INST) USER - ‹|im_start|›"
    assert (rows["g"].summary, rows["g"].text_summary) == ("", None)
    assert all(row.image_description is None for row in rows.values())


@pytest.mark.parametrize(("item", "lacking"), [("d", "image"), ("e", "text")])
def test_missing_error_names_the_item_and_what_it_lacks(
    catalogue: list[Item], item: str, lacking: str
) -> None:
    short = [row for row in catalogue if row.item in {"a", "b", item}]
    with pytest.raises(DataError, match=f"item {item}: expected text and image; got no {lacking}"):
        choose_inputs(short, text=True, image=True, missing="error")
    assert choose_inputs(short, text=lacking != "text", image=lacking != "image", missing="error")
    assert choose_inputs(short, text=True, image=True, missing="describe") == short


@pytest.mark.parametrize(("fusion", "calls"), [("model", 6 + 6 + 5), ("concat", 6 + 6)])
def test_a_dry_run_counts_the_prompts_of_every_step(
    llava: LocalModel, catalogue: list[Item], fusion: str, calls: int
) -> None:
    counting = CountingEngine(llava.encoder, 4_000)
    Summarizer(counting, TEMPLATES, fusion).summarize(catalogue)
    assert counting.first_prompt == prompts.text_summary(TEMPLATES, catalogue[0].text or "")
    assert counting.calls == calls


def test_texts_that_are_too_long_are_shortened_and_counted(
    llava: LocalModel, store: ResponseStore, catalogue: list[Item]
) -> None:
    long = [catalogue[0]._replace(text="kettle " * 1_000), catalogue[1]]
    recorder = Recorder(llava, store, "response", limit=90)
    summarizer = Summarizer(recorder.engine, TEMPLATES, "model")
    list(summarizer.summarize(long))
    assert summarizer.shortened == 1
    assert all(llava.encoder.count_tokens(prompt) <= 90 for prompt in recorder.prompts)


def test_an_image_that_is_too_long_for_the_model_is_an_error(
    llava: LocalModel, store: ResponseStore, catalogue: list[Item]
) -> None:
    recorder = Recorder(llava, store, "response", limit=30)
    only_image = catalogue[0]._replace(text=None)
    with pytest.raises(ModelError, match=r"item a: expected a prompt of at most 30 tokens; got \d"):
        Summarizer(recorder.engine, TEMPLATES, "model").summarize([only_image])


def test_a_killed_run_of_summaries_resumes_with_what_is_missing(
    llava: LocalModel,
    store: ResponseStore,
    catalogue: list[Item],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = list(
        Summarizer(greedy_engine(llava, store, 4), TEMPLATES, "model").summarize(catalogue)
    )
    monkeypatch.setattr(local, "PROMPTS_PER_BATCH", 1)
    with ResponseStore(Path(store._path).with_name("other.sqlite")) as other:
        first, calls = greedy_engine(llava, other, 4), []
        run_batch = first._run_batch

        def killed_at_the_ninth(batch: Sequence[Prompt]) -> Iterable[StepOutput]:
            if len(calls) == 8:
                raise KeyboardInterrupt
            calls.extend(batch)
            return run_batch(batch)

        first._run_batch = killed_at_the_ninth
        with pytest.raises(KeyboardInterrupt):
            Summarizer(first, TEMPLATES, "model").summarize(catalogue)
        second = greedy_engine(llava, other, 4)
        assert Summarizer(second, TEMPLATES, "model").summarize(catalogue) == whole
        assert len(calls) + second.computed == len(other)
        third = greedy_engine(llava, other, 4)
        assert Summarizer(third, TEMPLATES, "model").summarize(catalogue) == whole
        assert third.computed == 0


def test_a_new_item_takes_the_prompts_of_one_item(
    llava: LocalModel, store: ResponseStore, catalogue: list[Item]
) -> None:
    Summarizer(Recorder(llava, store, "response").engine, TEMPLATES, "model").summarize(
        catalogue[1:]
    )
    recorder = Recorder(llava, store, "response")
    Summarizer(recorder.engine, TEMPLATES, "model").summarize(catalogue)
    assert len(recorder.prompts) == 3


def test_progress_is_shown_with_its_total(
    llava: LocalModel,
    store: ResponseStore,
    catalogue: list[Item],
    capsys: pytest.CaptureFixture[str],
) -> None:
    Summarizer(Recorder(llava, store, "response").engine, TEMPLATES, "model").summarize(catalogue)
    assert "17/17" in capsys.readouterr().err

"""The rehearsal runs every part with tiny models, keeps its time and what it has measured."""

import gc
import json
import weakref
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from bench import cutoff, rehearsal, shapes, timing
from bench.generated_data import Sizes
from bench.items import encode_item_summaries, summarize
from bench.pipeline import open_model
from bench.preferences import infer
from bench.rehearsal import PARTS, STEPS, Part, Scale
from bench.scoring import score, score_by_reference
from bench.shapes import RandomModel
from bench.timing import Options
from mllm_msr.core.schemas import Summaries
from mllm_msr.core.tables import read_rows
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.images.gallery import Gallery
from mllm_msr.method.examples import read_questions

NEW_TOKENS = 3
ITEMS, TEXT_TOKENS = 5, 4
SIZES = Sizes(
    items=ITEMS,
    histories=2,
    train=2,
    test=2,
    candidates=3,
    train_items=3,
    test_items=3,
    text_tokens=TEXT_TOKENS,
)
SCALE = Scale(SIZES, shapes.TINY, NEW_TOKENS, reference=1)
SETTINGS = rehearsal.read_preset()


@pytest.fixture(scope="module", autouse=True)
def cpu() -> Iterator[None]:
    """Run on one thread of a CPU: the models are tiny."""
    with pytest.MonkeyPatch.context() as patched:
        for module in ("bench.timing", "bench.rehearsal", "mllm_msr.engines.local"):
            patched.setattr(f"{module}.find_device", lambda: torch.device("cpu"))
        patched.setattr("bench.timing.matrix_rate", lambda *_: 1e13)
        patched.setattr("bench.rehearsal.matrix_rate", lambda *_: 1e13)
        patched.setattr("bench.generated_data.DRAWN", 1)
        patched.setattr("bench.generated_data.SIDE", 336)
        torch.set_num_threads(1)
        gc.freeze()  # or each collection would visit all imported modules
        yield
        gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare the folder in which the parts run."""
    return rehearsal.prepare(tmp_path_factory.mktemp("rehearsal"), SCALE, SETTINGS)


@pytest.fixture
def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rehearsals use the prepared folder."""
    monkeypatch.setattr(rehearsal, "prepare", lambda *_: folder)


@pytest.fixture(scope="module")
def in_memory() -> Iterator[list[int]]:
    """Record how many models are in memory each time that one is loaded."""
    loaded: list[weakref.ref[Any]] = []
    counts: list[int] = []
    load = RandomModel.load

    def record(model: RandomModel) -> Any:
        counts.append(sum(one() is not None for one in loaded))
        weights = load(model)
        loaded.append(weakref.ref(weights))
        return weights

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RandomModel, "load", record)
        yield counts


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory, in_memory: list[int]) -> dict[str, Any]:
    """Run all parts; return the lines of the file by part."""
    out = tmp_path_factory.mktemp("out") / "lines.jsonl"
    returned = rehearsal.rehearse(SCALE, PARTS, 600, out)
    assert in_memory == [0] * (len(PARTS) + 2)  # both sides of scoring load one for an adapter
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert written == json.loads(json.dumps(returned))
    return {line["part"]: line for line in written}


def test_every_part_has_a_line(lines: dict[str, Any]) -> None:
    names = [part.name for part in PARTS if part.name != rehearsal.SUMMARIES]
    assert lines.keys() == {"machine", *names, *STEPS, "extrapolation"}
    for name in (*names, *STEPS):
        line = lines[name]
        assert line["count"] == line["of"] > 0
        assert not line["cut_off"]
        assert line["tokens"] >= line["necessary_tokens"] > 0
        assert line["tokens_per_second"] > 0
        assert line["peak_gb"] > 0
        assert line["computed_gb"] > 0
        if "by the reference" in name:
            assert line["ratio"] > 0
        else:
            assert 0 < line["share_of_matrix_rate"] <= 1


def test_counts_are_those_of_the_generated_data(lines: dict[str, Any]) -> None:
    assert lines["scoring"]["count"] == SIZES.test * SIZES.candidates
    assert lines["fine-tuning"]["count"] == 2 * SIZES.train
    assert lines["preferences"]["count"] == SIZES.histories
    assert {lines[step]["count"] for step in STEPS} == {SIZES.items}


def test_counted_tokens_are_those_of_the_prompts(lines: dict[str, Any], folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shapes.POCKET)
    summaries = read_rows(Summaries, folder / "data/summarize_items/summaries.parquet", "item")
    expected = sum(len(tokenizer(row["summary"])["input_ids"]) for row in summaries)
    features = lines["summary features"]
    assert features["tokens"] == features["prompt_tokens"] == expected
    assert ITEMS * TEXT_TOKENS - ITEMS <= expected <= ITEMS * TEXT_TOKENS + ITEMS
    # Nothing is shared between different images, so that every prompt is processed as a whole.
    images = lines["image descriptions"]
    assert images["necessary_tokens"] <= images["tokens"]
    assert images["tokens"] == images["prompt_tokens"] + ITEMS * (NEW_TOKENS - 1)
    # Pairs with the same image share its tokens.
    scored = lines["scoring"]
    assert scored["necessary_tokens"] <= scored["tokens"] < scored["prompt_tokens"]


def test_the_reference_processes_whole_prompts(folder: Path) -> None:
    with chdir(folder):
        options = Options(rehearsal.LLAVA, reference_count=1, seconds=600)
        measured = score_by_reference(options, every_token=True)
    # A batch is padded to its longest prompt, and 29 of 30 generated tokens are read again.
    assert measured.tokens is not None
    assert measured.prompt_tokens is not None
    assert measured.tokens >= measured.prompt_tokens + 29 * measured.count


def test_targets_stand_beside_figures(lines: dict[str, Any]) -> None:
    for part in PARTS:
        for field, target in part.targets.items():
            line = lines[part.name]
            met = line[field] >= target
            shown = {"target": target, "measured": line[field], "met": met}
            assert line["targets"][field] == shown
    ours, reference = lines["scoring"], lines["scoring by the reference"]
    assert reference["ratio"] == pytest.approx(
        ours["per_second"] / reference["per_second"], rel=0.02
    )


def test_hours_are_counts_over_rates(lines: dict[str, Any]) -> None:
    last = lines["extrapolation"]
    hours = 0.0
    for stage in last["stages"].values():
        assert stage["per_second"] == lines[stage["part"]]["per_second"]
        wanted = stage["count"] / stage["per_second"] / 3600
        assert stage["hours"] == pytest.approx(wanted, rel=0.01)
        hours += stage["hours"]
    assert last["gpu_hours"] == pytest.approx(hours, rel=0.01, abs=0.01)
    assert not last["missing"]


def test_the_presets_work_is_counted() -> None:
    counts = {stage: count for stage, (_, count) in rehearsal.count_work(SETTINGS).items()}
    assert counts["summarize_items, fusions"] == counts["encode_items, images"] == 11_896
    assert counts["infer_preferences"] == 25_411
    assert counts["sft, training"] == 10 * 2 * (25_411 - 2 * 2_541)
    assert counts["sft, validation"] == 11 * 200 * 21
    assert counts["score"] == 2 * 2_541 * 41


@pytest.mark.usefixtures("prepared")
def test_an_interrupted_rehearsal_keeps_finished_parts(tmp_path: Path) -> None:
    def interrupt(_: Options) -> timing.Measured:
        raise KeyboardInterrupt

    first = next(part for part in PARTS if part.name == "summary features")
    parts = [first, Part("interrupted", rehearsal.LLAVA, interrupt, 1)]
    out = tmp_path / "lines.jsonl"
    with pytest.raises(KeyboardInterrupt):
        rehearsal.rehearse(SCALE, parts, 600, out)
    kept = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["part"] for line in kept] == ["machine", "summary features"]
    assert kept[1]["count"] == ITEMS
    assert Path.cwd() != tmp_path
    assert Path("params.yaml").is_file()  # back in the project


@pytest.mark.usefixtures("prepared")
def test_a_failed_part_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Options) -> timing.Measured:
        raise torch.OutOfMemoryError("CUDA out of memory")

    last = next(part for part in PARTS if part.name == "summary features")
    parts = [Part("scoring", rehearsal.LLAVA, fail, 1), last]
    found = {line["part"]: line for line in rehearsal.rehearse(SCALE, parts, 600)}
    assert found["scoring"] == {"part": "scoring", "error": "OutOfMemoryError: CUDA out of memory"}
    assert found["summary features"]["count"] == ITEMS
    assert "score" in found["extrapolation"]["missing"]
    assert found["extrapolation"]["gpu_hours"] is None

    monkeypatch.setattr(rehearsal, "PARTS", parts)
    monkeypatch.setattr(rehearsal, "SMALL", SCALE)
    ended = CliRunner().invoke(rehearsal.app, ["--small", "--part", "scoring"])
    assert ended.exit_code == 1
    ended = CliRunner().invoke(rehearsal.app, ["--small", "--part", "summary features"])
    assert ended.exit_code == 0


@pytest.mark.usefixtures("prepared")
def test_no_part_starts_when_the_time_is_up() -> None:
    found = rehearsal.rehearse(SCALE, PARTS[:2], 0)
    assert [line.get("error") for line in found[1:3]] == ["no time left"] * 2


def test_an_unknown_part_is_refused() -> None:
    ended = CliRunner().invoke(rehearsal.app, ["--part", "speed"])
    assert ended.exit_code == 2
    assert "fine-tuning" in ended.stderr


@pytest.mark.usefixtures("prepared")
def test_a_trace_is_written(tmp_path: Path) -> None:
    part = next(part for part in PARTS if part.name == "summary features")
    rehearsal.rehearse(SCALE, [part], 600, trace=tmp_path / "traces")
    written = [file.name for file in (tmp_path / "traces").iterdir()]
    assert written == ["summary_features.json.gz"]


def test_work_is_cut_off_and_says_how_far_it_came(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock by which every look takes a second, so that the time is up at the first progress.
    seconds = iter(range(10**9))
    clock = SimpleNamespace(perf_counter=lambda: next(seconds))
    monkeypatch.setattr(cutoff, "time", clock)
    # One prompt per batch: with more, the first batch would have all of them.
    monkeypatch.setattr("mllm_msr.engines.budgets.Budget.tokens", 1)
    monkeypatch.setattr(LocalModel, "batches", lambda _, asked: [[i] for i in range(len(asked))])
    with chdir(folder):
        features = encode_item_summaries(Options(rehearsal.LLAVA, sequences=3, seconds=0.5))
        steps = summarize(Options(rehearsal.LLAVA, sequences=3, seconds=0.5))
        preferences = infer(Options(rehearsal.LLAMA, sequences=2, seconds=0.5))
    assert (features.count, features.asked) == (1, 3)
    assert [(step.count, step.asked) for step in steps.values()] == [(1, 3)] * 3
    # One prompt of each of two blocks makes one user of two.
    assert (preferences.count, preferences.asked) == (1, 2)
    described = timing.describe([preferences])
    assert (described["count"], described["of"]) == (1, 2)


def test_scoring_without_limit_has_all_pairs(folder: Path) -> None:
    with chdir(folder):
        measured = score(Options(rehearsal.LLAVA))
    assert measured.count == measured.asked == len(measured.results) == 6


def test_units_are_yielded_until_the_time_is_up() -> None:
    assert list(cutoff.until(range(3), None)) == [0, 1, 2]
    assert list(cutoff.until(range(3), 600)) == [0, 1, 2]
    assert list(cutoff.until(range(3), -1)) == [0]


def test_random_models_respond_with_as_many_words_as_allowed(folder: Path) -> None:
    for name in (rehearsal.LLAVA, rehearsal.LLAMA):
        encoder = Encoder(str(folder / name), None, None)
        model = open_model(encoder)
        tokens = encoder.tokenizer("Summarize", return_tensors="pt")
        output = model.weights.generate(**tokens, do_sample=False, max_new_tokens=7)
        words = encoder.tokenizer.decode(output[0, tokens["input_ids"].shape[1] :]).split()
        assert len(words) == 7
        assert {f"Ġ{word}" for word in words} <= set(shapes.whole_words(encoder.tokenizer))


def test_large_random_models_have_weights_in_bfloat16(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLLM_MSR_DTYPE", "bfloat16")
    weights = open_model(Encoder(str(folder / rehearsal.LLAMA), None, None)).weights
    assert {parameter.dtype for parameter in weights.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(parameter).all() for parameter in weights.parameters())


def test_generated_data_have_the_presets_form(folder: Path) -> None:
    with Gallery(folder / "data/fetch_images/images.parquet") as gallery:
        sizes = {gallery.size(ref) for ref in gallery.image_refs}
        digests = {ref.digest for ref in gallery.image_refs}
    assert sizes == {(189, 336), (336, 336)}
    assert len(digests) == ITEMS  # or equal images would be asked about once
    questions = read_questions(folder / "data/filter_sequences/test_candidates.parquet")
    assert len(questions) == 6
    assert sum(question.label for question in questions) == 2
    changed = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    assert changed["sft"]["epochs"] == 1
    assert changed["summarize_items"]["max_new_tokens"] == NEW_TOKENS


def test_full_sizes_have_the_pairs_per_image_of_the_preset() -> None:
    counts = rehearsal.count_work(SETTINGS)
    sizes = rehearsal.FULL.sizes
    items = rehearsal.ITEMS
    scored = counts["score"][1] / items
    assert sizes.test * sizes.candidates / sizes.test_items == pytest.approx(scored, rel=0.02)
    trained = counts["sft, training"][1] / SETTINGS["sft"]["epochs"] / items
    assert 2 * sizes.train / sizes.train_items == pytest.approx(trained, rel=0.02)

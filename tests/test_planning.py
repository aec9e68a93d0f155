"""The plan of a run: what its model stages would ask, and what is stored already."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from mllm_msr.cli.plan import app
from mllm_msr.core.errors import ModelError, ParamsError
from mllm_msr.core.params import load_all_params
from mllm_msr.core.schemas import Candidates, FailedImages, Retrieved
from mllm_msr.core.tables import read_rows, write_rows
from mllm_msr.engines.encoding import Encoder
from mllm_msr.planning import StagePlan, plan_stages

if TYPE_CHECKING:
    from small_world import SmallWorld

MODEL = "mllm_msr/pocket/model"
# Six items have a text, six an image and five both; the histories make 3, 1 and 1 blocks.
PROMPTS = {"summarize_items": 6 + 6 + 5, "infer_preferences": 3 + 1 + 1, "score": 3 + 3}
COMPUTED = {"encode_items", "sft, training", "sft, validation"}  # and never stored


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings with the pocket model, and no response stored yet."""
    from small_world import write_settings

    monkeypatch.setenv("MLLM_MSR_RESPONSES", str(tmp_path / "responses.sqlite"))
    return write_settings(tmp_path, Path(MODEL))


def plan(world: "SmallWorld", params: Path) -> dict[str, StagePlan]:
    found = plan_stages(world.folder, load_all_params(params), Path("prompts.yaml"))
    return {stage.stage: stage for stage in found}


def test_with_an_empty_store_everything_is_asked(
    world: "SmallWorld", params: Path, tmp_path: Path
) -> None:
    found = plan(world, params)
    asked = {name: each.prompts for name, each in found.items() if name not in COMPUTED}
    assert asked == PROMPTS
    assert all(each.stored == 0 for each in found.values())
    assert found["summarize_items"].new_tokens == 4 * PROMPTS["summarize_items"]
    assert found["score"].new_tokens == 0
    assert all(each.prompt_tokens > 5 * each.prompts for each in found.values())
    assert not (tmp_path / "responses.sqlite").exists()


def test_stored_responses_are_not_asked_again(
    world: "SmallWorld", params: Path, tmp_path: Path
) -> None:
    from stages.infer_preferences import infer_preferences

    infer_preferences(world.histories, world.summaries, world.items, tmp_path, params)
    found = plan(world, params)["infer_preferences"]
    assert (found.prompts, found.stored) == (5, 5)
    assert found.tokens == 0


def test_the_tokens_are_those_of_the_prompts(
    world: "SmallWorld", params: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    count_tokens = Encoder.count_tokens

    def count(self: Encoder, prompt) -> int:
        counted.append(count_tokens(self, prompt))
        return counted[-1]

    monkeypatch.setattr(Encoder, "count_tokens", count)
    score = plan(world, params)["score"]
    assert score.prompt_tokens == sum(counted[-6:])  # all six are the sample


def test_features_and_fine_tuning_are_planned_whole(
    world: "SmallWorld", params: Path, tmp_path: Path
) -> None:
    from small_world import write_settings

    found = plan(world, params)
    assert found["encode_items"].prompts == 6 + 8  # images and summaries
    assert found["encode_items"].tokens > 8
    # A target and a negative, then a target and two negatives.
    # One epoch, with a validation before and after it.
    assert (found["sft, training"].prompts, found["sft, validation"].prompts) == (2, 2 * 3)
    assert found["sft, training"].tokens == 3 * found["sft, training"].prompt_tokens
    (tmp_path / "other").mkdir()
    longer = plan(world, write_settings(tmp_path / "other", Path(MODEL), sft={"epochs": 4}))
    for part, factor in (("sft, training", 4), ("sft, validation", 5 / 2)):
        assert longer[part].prompts == factor * found[part].prompts
        assert longer[part].tokens == factor * found[part].tokens


def test_reranking_is_planned_once_candidates_are_retrieved(
    world: "SmallWorld", params: Path, tmp_path: Path
) -> None:
    from small_world import write_settings

    (tmp_path / "other").mkdir()
    retrieving = write_settings(
        tmp_path / "other", Path(MODEL), retrieve={"retriever": "popularity", "candidates": 2}
    )
    assert "rerank" not in plan(world, retrieving)
    scored = read_rows(Candidates, world.candidates("test"), order="sequence, item")
    rows = [
        {"sequence": row["sequence"], "split": "test", "item": row["item"], "rank": 1, "score": 0.5}
        for row in scored
    ]
    path = world.folder / "retrieve/candidates.parquet"
    path.parent.mkdir()
    write_rows(Retrieved, rows, path)
    try:
        assert plan(world, retrieving)["rerank"].prompts == len(rows)
        assert "rerank" not in plan(world, params)
    finally:
        shutil.rmtree(path.parent)


def test_a_preset_is_planned_and_not_applied(
    world: "SmallWorld", params: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/long.yaml").write_text("sft: {epochs: 5}\n", encoding="utf-8")
    missing = "recommender: {model: models/absent}\n"
    (tmp_path / "presets/absent.yaml").write_text(missing, encoding="utf-8")
    before = params.read_bytes()
    rows = {line[:13]: line.split() for line in lines_of(world, params, "--preset", "long")}
    assert rows["sft, training"][2] == "10"
    assert params.read_bytes() == before
    with pytest.raises(ModelError, match="models/absent: expected a model"):
        lines_of(world, params, "--preset", "absent")
    with pytest.raises(ParamsError, match="expected a preset among absent, long; got other"):
        lines_of(world, params, "--preset", "other")


def lines_of(world: "SmallWorld", params: Path, *options: str) -> list[str]:
    words = ["--data", str(world.folder), "--params", str(params), *options]
    return CliRunner().invoke(app, words, catch_exceptions=False).stdout.splitlines()


def test_the_command_prints_a_row_for_each_stage(
    world: "SmallWorld", params: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))  # whose state directory has no checkpoint
    planned = plan(world, params)
    lines = lines_of(world, params, "--tokens-per-second", "0.1")[: 1 + len(planned)]
    assert lines[0].endswith("time, at most  GPU-hours")
    assert lines[1].split()[1:4] == ["17", "0", "17"]
    for line, stage in zip(lines[1:], planned.values(), strict=True):
        assert line.startswith(stage.stage)
        assert float(line.split()[-1]) == pytest.approx(stage.tokens / 0.1 / 3600, abs=0.006)


def test_the_command_says_how_far_images_and_fine_tuning_are(
    world: "SmallWorld", params: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    failed = [{"item": "z", "place": "z.png", "reason": "no such file"}]
    write_rows(FailedImages, failed, world.folder / "fetch_images/failures.parquet")
    for step, text in ((4, '{"global_step": 4, "max_steps": 12}'), (7, ""), (5, None)):
        state = tmp_path / f".mllm_msr/sft/0123456789/checkpoint-{step}/trainer_state.json"
        state.parent.mkdir(parents=True)
        if text is not None:
            state.write_text(text, encoding="utf-8")
    rows = [line.split() for line in lines_of(world, params)[-3:]]
    assert rows[0] == ["stage", "done", "missing", "failed"]
    assert rows[1] == ["fetch_images,", "images", "6", "0", "1"]
    assert rows[2] == ["sft,", "steps", "(01234567)", "4", "8", "0"]

"""The stage encode_items by its command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from families import Family
from small_world import SmallWorld, write_settings

from mllm_msr.core.schemas import Features
from mllm_msr.core.tables import read_rows

Run = Callable[[Path], int]


@pytest.fixture
def run(
    world: SmallWorld,
    build: Callable[[str], Family],
    tmp_path: Path,
    run_command: Callable[..., int],
) -> Run:
    """Run the stage in this process into a folder; return the exit code."""
    params = write_settings(tmp_path, build("llava").folder)

    def run_stage(out: Path) -> int:
        options = {"items": world.items, "images": world.images, "summaries": world.summaries}
        words = [w for k, v in (options | {"out": out}).items() for w in (f"--{k}", str(v))]
        return run_command("encode_items", *words, "--params", params)

    return run_stage


def test_every_item_has_a_row_and_a_second_run_writes_the_same_bytes(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / name / "features.parquet" for name in ("one", "other")]
    assert [run(path.parent) for path in paths] == [0, 0]
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        "6 of 8 items have features of an image",
        f"wrote {paths[0]}: 8 items with features",
    ]
    rows = list(read_rows(Features, paths[0], order="1"))
    assert [row["item"] for row in rows] == list("abcdefgt")
    assert [row["item"] for row in rows if row["image"] is None] == ["d", "g"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_no_model_writes_an_empty_table_and_the_pocket_model_on_other_data_is_an_error(
    world: SmallWorld,
    tmp_path: Path,
    run_command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def encode(out: Path, model: str | None) -> int:
        nulled = {"encode_items": {"model": model}, "feature_baselines": {"models": []}}
        changes = nulled | {"preprocess": {"source": "tables"}}
        params = write_settings(tmp_path, Path("mllm_msr/pocket/model"), **changes)
        words = ["--items", str(world.items), "--images", str(world.images), "--summaries"]
        words += [str(world.summaries), "--out", str(out), "--params", str(params)]
        return run_command("encode_items", *words)

    path = tmp_path / "out/features.parquet"
    assert encode(path.parent, None) == 0
    assert capsys.readouterr().out == f"encode_items.model is null: wrote {path} without rows\n"
    assert list(read_rows(Features, path, "1")) == []
    assert encode(tmp_path / "refused", "mllm_msr/pocket/model") == 1
    assert "encode_items.model: expected a model for preprocess.source" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_an_error_is_one_line(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(SmallWorld, "summaries", tmp_path / "nothing.parquet")
    assert run(tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/nothing.parquet: expected a table; got no such file")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()

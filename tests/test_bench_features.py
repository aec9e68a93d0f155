"""Benchmarks of image features: another encoder's table, and differences between two tables."""

import json
from pathlib import Path

import numpy as np
import pytest
from families import draw_image
from questions import ask, plant, write_questions
from typer import Typer
from typer.testing import CliRunner

from bench import feature_comparison, real_image_features
from mllm_msr.core.errors import DataError, ModelError
from mllm_msr.core.schemas import Candidates, Features, Scores
from mllm_msr.core.tables import read_rows, write_rows

BASELINES = ("vbpr", "gru4rec_f")


def write_scores(filtered: Path, folder: Path, of_target: float) -> None:
    """Score every target with a number and every negative with 0."""
    rows = [
        {
            "sequence": row["sequence"],
            "item": row["item"],
            "split": split,
            "log_odds": of_target if row["label"] else 0.0,
        }
        for split in ("valid", "test")
        for row in read_rows(Candidates, filtered / f"{split}_candidates.parquet", "1")
    ]
    for name in BASELINES:
        write_rows(Scores, rows, folder / f"{name}.parquet")


def compare(filtered: Path, first: list[Path], second: list[Path]) -> list[dict[str, object]]:
    """Run the comparison; return its lines."""
    words = ["--filtered", str(filtered)]
    words += [word for folder in first for word in ("--first", str(folder))]
    words += [word for folder in second for word in ("--second", str(folder))]
    app = Typer()
    app.command()(feature_comparison.main)
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def filtered(tmp_path: Path) -> Path:
    """Candidates of the planted log, six of them for each sequence."""
    return write_questions(ask(plant()), tmp_path / "world", negatives=5)[1]


def test_differences_are_second_minus_first(filtered: Path, tmp_path: Path) -> None:
    write_scores(filtered, tmp_path / "level", of_target=0)
    write_scores(filtered, tmp_path / "right", of_target=1)
    lines = compare(filtered, [tmp_path / "level"], [tmp_path / "right"])
    assert {line["model"] for line in lines} == set(BASELINES)
    assert all(line["first"] == [0.5] * 3 and line["second"] == [1] * 3 for line in lines)
    assert all(line["difference"] == [0.5] * 3 for line in lines)


def test_equal_scores_do_not_differ(filtered: Path, tmp_path: Path) -> None:
    write_scores(filtered, tmp_path / "right", of_target=1)
    for line in compare(filtered, [tmp_path / "right"], [tmp_path / "right"]):
        assert (line["difference"], line["p"]) == ([0] * 3, 1)


def test_seeds_are_averaged_by_sequence(filtered: Path, tmp_path: Path) -> None:
    write_scores(filtered, tmp_path / "wrong", of_target=-1)
    write_scores(filtered, tmp_path / "right", of_target=1)
    both = [tmp_path / "wrong", tmp_path / "right"]
    for line in compare(filtered, [tmp_path / "right"], both):
        assert line["second"] == [0.5] * 3


def test_a_baseline_without_scores_in_every_folder_is_left_out(
    filtered: Path, tmp_path: Path
) -> None:
    write_scores(filtered, tmp_path / "first", of_target=0)
    write_scores(filtered, tmp_path / "second", of_target=1)
    (tmp_path / "second" / "vbpr.parquet").unlink()
    lines = compare(filtered, [tmp_path / "first"], [tmp_path / "second"])
    assert {line["model"] for line in lines} == {"gru4rec_f"}


def test_folders_without_scores_are_an_error(filtered: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected scores of a feature baseline in every folder"):
        compare(filtered, [tmp_path / "absent"], [tmp_path / "absent"])


def test_only_vectors_of_images_are_replaced(tmp_path: Path) -> None:
    rows = [{"item": item, "image": [1.0], "summary": [2.0, 3.0]} for item in "ab"]
    vectors = {"a": np.arange(3, dtype=np.float32)}
    path = tmp_path / "features.parquet"
    write_rows(Features, real_image_features.replace_image_vectors(rows, vectors), path)
    assert list(read_rows(Features, path, order="item")) == [
        {"item": "a", "image": [0, 1, 2], "summary": [2, 3]},
        {"item": "b", "image": None, "summary": [2, 3]},
    ]


def test_the_whole_image_is_scaled_to_a_square_of_levels_around_zero() -> None:
    pixels = real_image_features.read_pixels(draw_image(200, 300, seed=1))
    side = real_image_features.SIDE
    assert (pixels.shape, pixels.dtype) == ((3, side, side), np.float32)
    assert -1 <= pixels.min() < 0 < pixels.max() <= 1


def test_batches_have_every_image_once() -> None:
    refs = list(range(real_image_features.IMAGES_PER_BATCH * 2 + 1))
    batches = list(real_image_features.batches(refs))  # type: ignore[arg-type]
    assert [ref for batch in batches for ref in batch] == refs
    assert max(map(len, batches)) == real_image_features.IMAGES_PER_BATCH


def test_an_encoder_that_is_not_installed_is_an_error_of_one_line() -> None:
    try:
        import efficientnet_lite_pytorch  # noqa: F401
    except ImportError:
        with pytest.raises(ModelError, match="install its two packages") as caught:
            real_image_features.load_efficientnet()
        assert "\n" not in str(caught.value)
    else:
        pytest.skip("the encoder is installed")

"""Features are read for the items of a task, and standardised over those that have them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mllm_msr.baselines.features import read_columns, read_features, standardise
from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import Features
from mllm_msr.core.tables import write_rows

ROWS: list[dict[str, Any]] = [
    {"item": "a", "image": [1.0, 2.0], "summary": [1.0, 2.0, 3.0]},
    {"item": "b", "image": None, "summary": [4.0, 5.0, 6.0]},
    {"item": "c", "image": [5.0, 6.0], "summary": None},
]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    write_rows(Features, rows, folder / "features.parquet")
    return folder / "features.parquet"


def test_rows_are_those_of_the_items_in_their_order(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    images = read_features(path, ["c", "b", "a"], "image")
    np.testing.assert_array_equal(images, [[5, 6], [np.nan, np.nan], [1, 2]])
    assert images.dtype == np.float32
    summaries = read_features(path, ["b", "a"], "summary")
    np.testing.assert_array_equal(summaries, [[4, 5, 6], [1, 2, 3]])


def test_an_item_without_a_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="expected a row for every item of the k-core; got none for"
    ):
        read_features(write(tmp_path, ROWS), ["a", "z"], "image")


def test_a_feature_that_no_item_has_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, [{"item": "a", "image": None, "summary": [1.0]}])
    (summaries,) = read_columns(path, ["a"], ["image", "summary"], "sasrec_f")
    np.testing.assert_array_equal(summaries, [[1.0]])
    assert caplog.messages == ["sasrec_f: no item has vectors of images"]


def test_items_without_a_feature_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = read_columns(write(tmp_path, ROWS), ["a", "b"], ["summary", "image"], "vbpr")
    assert [column.shape for column in columns] == [(2, 3), (2, 2)]
    (said,) = caplog.messages
    assert said.startswith("vbpr: 1 of 2 items have no vector of images, ")


def test_no_feature_at_all_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path, [{"item": "a", "image": None, "summary": [1.0]}])
    said = "expected vectors of images; got none of 1 items; take vbpr out of feature_baselines"
    with pytest.raises(DataError, match=said):
        read_columns(path, ["a"], ["image"], "vbpr")


def test_a_baseline_that_wants_no_feature_gets_none(tmp_path: Path) -> None:
    assert read_columns(tmp_path / "nowhere", ["a"], [], "gru4rec_f") == []


def test_vectors_of_two_widths_are_an_error(tmp_path: Path) -> None:
    path = write(
        tmp_path, [{"item": i, "image": None, "summary": [1.0] * len(i)} for i in ["a", "bb"]]
    )
    with pytest.raises(DataError, match="expected vectors of one width; got widths 1, 2"):
        read_features(path, ["a"], "summary")


def test_standard_columns_by_hand() -> None:
    vectors = np.array([[1, 7], [np.nan, np.nan], [3, 7]], dtype=np.float32)
    np.testing.assert_array_equal(standardise(vectors), [[-1, 0], [0, 0], [1, 0]])


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(2, 9), st.integers(1, 4)),
        elements=st.floats(-9, 9, width=16),
    ),
    st.data(),
)
def test_columns_that_vary_have_mean_0_and_deviation_1(vectors: np.ndarray, data: Any) -> None:
    absent = data.draw(arrays(bool, len(vectors)))
    absent[:1] = False
    vectors[absent] = np.nan
    standard = standardise(vectors)
    assert (standard[absent] == 0).all()
    present = standard[~absent].astype(np.float64)
    varies = (vectors[~absent] != vectors[~absent][0]).any(axis=0)
    np.testing.assert_allclose(present.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(present.std(axis=0), varies, atol=1e-3)

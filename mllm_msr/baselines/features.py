"""Item features as arrays, a row per item of a task."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as arrow
import pyarrow.compute
import pyarrow.parquet

from mllm_msr.errors import DataError
from mllm_msr.tables import Features, check_table

Vectors = npt.NDArray[np.float32]


def read_features(path: Path, items: Sequence[str], name: str) -> Vectors:
    """Read one kind of features.

    Args:
        path: The table Features.
        items: Names of the items, in the order of the rows wanted.
        name: The column, ``image`` or ``summary``.

    Returns:
        Of shape (items, width); NaN in the rows of items without this feature.

    Raises:
        DataError: The table is missing or breaks its model, lacks an item or the feature of all
            of them, or has vectors of several widths.
    """
    check_table(Features, path)
    table = arrow.parquet.read_table(path, columns=["item", name])
    lists = table[name].combine_chunks()
    widths = arrow.compute.unique(arrow.compute.list_value_length(lists.drop_null())).to_pylist()
    if len(widths) != 1:
        came = f"widths {', '.join(map(str, widths))}" if widths else f"none in {len(lists):,} rows"
        remedy = "leave what reads them out of feature_baselines.models, or run encode_items again"
        raise DataError("vectors of one width", came, f"{path}, column {name}", remedy)
    vectors = np.full((len(lists), widths[0]), np.nan, dtype=np.float32)
    vectors[lists.is_valid().to_numpy(False)] = lists.flatten().to_numpy().reshape(-1, widths[0])
    return vectors[_find_rows(table["item"], items, path)]


def standardise(vectors: Vectors) -> Vectors:
    """Give each column mean 0 and deviation 1 over the items that have the feature.

    An item without it gets zeros, so it stands where the average item does. A column that is the
    same for all becomes zeros too.
    """
    present = ~np.isnan(vectors[:, 0])
    mean, deviation = vectors[present].mean(axis=0), vectors[present].std(axis=0)
    varies = deviation > 1e-6 * np.abs(mean)  # more than what rounding leaves of a constant
    scaled = (vectors - mean) / np.where(varies, deviation, np.inf)
    standard: Vectors = np.where(present[:, None], scaled, 0).astype(np.float32)
    return standard


def _find_rows(
    names: arrow.ChunkedArray, items: Sequence[str], path: Path
) -> npt.NDArray[np.int64]:
    """Give the row of each item."""
    rows = arrow.compute.index_in(arrow.array(items, arrow.string()), names.combine_chunks())
    if rows.null_count:
        came, remedy = f"none for {rows.null_count:,}", "run the stage encode_items again"
        raise DataError("a row for every item of the core", came, str(path), remedy)
    found: npt.NDArray[np.int64] = rows.to_numpy().astype(np.int64)
    return found

"""Item features as arrays, a row per item of a task."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as arrow
import pyarrow.compute
import pyarrow.parquet

from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import Features
from mllm_msr.core.tables import check_table

Vectors = npt.NDArray[np.float32]
OF = {"image": "of images", "summary": "of summaries"}

log = logging.getLogger(__name__)


def read_columns(
    path: Path, items: Sequence[str], names: Sequence[str], baseline: str
) -> list[Vectors]:
    """Read the kinds of features that a baseline wants and items have; what is missing is logged.

    A catalogue without images leaves the summaries, and the other way round.

    Args:
        path: The table Features.
        items: Names of the items, in the order of the rows wanted.
        names: Columns of the table.
        baseline: Its name, for errors and the log.

    Returns:
        For each kind that any item has, an array as of :func:`read_features`.

    Raises:
        DataError: As :func:`read_features`; or kinds are wanted, and items have none of them.
    """
    columns = []
    for name in names:
        vectors = read_features(path, items, name)
        if vectors is None:
            log.warning("%s: no item has vectors %s", baseline, OF[name])
            continue
        columns.append(vectors)
        if missing := int(np.isnan(vectors[:, 0]).sum()):
            log.warning(
                "%s: %s of %s items have no vector %s, and stand where the average item does",
                *(baseline, f"{missing:,}", f"{len(items):,}", OF[name]),
            )
    if names and not columns:
        raise DataError(
            expected=" or ".join(f"vectors {OF[name]}" for name in names),
            got=f"none of {len(items):,} items",
            where=str(path),
            fix=f"take {baseline} out of feature_baselines.models: it has nothing to read",
        )
    return columns


def read_features(path: Path, items: Sequence[str], name: str) -> Vectors | None:
    """Read one kind of features.

    Args:
        path: The table Features.
        items: Names of the items, in the order of the rows wanted.
        name: The column, ``image`` or ``summary``.

    Returns:
        Of shape (items, width); NaN in the rows of items without this feature. None where no
        item has it.

    Raises:
        DataError: The table is missing or breaks its model, has no rows, lacks an item, or has
            vectors of several widths.
    """
    check_table(Features, path)
    table = arrow.parquet.read_table(path.absolute(), columns=["item", name], partitioning=None)
    if not table.num_rows:
        fix = "set encode_items.model and run encode_items, or set feature_baselines.models to []"
        raise DataError(
            expected="the items' vectors", got="a table without rows", where=str(path), fix=fix
        )
    lists = table[name].combine_chunks()
    widths = arrow.compute.unique(arrow.compute.list_value_length(lists.drop_null())).to_pylist()
    rows = _find_rows(table["item"], items, path)
    if not widths:
        return None
    if len(widths) > 1:
        got, fix = f"widths {', '.join(map(str, widths))}", "run the stage encode_items again"
        raise DataError(
            expected="vectors of one width", got=got, where=f"{path}, column {name}", fix=fix
        )
    vectors = np.full((len(lists), widths[0]), np.nan, dtype=np.float32)
    vectors[lists.is_valid().to_numpy(False)] = lists.flatten().to_numpy().reshape(-1, widths[0])
    return vectors[rows]


def standardise(vectors: Vectors) -> Vectors:
    """Scale each column to mean 0 and deviation 1 over the items that have the feature.

    An item without it gets zeros, so it stands where the average item does. A column that is the
    same for all becomes zeros too.
    """
    present = ~np.isnan(vectors[:, 0])
    with np.errstate(invalid="ignore"):  # infinite features become NaN, which the training reports
        mean, deviation = vectors[present].mean(axis=0), vectors[present].std(axis=0)
        varies = deviation > 1e-6 * np.abs(mean)  # more than what rounding leaves of a constant
        scaled = (vectors - mean) / np.where(varies, deviation, np.inf)
    standard: Vectors = np.where(present[:, None], scaled, 0).astype(np.float32)
    return standard


def _find_rows(
    names: arrow.ChunkedArray, items: Sequence[str], path: Path
) -> npt.NDArray[np.int64]:
    """Return the row of each item."""
    rows = arrow.compute.index_in(arrow.array(items, arrow.string()), names.combine_chunks())
    if rows.null_count:
        got, fix = f"none for {rows.null_count:,}", "run the stage encode_items again"
        raise DataError(
            expected="a row for every item of the k-core", got=got, where=str(path), fix=fix
        )
    found: npt.NDArray[np.int64] = rows.to_numpy().astype(np.int64)
    return found

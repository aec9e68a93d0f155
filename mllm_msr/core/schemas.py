"""Schemas of all tables that stages exchange: their columns, types and checks, as pandera models.

The checks run inside DuckDB (pandera's Ibis backend), so that a table never has to fit into memory.
:mod:`mllm_msr.core.tables` reads and writes the tables.
"""

from typing import get_args

import ibis
import pandera.ibis as pa
from ibis.expr import datatypes
from ibis.expr.types import BooleanColumn
from pandera.config import ValidationDepth, config_context
from pandera.dtypes import immutable
from pandera.engines import ibis_engine

from mllm_msr.core.params import Sampling

SPLITS = ["train", "valid", "test"]
SAMPLINGS = list(get_args(Sampling))  # of negatives, in the order of tables of results
# These skip sequences for which they find too few items.
PARTIAL_SAMPLINGS = ("targets", "contemporary", "stratum")
STRATA = ["cold", "rare", "warm"]  # of items, by known interactions; see mllm_msr/data/sequences.py
FINITE = "finite numbers only"


@ibis_engine.Engine.register_dtype(equivalents=[datatypes.Array(datatypes.float32)])
@immutable
class Vector(ibis_engine.DataType):  # type: ignore[misc]
    """A list of 32-bit floats; pandera 0.35 supports no lists in Ibis tables."""

    type = datatypes.Array(datatypes.float32)


class Table(pa.DataFrameModel):  # type: ignore[misc]
    """Base of all tables: exactly the columns that the model declares."""

    class Config:
        """Refuse missing and unknown columns."""

        strict = True

    @classmethod
    def validate(cls, check_obj: ibis.Table, lazy: bool = False) -> ibis.Table:
        """Check the table; without rows, check only its columns and their types.

        Pandera runs one or more queries for each check. A table that passes all checks in one query
        needs none of them; any other is left to pandera, whose errors name columns and values.
        """
        with config_context(validation_depth=ValidationDepth.SCHEMA_ONLY):
            super().validate(check_obj, lazy=lazy)
        if _passes(cls.to_schema(), check_obj):
            return check_obj
        return super().validate(check_obj, lazy=lazy)


def _passes(schema: pa.DataFrameSchema, table: ibis.Table) -> bool:
    """Return whether a table has no rows, or passes all checks of its values, by one query.

    False where the query cannot express a check, too.
    """
    valid = ibis.literal(True)
    for name, column in schema.columns.items():
        values = table[name]
        if not column.nullable:
            valid &= values.notnull()
            if values.type().is_floating():
                valid &= ~values.isnan()
        for check in column.checks:
            condition = _condition(check, table, name)
            if condition is None:
                return False
            valid &= condition | values.isnull()
    counts = {"rows": table.count(), "valid": valid.sum()}
    if schema.unique:
        counts["distinct"] = table.select(*schema.unique).distinct().count().as_scalar()
    (row,) = table.aggregate(**counts).to_pyarrow().to_pylist()
    return row["rows"] == 0 or len(set(row.values())) == 1


def _condition(check: pa.Check, table: ibis.Table, name: str) -> BooleanColumn | None:
    """Return a check of a column as an expression; None if there is none."""
    values = table[name]
    match check.name, check.statistics:
        case "greater_than_or_equal_to", {"min_value": minimum}:
            return values >= minimum
        case "less_than_or_equal_to", {"max_value": maximum}:
            return values <= maximum
        case "isin", {"allowed_values": allowed}:
            return values.isin(allowed)
        case "str_length", {"min_value": int(shortest), "max_value": int(longest)}:
            return values.length().between(shortest, longest)
    output = check(table, name).check_output
    return output if isinstance(output, BooleanColumn) else None


def _is_finite(data: pa.IbisData) -> BooleanColumn:
    """Return whether each number, or each vector, of a column is finite."""
    column = data.table[data.key]
    if not column.type().is_array():
        return ~(column.isinf() | column.isnan())
    return column.filter(lambda number: number.isinf() | number.isnan()).length() == 0


class Interactions(Table):
    """Interactions. Each (user, item) pair occurs once, at its earliest time."""

    # Cleaning makes the pairs unique; checking it here would sort a hundred million rows again.
    user: str
    item: str
    timestamp: int = pa.Field(nullable=True, ge=0)  # ms since 1970; null: only the order is known
    position: int = pa.Field(ge=0)  # order in the publisher's file; breaks ties in time


class Items(Table):
    """The catalogue, with the publisher's texts; whitespace is folded."""

    item: str
    title: str = pa.Field(nullable=True)
    description: str = pa.Field(nullable=True)

    class Config:
        """One row per item."""

        unique = ["item"]


class ImageSources(Table):
    """The source of each item's image: a file, a member of a zip archive, or a URL."""

    item: str
    file: str = pa.Field(nullable=True)  # path of the image or of its archive; null: on the web
    member: str = pa.Field(nullable=True)  # name in the archive; null: file is the image itself
    url: str = pa.Field(nullable=True)  # null: in a file

    class Config:
        """One row per item."""

        unique = ["item"]


class FailedImages(Table):
    """Images that could not be fetched or decoded, and why."""

    item: str
    place: str  # path or URL
    reason: str

    class Config:
        """One row per item."""

        unique = ["item"]


class Images(Table):
    """Decoded images, shrunk and encoded again; items without an image have no row."""

    item: str
    image: datatypes.binary  # RGB; JPEG if the source was JPEG, else lossless WebP
    width: int = pa.Field(ge=1)  # pixels
    height: int = pa.Field(ge=1)  # pixels
    digest: str = pa.Field(str_length={"min_value": 64, "max_value": 64})  # SHA-256 of image

    class Config:
        """One row per item."""

        unique = ["item"]


class Sequences(Table):
    """A user's history and target: the recommender predicts the target from the history."""

    sequence: int = pa.Field(ge=0)
    user: str
    split: str = pa.Field(isin=SPLITS)
    target: str
    history_length: int = pa.Field(ge=1)  # items of the history
    used: bool  # within filter_sequences.budget; others have no history and no candidates
    stratum: str = pa.Field(isin=STRATA)  # of the target

    class Config:
        """One row per sequence."""

        unique = ["sequence"]


class Histories(Table):
    """The items before the target of each used sequence; preferences are inferred from them."""

    sequence: int = pa.Field(ge=0)
    position: int = pa.Field(ge=1)  # 1 is the oldest
    item: str

    class Config:
        """One item per position."""

        unique = ["sequence", "position"]


class Candidates(Table):
    """The items to be ranked for each used sequence: target and negatives, in random order."""

    sampling: str = pa.Field(isin=SAMPLINGS)  # of the negatives (mllm_msr/data/candidates.py)
    sequence: int = pa.Field(ge=0)
    position: int = pa.Field(ge=0)
    item: str
    label: bool  # true for the target

    class Config:
        """Each item at most once per sampling and sequence."""

        unique = ["sampling", "sequence", "item"]


class Popularity(Table):
    """Interactions per item that are known at training time (mllm_msr/data/sequences.py).

    These are all interactions of users without a held-out target, and those of other users before
    their first one. With ``split: time``, only interactions before the first held-out target of all
    users count; with ``budget.interactions: used``, only those of users with a used training
    sequence.
    """

    item: str
    interactions: int = pa.Field(ge=0)
    withheld: bool  # by the split cold_items; such an item has no known interaction

    class Config:
        """One row per item."""

        unique = ["item"]


class Summaries(Table):
    """The item summaries that the models generate (paper, section Method, step 1)."""

    item: str
    text_summary: str = pa.Field(nullable=True)  # null: no text, or text: none
    image_description: str = pa.Field(nullable=True)  # null: no image, or image: false
    summary: str  # the fusion of both, or the only one

    class Config:
        """One row per item."""

        unique = ["item"]


class Features(Table):
    """A model's features of each item, as vectors of the model's widths."""

    item: str
    image: Vector = pa.Field(nullable=True)  # of the vision tower; null: no image
    summary: Vector = pa.Field(nullable=True)  # of the language model; null: an empty summary

    class Config:
        """One row per item."""

        unique = ["item"]

    @pa.check("image", "summary", error=FINITE)  # type: ignore[untyped-decorator]
    def finite(cls, data: pa.IbisData) -> BooleanColumn:  # noqa: N805
        """Refuse the output of a model with broken weights."""
        return _is_finite(data)


class Preferences(Table):
    """The preference after each block of a history (paper, section Method, step 2)."""

    sequence: int = pa.Field(ge=0)
    block: int = pa.Field(ge=1)  # the last block of a sequence is what the recommender reads
    items: int = pa.Field(ge=1)  # items up to this block
    preference: str

    class Config:
        """One preference per block."""

        unique = ["sequence", "block"]


class Scores(Table):
    """The recommender's score of each candidate."""

    sequence: int = pa.Field(ge=0)
    item: str
    split: str = pa.Field(isin=SPLITS)
    log_odds: float  # of yes against no, fp32 logits

    class Config:
        """One score per candidate."""

        unique = ["sequence", "item"]

    @pa.check("log_odds", error=FINITE)  # type: ignore[untyped-decorator]
    def finite(cls, data: pa.IbisData) -> BooleanColumn:  # noqa: N805
        """Refuse scores that cannot be ranked."""
        return _is_finite(data)


class Retrieved(Table):
    """The items of the whole catalogue that a retriever proposes for each used sequence."""

    sequence: int = pa.Field(ge=0)
    split: str = pa.Field(isin=SPLITS)
    item: str
    rank: int = pa.Field(ge=1)  # 1 is the best
    score: float  # of the retriever

    class Config:
        """Each item at most once per sequence."""

        unique = ["sequence", "item"]

    @pa.check("score", error=FINITE)  # type: ignore[untyped-decorator]
    def finite(cls, data: pa.IbisData) -> BooleanColumn:  # noqa: N805
        """Refuse scores that cannot be ranked."""
        return _is_finite(data)


class FirstItems(Table):
    """The first items of the whole catalogue by each baseline, for each used test sequence."""

    scorer: str  # popularity, target_popularity or a baseline
    sequence: int = pa.Field(ge=0)
    split: str = pa.Field(isin=SPLITS)
    item: str
    rank: int = pa.Field(ge=1)  # 1 is the best
    score: float

    class Config:
        """Each item at most once per scorer and sequence."""

        unique = ["scorer", "sequence", "item"]

    @pa.check("score", error=FINITE)  # type: ignore[untyped-decorator]
    def finite(cls, data: pa.IbisData) -> BooleanColumn:  # noqa: N805
        """Refuse scores that cannot be ranked."""
        return _is_finite(data)


class PerSequence(Table):
    """The rank of each target by each scorer, as the counts that all metrics derive from."""

    sampling: str = pa.Field(isin=SAMPLINGS)  # of the negatives
    sequence: int = pa.Field(ge=0)
    split: str = pa.Field(isin=SPLITS)
    scorer: str
    candidates: int = pa.Field(ge=2)  # the target included
    above: int = pa.Field(ge=0)  # negatives scored higher than the target
    tied: int = pa.Field(ge=0)  # negatives with the target's score

    class Config:
        """One row per sampling, scorer and sequence."""

        unique = ["sampling", "scorer", "sequence"]


class Comparisons(Table):
    """Differences of a scorer's test AUC from that of a baseline that ignores the user."""

    sampling: str = pa.Field(isin=SAMPLINGS)  # of the negatives
    scorer: str
    baseline: str  # the scorer that ignores the user
    difference: float  # mean over the sequences
    low: float  # bounds of the paired confidence interval
    high: float
    p: float = pa.Field(ge=0, le=1)  # two-sided, Holm-corrected within the sampling

    class Config:
        """One row per sampling and pair of scorers."""

        unique = ["sampling", "scorer", "baseline"]

    @pa.check("difference", "low", "high", error=FINITE)  # type: ignore[untyped-decorator]
    def finite(cls, data: pa.IbisData) -> BooleanColumn:  # noqa: N805
        """Refuse differences that are not finite."""
        return _is_finite(data)


class Oracle(Table):
    """The pocket world's true utilities: the log choice weight of each item for each user."""

    user: str
    item: str
    utility: float

    @pa.check("utility", error=FINITE)  # type: ignore[untyped-decorator]
    def finite(cls, data: pa.IbisData) -> BooleanColumn:  # noqa: N805
        """Refuse utilities that are not finite."""
        return _is_finite(data)


AnyTable = type[Table]

"""The checks of a table: one query decides as pandera's own checks do."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ibis
import pandera.ibis as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ibis.expr.types import BooleanColumn
from pandera.errors import SchemaErrors

from mllm_msr.core.schemas import Table


class Measured(Table):
    """A table with every kind of check that the tables of stages have."""

    name: str = pa.Field(nullable=True, isin=["a", "b"])
    code: str = pa.Field(str_length={"min_value": 1, "max_value": 2})
    count: int = pa.Field(ge=0)
    share: float = pa.Field(ge=0, le=1)
    score: float = pa.Field(nullable=True)

    class Config:
        """One row per name and code."""

        unique = ["name", "code"]

    @pa.check("score")  # type: ignore[untyped-decorator]
    def finite(cls, data: pa.IbisData) -> BooleanColumn:  # noqa: N805
        """Refuse infinity."""
        return ~data.table[data.key].isinf()


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["a", "b", "b", None, "c"]),
            "code": st.sampled_from(["x", "y", "zz", "zz", "", "long", None]),
            "count": st.sampled_from([0, 1, 2, 3, -1, None]),
            "share": st.sampled_from([0.0, 0.5, 1.0, 1.5, -0.1, math.nan, None]),
            "score": st.sampled_from([None, 0.0, -2.5, math.inf, math.nan]),
        }
    ),
    max_size=3,
)
VALID = {"name": "a", "code": "x", "count": 0, "share": 1.0, "score": None}
TYPES = ibis.schema(
    {"name": "str", "code": "str", "count": "int64", "share": "float64", "score": "float64"}
)

Row = Mapping[str, object]


def make_table(rows: Sequence[Row]) -> ibis.Table:
    """Return a table of a new DuckDB database."""
    database = ibis.duckdb.connect()
    return database.create_table("rows", ibis.memtable(list(rows), schema=TYPES))


def refuses(validate: Callable[..., Any], rows: Sequence[Row]) -> bool:
    try:
        validate(make_table(rows), lazy=True)
    except SchemaErrors:
        return True
    return False


def assert_decided_as_by_pandera(rows: Sequence[Row]) -> None:
    assert refuses(Measured.validate, rows) == refuses(Measured.to_schema().validate, rows)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"code": "y"},
        {"name": "c"},
        {"code": "long"},
        {"count": -1},
        {"share": 1.5, "code": "y"},
        {"share": math.nan, "code": "y"},
        {"score": math.inf, "code": "y"},
        {"score": math.nan, "code": "y"},
    ],
)
def test_a_fault_of_the_second_row_is_seen(changes: Row) -> None:
    assert_decided_as_by_pandera([VALID, {**VALID, **changes}])


@pytest.mark.slow
@settings(max_examples=30)
@given(ROWS.filter(bool))
def test_a_table_is_refused_where_pandera_refuses_it(rows: list[Row]) -> None:
    assert_decided_as_by_pandera(rows)


def test_a_table_without_rows_has_valid_values() -> None:
    assert not refuses(Measured.validate, [])


def test_a_valid_table_takes_one_query(monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table([VALID])
    backend, queries = type(table.get_backend()), []
    execute = backend.to_pyarrow

    def count_and_execute(*arguments: Any, **options: Any) -> Any:
        queries.append(arguments)
        return execute(*arguments, **options)

    monkeypatch.setattr(backend, "to_pyarrow", count_and_execute)
    Measured.validate(table, lazy=True)
    assert len(queries) == 1


class Positive(Table):
    """A table whose check no expression is known for."""

    count: int = pa.Field(gt=0)


@pytest.mark.parametrize(("count", "refused"), [(1, False), (0, True)])
def test_a_check_that_the_query_cannot_express_is_left_to_pandera(
    count: int, refused: bool
) -> None:
    table = ibis.duckdb.connect().create_table("rows", ibis.memtable([{"count": count}]))
    if refused:
        with pytest.raises(SchemaErrors, match="greater_than"):
            Positive.validate(table, lazy=True)
    else:
        Positive.validate(table, lazy=True)

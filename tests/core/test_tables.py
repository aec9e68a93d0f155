"""Tables are checked when written and when read, written atomically, and carry a digest."""

import math
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as arrow
import pyarrow.parquet
import pytest
from small_world import image_row, names

from mllm_msr.core import schemas
from mllm_msr.core.errors import DataError, ParamsError
from mllm_msr.core.parquet import DIGEST_KEY
from mllm_msr.core.schemas import AnyTable
from mllm_msr.core.tables import (
    arrow_schema,
    check_table,
    count_rows,
    open_database,
    read_last_preferences,
    read_rows,
    read_table,
    write_query,
    write_rows,
)

ROWS: dict[AnyTable, dict[str, Any]] = {
    schemas.Interactions: {"user": "u", "item": "a", "timestamp": 5, "position": 0},
    schemas.Items: {"item": "a", "title": "Red kettle", "description": None},
    schemas.ImageSources: {"item": "a", "file": "covers.zip", "member": "a.jpg", "url": None},
    schemas.FailedImages: {"item": "a", "place": "a.jpg", "reason": "no such file"},
    schemas.Images: image_row("a", (8, 8)),
    schemas.Sequences: {
        **{"sequence": 0, "user": "u", "split": "train", "target": "a", "history_length": 3},
        "used": True,
        "stratum": "warm",
    },
    schemas.Histories: {"sequence": 0, "position": 1, "item": "a"},
    schemas.Candidates: {"sampling": "uniform", "sequence": 0, "position": 0}
    | {"item": "a", "label": True},
    schemas.Popularity: {"item": "a", "interactions": 3, "withheld": False},
    schemas.Summaries: {
        **{"item": "a", "text_summary": "t", "image_description": None, "summary": "t"}
    },
    schemas.Features: {"item": "a", "image": [0.5, -1.0], "summary": [0.25]},
    schemas.Preferences: {"sequence": 0, "block": 1, "items": 3, "preference": "p"},
    schemas.Scores: {"sequence": 0, "item": "a", "split": "test", "log_odds": -0.5},
    schemas.Retrieved: {"sequence": 0, "split": "test", "item": "a", "rank": 1, "score": 0.5},
    schemas.FirstItems: {
        **{"scorer": "sasrec", "sequence": 0, "split": "test", "item": "a", "rank": 1},
        "score": 0.5,
    },
    schemas.PerSequence: {
        **{"sampling": "uniform", "sequence": 0, "split": "test", "scorer": "s"},
        **{"candidates": 21, "above": 0, "tied": 0},
    },
    schemas.Comparisons: {
        **{"sampling": "uniform", "scorer": "s", "baseline": "popularity"},
        **{"difference": 0.1, "low": 0.0, "high": 0.2, "p": 0.5},
    },
    schemas.Oracle: {"user": "u", "item": "a", "utility": 0.5},
}
# A check takes a tenth of a second, so only these tables are tested each time.
FAST = (schemas.Items, schemas.Images, schemas.Candidates, schemas.Features, schemas.Comparisons)
EVERY = pytest.mark.parametrize(
    "model",
    [pytest.param(m, marks=[] if m in FAST else pytest.mark.slow, id=m.__name__) for m in ROWS],
)
UNCHECKED = {schemas.Interactions, schemas.Oracle}  # unique by construction, not checked


def write(path: Path, table: arrow.Table) -> Path:
    arrow.parquet.write_table(table, path)
    return path


def table_of(model: AnyTable, *rows: Mapping[str, Any]) -> arrow.Table:
    return arrow.Table.from_pylist(list(rows), schema=arrow_schema(model))


def test_every_table_is_tested_here() -> None:
    models = {
        value
        for value in vars(schemas).values()
        if isinstance(value, type)
        and issubclass(value, schemas.Table)
        and value is not schemas.Table
    }
    assert models == set(ROWS)


def test_a_database_respects_the_memory_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLLM_MSR_MEMORY", "100MB")
    with open_database(tmp_path / "spill") as connection:
        rows = (
            "SELECT hash(range)::VARCHAR AS item, range % 7 AS interactions,"
            " false AS withheld FROM range(1_000_000)"
        )
        written = write_query(
            schemas.Popularity, connection, f"{rows} ORDER BY item", tmp_path / "t.parquet"
        )
        limit = connection.execute("SELECT current_setting('memory_limit')").fetchall()
    assert written == 1_000_000
    assert limit == [("95.3 MiB",)]


def test_too_little_memory_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.parquet"
    said = "expected memory for DuckDB; got too little; free memory, or raise MLLM_MSR_MEMORY"
    other = {"item": str(tmp_path)}  # bytes that were checked before are not checked again
    arrow.parquet.write_table(table_of(schemas.Popularity, ROWS[schemas.Popularity] | other), path)
    monkeypatch.setenv("MLLM_MSR_MEMORY", "1MB")
    with pytest.raises(DataError, match=said), open_database(tmp_path / "spill") as connection:
        connection.execute("SELECT list(range) FROM range(10_000_000)")

    def fail(*_: object, **__: object) -> None:
        raise duckdb.OutOfMemoryException("could not allocate block")

    monkeypatch.setattr(schemas.Popularity, "validate", fail)
    with pytest.raises(DataError, match=f"t.parquet: {said}"):  # not a damaged file
        check_table(schemas.Popularity, path)


def test_equal_bytes_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first.parquet", tmp_path / "second.parquet"
    row = ROWS[schemas.Popularity] | {"item": str(tmp_path)}
    write_rows(schemas.Popularity, [row], first)
    checked = []
    validate = schemas.Popularity.validate
    monkeypatch.setattr(
        schemas.Popularity, "validate", lambda *args, **_: checked.append(validate(*args))
    )
    second.write_bytes(first.read_bytes())
    check_table(schemas.Popularity, second)
    assert not checked
    write_rows(schemas.Popularity, [row | {"withheld": True}], second)
    assert len(checked) == 1
    with pytest.raises(DataError, match="the table Items"):  # of another model
        check_table(schemas.Items, first)
    damaged = bytearray(first.read_bytes())
    damaged[10] ^= 1
    first.write_bytes(damaged)
    with pytest.raises(DataError, match="other bytes"):
        check_table(schemas.Popularity, first)


def test_the_last_preference_of_a_sequence_is_that_of_its_highest_block(tmp_path: Path) -> None:
    path = tmp_path / "preferences.parquet"
    rows = [
        {"sequence": sequence, "block": block, "items": block, "preference": f"{sequence}.{block}"}
        for sequence, block in ((1, 10), (0, 1), (1, 2), (0, 3), (0, 2), (7, 1))
    ]
    write_rows(schemas.Preferences, rows, path)
    assert read_last_preferences(path) == {0: "0.3", 1: "1.10", 7: "7.1"}


def test_an_invalid_memory_limit_is_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLLM_MSR_MEMORY", "plenty")
    said = "MLLM_MSR_MEMORY: expected a size such as 8GB; got 'plenty'"
    with pytest.raises(ParamsError, match=said), open_database(tmp_path / "spill"):
        pass


@EVERY
def test_written_rows_are_read_back_unchanged(model: AnyTable, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    assert write_rows(model, [ROWS[model]], path) == 1
    assert list(read_rows(model, path, order="1")) == [ROWS[model]]
    assert names(tmp_path) == ["t.parquet"]


@EVERY
def test_a_missing_column_is_refused_by_name(model: AnyTable, tmp_path: Path) -> None:
    whole = table_of(model, ROWS[model])
    for name in whole.column_names:
        path = write(tmp_path / "t.parquet", whole.drop_columns([name]))
        with pytest.raises(DataError, match=rf"t\.parquet.*\b{name}\b") as caught:
            check_table(model, path)
        assert "\n" not in str(caught.value)


@EVERY
def test_an_extra_column_is_refused_by_name(model: AnyTable, tmp_path: Path) -> None:
    whole = table_of(model, ROWS[model]).append_column("extra", [[1]])
    with pytest.raises(DataError, match="extra"):
        check_table(model, write(tmp_path / "t.parquet", whole))


@EVERY
def test_a_column_of_another_type_is_refused(model: AnyTable, tmp_path: Path) -> None:
    whole = table_of(model, ROWS[model])
    for index, field in enumerate(whole.schema):
        other = arrow.array(["x"]) if field.type != arrow.string() else arrow.array([1.5])
        path = write(tmp_path / "t.parquet", whole.set_column(index, field.name, other))
        with pytest.raises(DataError, match=f"column {field.name}: expected"):
            check_table(model, path)


@EVERY
def test_a_null_in_a_required_column_is_refused(model: AnyTable, tmp_path: Path) -> None:
    columns = model.to_schema().columns
    path = tmp_path / "t.parquet"
    for name, column in columns.items():
        rows = [ROWS[model] | {name: None}]
        if column.nullable:
            write_rows(model, rows, path)
        else:
            with pytest.raises(DataError, match=f"column {name}: expected"):
                write_rows(model, rows, path)


@EVERY
def test_a_repeated_row_is_refused(model: AnyTable, tmp_path: Path) -> None:
    if model in UNCHECKED:
        pytest.skip("its writer sees to uniqueness")
    with pytest.raises(DataError, match=r"t\.parquet.*unique"):
        write_rows(model, [ROWS[model]] * 2, tmp_path / "t.parquet")


@EVERY
def test_a_number_below_its_minimum_is_refused(model: AnyTable, tmp_path: Path) -> None:
    numbers = [name for name, value in ROWS[model].items() if type(value) is int]
    for name in numbers:
        with pytest.raises(DataError, match=f"column {name}: expected .*got .*-1"):
            write_rows(model, [ROWS[model] | {name: -1}], tmp_path / "t.parquet")


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column split: .*isin.*got .*dev"):
        write_rows(
            schemas.Scores, [ROWS[schemas.Scores] | {"split": "dev"}], tmp_path / "t.parquet"
        )


def test_a_catalogue_may_have_no_images(tmp_path: Path) -> None:
    assert write_rows(schemas.Images, [], tmp_path / "t.parquet") == 0
    assert list(read_rows(schemas.Images, tmp_path / "t.parquet", order="item")) == []


def test_a_missing_file_names_the_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file; run the stage that writes it"):
        check_table(schemas.Items, tmp_path / "t.parquet")


@pytest.mark.parametrize("content", [b"", b"item,title\na,b\n", b"PAR1" + b"\0" * 50])
def test_a_file_that_is_not_parquet_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match="expected a Parquet file") as caught:
        check_table(schemas.Items, path)
    assert "\n" not in str(caught.value)


def test_a_query_is_written_as_a_table_and_read_as_a_view(tmp_path: Path) -> None:
    path = tmp_path / "new" / "t.parquet"
    query = "SELECT 'a' || i AS item, i AS interactions, false AS withheld"
    query += " FROM range(3) AS r (i) ORDER BY i"
    with duckdb.connect() as connection:
        assert write_query(schemas.Popularity, connection, query, path) == 3
        read_table(schemas.Popularity, connection, path, "popularity")
        assert connection.sql("SELECT sum(interactions) FROM popularity").fetchall() == [(3,)]
    assert count_rows(path) == 3


def test_a_query_with_invalid_rows_keeps_the_earlier_table(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_rows(schemas.Popularity, [ROWS[schemas.Popularity]], path)
    before = path.read_bytes()
    query = "SELECT 'a' AS item, -1::BIGINT AS interactions, false AS withheld"
    with duckdb.connect() as connection, pytest.raises(DataError, match="interactions"):
        write_query(schemas.Popularity, connection, query, path)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["t.parquet"]


def test_a_table_is_written_and_read_in_exactly_the_named_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"item": "a", "interactions": 3, "withheld": False}
    folder = Path("hdfs:/games [2]/user=7/my *data?/it's")
    other = Path("hdfs:/games 2/user=7/my data1/it's")
    for made in (folder, other):
        made.mkdir(parents=True)
    one, two = folder / "one.parquet", folder / "two.parquet"
    write(other.absolute() / "one.parquet", arrow.table({"item": ["b"], "interactions": [9]}))
    assert write_rows(schemas.Popularity, [row], one) == 1
    with duckdb.connect() as connection:
        read_table(schemas.Popularity, connection, one, "popularity")
        assert write_query(schemas.Popularity, connection, "FROM popularity", two) == 1
    for path in (one, two):
        assert list(read_rows(schemas.Popularity, path, "item")) == [row]
        assert count_rows(path) == 1


def test_rows_of_several_groups_keep_their_order(tmp_path: Path) -> None:
    rows = ({"item": f"{n:05}", "interactions": n, "withheld": False} for n in range(2_500))
    assert write_rows(schemas.Popularity, rows, tmp_path / "t.parquet") == 2_500
    found = [
        row["interactions"] for row in read_rows(schemas.Popularity, tmp_path / "t.parquet", "item")
    ]
    assert found == list(range(2_500))


def failing_rows() -> Iterator[dict[str, Any]]:
    for number in range(1_500):
        yield {"item": str(number), "interactions": number, "withheld": False}
    raise KeyboardInterrupt


@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError])
def test_a_failed_write_keeps_the_earlier_table(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "t.parquet"
    write_rows(schemas.Popularity, [ROWS[schemas.Popularity]], path)
    before = path.read_bytes()
    bad = [ROWS[schemas.Popularity] | {"interactions": None}]
    with pytest.raises(error):
        write_rows(schemas.Popularity, bad if error is DataError else failing_rows(), path)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["t.parquet"]


FULL_DISK = """
import sys
from pathlib import Path
import duckdb
from mllm_msr.core.errors import DataError, ParamsError
from mllm_msr.core import (tables, schemas)
path, how = Path(sys.argv[1]), sys.argv[2]
numbers = "SELECT md5(i::VARCHAR) AS item, i AS interactions FROM range(200_000) AS r (i)"
try:
    with duckdb.connect() as connection:
        if how == "query":
            tables.write_query(schemas.Popularity, connection, numbers, path)
        else:
            rows = ({"item": i, "interactions": n} for i, n in connection.sql(numbers).fetchall())
            tables.write_rows(schemas.Popularity, rows, path)
except DataError as error:
    print(error)
"""


def limit_file_size() -> None:
    """Limit the size of files to 64 KiB, to imitate a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))


@pytest.mark.parametrize("how", ["query", "rows"])
def test_a_full_disk_keeps_the_earlier_table(how: str, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_rows(schemas.Popularity, [ROWS[schemas.Popularity]], path)
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), how],
        capture_output=True,
        text=True,
        preexec_fn=limit_file_size,
        check=False,
    )
    assert done.stdout.splitlines() == [
        f"{path}: expected room for the output; got a full disk;"
        " free some space and run again; earlier outputs are untouched"
    ], done.stderr
    assert path.read_bytes() == before
    assert names(tmp_path) == ["t.parquet"]


@EVERY
@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_a_non_finite_number_is_refused(model: AnyTable, number: float, tmp_path: Path) -> None:
    for name, value in ROWS[model].items():
        if isinstance(value, float):
            bad: object = number
        elif isinstance(value, list):
            bad = [value[0], number]
        else:
            continue
        rows = [ROWS[model] | {name: bad}]
        with pytest.raises(DataError, match=f"column {name}: expected .*got .*(inf|nan)"):
            write_rows(model, rows, tmp_path / "t.parquet")
        path = write(tmp_path / "other.parquet", table_of(model, *rows))  # with statistics
        with pytest.raises(DataError, match=f"column {name}: expected .*got .*(inf|nan)"):
            check_table(model, path)


# -- damaged bytes ---------------------------------------------------------------------------------


def write_by_query(model: AnyTable, path: Path) -> None:
    with duckdb.connect() as connection:
        connection.register("rows", table_of(model, ROWS[model]))
        write_query(model, connection, "FROM rows", path)


@EVERY
@pytest.mark.parametrize("how", ["query", "rows"])
def test_a_flipped_byte_is_detected(model: AnyTable, how: str, tmp_path: Path) -> None:
    path, damaged = tmp_path / "t.parquet", tmp_path / "damaged.parquet"
    if how == "rows":
        write_rows(model, [ROWS[model]], path)
    else:
        write_by_query(model, path)
    content = path.read_bytes()
    for place in range(3, len(content), 61):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        try:
            found = list(read_rows(model, damaged, order="1"))
        except DataError as error:
            assert "damaged.parquet" in str(error)  # noqa: PT017
        else:
            assert found == [ROWS[model]]


@pytest.mark.parametrize("how", ["query", "rows"])
def test_a_damaged_table_is_a_user_error(how: str, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    if how == "rows":
        write_rows(schemas.Popularity, [ROWS[schemas.Popularity]], path)
    else:
        write_by_query(schemas.Popularity, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        check_table(schemas.Popularity, path)
    assert str(caught.value) == (
        f"{path}: expected the bytes that were written; got other bytes: their SHA-256 is not the"
        " one in the footer; delete the file, run its stage again, and check the disk"
    )


@pytest.mark.parametrize("how", ["query", "rows"])
def test_equal_rows_give_equal_bytes(how: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        if how == "rows":
            write_rows(schemas.Scores, [ROWS[schemas.Scores]], tmp_path / name)
        else:
            write_by_query(schemas.Scores, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_table_without_a_digest_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", table_of(schemas.Popularity, ROWS[schemas.Popularity]))
    assert list(read_rows(schemas.Popularity, path, "item")) == [ROWS[schemas.Popularity]]


def test_an_item_named_like_a_digest_does_not_hide_the_digest(tmp_path: Path) -> None:
    item = f"{DIGEST_KEY}ab" + "sha256:" + "0" * 64
    path = tmp_path / "t.parquet"
    write_rows(schemas.Popularity, [ROWS[schemas.Popularity] | {"item": item}], path)
    assert [row["item"] for row in read_rows(schemas.Popularity, path, "item")] == [item]

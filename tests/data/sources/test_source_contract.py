"""Tables that another program wrote are checked against the contract, and read as they are."""

from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest
from typer.testing import CliRunner

from mllm_msr.cli.data import app
from mllm_msr.core.schemas import ImageSources, Interactions, Items
from mllm_msr.data.sources.contract import TABLES, find_violations, read_prepared

CREATE = {
    "interactions": 'CREATE TABLE interactions ("user" VARCHAR, item VARCHAR, timestamp BIGINT,'
    " position BIGINT)",
    "items": "CREATE TABLE items (item VARCHAR, title VARCHAR, description VARCHAR)",
    "image_sources": "CREATE TABLE image_sources (item VARCHAR, file VARCHAR, member VARCHAR,"
    " url VARCHAR)",
}
ROWS = {
    "interactions": "('ann', '1', 1700000000000, 1), ('ann', '2', 1700000000001, 2),"
    " ('bob', '2', 1700000000000, 3)",
    "items": "('1', 'Red kettle', NULL), ('2', NULL, 'Blue'), ('3', NULL, NULL)",
    "image_sources": "('1', 'images/1.png', NULL, NULL), ('2', NULL, NULL, 'https://a.org/2.png')",
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes the tables, changed by SQL, and returns their folder."""

    def write_tables(*changes: str, without: str = "", parts: bool = False) -> Path:
        folder = tmp_path / "prepared"
        (folder / "images").mkdir(parents=True)
        (folder / "images/1.png").touch()
        with duckdb.connect() as connection:
            for table, create in CREATE.items():
                connection.execute(create)
                connection.execute(f"INSERT INTO {table} VALUES {ROWS[table]}")
            for change in changes:
                connection.execute(change)
            for table in CREATE.keys() - {without}:
                if not parts:
                    connection.table(table).write_parquet(str(folder / f"{table}.parquet"))
                    continue
                (folder / table).mkdir()
                (folder / table / "_SUCCESS").touch()
                for part in (0, 1):
                    rows = f"SELECT * FROM {table} WHERE hash(item) % 2 = {part}"
                    place = folder / table / f"part-0000{part}.snappy.parquet"
                    connection.sql(rows).write_parquet(str(place))
        return folder

    return write_tables


def violations(folder: Path) -> list[str]:
    with duckdb.connect() as connection:
        return [str(each) for each in find_violations(connection, folder)]


def test_the_contract_has_the_columns_of_the_tables_that_preprocess_writes() -> None:
    models = {"interactions": Interactions, "items": Items, "image_sources": ImageSources}
    columns = {name: list(model.to_schema().columns) for name, model in models.items()}
    assert {table: list(names) for table, names in TABLES.items()} == columns


@pytest.mark.parametrize("parts", [False, True])
def test_tables_that_keep_the_contract_have_no_violation(write: Write, parts: bool) -> None:
    folder = write(parts=parts)
    assert violations(folder) == []
    ended = CliRunner().invoke(app, ["check", str(folder)])
    assert ended.exit_code == 0
    assert ended.output.endswith("keeps the contract: 3 interactions, 3 items, 2 image sources\n")


def test_a_catalogue_may_have_no_images(write: Write) -> None:
    assert violations(write(without="image_sources")) == []


INSERT = "INSERT INTO interactions VALUES "


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (INSERT + "('', '1', 1700000000000, 4)", "interactions: 1 row without user"),
        (INSERT + "('cid', NULL, 1700000000000, 4)", "interactions: 1 row without item"),
        (INSERT + "('cid', '1', 1700000000000, NULL)", "interactions: 1 row without position"),
        (INSERT + "('cid', '1', 1700000000000, -1)", "interactions: 1 row with a negative pos"),
        ("UPDATE interactions SET timestamp = 1700000000", "3 rows with a timestamp that is not"),
        (INSERT + "('cid', '1', NULL, 4)", "interactions: 1 row without timestamp while others"),
        (INSERT + "('ann', '1', 1700000000009, 4)", "1 row repeating a pair of user and item"),
        (INSERT + "('ann', '3', 1700000000000, 1)", "1 row of a user with the same timestamp"),
        (INSERT + "('cid', 'x', 1700000000000, 4)", "interactions: 1 row with an item that items"),
        ("DELETE FROM interactions", "interactions: rows are missing: it has none"),
        ("INSERT INTO items VALUES (NULL, 'A', NULL)", "items: 1 row without item"),
        ("INSERT INTO items VALUES ('1', 'A', NULL)", "items: 1 row repeating an item"),
        ("UPDATE items SET title = ' A  b'", "items: 3 rows whose title or description is empty"),
        ("UPDATE items SET description = ''", "items: 3 rows whose title or description is empty"),
        ("UPDATE image_sources SET item = '1'", "image_sources: 1 row repeating an item"),
        ("UPDATE image_sources SET item = item || 'x'", "image_sources: 2 rows with an item that"),
        ("UPDATE image_sources SET url = 'ftp://a.org'", "image_sources: 1 row with both file and"),
        ("UPDATE image_sources SET url = 'ftp://a.org'", "image_sources: 2 rows with a url that"),
        ("UPDATE image_sources SET member = 'a'", "image_sources: 1 row with a member and no file"),
        ("UPDATE image_sources SET file = '../a' WHERE item = '1'", "a file that is no path below"),
        ("UPDATE image_sources SET file = 'a.png' WHERE item = '1'", "a file that is missing, suc"),
        ("ALTER TABLE items DROP title", "items: no column title: it has item, description"),
        ("ALTER TABLE items ADD price INT", "items: unknown column price: only item, title"),
        (
            "ALTER TABLE interactions ALTER position TYPE INTEGER",
            "interactions: column position is not BIGINT: it is INTEGER",
        ),
    ],
)
def test_each_violation_is_named_with_a_count_and_an_example(
    write: Write, change: str, expected: str
) -> None:
    found = violations(write(change))
    assert any(expected in each for each in found), found


def test_all_violations_are_printed_and_the_exit_code_is_1(write: Write) -> None:
    folder = write(INSERT + "('ann', 'x', 5, 4)", "UPDATE items SET title = ''")
    ended = CliRunner().invoke(app, ["check", str(folder)])
    assert ended.exit_code == 1
    lines = ended.output.splitlines()
    assert lines[0] == (
        "interactions: 1 row with a timestamp that is not milliseconds from 1973 to 2100, such as"
        " user 'ann', item 'x', timestamp '5', position '4'"
    )
    assert len(lines) == 3


def test_a_missing_table_and_a_damaged_one_are_violations(write: Write) -> None:
    folder = write(without="items")
    (folder / "interactions.parquet").write_bytes(b"no Parquet")
    found = violations(folder)
    assert len(found) == 2
    assert found[0].startswith("interactions: not readable as Parquet")
    assert found[1].startswith("items: no file items.parquet or folder items of part files")


@pytest.mark.parametrize("table", TABLES)
def test_a_file_beside_a_folder_of_the_same_table_is_refused(write: Write, table: str) -> None:
    folder = write()
    (folder / table).mkdir()
    (found,) = violations(folder)
    assert found == f"{table}: expected one of {table}.parquet and {table}: got both; remove one"


@pytest.mark.parametrize("other", ["day=1/part-0.parquet", "part-00002.csv", "old.parquet/a"])
def test_a_folder_with_other_than_parquet_files_is_refused(write: Write, other: str) -> None:
    folder = write(parts=True)
    (folder / "interactions" / other).parent.mkdir(exist_ok=True)
    (folder / "interactions" / other).touch()
    (found,) = violations(folder)
    assert found == (
        "interactions: expected a folder of Parquet files, not partitioned by a column: got"
        f" {other.partition('/')[0]}; write it again as one file, or without partitions"
    )


@pytest.mark.parametrize("length", [0, 4, 100])
def test_a_truncated_part_is_named(write: Write, length: int) -> None:
    folder = write(parts=True)
    part = folder / "interactions" / "part-00001.snappy.parquet"
    part.write_bytes(part.read_bytes()[:length])
    (found,) = violations(folder)
    assert found.startswith("interactions: not readable as Parquet: part-00001.snappy.parquet: ")


@pytest.mark.parametrize("table", ["items", "interactions"])
def test_a_part_whose_pages_are_damaged_is_named(write: Write, table: str) -> None:
    folder = write(parts=True)
    part = folder / table / "part-00001.snappy.parquet"
    content = part.read_bytes()
    part.write_bytes(b"PAR1" + bytes([255]) * 60 + content[64:])
    (found,) = violations(folder)
    assert found.startswith(f"{table}: not readable as Parquet: part-00001.snappy.parquet: ")
    assert "\n" not in found


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("*, 1 AS price", "interactions: unknown column price: only user, item, timestamp,"),
        (
            "* REPLACE (timestamp::DOUBLE AS timestamp)",
            "interactions: column timestamp is not BIGINT: it is DOUBLE in part-00001.snappy",
        ),
        ("* EXCLUDE position", "interactions: no column position: it has user, item, timestamp in"),
    ],
)
def test_the_columns_of_each_part_are_checked(write: Write, columns: str, expected: str) -> None:
    folder = write(parts=True)
    part = folder / "interactions" / "part-00001.snappy.parquet"
    with duckdb.connect() as connection:
        connection.execute(f"CREATE TABLE part AS SELECT {columns} FROM '{part}'")
        connection.table("part").write_parquet(str(part))
    (found,) = violations(folder)
    assert found.startswith(expected)
    assert found.endswith("in part-00001.snappy.parquet")


def test_a_file_name_that_is_too_long_is_a_violation(write: Write) -> None:
    folder = write(f"INSERT INTO image_sources VALUES ('3', '{'x' * 5_000}', NULL, NULL)")
    (found,) = violations(folder)
    assert "with a file that is missing" in found


def test_the_rows_are_read_as_they_are(write: Write) -> None:
    folder = write(parts=True)
    with duckdb.connect() as connection:
        queries = read_prepared(connection, folder)
        rows = [connection.execute(query).fetchall() for query in queries]
    assert rows[0] == [
        ("ann", "1", 1700000000000, 1),
        ("ann", "2", 1700000000001, 2),
        ("bob", "2", 1700000000000, 3),
    ]
    assert rows[2][0] == ("1", f"{folder}/images/1.png", None, None)

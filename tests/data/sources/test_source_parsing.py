"""Reading of raw files: complete, in order and from the exact path, or an error."""

import csv
import gzip
import json
import tempfile
from pathlib import Path

import duckdb
import pyarrow as arrow
import pyarrow.parquet
import pytest
import yaml
from folder_names import folder_names
from hypothesis import given, settings

from mllm_msr.core.errors import DataError
from mllm_msr.core.files import file_digest
from mllm_msr.core.params import AmazonParams, MicroLensParams, PreprocessParams
from mllm_msr.core.tables import open_database
from mllm_msr.data.sources import SOURCES
from mllm_msr.data.sources.cleaning import IMAGES, INTERACTIONS, ITEMS, clean
from mllm_msr.data.sources.parsing import list_zip, view_records
from mllm_msr.data.sources.tables import DEFAULT_LAYOUT
from stages.preprocess import preprocess

FORMS = ["csv", "tsv", "jsonl", "parquet"]
INTERNAL = [
    *("row", "position", "file_row_number", "filename", "file_index", "json", "c0", "record"),
    *("cell", "known", "Item", "ITEM", "User", "user_1"),
]
SETTINGS = PreprocessParams(
    allow_pocket_model=False,
    source="tables",
    unknown_items="error",
    microlens=MicroLensParams(covers="optional"),
    amazon=AmazonParams(
        category="Things",
        min_rating=0.0,
        verified_only=False,
        bad_records="error",
        text_length=99,
        image_size="large",
    ),
    tables=DEFAULT_LAYOUT,
)


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    form = path.suffix[1:]
    if form == "parquet":
        table = arrow.table([[row[key] for row in rows] for key in rows[0]], list(rows[0]))
        arrow.parquet.write_table(table, path.absolute(), write_page_checksum=True)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t" if form == "tsv" else ",")
            writer.writerows([list(rows[0]), *([*row.values()] for row in rows)])
    return path


def records(file: Path, *columns: str) -> list[tuple[object, ...]]:
    with duckdb.connect() as connection:
        view_records(connection, "records", file, columns)
        return connection.execute("FROM records ORDER BY row").fetchall()


def with_form(raw: Path, name: str, form: str) -> Path:
    """Remove the CSV file that another format replaces."""
    (raw / f"{name}.csv").unlink()
    return raw / f"{name}.{form}"


# -- paths -----------------------------------------------------------------------------------------


def write_tables(folder: Path, user: str) -> None:
    write(folder / "interactions.jsonl", [{"user": user, "item": "1", "timestamp": 1700000000000}])
    write(folder / "items.parquet", [{"item": "1", "title": "Red kettle"}])


def write_microlens(folder: Path, user: str) -> None:
    (folder / "MicroLens-0k_pairs.tsv").write_text(f"{user}\t1\n")
    (folder / "MicroLens-0k_titles.csv").write_text("item,title\n1,Red kettle\n")


def write_amazon(folder: Path, user: str) -> None:
    review = {"user_id": user, "parent_asin": "1", "timestamp": 1700000000000, "rating": 5.0}
    content = gzip.compress(json.dumps(review).encode())
    (folder / "Things.jsonl.gz").write_bytes(content)
    write(folder / "meta_Things.jsonl", [{"parent_asin": "1", "title": "Red kettle"}])


WRITERS = {"tables": write_tables, "microlens": write_microlens, "amazon": write_amazon}


@settings(max_examples=30)
@given(folder_names)
def test_every_source_reads_exactly_the_named_folder(name: str) -> None:
    with tempfile.TemporaryDirectory() as parent, pytest.MonkeyPatch.context() as patch:
        patch.chdir(parent)
        for source, write_source in WRITERS.items():
            for number, folder in enumerate([name, "games 2", "my data1", "x", "a"]):
                if number == 0 or folder != name:
                    Path(folder).mkdir(exist_ok=True)
                    write_source(Path(folder), str(number))
            with duckdb.connect() as connection:
                SOURCES[source](connection, Path(name), SETTINGS)
                found = connection.execute('SELECT "user" FROM raw_interactions').fetchall()
                titles = connection.execute("SELECT title FROM raw_items").fetchall()
            assert (found, titles) == ([("0",)], [("Red kettle",)])


# -- columns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", INTERNAL)
def test_unused_columns_may_have_any_name(tmp_path, form, name):
    rows = [{name: "x", "user": f"u{n}", "item": "1"} for n in range(3)]
    file = write(tmp_path / f"a.{form}", rows)
    assert records(file, "user", "item") == [(f"u{n}", "1", n + 1) for n in range(3)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*INTERNAL, "a/b~c", 'a"b', "a.b", "$.a[0]"])
def test_a_wanted_column_may_have_any_name(tmp_path, form, name):
    file = write(tmp_path / f"a.{form}", [{"user": "no", name: "yes"}])
    with duckdb.connect() as connection:
        view_records(connection, "records", file, ["user"], (), {"user": name})
        assert connection.execute("FROM records").fetchall() == [("yes", 1)]


@pytest.mark.parametrize(
    "content",
    [
        ",user,item\n0,ann,1\n1,bob,2\n",
        "user,item,\nann,1,\nbob,2,\n",
        ",user,,item\n,ann,,1\n,bob,,2\n",
        'user,"a\nb",item\nann,,1\nbob,,2\n',
        "user,\xa0,\u2028,item\nann,,,1\nbob,,,2\n",
        "note,user,item,note\nx,ann,1,y\nx,bob,2,y\n",
    ],
    ids=["index of pandas", "trailing comma", "two", "line break", "odd spaces", "twice"],
)
def test_unused_csv_columns_may_have_any_header(tmp_path, content):
    (tmp_path / "a.csv").write_text(content)
    assert records(tmp_path / "a.csv", "user", "item") == [("ann", "1", 1), ("bob", "2", 2)]


def test_an_optional_column_of_parquet_may_be_all_null(raw, read):
    file = with_form(raw, "items", "parquet")
    write(file, [{"item": i, "title": "x", "description": None} for i in ("001", "1")])
    assert [row[2] for row in read(raw).items] == [None, None]


# -- JSON Lines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not JSON", "Expecting value"),
        (b'{"item": "\\ud800", "title": "x"}', r"half of a surrogate pair, such as \\ud800"),
        (b'{"item": "\xff", "title": "x"}', "invalid start byte"),
        (b'{"item": "1"', "Expecting ','"),
        (b'"text"', "no object"),
    ],
)
@pytest.mark.parametrize("line_number", [1, 2, 4])
def test_a_line_that_is_no_json_object_is_an_error(raw, read, line, message, line_number):
    lines = [b'{"item": "001", "title": "x"}', b"", b'{"item": "1", "title": "y"}']
    lines.insert(line_number - 1, line)
    with_form(raw, "items", "jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=rf"jsonl, line {line_number}: expected .*got .*{message}"):
        read(raw)


def test_an_integer_of_any_length_keeps_its_digits(tmp_path):
    long = 12345678901234567890123
    file = write(tmp_path / "a.jsonl", [{"item": long}, {"item": -long}, {"item": "007"}])
    assert [row[0] for row in records(file, "item")] == [str(long), str(-long), "007"]


# -- damage ----------------------------------------------------------------------------------------


def damage(content: bytes, what: str) -> bytes:
    if what == "flipped bit":
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    return {
        "wrong checksum": content[:-8] + b"abcd" + content[-4:],
        "cut short": content[:-5],
        "something after it": content + b"<html>",
        "second part cut short": content + content[:30],
    }[what]


@pytest.mark.parametrize(
    "what",
    ["flipped bit", "wrong checksum", "cut short", "something after it", "second part cut short"],
)
@pytest.mark.parametrize("source", ["tables", "amazon"])
def test_a_damaged_gzip_file_is_an_error(raw, read, what, source):
    if source == "tables":
        lines = "".join(f'{{"item": "{n:03}", "title": "{n * n}"}}\n' for n in range(2000))
        file = with_form(raw, "items", "jsonl.gz")
        options = {"tables": {"items_file": file.name}}
    else:
        write_amazon(raw, "ann")
        review = (
            '{{"user_id": "{}", "parent_asin": "1", "timestamp": 1700000000000, "rating": 5}}\n'
        )
        lines = "".join(review.format(n * n) for n in range(2000))
        file, options = raw / "Things.jsonl.gz", {"category": "Things", "bad_records": "drop"}
    file.write_bytes(damage(gzip.compress(lines.encode()), what))
    with pytest.raises(DataError, match=r"gz: expected a valid gzip file; .*download it again$"):
        read(raw, source, **options)


def test_a_gzip_file_of_several_members_is_read_completely(raw, read):
    lines = [b'{"item": "001", "title": "x"}\n', b'{"item": "1", "title": "y"}\n']
    file = with_form(raw, "items", "jsonl.gz")
    file.write_bytes(b"".join(map(gzip.compress, lines)))
    assert len(read(raw, tables={"items_file": file.name}).items) == 2


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_parquet_page_with_a_wrong_checksum_is_refused(tmp_path, compression):
    ids = [f"u{n * n}" for n in range(5000)]
    file = tmp_path / "a.parquet"
    arrow.parquet.write_table(
        arrow.table({"user": ids}),
        file,
        compression=compression,
        write_page_checksum=True,
        use_dictionary=False,
    )
    assert len(records(file, "user")) == 5000
    file.write_bytes(damage(file.read_bytes(), "flipped bit"))
    with pytest.raises(DataError, match=r"a\.parquet: expected a well-formed parquet .*checksum"):
        records(file, "user")


def test_a_truncated_parquet_file_is_refused(tmp_path):
    file = write(tmp_path / "a.parquet", [{"user": "ann"}])
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match="expected a well-formed parquet file"):
        records(file, "user")


def test_a_file_that_is_no_zip_is_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"expected a valid zip file; .*download it again"):
        list_zip(tmp_path / "a.zip", tmp_path)


# -- reads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unknown_items", ["drop", "keep"])
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_a_text_file_is_read_once(tmp_path, form, unknown_items):
    interactions, items = tmp_path / f"interactions.{form}", tmp_path / f"items.{form}"
    row = {"user": "ann", "timestamp": 1700000000000, "rating": 4}
    write(interactions, [row | {"item": f"i{n}"} for n in range(1000)] + [row | {"item": "i1"}])
    write(items, [{"item": f"i{n}", "title": "kettle", "image": f"{n}.png"} for n in range(999)])
    layout = DEFAULT_LAYOUT.model_copy(update={"min_rating": 2.0})
    settings = SETTINGS.model_copy(update={"tables": layout, "unknown_items": unknown_items})
    with duckdb.connect() as connection:
        connection.execute("CALL enable_logging('FileSystem')")
        clean(connection, SOURCES["tables"](connection, tmp_path, settings), unknown_items)
        for query in (INTERACTIONS, ITEMS, IMAGES):
            assert len(connection.execute(query).fetchall()) in (999, 1000)
        read = connection.execute(
            "SELECT path, sum(bytes) FROM duckdb_logs_parsed('FileSystem')"
            " WHERE op = 'READ' AND path IN ($1, $2) GROUP BY path",
            [str(interactions), str(items)],
        ).fetchall()
    assert dict(read) == {str(file): file.stat().st_size for file in (interactions, items)}


def test_equal_rows_in_any_text_form_give_equal_bytes(tmp_path):
    digests = set()
    for form in ("csv", "tsv", "jsonl"):
        folder = tmp_path / form
        folder.mkdir()
        rows = [{"user": "ann", "item": f"i{n}", "timestamp": 1700000000000} for n in range(9)]
        write(folder / f"interactions.{form}", rows)
        write(folder / f"items.{form}", [{"item": f"i{n}", "title": "kettle"} for n in range(9)])
        settings = folder / "params.yaml"
        changed = yaml.safe_load(Path("params.yaml").read_text())
        changed["preprocess"]["source"] = "tables"
        settings.write_text(yaml.safe_dump(changed))
        preprocess(raw=folder, out=folder / "out", params=settings)
        digests.add(file_digest(folder / "out" / "interactions.parquet"))
    assert len(digests) == 1


# -- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_row_numbers_do_not_depend_on_threads(tmp_path, form, ordered):
    file = tmp_path / f"a.{form}"
    kind = {"csv": "csv", "jsonl": "json", "parquet": "parquet, ROW_GROUP_SIZE 4096"}[form]
    duckdb.execute(
        f"COPY (SELECT 'u' || range AS user FROM range(200000)) TO '{file}' (FORMAT {kind})"
    )
    with open_database(tmp_path / "spill", ordered) as connection:
        connection.execute("SET threads = 8")
        view_records(connection, "records", file, ["user"])
        connection.execute("CREATE TABLE copied AS FROM records")
        wrong = connection.execute("FROM copied WHERE \"user\" <> 'u' || (row - 1) LIMIT 3")
        assert wrong.fetchall() == []
        assert connection.execute("SELECT count(*) FROM copied").fetchall() == [(200_000,)]


def write_parts(folder: Path, names: list[str]) -> None:
    """Write two interactions into each part, all with the same time."""
    folder.mkdir()
    (folder / "_SUCCESS").touch()
    (folder / ".part.crc").touch()
    for number, name in enumerate(names):
        rows = [
            {"user": "ann", "item": f"{number}{n}", "timestamp": 1700000000000} for n in range(2)
        ]
        write(folder / name, rows)


@pytest.mark.parametrize("pattern", ["part-{:05}-c000.snappy.parquet", "part.{}.parquet"])
def test_the_parts_of_a_folder_are_read_in_the_order_of_their_numbers(raw, read, pattern):
    write_parts(
        with_form(raw, "interactions", "parquet"), [pattern.format(number) for number in range(12)]
    )
    found = read(raw, unknown_items="keep").interactions
    assert [row[1] for row in found] == [f"{part}{n}" for part in range(12) for n in range(2)]
    assert [row[3] for row in found] == list(range(1, 25))


def test_an_error_in_a_folder_has_the_part_and_its_row(raw, read):
    folder = with_form(raw, "interactions", "parquet")
    write_parts(folder, ["part-0.parquet", "part-1.parquet"])
    rows = [{"user": "ann", "item": "001", "timestamp": n} for n in (1700000000000, 17)]
    write(folder / "part-2.parquet", rows)
    with pytest.raises(DataError, match=r"interactions\.parquet/part-2\.parquet, row 2, timestamp"):
        read(raw, unknown_items="keep")


def test_parts_may_write_ids_as_texts_or_as_integers(tmp_path):
    folder = tmp_path / "a.parquet"
    folder.mkdir()
    write(folder / "1.parquet", [{"item": 7}])
    write(folder / "2.parquet", [{"item": "007"}])
    assert records(folder, "item") == [("7", 1), ("007", 2)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "a folder of Parquet files.*; got none"),
        (["day=1/part.parquet"], "not partitioned by a column; got day=1"),
        (["1.parquet", "notes.txt"], "got notes.txt"),
    ],
)
def test_a_folder_with_other_files_is_refused(tmp_path, names, message):
    folder = tmp_path / "a.parquet"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    with pytest.raises(DataError, match=message):
        records(folder, "item")


def test_parts_with_other_columns_are_refused(tmp_path):
    folder = tmp_path / "a.parquet"
    folder.mkdir()
    write(folder / "1.parquet", [{"item": "7", "title": "x"}])
    write(folder / "2.parquet", [{"item": "8"}])
    with pytest.raises(DataError, match=r"2\.parquet: expected the columns item, title, as in"):
        records(folder, "item")


def test_a_folder_in_place_of_a_csv_file_is_refused(tmp_path):
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(DataError, match=r"a\.csv: expected a file; got a folder"):
        records(tmp_path / "a.csv", "item")

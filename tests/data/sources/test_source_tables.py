"""The reader of a user's own tables, in four file formats."""

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path

import duckdb
import pyarrow as arrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_msr.core.errors import DataError
from mllm_msr.data.sources.parsing import view_records


def test_ids_are_texts_and_a_repeated_pair_keeps_its_earliest_time(raw, read):
    tables = read(raw)
    assert tables.interactions == [
        ("ann", "1", 1700000001000, 3),
        ("ann", "001", 1700000002000, 4),
        ("bob", "1", 1700000001000, 2),
    ]
    assert tables.items == [("001", "Red kettle", None), ("1", "Blue teapot", None)]
    assert tables.images == []
    assert tables.dropped == {
        "interactions_with_unknown_items": 0,
        "users_left_without_interactions": 0,
        "items_left_without_interactions": 0,
        "images_of_unknown_items": 0,
        "repeated_interactions": 1,
    }


def test_a_repeated_pair_at_the_same_time_keeps_the_first_row(raw, read):
    (raw / "interactions.csv").write_text(
        "user,item,timestamp\n" + "ann,1,1700000001000\nann,001,1700000001000\n" * 2
    )
    assert [row[1:] for row in read(raw).interactions] == [
        ("1", 1700000001000, 1),
        ("001", 1700000001000, 2),
    ]


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_tables(tmp_path, read, form):
    interactions = [
        {"user": "007", "item": "b", "timestamp": 1700000001000, "rating": 5},
        {"user": "7", "item": "a", "timestamp": 1700000000000, "rating": 1},
    ]
    items = [
        {"item": "a", "title": 'Say "hi",\nworld 🫖', "description": None, "image": "pics/a.png"},
        {"item": "b", "title": None, "description": "Tall", "image": None},
    ]
    for name, rows in (("interactions", interactions), ("items", items)):
        _write(tmp_path / f"{name}.{form}", rows)
    tables = read(tmp_path)
    assert tables.interactions == [
        ("007", "b", 1700000001000, 1),
        ("7", "a", 1700000000000, 2),
    ]
    assert tables.items == [("a", 'Say "hi", world 🫖', None), ("b", None, "Tall")]
    assert tables.images == [("a", f"{tmp_path}/pics/a.png", None, None)]


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(raw, read):
    (raw / "items.csv").write_bytes(b'\xef\xbb\xbf"item",title\r\n"001",a\r\n\r\n1,b\r\n')
    assert read(raw).items == [("001", "a", None), ("1", "b", None)]


def test_a_line_that_starts_with_a_hash_is_no_comment(raw, read):
    (raw / "items.csv").write_text("item,title\n001,#tag\n1,x\n#,y\n")
    assert read(raw).items == [("#", "y", None), ("001", "#tag", None), ("1", "x", None)]


@pytest.mark.parametrize(
    "path", ["../secret.png", "pics/../../secret.png", "/etc/secret.png", "c:\\secret.png"]
)
def test_an_image_outside_the_folder_is_refused(raw, read, path):
    (raw / "items.csv").write_text(f"item,title,image\n001,a,\n1,b,{path}\n")
    with pytest.raises(
        DataError, match=r"items\.csv, row 2, image: expected a path below"
    ) as error:
        read(raw)
    assert repr(path) in str(error.value)


def test_an_image_may_be_a_url(raw, read):
    (raw / "items.csv").write_text(
        "item,title,image\n001,a,HTTPS://example.org/../a.png\n1,b,b.png\n"
    )
    assert read(raw).images == [
        ("001", None, None, "HTTPS://example.org/../a.png"),
        ("1", f"{raw}/b.png", None, None),
    ]


@pytest.mark.parametrize("place", ["ftp://example.org/a.png", "file:///etc/secret.png"])
def test_a_url_of_another_scheme_does_not_leave_the_folder(raw, read, place):
    (raw / "items.csv").write_text(f"item,title,image\n001,a,{place}\n1,b,\n")
    assert read(raw).images == [("001", f"{raw}/{place}", None, None)]


def test_two_formats_of_one_table_are_refused(raw, read):
    (raw / "items.tsv").write_text("item\ttitle\n")
    with pytest.raises(DataError, match=r"got items\.csv, items\.tsv; keep one of them"):
        read(raw)


def with_jsonl(raw: Path, name: str, content: bytes) -> None:
    """Replace a CSV file by JSON Lines."""
    (raw / f"{name}.csv").unlink()
    (raw / f"{name}.jsonl").write_bytes(content)


ITEM_LINES = b'{"item": "001", "title": "Red kettle"}\n{"item": "1", "title": "Blue teapot"}\n'


def test_json_lines_may_have_windows_line_ends(raw, read):
    with_jsonl(raw, "items", ITEM_LINES.replace(b"\n", b"\r\n"))
    assert read(raw).items == [("001", "Red kettle", None), ("1", "Blue teapot", None)]


def test_a_byte_order_mark_before_json_is_refused(raw, read):
    with_jsonl(raw, "items", b"\xef\xbb\xbf" + ITEM_LINES)
    with pytest.raises(
        DataError, match=r"items\.jsonl, line 1: expected JSON Lines without a byte"
    ):
        read(raw)


def test_a_key_that_no_line_has_is_a_missing_column(raw, read):
    with_jsonl(raw, "items", b'{"user": "ann", "item": "1", "timestamp": 1700000000000}\n' * 2)
    message = r"columns item, title; got user, item, timestamp; add title"
    with pytest.raises(DataError, match=rf"items\.jsonl: expected the {message}"):
        read(raw)


def test_a_key_of_a_later_line_or_of_only_nulls_is_a_column(raw, read):
    with_jsonl(raw, "items", b'{"item": "1"}\n{"item": "001", "title": "Red kettle"}\n')
    assert read(raw).items == [("001", "Red kettle", None), ("1", None, None)]
    (raw / "items.jsonl").write_bytes(b'{"item": "1", "title": null}\n{"item": "001"}\n')
    assert read(raw).items == [("001", None, None), ("1", None, None)]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_swapped_files_are_detected_by_their_columns(raw, read, form):
    if form == "jsonl":
        line = b'{"user": "ann", "item": "001", "timestamp": 1700000003000}\n'
        with_jsonl(raw, "interactions", line)
        with_jsonl(raw, "items", ITEM_LINES)
    one, other = raw / f"interactions.{form}", raw / f"items.{form}"
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    message = rf"interactions\.{form}: expected the columns user, item, timestamp; got item, title"
    with pytest.raises(DataError, match=f"{message}; add user, timestamp"):
        read(raw)


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet"])
def test_a_gzip_file_without_its_suffix_is_refused(raw, read, form):
    (raw / "items.csv").unlink()
    (raw / f"items.{form}").write_bytes(gzip.compress(ITEM_LINES, mtime=0))
    with pytest.raises(
        DataError, match=rf"items\.{form}.*: expected a well-formed {form}"
    ) as error:
        read(raw)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("header", ["item, title", "item ,title", "item,title "])
def test_spaces_around_a_column_name_are_an_error(raw, read, header):
    (raw / "items.csv").write_text(f"{header}\n001, Red kettle\n")
    with pytest.raises(
        DataError, match=r"items\.csv, header: expected names of columns without spa"
    ):
        read(raw)


cell = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(cell, cell), min_size=1, max_size=5, unique_by=lambda row: row[0]),
    st.sampled_from([("csv", ",", "\n"), ("csv", ",", "\r\n"), ("tsv", "\t", "\n")]),
)
def test_texts_survive_csv_with_quotes_newlines_commas_and_unicode(rows, form):
    suffix, delimiter, line_end = form
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writerows([("item", "title"), *rows])
    with tempfile.TemporaryDirectory() as folder, duckdb.connect() as connection:
        file = Path(folder) / f"items.{suffix}"
        file.write_bytes(text.getvalue().encode())
        view_records(connection, "records", file, ("item", "title"))
        assert connection.execute("SELECT item, title FROM records ORDER BY row").fetchall() == rows


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    if path.suffix == ".parquet":
        arrow.parquet.write_table(arrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(
                stream, rows[0], delimiter="\t" if path.suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["csv", "parquet", "json"])
def test_a_user_with_a_million_interactions_is_read(raw, read, form):
    interactions = (
        "SELECT 'ann' AS user, '00' || range AS item, 1700000000000 AS timestamp"
        " FROM range(1000000)"
    )
    (raw / "interactions.csv").unlink()
    file = raw / f"interactions.{'jsonl' if form == 'json' else form}"
    duckdb.sql(f"COPY ({interactions}) TO '{file}' (FORMAT {form})")
    tables = read(raw, unknown_items="keep")
    assert len(tables.interactions) == 1_000_000
    assert tables.interactions[-1] == ("ann", "00999999", 1700000000000, 1_000_000)

"""The cleaning rules of every source, and their errors."""

import re
import unicodedata
from pathlib import Path

import duckdb
import pyarrow as arrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_msr.core.errors import DataError
from mllm_msr.data.sources.cleaning import fold

HEAD = "user,item,timestamp\n"
GOOD = "ann,1,1700000000000\n"

BAD_FILES = {
    # name: (file, its content or None for no file, place, message)
    "missing file": ("items.csv", None, "raw", r"one items\.csv or .*; got interactions\.csv"),
    "empty file": ("items.csv", b"", r"items\.csv", "columns item, title; got an empty file"),
    "header only": ("items.csv", b"item,title\n", r"items\.csv", "at least one row; got none"),
    "empty interactions": ("interactions.csv", HEAD.encode(), r"interactions\.csv", "got none"),
    "missing column": (
        "interactions.csv",
        b"user_id,item,time\n1,1,1\n",
        r"interactions\.csv",
        "columns user, item, timestamp; got user_id, item, time; add user, timestamp",
    ),
    "no header": ("items.csv", b"1,Kettle\n", r"items\.csv", "got 1, Kettle"),
    "wrong separator": ("items.csv", b"item;title\n1;x\n", r"items\.csv", "got item;title"),
    "column twice": ("items.csv", b"item,title,item\n", r"items\.csv", "item again"),
    "not UTF-8": ("items.csv", b"item,title\n1,x\n2,\xff\n", r"line 3", "not utf-8"),
    "UTF-16": ("items.csv", "item,title\n".encode("utf-16"), r"items\.csv", "UTF-8"),
    "too few cells": ("items.csv", b"item,title\n1,x\n2\n", "line 3", "Columns: 2 Found: 1"),
    "too many cells": ("items.csv", b"item,title\n1,x,y\n", "line 2", "Columns: 2 Found: 3"),
    "open quote": ("items.csv", b'item,title\n1,x\n2,"y\n3,z\n', "line 3", "unterminated quote"),
    "mixed line ends": ("items.csv", b"item,title\n1,x\r\n2,y\n", r"items\.csv", "line ends"),
    "a zip": ("items.csv", b"PK\x03\x04\x14\x00\x08\x00\xff\xfe", r"items\.csv", "UTF-8"),
    "duplicate item": (
        "items.csv",
        b"item,title\n1,x\n2,y\n1,z\n",
        "rows 1 and 3",
        "every item once; got '1' again",
    ),
    "item without id": ("items.csv", b"item,title\n1,x\n,y\n", "row 2, item", "an empty cell"),
    "unknown item": (
        "interactions.csv",
        f"{HEAD}{GOOD}ann,9,1700000000000\n".encode(),
        "row 2, item",
        r"1 of 2 with other items, first '9'; .* preprocess\.unknown_items",
    ),
    "only unknown items": (
        "interactions.csv",
        f"{HEAD}ann,9,1700000000000\n".encode(),
        "row 1, item",
        "1 of 1 with other items, first '9'; add the items",
    ),
    "a blank first line": (
        "interactions.csv",
        f" \n{HEAD}{GOOD}".encode(),
        "interactions.csv, line 1",
        "a header with the names of the columns; got a blank first line; remove the line",
    ),
    "no user": ("interactions.csv", f"{HEAD}{GOOD},1,5\n".encode(), "row 2, user", "empty cell"),
    "no item": ("interactions.csv", f"{HEAD}ann,,5\n".encode(), "row 1, item", "empty cell"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_is_a_one_line_error_with_place_and_fix(raw, read, what):
    name, content, where, message = BAD_FILES[what]
    if content is None:
        (raw / name).unlink()
    else:
        (raw / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(raw)
    assert "\n" not in str(error.value)
    assert re.search(f"{where}.*: expected .*{message}", str(error.value)), error.value


@pytest.mark.parametrize(
    ("timestamp", "got"),
    [
        ("", "got an empty cell; fill it"),
        ("yesterday", "got 'yesterday'; correct it"),
        ("2024-05-01 10:00:00", "got '2024-05-01 10:00:00'"),
        ("1700000000000.0", "got '1700000000000.0'; write whole numbers"),
        ("1.7e12", r"got '1\.7e12'; write whole numbers, without a decimal point or exponent"),
        ("1.5.2024", r"got '1\.5\.2024'; correct it"),
        ("-1", "got '-1'; correct it"),
        ("0", "got '0'; correct it"),
        (
            "1700000000",
            r"like seconds \(2023-11-14\), set preprocess\.tables\.timestamp_unit to sec",
        ),
        ("1700000000000000", r"these look like microseconds \(2023-11-14\)"),
        ("1700000000000000000", r"these look like nanoseconds \(2023-11-14\)"),
        ("4200000000000", "before 2100; got '4200000000000"),
        ("9" * 40, "got '9999"),
    ],
)
def test_an_implausible_timestamp_is_an_error_with_a_guess_of_the_unit(raw, read, timestamp, got):
    (raw / "interactions.csv").write_text(f"{HEAD}{GOOD}ann,001,{timestamp}\n")
    with pytest.raises(DataError, match=rf"interactions\.csv, row 2, timestamp: .*{got}"):
        read(raw)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"item": "2", "title"', "line 2: .*Expecting"),
        ("[1, 2]", "line 2: .*no object"),
        ('{"item": ["2"], "title": "x"}', r'row 2, item: expected a text or .*got .\["2"\]'),
        ('{"item": 2.0, "title": "x"}', "row 2, item: .*got '2.0'"),
        ('{"item": true, "title": "x"}', "row 2, item: .*got 'true'"),
        ('{"title": "x"}', "row 2, item: expected a value; got an empty cell"),
        ('{"item": 1, "title": "x"}', "rows 1 and 2: .*'1' again"),
    ],
)
def test_a_bad_json_line_is_an_error(raw, read, line, message):
    (raw / "items.csv").unlink()
    (raw / "items.jsonl").write_text(f'{{"item": "1", "title": "a"}}\n{line}\n')
    with pytest.raises(DataError, match=message):
        read(raw)


def test_a_parquet_file_with_fractional_ids_is_refused(raw, read):
    (raw / "items.csv").unlink()
    table = arrow.table({"item": [1.0, 2.0], "title": ["a", "b"]})
    arrow.parquet.write_table(table, raw / "items.parquet")
    with pytest.raises(DataError, match=r"items\.parquet, column item: .*integers; got DOUBLE"):
        read(raw)


def test_a_malformed_parquet_file_is_refused(raw, read):
    (raw / "items.csv").rename(raw / "items.parquet")
    with pytest.raises(DataError, match=r"items\.parquet: expected a well-formed parquet file"):
        read(raw)


def test_interactions_with_unknown_items_are_dropped_and_counted(raw, read, caplog):
    (raw / "items.csv").write_text("item,title\n001,Red kettle\n")
    tables = read(raw, unknown_items="drop")
    assert tables.interactions == [("ann", "001", 1700000002000, 4)]
    assert tables.dropped["interactions_with_unknown_items"] == 2
    assert caplog.messages == [
        "dropped 2 interactions with unknown items, the first with '1' in"
        f" {raw}/interactions.csv, row 2"
    ]
    assert tables.dropped["repeated_interactions"] == 1


def test_dropping_unknown_items_must_not_drop_everything(raw, read):
    (raw / "items.csv").write_text("item,title\n2,Cup\n")
    with pytest.raises(DataError, match="4 of 4 with other items"):
        read(raw, unknown_items="drop")


def test_unknown_items_can_be_added_without_a_title(raw, read, caplog):
    (raw / "items.csv").write_text("item,title\n001,Red kettle\n")
    tables = read(raw, unknown_items="keep")
    assert tables.items == [("001", "Red kettle", None), ("1", None, None)]
    assert len(tables.interactions) == 3
    assert tables.dropped["interactions_with_unknown_items"] == 0
    assert not caplog.messages


@pytest.mark.parametrize(
    ("title", "clean"),
    [
        ("  Red \t kettle ", "Red kettle"),
        ("Red\u00a0\u3000\u2028kettle", "Red kettle"),
        ("Red\x00 \x1b[31m\x07\x7f\x85kettle", "Red [31m kettle"),
        (" \t\x00 ", None),
        ("👩‍🍳 شاي ☕️", "👩‍🍳 شاي ☕️"),
        ("<image> [INST] <|im_start|>", "<image> [INST] <|im_start|>"),
        ("long " * 1200 + "end", "long " * 1200 + "end"),
    ],
    ids=["spaces", "unicode spaces", "controls", "nothing left", "emoji", "tokens", "6003 letters"],
)
def test_titles_lose_only_control_characters_and_extra_spaces(raw, read, title, clean):
    (raw / "items.csv").write_text(f'item,title,description\n001,"{title}","{title}"\n1,b,\n')
    assert read(raw).items == [("001", clean, clean), ("1", "b", None)]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_folded_text_has_no_control_character_and_single_spaces(text):
    with duckdb.connect() as connection:
        folded = connection.execute(f"SELECT {fold('t')} FROM (SELECT ? AS t)", [text]).fetchall()
        (result,) = folded[0]
    assert result != ""
    if result:
        assert result == " ".join(result.split())
        assert not any(unicodedata.category(letter) == "Cc" for letter in result)
    visible = [letter for letter in text if unicodedata.category(letter)[0] not in "CZ"]
    assert [x for x in result or "" if unicodedata.category(x)[0] not in "CZ"] == visible


def test_a_folder_with_a_quote_in_its_name_is_read(raw, read, tmp_path):
    moved = Path(raw).rename(tmp_path / "bob's data")
    assert len(read(moved).items) == 2


def test_a_missing_folder_is_an_error(tmp_path, read):
    with pytest.raises(DataError, match=r"nowhere: expected one .*; got no such folder"):
        read(tmp_path / "nowhere")

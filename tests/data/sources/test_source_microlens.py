"""The reader of MicroLens, on made-up files in the published form."""

import io
import os
import sys
import warnings
import zipfile
from pathlib import Path
from typing import get_args

import duckdb
import pytest
from measuring import measured

from mllm_msr.core.errors import DataError
from mllm_msr.core.params import PreprocessParams
from mllm_msr.data.sources import SOURCES

REAL = Path(__file__).parents[3].parent / "shared" / "data" / "microlens"


@pytest.fixture
def release(tmp_path):
    (tmp_path / "MicroLens-9k_pairs.tsv").write_bytes(b"1\t12 3 7\r\n2\t3 12\r\n10\t7\r\n")
    (tmp_path / "MicroLens-9k_titles.csv").write_bytes(
        'item,title\r\n3,"Pan, lid and ""egg"""\r\n7,Tea 🍵 # calm\r\n12,茶\r\n'.encode()
    )
    return tmp_path


def test_lists_without_timestamps_keep_their_order(release, read):
    tables = read(release, "microlens")
    assert tables.interactions == [
        ("1", "12", None, 1),
        ("1", "3", None, 2),
        ("1", "7", None, 3),
        ("10", "7", None, 1),
        ("2", "3", None, 1),
        ("2", "12", None, 2),
    ]
    assert tables.items == [
        ("12", "茶", None),
        ("3", 'Pan, lid and "egg"', None),
        ("7", "Tea 🍵 # calm", None),
    ]
    assert tables.images == []


def test_pairs_with_timestamps_are_preferred(release, read):
    (release / "MicroLens-9k_pairs.csv").write_bytes(
        b"user,item,timestamp\r\n1,7,1660000000002\r\n1,3,1660000000001\r\n"
    )
    assert read(release, "microlens").interactions == [
        ("1", "3", 1660000000001, 2),
        ("1", "7", 1660000000002, 1),
    ]


def test_covers_are_matched_by_name_and_unused_ones_counted(release, read, caplog):
    covers = release / "MicroLens-9k_covers"
    covers.mkdir()
    for name in ("7.jpg", "99.jpg", "Thumbs.db"):
        (covers / name).touch()
    tables = read(release, "microlens")
    assert tables.images == [("7", str(covers / "7.jpg"), None, None)]
    assert tables.dropped["images_of_unknown_items"] == 1
    assert caplog.messages == ["dropped 1 images of unknown items, the first of '99'"]


@pytest.mark.parametrize("folder", ["MicroLens-9k_covers", "MicroLens-9k_covers/covers/inner"])
def test_covers_may_have_any_image_suffix_and_depth(release, read, folder):
    (release / folder).mkdir(parents=True)
    for name in ("3.JPG", "7.jpeg", "12.Png", "1.gif", "__MACOSX"):
        (release / folder / name).touch()
    found = [(item, Path(file).name) for item, file, _, _ in read(release, "microlens").images]
    assert found == [("12", "12.Png"), ("3", "3.JPG"), ("7", "7.jpeg")]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"caf\xe9/3.jpg"])
def test_a_cover_whose_name_is_not_utf_8_is_of_an_unknown_item(release, read, name):
    covers = release / "MicroLens-9k_covers"
    covers.mkdir()
    (covers / "3.jpg").touch()
    odd = covers / os.fsdecode(name)
    odd.parent.mkdir(exist_ok=True)
    odd.touch()
    tables = read(release, "microlens")
    assert tables.images == [("3", str(covers / "3.jpg"), None, None)]
    assert tables.dropped["images_of_unknown_items"] == 1


def test_missing_required_covers_are_an_error(release, read):
    message = (
        r"one MicroLens-\*_covers or .*; got none; .*preprocess\.microlens\.covers to optional"
    )
    with pytest.raises(DataError, match=message):
        read(release, "microlens", covers="required")


@pytest.mark.parametrize("covers", ["required", "optional"])
def test_a_folder_or_zip_without_covers_is_an_error_with_either_setting(release, read, covers):
    (release / "MicroLens-9k_covers").mkdir()
    (release / "MicroLens-9k_covers" / "Thumbs.db").touch()
    with pytest.raises(DataError, match=r"covers: expected covers named .*; got Thumbs\.db"):
        read(release, "microlens", covers=covers)
    (release / "MicroLens-9k_covers" / "Thumbs.db").unlink()
    (release / "MicroLens-9k_covers").rmdir()
    with zipfile.ZipFile(release / "MicroLens-9k_covers.zip", "w"):
        pass
    with pytest.raises(DataError, match=r"covers\.zip: expected covers named .*; got nothing"):
        read(release, "microlens", covers=covers)


@pytest.mark.parametrize("name", ["covers/7.jpg", "7.jpg", "MicroLens-9k_covers/7.PNG"])
def test_two_covers_of_one_item_are_an_error(release, read, name):
    with (
        zipfile.ZipFile(release / "MicroLens-9k_covers.zip", "w") as archive,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UserWarning)  # of zipfile, on the same name again
        for member in ("7.jpg", name):
            archive.writestr(member, b"")
    with pytest.raises(
        DataError, match=r"covers\.zip: expected one cover of each item; got .* and"
    ):
        read(release, "microlens")


def test_covers_can_be_read_from_a_zip(release, read):
    covers = release / "MicroLens-9k_covers.zip"
    with zipfile.ZipFile(covers, "w") as archive:
        for name in ("MicroLens-9k_covers/7.jpg", "__MACOSX/MicroLens-9k_covers/7.jpg", "a.txt"):
            archive.writestr(name, b"")
    tables = read(release, "microlens")
    assert tables.images == [("7", str(covers), "MicroLens-9k_covers/7.jpg", None)]


def test_a_truncated_zip_is_an_error(release, read):
    (release / "MicroLens-9k_covers.zip").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(DataError, match=r"covers\.zip: expected a valid zip file; got .*download"):
        read(release, "microlens")


def test_a_zip_with_a_damaged_directory_is_an_error(release, read):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("1.jpg", b"image")
    content = whole.getvalue()
    start = content.index(b"PK\x01\x02")
    for place in (start, start + 6, len(content) - 10):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        (release / "MicroLens-9k_covers.zip").write_bytes(damaged)
        with pytest.raises(
            DataError, match=r"covers\.zip: expected a valid zip file; got a damaged"
        ):
            read(release, "microlens")


def test_a_zip_that_is_a_named_pipe_or_outside_the_folder_is_an_error(
    release, read, tmp_path_factory
):
    covers = release / "MicroLens-9k_covers.zip"
    os.mkfifo(covers)
    with pytest.raises(DataError, match=r"covers\.zip: expected a valid zip .*got a named pipe"):
        read(release, "microlens")
    covers.unlink()
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "covers.zip"
    with zipfile.ZipFile(elsewhere, "w") as archive:
        archive.writestr("1.jpg", b"image")
    covers.symlink_to(elsewhere)
    with pytest.raises(
        DataError, match=r"covers\.zip: expected .*got a path or link that leads out"
    ):
        read(release, "microlens")


def test_covers_in_both_a_folder_and_a_zip_are_refused(release, read):
    (release / "MicroLens-9k_covers").mkdir()
    (release / "MicroLens-9k_covers.zip").touch()
    with pytest.raises(DataError, match=r"got MicroLens-9k_covers, MicroLens-9k_covers\.zip"):
        read(release, "microlens")


def test_a_repeated_item_in_a_list_keeps_its_first_position(release, read):
    (release / "MicroLens-9k_pairs.tsv").write_bytes(b"1\t3 7 3\r\n")
    tables = read(release, "microlens")
    assert tables.interactions == [("1", "3", None, 1), ("1", "7", None, 2)]
    assert tables.dropped["repeated_interactions"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"user\titems\r\n1\t3 7\r\n", r"row 1: expected a user, a tab, .*got 'user items'"),
        (b"1\t3 7\r\n2\t3  7\r\n", r"row 2: .*got '2 3␣␣7'"),
        (b"1\t3 7\r\n2\t\r\n", "row 2: .*got '2'"),
        (b"1\t3\t7\r\n", "line 1: .*Columns: 2 Found: 3"),
        (b"item,title\r\n3,x\r\n", "line 1: .*Columns: 2 Found: 1"),
        (b"1\t3 7\r\n2\t3\r\n1\t12\r\n", "row 3: expected one line per user; got user 1 again"),
        (b"", "at least one row; got none"),
    ],
    ids=["header", "two spaces", "no items", "two tabs", "swapped", "user again", "empty"],
)
def test_malformed_lists_are_refused(release, read, content, message):
    (release / "MicroLens-9k_pairs.tsv").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(release, "microlens")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "pairs",
            b"1,7,1660000000001\r\n",
            "columns user, item, timestamp; got 1, 7, 1660000000001",
        ),
        ("pairs", b"item,title\r\n3,x\r\n", "columns user, item, timestamp; got item, title"),
        ("pairs", b"user,item,timestamp\r\n1,7,1660000000\r\n", "row 1, timestamp: .*seconds"),
        (
            "pairs",
            b"user,item,timestamp\r\n1,7,1660000000001\r\n1,3,1660000000\r\n",
            "row 2, timestamp: .*seconds",
        ),
        ("titles", b"3,Pan\r\n7,Tea\r\n12,x\r\n", "columns item, title; got 3, Pan"),
        ("titles", b"user,item,timestamp\r\n1,7,1\r\n", "columns item, title; got user, item"),
        ("titles", b"item,title\r\n3,a\r\n7,b\r\n3,c\r\n12,d\r\n", "rows 1 and 3: .*'3' again"),
        ("titles", b"PK\x03\x04\x14\x00\x08\x00\xff\xfe", "UTF-8"),
    ],
    ids=[
        *("pairs without a header", "titles as pairs", "seconds", "seconds among milliseconds"),
        *("titles without a header", "pairs as titles", "an item twice", "a zip as titles"),
    ],
)
def test_malformed_tables_are_refused(release, read, file, content, message):
    (release / f"MicroLens-9k_{file}.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(release, "microlens")
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_and_either_line_end_are_accepted(release, read):
    (release / "MicroLens-9k_pairs.csv").write_bytes(
        b"\xef\xbb\xbfuser,item,timestamp\n007,7,1660000000002\n7,7,1660000000001\n"
    )
    assert [row[:2] for row in read(release, "microlens").interactions] == [
        ("007", "7"),
        ("7", "7"),
    ]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_lists_may_have_either_line_end_a_byte_order_mark_and_leading_zeros(
    release, read, mark, line_end
):
    lists = line_end.join([b"007\t3 12", b"7\t007", b""])
    (release / "MicroLens-9k_pairs.tsv").write_bytes(mark + lists)
    tables = read(release, "microlens", unknown_items="keep")
    assert [row[:2] for row in tables.interactions] == [("007", "3"), ("007", "12"), ("7", "007")]


def test_titles_may_start_with_a_byte_order_mark(release, read):
    file = release / "MicroLens-9k_titles.csv"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [row[0] for row in read(release, "microlens").items] == ["12", "3", "7"]


def test_pairs_with_a_million_interactions_of_one_user_are_read(release, read):
    pairs = (
        'SELECT 1 AS "user", 1000000 + range AS item, 1660000000000 + range AS timestamp'
        " FROM range(1000000)"
    )
    duckdb.sql(f"COPY ({pairs}) TO '{release}/MicroLens-9k_pairs.csv' (HEADER)")
    tables = read(release, "microlens", unknown_items="keep")
    assert len(tables.interactions) == 1_000_000
    assert tables.interactions[-1] == ("1", "1999999", 1660000999999, 1_000_000)


def test_an_item_may_have_no_title(release, read):
    # As in some of the larger variants.
    (release / "MicroLens-9k_titles.csv").write_bytes(b"item,title\r\n3,Pan\r\n7,\r\n12,x\r\n")
    assert read(release, "microlens").items == [
        ("12", "x", None),
        ("3", "Pan", None),
        ("7", None, None),
    ]


def test_two_variants_in_one_folder_are_refused(release, read):
    (release / "MicroLens-1M_titles.csv").touch()
    with pytest.raises(DataError, match=r"got MicroLens-1M_titles\.csv, MicroLens-9k_titles\.csv"):
        read(release, "microlens")


# -- titles of the larger variants -----------------------------------------------------------------


def with_lines(release: Path, content: bytes, name: str = "title_en") -> Path:
    """Replace the titles by a file in the form of the larger variants."""
    (release / "MicroLens-9k_titles.csv").unlink()
    (release / f"MicroLens-9k_{name}.csv").write_bytes(content)
    return release


@pytest.mark.parametrize("name", ["title_en", "title"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("header", [b"", b"item,title\n", b"videoID, title\r\n"])
def test_title_lines_are_read_with_and_without_byte_order_mark_and_header(
    release, read, name, line_end, mark, header
):
    titles = [b"3,Pan, lid and egg", b"7,Tea", "12,茶".encode(), b""]
    with_lines(release, mark + header + line_end.join(titles), name)
    assert read(release, "microlens").items == [
        ("12", "茶", None),
        ("3", "Pan, lid and egg", None),
        ("7", "Tea", None),
    ]


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ('3,"Pan, lid"', "Pan, lid"),
        ('3,"Pan ""and"" lid"', 'Pan "and" lid'),
        ('3,"Pan', '"Pan'),
        ('3,Pan" and lid', 'Pan" and lid'),
        ('3,"Pan" and "lid"', '"Pan" and "lid"'),
        ('3,"', '"'),
        ('3,""', None),
        ("3,", None),
        ("3,item,title", "item,title"),
    ],
)
def test_quotes_are_removed_only_around_a_whole_title(release, read, line, title):
    with_lines(release, f"{line}\n7,b\n12,c\n".encode())
    assert read(release, "microlens").items[1:] == [("3", title, None), ("7", "b", None)]


def test_leading_zeros_of_items_in_title_lines_stay(release, read):
    with_lines(release, b"3,a\n7,b\n12,c\n007,d\n")
    assert read(release, "microlens").items[0] == ("007", "d", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"user,item,timestamp\n1,7,5\n", "line 1: expected the number of an item, a comma"),
        (b"1\t3 7\n", "line 1: .*got '1"),
        (b"3,Pan\nx7,Tea\n", "line 2: .*got 'x7,Tea'"),
        (b"3,Pan\n\nand lid\n", "line 3: .*got 'and lid'; use the published file"),
        (b"3,Pan\n7,\xff\n", "line 2: expected titles in UTF-8; got"),
        (b"PK\x03\x04\x14\x00\x08\x00\xff\xfe", "line 1: expected titles in UTF-8"),
        (b"3,Pan\n7,Tea\n3,x\n12,y\n", "rows 1 and 3: expected every item once; got '3' again"),
        (b"", "at least one row; got none"),
        (b"item,title\n", "at least one row; got none"),
    ],
    ids=[
        *("pairs", "lists", "no number", "two lines", "not UTF-8", "a zip", "twice", "empty"),
        "header alone",
    ],
)
def test_malformed_title_lines_are_refused(release, read, content, message):
    with_lines(release, content)
    with pytest.raises(DataError, match=rf"MicroLens-9k_title_en\.csv.*{message}") as error:
        read(release, "microlens")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MicroLens-50k_pairs.csv", "got MicroLens-50k_pairs.csv and MicroLens-9k_titles.csv;"),
        ("MicroLens-1M_covers.zip", "got MicroLens-9k_pairs.tsv and .* and MicroLens-1M_covers"),
    ],
)
def test_files_of_two_variants_are_refused(release, read, name, message):
    (release / name).write_bytes(b"user,item,timestamp\n1,7,1660000000002\n")
    with pytest.raises(DataError, match=f"expected files of one variant; {message}"):
        read(release, "microlens")


@pytest.mark.parametrize("name", ["MicroLens-9k_title_en.csv", "MicroLens-9k_title.csv"])
def test_two_title_files_are_refused(release, read, name):
    (release / name).touch()
    with pytest.raises(DataError, match=rf"got {name}, MicroLens-9k_titles\.csv; keep one of"):
        read(release, "microlens")


def test_missing_pairs_are_an_error(release, read):
    (release / "MicroLens-9k_pairs.tsv").unlink()
    with pytest.raises(DataError, match=r"MicroLens-\*_pairs.*; got MicroLens-9k_titles\.csv"):
        read(release, "microlens")


def test_a_user_with_a_million_items_is_read(release, read):
    items = range(1_000_000, 2_000_000)
    (release / "MicroLens-9k_pairs.tsv").write_text("1\t" + " ".join(map(str, items)) + "\r\n")
    tables = read(release, "microlens", unknown_items="keep")
    assert len(tables.interactions) == 1_000_000
    assert tables.interactions[-1][1:] == ("1999999", None, 1_000_000)


def test_every_source_of_the_settings_has_a_reader():
    assert set(get_args(PreprocessParams.model_fields["source"].annotation)) == {
        *SOURCES,
        "prepared",
    }


@pytest.mark.skipif(not REAL.is_dir(), reason="the real release is not here")
def test_the_real_release_is_read_completely_in_little_memory(tmp_path):
    settings = Path(__file__).parents[3] / "params.yaml"
    params = tmp_path / "params.yaml"
    changed = settings.read_text().replace("source: pocket", "source: microlens")
    params.write_text(changed.replace("covers: required", "covers: optional"))
    command = [sys.executable, "-m", "stages.preprocess", "--raw", str(REAL)]
    command += ["--params", str(params), "--out", str(tmp_path / "out")]
    message, peak = measured(command)
    assert peak < 1_500_000  # kilobytes
    assert message.endswith("359,708 interactions, 19,220 items, 0 images\n")
    rows = duckdb.sql(
        f"""SELECT count(*), count(DISTINCT "user"), count(DISTINCT item)
        FROM '{tmp_path}/out/interactions.parquet'"""
    ).fetchall()
    assert rows == [(359_708, 50_000, 19_220)]

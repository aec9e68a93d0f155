"""Settings of the source ``tables``: file and column names, units, ratings, image patterns."""

import json
import os
import sys
import zipfile
from pathlib import Path

import pytest
from pydantic import ValidationError

from mllm_msr.core.errors import DataError
from mllm_msr.core.params import TablesParams
from mllm_msr.data.sources.tables import DEFAULT_LAYOUT

MOVIELENS = Path(__file__).parents[4] / "shared" / "data" / "movielens"
PUBLISHED = {
    "interactions_file": "ratings.csv",
    "items_file": "films.csv",
    "interaction_columns": {
        **{"user": "userId", "item": "filmId", "timestamp": "timestamp", "rating": "rating"}
    },
    "item_columns": {
        **{"item": "filmId", "title": "title", "description": "genres", "image": "image"}
    },
    "timestamp_unit": "seconds",
    "image_pattern": "posters/{item}.jpg",
    "image_archive": "posters.zip",
}
HEAD = "user,item,timestamp\n"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Write files with a publisher's own names and columns."""
    (tmp_path / "ratings.csv").write_text(
        "userId,filmId,rating,timestamp\n"
        "1,10,4.5,1260759144\n1,20,2.0,1260759145\n2,20,3.0,1260759146\n3,10,0.5,1260759147\n"
    )
    (tmp_path / "films.csv").write_text(
        'filmId,title,genres\n10,"Long Road, The",Drama|War\n20,Red Kettle,Comedy\n'
    )
    zip_images(tmp_path, "posters/10.jpg", "posters/99.jpg", "posters/", "LICENSE")
    return tmp_path


def zip_images(folder: Path, *names: str) -> None:
    with zipfile.ZipFile(folder / "posters.zip", "w") as archive:
        for name in names:
            archive.writestr(name, "")


def test_files_with_other_names_and_columns_are_read(published, read, caplog):
    found = read(published, tables=PUBLISHED)
    assert found.interactions == [
        ("1", "10", 1260759144000, 1),
        ("1", "20", 1260759145000, 2),
        ("2", "20", 1260759146000, 3),
        ("3", "10", 1260759147000, 4),
    ]
    assert found.items == [
        ("10", "Long Road, The", "Drama|War"),
        ("20", "Red Kettle", "Comedy"),
    ]
    assert found.images == [("10", f"{published}/posters.zip", "posters/10.jpg", None)]
    assert found.dropped["images_of_unknown_items"] == 1
    assert "1 of 2 items have no image posters/{item}.jpg" in caplog.text


def test_low_ratings_and_the_users_and_items_without_others_are_counted(published, read):
    found = read(published, tables=PUBLISHED | {"min_rating": 3.5})
    assert [row[:2] for row in found.interactions] == [("1", "10")]
    assert found.dropped["interactions_with_low_rating"] == 3
    assert found.dropped["users_left_without_interactions"] == 2
    assert found.dropped["items_left_without_interactions"] == 1
    assert len(found.items) == 2


def test_a_rating_equal_to_the_minimum_stays(published, read):
    found = read(published, tables=PUBLISHED | {"min_rating": 3.0})
    assert [row[:2] for row in found.interactions] == [("1", "10"), ("2", "20")]


@pytest.mark.parametrize("rating", ["", "good", "nan", "inf"])
def test_a_rating_that_is_no_number_is_refused_if_ratings_are_filtered(published, read, rating):
    with (published / "ratings.csv").open("a") as stream:
        stream.write(f"4,10,{rating},1260759148\n")
    assert len(read(published, tables=PUBLISHED).interactions) == 5
    with pytest.raises(DataError, match=r"ratings\.csv, row 5, rating: .*min_rating to null"):
        read(published, tables=PUBLISHED | {"min_rating": 3})


def test_a_minimum_rating_that_drops_everything_is_refused(published, read):
    with pytest.raises(DataError, match=r"rated 9 or more; got 4 with less; lower preprocess"):
        read(published, tables=PUBLISHED | {"min_rating": 9})


def test_users_and_items_of_dropped_unknown_items_are_counted(published, read):
    with (published / "ratings.csv").open("a") as stream:
        stream.write("9,77,5,1260759148\n1,77,5,1260759148\n1,78,5,1260759148\n")
    dropped = read(published, unknown_items="drop", tables=PUBLISHED).dropped
    assert dropped["interactions_with_unknown_items"] == 3
    assert dropped["users_left_without_interactions"] == 1
    assert dropped["items_left_without_interactions"] == 2


@pytest.mark.parametrize(
    ("unit", "timestamp", "message"),
    [
        ("seconds", "1700000000000", "like milliseconds (2023-11-14), set {} to milliseconds"),
        ("seconds", "2023-11-14", "like iso8601, set {} to iso8601"),
        ("seconds", "1700000000.5", "got '1700000000.5'; write whole numbers"),
        ("milliseconds", "2023-11-14T10:00:00Z", "like iso8601, set {} to iso8601"),
        ("iso8601", "1700000000", "like seconds (2023-11-14), set {} to seconds"),
        ("iso8601", "2023-02-30", "got '2023-02-30'; correct it"),
        ("iso8601", "14.11.2023", "got '14.11.2023'; correct it"),
        ("iso8601", "1700000000000000", "microseconds (2023-11-14), convert the column to iso8601"),
    ],
)
def test_a_timestamp_of_another_unit_is_an_error_with_the_setting(
    raw, read, unit, timestamp, message
):
    (raw / "interactions.csv").write_text(f"{HEAD}ann,1,{timestamp}\n")
    with pytest.raises(DataError) as error:
        read(raw, tables={"timestamp_unit": unit})
    assert message.format("preprocess.tables.timestamp_unit") in str(error.value)


@pytest.mark.parametrize(
    ("timestamp", "milliseconds"),
    [
        ("2023-11-14T22:13:20Z", 1700000000000),
        ("2023-11-14 22:13:20", 1700000000000),
        ("2023-11-15T00:13:20.123+02:00", 1700000000123),
        ("2023-11-14T18:13:20-04", 1700000000000),
        ("2023-11-15T03:43:20+0530", 1700000000000),
        ("2023-11-14T22:13", 1699999980000),
        ("2023-11-14", 1699920000000),
    ],
)
def test_iso_8601_without_an_offset_is_utc(raw, read, timestamp, milliseconds):
    (raw / "interactions.csv").write_text(f"{HEAD}ann,1,{timestamp}\n")
    assert read(raw, tables={"timestamp_unit": "iso8601"}).interactions == [
        ("ann", "1", milliseconds, 1)
    ]


@pytest.mark.parametrize("name", ["my *data?.csv", "a [1].csv", "deep/it's.csv"])
def test_a_file_name_is_no_pattern(raw, read, name):
    (raw / name).parent.mkdir(exist_ok=True)
    (raw / "items.csv").rename(raw / name)
    (raw / "my 1datax.csv").write_text("item,title\nno,no\n")
    (raw / "a 1.csv").write_text("item,title\nno,no\n")
    assert len(read(raw, tables={"items_file": name}).items) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"items_file": "films.csv"}, r"the file films\.csv; got .*items\.csv.*items_file"),
        (
            {"item_columns": DEFAULT_LAYOUT.item_columns.model_dump() | {"description": "genre"}},
            r"columns item, title, genre; got item, title; add genre, or correct preprocess\.tab",
        ),
        ({"min_rating": 3.0}, r"columns user, item, timestamp, rating; .*; add rating, or correct"),
        ({"image_pattern": "posters/{item}.jpg"}, "images named posters/{item}.jpg; got no files"),
        ({"image_pattern": "{item}.csv"}, r"of the items in items\.csv; got images of others"),
    ],
)
def test_a_setting_that_does_not_match_the_files_is_an_error(raw, read, settings, message):
    with pytest.raises(DataError, match=message):
        read(raw, tables=settings)


def test_images_of_the_column_take_precedence_over_the_pattern(raw, read):
    for name in ("images/1.jpg", "images/001.jpg", "images/deep/7.jpg"):
        (raw / name).parent.mkdir(exist_ok=True, parents=True)
        (raw / name).touch()
    (raw / "items.csv").write_text("item,title,image\n001,a,other.png\n1,b,\n")
    found = read(raw, tables={"image_pattern": "images/{item}.jpg"})
    assert found.images == [
        ("001", f"{raw}/other.png", None, None),
        ("1", f"{raw}/images/1.jpg", None, None),
    ]
    assert found.dropped["images_of_unknown_items"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"caf\xe9/1.jpg"])
def test_an_image_whose_name_is_not_utf_8_is_of_an_unknown_item(raw, read, name, caplog):
    (raw / "images").mkdir()
    (raw / "images" / "001.jpg").touch()
    odd = raw / "images" / os.fsdecode(name)
    odd.parent.mkdir(exist_ok=True)
    odd.touch()
    found = read(raw, tables={"image_pattern": "images/{item}.jpg"})
    assert found.images == [("001", f"{raw}/images/001.jpg", None, None)]
    assert found.dropped["images_of_unknown_items"] == 1
    assert "caf" in caplog.text


def test_the_pocket_world_ignores_the_settings_of_tables(raw, read):
    assert len(read(raw, "pocket", tables=PUBLISHED).items) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"items_file": "../items.csv"},
        {"items_file": "/items.csv"},
        {"image_archive": "posters.zip"},
        {"image_pattern": "posters/item.jpg"},
        {"image_pattern": "{item}/{item}.jpg"},
        {"image_pattern": "../{item}.jpg"},
        {"timestamp_unit": "days"},
        {"min_rating": float("nan")},
        {"item_columns": {"item": "id"}},
    ],
    ids=json.dumps,
)
def test_contradictory_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        TablesParams.model_validate(DEFAULT_LAYOUT.model_dump() | wrong)


@pytest.mark.skipif(not MOVIELENS.is_dir(), reason="the data cannot be shipped")
def test_movielens_is_read_as_published(read):
    names = {"user": "userId", "item": "movieId", "timestamp": "timestamp", "rating": "rating"}
    items = {"item": "movieId", "title": "title", "description": "genres", "image": "image"}
    settings = PUBLISHED | {
        **{"items_file": "movies.csv", "interaction_columns": names, "item_columns": items}
    }
    found = read(MOVIELENS, tables=settings)
    assert len(found.interactions) == 100_004
    assert len({row[0] for row in found.interactions}) == 671
    assert len(found.images) == 2000
    assert found.images[0][1:3] == (f"{MOVIELENS}/posters.zip", "posters/1.jpg")
    assert set(found.dropped.values()) == {0}

"""The reader of Amazon Reviews 2023, on made-up records in the published form."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import duckdb
import pytest

from mllm_msr.core.errors import DataError

URL = "https://m.example/I/"


def review(user: Any, item: Any, time: Any, **fields: Any) -> dict[str, Any]:
    return {
        "rating": 5.0,
        "title": "Fine",
        "text": "Does what it says<br />",
        "images": [{"small_image_url": f"{URL}s.jpg", "attachment_type": "IMAGE"}],
        "asin": f"{item}x",
        "parent_asin": item,
        "user_id": user,
        "timestamp": time,
        "helpful_vote": 0,
        "verified_purchase": True,
    } | fields


def image(variant: str, hi_res: str | None, large: str | None) -> dict[str, str | None]:
    return {"thumb": f"{URL}t.jpg", "large": large, "variant": variant, "hi_res": hi_res}


def item(asin: Any, title: str | None, **fields: Any) -> dict[str, Any]:
    return {
        "main_category": None,
        "title": title,
        "average_rating": 4.5,
        "rating_number": 3,
        "features": [],
        "description": [],
        "price": None,
        "images": [],
        "videos": [],
        "store": "Store",
        "categories": [],
        "details": {"Colour": "Red"},
        "parent_asin": asin,
        "bought_together": None,
    } | fields


REVIEWS = [
    review("ann", "B1", 1700000003000),
    review("ann", "007", 1700000001000, rating=2.0),
    review("bob", "B1", 1700000002000, verified_purchase=False),
    review("ann", "B1", 1700000000000, rating=4.0),
]
ITEMS = [
    item(
        "B1",
        "Tea &amp; cup",
        description=["<p>Holds <b>H<sub>2</sub>O</b></p>and tea.", "Dish&nbsp;washer"],
        features=["not this"],
        images=[
            image("PT01", f"{URL}1h.jpg", f"{URL}1.jpg"),
            image("MAIN", f"{URL}2h.jpg", f"{URL}2.jpg"),
        ],
    ),
    item("007", "", features=["Red", "For <5 and >3"], images=[image("X", None, f"{URL}3.jpg")]),
    item("B9", "Nobody's lamp"),
]


def lines(records: list[Any]) -> str:
    return "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in records)


def write(folder: Path, reviews: list[Any] = REVIEWS, items: list[Any] = ITEMS) -> Path:
    (folder / "Small_Things.jsonl").write_text(lines(reviews))
    (folder / "meta_Small_Things.jsonl").write_text(lines(items))
    return folder


@pytest.fixture
def release(tmp_path):
    return write(tmp_path)


def with_csv(folder: Path, content: str) -> Path:
    (folder / "Small_Things.jsonl").unlink()
    (folder / "Small_Things.csv").write_text(content, newline="")
    return folder


CSV = (
    "user_id,parent_asin,rating,timestamp\r\n"
    "ann,B1,5.0,1700000003000\r\nann,007,2.0,1700000001000\r\n"
)


# -- valid files -----------------------------------------------------------------------------------


def test_reviews_are_joined_to_metadata_by_parent_asin(release, read):
    tables = read(release, "amazon")
    assert tables.interactions == [
        ("ann", "B1", 1700000000000, 4),
        ("ann", "007", 1700000001000, 2),
        ("bob", "B1", 1700000002000, 3),
    ]
    assert tables.dropped == {
        "reviews_with_low_rating": 0,
        "unverified_reviews": 0,
        "metadata_of_items_without_reviews": 1,
        "repeated_metadata": 0,
        "interactions_with_unknown_items": 0,
        "users_left_without_interactions": 0,
        "items_left_without_interactions": 0,
        "images_of_unknown_items": 0,
        "repeated_interactions": 1,
    }


def test_html_is_removed_and_features_replace_a_missing_description(release, read):
    assert read(release, "amazon").items == [
        ("007", None, "Red For <5 and >3"),
        ("B1", "Tea & cup", "Holds H2O and tea. Dish washer"),
    ]


def test_a_description_of_only_tags_is_missing(tmp_path, read):
    write(tmp_path, items=[item("B1", "a", description=["<br>", ""], features=["Red"])])
    tables = read(tmp_path, "amazon", unknown_items="drop")
    assert tables.items == [("B1", "a", "Red")]


@pytest.mark.parametrize(
    ("size", "urls"), [("large", ["3.jpg", "2.jpg"]), ("hi_res", ["3.jpg", "2h.jpg"])]
)
def test_the_main_image_has_the_preferred_size_if_available(release, read, size, urls):
    images = read(release, "amazon", image_size=size).images
    assert images == [("007", None, None, URL + urls[0]), ("B1", None, None, URL + urls[1])]


def test_without_a_main_image_the_first_valid_url_is_used(tmp_path, read):
    images = [image("A", "file:///etc/x", None), image("B", f"{URL}b.jpg", None)]
    write(tmp_path, REVIEWS[:2], [item("B1", "a", images=images), item("007", "b", images=None)])
    assert read(tmp_path, "amazon").images == [("B1", None, None, f"{URL}b.jpg")]


def test_metadata_of_the_hugging_face_loader_gives_the_same_tables(release, read):
    expected = vars(read(release, "amazon"))
    loaded = [
        record
        | {
            "price": "None",
            "details": json.dumps(record["details"]),
            "images": {
                key: [image[key] for image in record["images"]]
                for key in ("thumb", "large", "variant", "hi_res")
            },
        }
        for record in ITEMS
    ]
    write(release, items=loaded)
    assert vars(read(release, "amazon")) == expected


def test_gzip_gives_the_same_tables(release, read):
    expected = vars(read(release, "amazon"))
    for file in list(release.iterdir()):
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert vars(read(release, "amazon")) == expected


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_benchmarks_csv_is_read_with_either_line_end(release, read, packed, line_end):
    with_csv(release, CSV.replace("\r\n", line_end))
    if packed:
        file = release / "Small_Things.csv"
        file.with_name("Small_Things.csv.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    tables = read(release, "amazon", min_rating=3.0)
    assert tables.interactions == [("ann", "B1", 1700000003000, 1)]
    assert tables.dropped["reviews_with_low_rating"] == 1


def test_a_csv_may_have_a_byte_order_mark_and_leading_zeros(release, read):
    with_csv(release, f"\ufeff{CSV}007,007,4.0,1700000002000\r\n")
    assert [row[:2] for row in read(release, "amazon").interactions] == [
        ("007", "007"),
        ("ann", "007"),
        ("ann", "B1"),
    ]


def test_seconds_among_milliseconds_of_a_csv_are_refused(release, read):
    with_csv(release, f"{CSV}bob,B1,5.0,1700000002\r\n")
    refused(read, release, r"csv, row 3, timestamp: .*these look like seconds", bad_records="drop")


def test_windows_line_ends_and_blank_lines_are_accepted(tmp_path, read):
    write(tmp_path)
    expected = vars(read(tmp_path, "amazon"))
    for file in tmp_path.iterdir():
        file.write_bytes(b"\r\n" + file.read_bytes().replace(b"\n", b"\r\n \r\n"))
    assert vars(read(tmp_path, "amazon")) == expected


def test_integer_ids_become_text_and_leading_zeros_stay(tmp_path, read):
    write(
        tmp_path,
        [review(7, 12, 1700000000000), review("007", "0012", 1700000000000)],
        [item(12, "a"), item("0012", "b")],
    )
    tables = read(tmp_path, "amazon")
    assert [row[:2] for row in tables.interactions] == [("007", "0012"), ("7", "12")]
    assert [row[:2] for row in tables.items] == [("0012", "b"), ("12", "a")]


def test_low_ratings_and_unverified_purchases_are_dropped_and_counted(release, read):
    tables = read(release, "amazon", min_rating=4.0, verified_only=True)
    assert [row[:3] for row in tables.interactions] == [("ann", "B1", 1700000000000)]
    assert tables.dropped["reviews_with_low_rating"] == 1
    assert tables.dropped["unverified_reviews"] == 1
    assert tables.dropped["metadata_of_items_without_reviews"] == 2


def test_a_rating_of_zero_is_read(tmp_path, read):
    write(tmp_path, [review("ann", "B1", 1700000000000, rating=0.0)])
    assert len(read(tmp_path, "amazon").interactions) == 1


def test_long_texts_are_cut_between_words(tmp_path, read):
    write(tmp_path, REVIEWS[:1], [item("B1", "x" * 30, description=["Red tea cup and", "lid"])])
    assert read(tmp_path, "amazon", text_length=12).items == [("B1", "x" * 12, "Red tea cup")]


@pytest.mark.slow
@pytest.mark.parametrize("form", [".jsonl", ".csv"])
def test_a_user_with_a_million_reviews_is_read(tmp_path, read, form):
    reviews = (
        "SELECT 'ann' AS user_id, 'B' || range AS parent_asin, 5.0 AS rating,"
        " 1700000000000 AS timestamp FROM range(1000000)"
    )
    kind = {".jsonl": "FORMAT json", ".csv": "HEADER"}[form]
    duckdb.sql(f"COPY ({reviews}) TO '{tmp_path}/Small_Things{form}' ({kind})")
    (tmp_path / "meta_Small_Things.jsonl").write_text(lines([item("B999999", "Last")]))
    tables = read(tmp_path, "amazon", unknown_items="drop")
    assert tables.interactions == [("ann", "B999999", 1700000000000, 1_000_000)]
    assert tables.dropped["interactions_with_unknown_items"] == 999_999


# -- errors ----------------------------------------------------------------------------------------

BAD_REVIEWS = {
    # name: (record or line, message, reason in the counts)
    "broken": ('{"rating": 5.0, "ti', r"a JSON object; got '\{\"rating\": 5\.0, \"ti'", "json"),
    "list": ("[1, 2]", r"a JSON object; got '\[1, 2\]'", "json"),
    "half a character": ('{"user_id": "\\ud83d"}', r"object; got '\{.user_id.*ud83d", "json"),
    "no user": (
        {"rating": 5.0, "asin": "B"},
        "user_id; got no user_id but rating, asin",
        "user_id",
    ),
    "empty user": (review("", "B1", 1), 'user_id; got user_id ""', "user_id"),
    "user of many": (review(["a"], "B1", 1), r'got user_id \["a"\]', "user_id"),
    "fractional item": (review("a", 1.0, 1), "got parent_asin 1.0", "parent_asin"),
    "no item": (review("a", None, 1), "got parent_asin null", "parent_asin"),
    "date": (
        review("a", "B1", "2023-01-01"),
        "an integer timestamp from 1973 to 2099; got",
        "timestamp",
    ),
    "no time": (review("a", "B1", 0), "1973 to 2099; got timestamp 0", "timestamp"),
    "fractional time": (review("a", "B1", 1.7e12), "got timestamp 17000", "timestamp"),
    "rating in words": (review("a", "B1", 1, rating="five"), 'got rating "five"', "rating"),
    "six stars": (review("a", "B1", 1, rating=6), "from 0 to 5; got rating 6", "rating"),
    "no number": (review("a", "B1", 1, rating=float("nan")), "got rating NaN", "rating"),
    "verified in words": (
        review("a", "B1", 1, verified_purchase="yes"),
        'true or false; got verified_purchase "yes"',
        "verified_purchase",
    ),
}
BAD_ITEMS = {
    "broken": ("{", "a JSON object; got '{'", "json"),
    "no id": ({"title": "x"}, "parent_asin; got no parent_asin but title", "parent_asin"),
    "empty id": (item("", "x"), 'parent_asin; got parent_asin ""', "parent_asin"),
    "review": (review("ann", "B2", 1), 'metadata, not a review; got user_id "ann"', "user_id"),
    "title of many": (item("B2", ["x"]), "title is a text; got title", "title"),
    "bare description": (item("B2", "x", description="y"), "list of texts; got", "description"),
    "numbered features": (item("B2", "x", features=3), "list of texts; got features 3", "features"),
    "a list in a list": (item("B2", "x", features=[["x"]]), "list of texts; got", "features"),
    "more than texts": (
        item("B2", "x", description=[None, {"a": 1}, 3, "ok"]),
        r"list of texts; got description \[null, \{",
        "description",
    ),
    "bare image": (item("B2", "x", images=URL), "list of images; got images", "images"),
}


@pytest.mark.parametrize("what", BAD_REVIEWS)
def test_a_bad_review_is_an_error_with_its_line(tmp_path, read, what):
    record, message, _ = BAD_REVIEWS[what]
    write(tmp_path, [REVIEWS[0], "", record, record])
    refused(
        read, tmp_path, rf"Small_Things\.jsonl, line 3: expected .*{message}", verified_only=True
    )


@pytest.mark.parametrize("what", BAD_REVIEWS)
def test_a_bad_review_can_be_dropped_and_counted(tmp_path, read, what, caplog):
    record, _, fault = BAD_REVIEWS[what]
    write(tmp_path, [REVIEWS[0], "", record, record])
    tables = read(tmp_path, "amazon", bad_records="drop", verified_only=True, unknown_items="drop")
    assert len(tables.interactions) == 1
    assert tables.dropped[f"reviews_with_bad_{fault}"] == 2
    (message,) = caplog.messages
    assert re.search(rf"dropped 2 reviews with bad {fault}, .*Things\.jsonl, line 3$", message)


@pytest.mark.parametrize("what", BAD_ITEMS)
def test_a_bad_metadata_record_is_an_error_with_its_line(tmp_path, read, what):
    record, message, _ = BAD_ITEMS[what]
    write(tmp_path, items=[*ITEMS, record])
    refused(read, tmp_path, rf"meta_Small_Things\.jsonl, line 4: expected .*{message}")


@pytest.mark.parametrize("what", BAD_ITEMS)
def test_a_bad_metadata_record_can_be_dropped_and_counted(tmp_path, read, what, caplog):
    record, _, fault = BAD_ITEMS[what]
    write(tmp_path, items=[*ITEMS, record])
    tables = read(tmp_path, "amazon", bad_records="drop")
    assert tables.dropped[f"metadata_with_bad_{fault}"] == 1
    assert len(tables.items) == 2
    assert caplog.messages[0].endswith("meta_Small_Things.jsonl, line 4")


def test_invalid_utf_8_is_a_bad_record(tmp_path, read):
    write(tmp_path)
    with (tmp_path / "Small_Things.jsonl").open("ab") as stream:
        stream.write(b'{"user_id": "\xff"}\n')
    refused(read, tmp_path, r"line 5: expected a JSON object; got '\{.user_id.: .�")
    assert read(tmp_path, "amazon", bad_records="drop").dropped["reviews_with_bad_json"] == 1


@pytest.mark.parametrize("bad_records", ["error", "drop"])
def test_swapped_files_are_refused(tmp_path, read, bad_records):
    write(tmp_path, reviews=ITEMS)
    message = r"Small_Things\.jsonl, line 1: expected a review .*; got no user_id but main_category"
    refused(read, tmp_path, message, bad_records=bad_records)
    write(tmp_path, items=REVIEWS)
    message = r"meta_Small_Things\.jsonl, line 1: expected an item's metadata, not a review.*"
    message += {"error": "bad_records to drop", "drop": "this looks like another file"}[bad_records]
    refused(read, tmp_path, message, bad_records=bad_records)


def test_csv_named_jsonl_is_refused(release, read):
    (release / "Small_Things.jsonl").write_text(CSV)
    message = r"line 1: expected a JSON object; got 'user_id,parent_asin,rating,timestamp'"
    refused(read, release, message, bad_records="drop")


def test_json_lines_named_csv_are_refused(release, read):
    with_csv(release, lines(REVIEWS))
    refused(read, release, r"csv: expected the columns user_id, .*; got \{.?rating")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "expected the columns user_id, parent_asin, rating, timestamp; got an empty file"),
        ("ann,B1,5.0,1700000000000\n", "got ann, B1, 5.0, 1700000000000; add user_id"),
        ("user_id,item,rating,timestamp\n", "got user_id, item, .*; add parent_asin"),
    ],
)
def test_a_csv_without_its_header_is_refused(release, read, header, message):
    with_csv(release, header)
    refused(read, release, message)


def test_a_bad_row_of_a_csv_is_an_error_or_counted(release, read):
    with_csv(release, f"{CSV}bob,B1,five,1700000000000\r\n")
    refused(
        read, release, r'csv, row 3: expected a review with a rating from 0 to 5; got rating "five"'
    )
    assert read(release, "amazon", bad_records="drop").dropped["reviews_with_bad_rating"] == 1


def test_verified_only_needs_json_lines(release, read):
    with_csv(release, CSV)
    message = r"expected reviews with verified_purchase; .*verified_only to false"
    refused(read, release, message, verified_only=True)


@pytest.mark.parametrize("name", ["Small_Things.jsonl", "meta_Small_Things.jsonl"])
def test_a_truncated_gzip_file_is_refused(release, read, name):
    file = release / name
    content = gzip.compress(file.read_bytes() * 50)
    file.with_name(f"{name}.gz").write_bytes(content[: len(content) // 2])
    file.unlink()
    refused(
        read,
        release,
        rf"{name}\.gz: expected a valid gzip file; got a damaged one .*download it again",
        bad_records="drop",
    )


@pytest.mark.parametrize("what", ["cut short", "not packed"])
def test_a_malformed_gzip_file_is_refused(release, read, what):
    content = gzip.compress(CSV.encode())[:30] if what == "cut short" else CSV.encode()
    with_csv(release, "").joinpath("Small_Things.csv").unlink()
    (release / "Small_Things.csv.gz").write_bytes(content)
    refused(read, release, r"Small_Things\.csv\.gz: expected a valid gzip file")


@pytest.mark.parametrize("name", ["Small_Things.jsonl", "meta_Small_Things.jsonl"])
def test_a_byte_order_mark_before_json_is_refused(release, read, name):
    file = release / name
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    refused(read, release, rf"{name}, line 1: expected JSON Lines without a byte order mark")


@pytest.mark.parametrize("name", ["Small_Things.jsonl", "meta_Small_Things.jsonl"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(release, read, name, content):
    (release / name).write_text(content)
    refused(read, release, rf"{name}: expected at least one row; got none", bad_records="drop")


@pytest.mark.parametrize("name", ["Small_Things.jsonl", "meta_Small_Things.jsonl"])
def test_a_missing_file_is_an_error(release, read, name):
    (release / name).unlink()
    refused(read, release, r"expected one (meta_)?Small_Things\.jsonl or ")


def test_files_of_other_categories_are_ignored(release, read):
    (release / "Other_Things.jsonl.gz").touch()
    (release / "meta_Other_Things.jsonl.gz").touch()
    assert read(release, "amazon").items


def test_two_forms_of_the_reviews_are_refused(release, read):
    (release / "Small_Things.csv").touch()
    refused(read, release, r"got Small_Things\.csv, Small_Things\.jsonl; keep one of them")


def test_metadata_of_another_category_is_refused(release, read):
    (release / "meta_Small_Things.jsonl").write_text(lines([item("C1", "x"), item("C2", "y")]))
    message = r"metadata of the items in Small_Things\.jsonl; got 2 other items"
    refused(read, release, message, unknown_items="keep")


def test_filters_that_drop_every_review_are_refused(tmp_path, read):
    write(tmp_path, [REVIEWS[1], REVIEWS[2]])
    message = "a review that passes the filters; got 1 with a low rating and 1 unverified ones"
    refused(read, tmp_path, message, min_rating=3.0, verified_only=True)


@pytest.mark.parametrize("others", [REVIEWS[1:], []], ids=["mixed", "all"])
def test_seconds_are_refused_even_if_bad_records_are_dropped(tmp_path, read, others):
    write(tmp_path, [*others, review("cleo", "B1", 1700000000)])
    message = rf"row {len(others) + 1}, timestamp: .*these look like seconds \(2023-11-14\)"
    refused(read, tmp_path, message, bad_records="drop", unknown_items="drop")


def test_repeated_metadata_is_an_error_or_dropped(tmp_path, read, caplog):
    write(tmp_path, items=[*ITEMS, "", item("B1", "Another cup"), item("B9", "Again")])
    refused(read, tmp_path, r"rows 1 and 4: expected every item once; got 'B1' again")
    tables = read(tmp_path, "amazon", bad_records="drop")
    assert [row[:2] for row in tables.items] == [("007", None), ("B1", "Tea & cup")]
    assert tables.dropped["repeated_metadata"] == 1
    assert caplog.messages == [
        f"dropped 1 repeated metadata, the first of 'B1' in {tmp_path}/meta_Small_Things.jsonl,"
        " line 5"
    ]


def test_reviews_without_metadata_follow_the_setting_for_unknown_items(tmp_path, read):
    write(tmp_path, [*REVIEWS, review("ann", "B3", 1700000000000)])
    refused(read, tmp_path, r"row 5, item: expected interactions with items of meta_Small_Things")
    tables = read(tmp_path, "amazon", unknown_items="keep")
    assert [row[0] for row in tables.items] == ["007", "B1", "B3"]


def refused(read: Any, folder: Path, message: str, **settings: Any) -> None:
    with pytest.raises(DataError) as error:
        read(folder, "amazon", **settings)
    assert "\n" not in str(error.value)
    assert re.search(message, str(error.value)), error.value

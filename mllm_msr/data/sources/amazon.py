"""Reader of Amazon Reviews 2023: the reviews of a category and the metadata of its items.

The release (https://amazon-reviews-2023.github.io) has ``<Category>.jsonl`` and
``meta_<Category>.jsonl``, also compressed as ``.gz``; its benchmark has the reviews as
``<Category>.csv``, without texts. An item is a ``parent_asin``, which its variants, such as
colours, share. Metadata in the form of Hugging Face's loader, in which lists of objects have become
objects of lists, is read too.
"""

import logging
from pathlib import Path

import duckdb

from mllm_msr.core.errors import DataError
from mllm_msr.core.params import AmazonParams, PreprocessParams
from mllm_msr.data.sources.cleaning import EARLIEST, LATEST
from mllm_msr.data.sources.faults import count_faults, find_record, view_objects
from mllm_msr.data.sources.markup import register_visible_text
from mllm_msr.data.sources.parsing import (
    JSON_TEXTS,
    RawFiles,
    explain_read_errors,
    fetch_first,
    find_single_file,
    view_records,
)

TEXTS = tuple(kind for kind in JSON_TEXTS if kind != "NULL")
NUMBERS = ("DOUBLE", "BIGINT", "UBIGINT")
REVIEW_KINDS = {
    "user_id": TEXTS,
    "parent_asin": TEXTS,
    "timestamp": TEXTS,
    "rating": NUMBERS,
}
CSV_COLUMNS = ("user_id", "parent_asin", "rating", "timestamp")
ITEM_KINDS = {
    "parent_asin": TEXTS,
    "user_id": ("NULL",),
    "title": ("VARCHAR", "NULL"),
    "description": ("ARRAY", "NULL"),
    "features": ("ARRAY", "NULL"),
    "images": ("ARRAY", "OBJECT", "NULL"),
}
EXPECTED_REVIEW = {
    "json": "a JSON object",
    "user_id": "a review with the text user_id",
    "parent_asin": "a review with the text parent_asin",
    "timestamp": "a review with an integer timestamp from 1973 to 2099",
    "rating": "a review with a rating from 0 to 5",
    "verified_purchase": "a review with verified_purchase true or false",
}
EXPECTED_ITEM = {
    "json": "a JSON object",
    "parent_asin": "an item with the text parent_asin",
    "user_id": "an item's metadata, not a review",
    "title": "an item whose title is a text",
    "description": "an item whose description is a list of texts",
    "features": "an item whose features are a list of texts",
    "images": "an item with a list of images",
}
REVIEW_FORMS = ("jsonl", "jsonl.gz", "csv", "csv.gz")
TEXT_OR_NULL = ("VARCHAR", "NULL")
IMAGE = ("variant", "hi_res", "large")

log = logging.getLogger(__name__)


def read(
    connection: duckdb.DuckDBPyConnection, folder: Path, settings: PreprocessParams
) -> RawFiles:
    """Create the views of :data:`mllm_msr.data.sources.parsing.Reader` from one category's files.

    Metadata of items without a remaining review is dropped and counted.

    Raises:
        DataError: A file or a column is missing, the two files are swapped, a record is bad and
            ``preprocess.amazon.bad_records`` is ``error``, or no review is left.
    """
    category = settings.amazon.category
    reviews = find_single_file(folder, *(f"{category}.{form}" for form in REVIEW_FORMS))
    metadata = find_single_file(folder, f"meta_{category}.jsonl", f"meta_{category}.jsonl.gz")
    dropped = _read_reviews(connection, reviews, settings.amazon)
    dropped |= _read_items(connection, metadata, reviews, settings.amazon)
    return RawFiles(reviews, metadata, timed=True, dropped=dropped)


def _read_reviews(
    connection: duckdb.DuckDBPyConnection, file: Path, options: AmazonParams
) -> dict[str, int]:
    """Create the views of interactions; return the dropped reviews by reason."""
    _view_reviews(connection, file, options.verified_only)
    _mark_reviews(connection, file, options.min_rating)
    drop = options.bad_records == "drop"
    dropped = count_faults(connection, "reviews", file, EXPECTED_REVIEW, drop)
    connection.execute(
        'CREATE VIEW raw_interactions AS SELECT "user", item, timestamp, row AS position, row'
        " FROM reviews WHERE fault IS NULL"
    )
    connection.execute(
        'CREATE VIEW raw_dropped AS SELECT "user", item FROM reviews WHERE fault IS NOT NULL'
    )
    low, unverified, valid = fetch_first(
        connection,
        "SELECT count(*) FILTER (fault = 'low'), count(*) FILTER (fault = 'unverified'),"
        " count(*) FILTER (fault IS NULL) FROM reviews",
    ) or (0, 0, 0)
    if not valid:
        raise DataError(
            expected="a review that passes the filters",
            got=f"{low:,} with a low rating and {unverified:,} unverified ones",
            where=str(file),
            fix="change preprocess.amazon.min_rating or verified_only",
        )
    return dropped | {"reviews_with_low_rating": low, "unverified_reviews": unverified}


def _mark_reviews(connection: duckdb.DuckDBPyConnection, file: Path, min_rating: float) -> None:
    """Create the table ``reviews``; ``fault`` is the reason for which a review is dropped."""
    with explain_read_errors(file):
        connection.execute(
            rf"""CREATE TABLE reviews AS
            SELECT row, user_id AS "user", parent_asin AS item, timestamp, CASE
                WHEN fault IS NOT NULL THEN fault
                WHEN coalesce(user_id, '') = '' THEN 'user_id'
                WHEN coalesce(parent_asin, '') = '' THEN 'parent_asin'
                WHEN NOT coalesce(regexp_full_match(timestamp, '\d{{1,18}}'), false)
                    THEN 'timestamp'
                WHEN NOT coalesce(try_cast(rating AS DOUBLE) BETWEEN 0 AND 5, false)
                    THEN 'rating'
                WHEN try_cast(rating AS DOUBLE) < {min_rating} THEN 'low'
                WHEN NOT verified THEN 'unverified'
                -- A time in seconds stays, to be refused for the whole file.
                WHEN timestamp::BIGINT NOT BETWEEN {EARLIEST} AND {LATEST}
                    AND timestamp::BIGINT NOT BETWEEN {EARLIEST // 1000} AND {LATEST // 1000}
                    THEN 'timestamp'
            END AS fault FROM review_texts"""
        )


def _view_reviews(connection: duckdb.DuckDBPyConnection, file: Path, verified_only: bool) -> None:
    """Create the view ``review_texts`` from either form of the reviews."""
    verified = "true"
    if ".csv" in file.suffixes:
        if verified_only:
            raise DataError(
                expected="reviews with verified_purchase",
                got=f"a CSV file with {', '.join(CSV_COLUMNS)} only",
                where=str(file),
                fix="put the .jsonl file there, or set preprocess.amazon.verified_only to false",
            )
        view_records(connection, "review_records", file, CSV_COLUMNS, parse_once=False)
        fault, texts = "NULL::VARCHAR", ", ".join(CSV_COLUMNS)
    else:
        kinds = REVIEW_KINDS | ({"verified_purchase": ("BOOLEAN",)} if verified_only else {})
        view_objects(connection, "review_records", file, kinds)
        fault, texts = "fault", ", ".join(f"{name}->>'$' AS {name}" for name in REVIEW_KINDS)
        if verified_only:
            verified = "verified_purchase->>'$' = 'true'"
    connection.execute(
        f"CREATE VIEW review_texts AS SELECT row, {fault} AS fault, {texts}, {verified} AS verified"
        " FROM review_records"
    )


def _read_items(
    connection: duckdb.DuckDBPyConnection, file: Path, reviews: Path, options: AmazonParams
) -> dict[str, int]:
    """Create the views of items and images; return the dropped metadata by reason."""
    drop = options.bad_records == "drop"
    _clean_metadata(connection, file, options)
    dropped = count_faults(connection, "metadata", file, EXPECTED_ITEM, drop)
    good, reviewed, items = fetch_first(
        connection,
        "SELECT count(*), count(reviewed), count(DISTINCT item) FILTER (reviewed)"
        " FROM metadata WHERE fault IS NULL",
    ) or (0, 0, 0)
    if not reviewed:
        raise DataError(
            expected=f"metadata of the items in {reviews.name}",
            got=f"{good:,} other items",
            where=str(file),
            fix="use both complete files of one category",
        )
    # If it is not dropped here, cleaning refuses a repeated item and names both rows.
    once = "QUALIFY row_number() OVER (PARTITION BY item ORDER BY row) = 1" if drop else ""
    connection.execute(
        "CREATE VIEW raw_items AS SELECT item, title, description, url, row"
        f" FROM metadata WHERE fault IS NULL AND reviewed {once}"
    )
    connection.execute(
        "CREATE VIEW raw_images AS SELECT item, NULL::VARCHAR AS file,"
        " NULL::VARCHAR AS member, url, row"
        " FROM raw_items WHERE url IS NOT NULL"
    )
    repeated = reviewed - items if drop else 0
    if repeated:
        _warn_of_repeats(connection, file, repeated)
    return dropped | {
        "metadata_of_items_without_reviews": good - reviewed,
        "repeated_metadata": repeated,
    }


def _warn_of_repeats(connection: duckdb.DuckDBPyConnection, file: Path, repeated: int) -> None:
    """Warn of dropped records whose item already has one; name the first."""
    item, row = fetch_first(
        connection,
        "SELECT item, row FROM (FROM metadata WHERE fault IS NULL AND reviewed"
        " QUALIFY row_number() OVER (PARTITION BY item ORDER BY row) > 1) ORDER BY row LIMIT 1",
    ) or ("", 0)
    where, _ = find_record(file, row)
    log.warning("dropped %s repeated metadata, the first of %r in %s", repeated, item, where)


def _clean_metadata(
    connection: duckdb.DuckDBPyConnection, file: Path, options: AmazonParams
) -> None:
    """Create the table ``metadata``; only reviewed items are cleaned, others are null."""
    register_visible_text(connection)
    view_objects(connection, "metadata_records", file, ITEM_KINDS)
    visible = {
        name: f"nullif(visible_text({text}, {options.text_length}), '')"
        for name, text in (
            ("title", "title->>'$'"),
            ("description", "array_to_string(description->>'$[*]', ' ')"),
            ("features", "array_to_string(features->>'$[*]', ' ')"),
        )
    }
    with explain_read_errors(file):
        connection.execute(
            f"""CREATE TABLE metadata AS SELECT row, item, reviewed,
                CASE WHEN fault IS NOT NULL THEN fault
                    WHEN item = '' THEN 'parent_asin'
                    WHEN NOT {_texts("description")} THEN 'description'
                    WHEN NOT {_texts("features")} THEN 'features'
                END AS fault,
                CASE WHEN reviewed THEN {visible["title"]} END AS title,
                CASE WHEN reviewed
                    THEN coalesce({visible["description"]}, {visible["features"]}) END
                    AS description,
                CASE WHEN reviewed THEN {_url(options.image_size)} END AS url
            FROM (SELECT *, parent_asin->>'$' AS item FROM metadata_records)
            LEFT JOIN (SELECT DISTINCT item, true AS reviewed FROM raw_interactions) USING (item)"""
        )


def _texts(field: str) -> str:
    """Return the SQL for whether a JSON list holds only texts and nulls."""
    others = f"list_filter(json_type({field}, '$[*]'), lambda kind: kind NOT IN {TEXT_OR_NULL})"
    return f"coalesce(len({others}) = 0, true)"


def _url(size: str) -> str:
    """Return the SQL for the URL of the main image or, without one, of the first image."""
    of_lists = """json_transform(CASE WHEN json_type(images) = 'OBJECT' THEN images END,
        '{"variant": ["VARCHAR"], "hi_res": ["VARCHAR"], "large": ["VARCHAR"]}')"""
    images = f"""coalesce(
        json_transform(CASE WHEN json_type(images) = 'ARRAY' THEN images END,
            '[{{"variant": "VARCHAR", "hi_res": "VARCHAR", "large": "VARCHAR"}}]'),
        list_zip({", ".join(f"({of_lists}).{name}" for name in IMAGE)})::STRUCT({
        ", ".join(f"{name} VARCHAR" for name in IMAGE)
    })[])"""
    preferred = ", ".join(
        f"CASE WHEN regexp_matches(image.{name}, '^https?://') THEN image.{name} END"
        for name in sorted(("hi_res", "large"), key=lambda name: name != size)
    )
    return f"""list_filter(list_transform(
        list_concat(
            list_filter({images}, lambda image: image.variant = 'MAIN'), {images}),
        lambda image: coalesce({preferred})), lambda url: url IS NOT NULL)[1]"""

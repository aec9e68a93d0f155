"""A user's own data: an interactions file, an items file and images, all below one folder.

- ``interactions.csv`` (or ``.tsv``, ``.jsonl``, ``.parquet``): user, item, timestamp in integer
  milliseconds since 1970.
- ``items.csv`` (likewise): item, title, and if there are any, description and image, the path of
  a picture below the folder, or its http or https URL.

Ids are texts: ``007`` and ``7`` differ. The pocket world comes in this form.
"""

from pathlib import Path

import duckdb

from mllm_msr.errors import DataError
from mllm_msr.params import PreprocessParams
from mllm_msr.sources.raw import (
    FORMS,
    RawFiles,
    find_one,
    first_row,
    literal,
    reading,
    view_records,
)

ON_THE_WEB = "regexp_matches(image, '^https?://', 'i')"


def read(connection: duckdb.DuckDBPyConnection, folder: Path, _: PreprocessParams) -> RawFiles:
    """Make the views of :data:`mllm_msr.sources.raw.Reader` of a folder of tables.

    Raises:
        DataError: A file or a column is missing, a file cannot be read, or an image's path leads
            out of the folder.
    """
    interactions = find_one(folder, *(f"interactions{form}" for form in FORMS))
    items = find_one(folder, *(f"items{form}" for form in FORMS))
    view_records(connection, "interaction_records", interactions, ("user", "item", "timestamp"))
    connection.execute(
        "CREATE VIEW raw_interactions AS SELECT *, row AS position FROM interaction_records"
    )
    view_records(connection, "raw_items", items, ("item", "title"), ("description", "image"))
    _refuse_outside(connection, items)
    connection.execute(
        f"CREATE VIEW raw_images AS SELECT item, NULL::VARCHAR AS member, row,"
        f" CASE WHEN NOT {ON_THE_WEB} THEN {literal(folder)} || '/' || image END AS file,"
        f" CASE WHEN {ON_THE_WEB} THEN image END AS url"
        " FROM raw_items WHERE image IS NOT NULL"
    )
    return RawFiles(interactions, items, timed=True)


def _refuse_outside(connection: duckdb.DuckDBPyConnection, items: Path) -> None:
    """A table from elsewhere must not have us read any file of this machine."""
    with reading(items):
        found = first_row(
            connection,
            rf"SELECT row, image FROM raw_items WHERE NOT {ON_THE_WEB}"
            r" AND regexp_matches(image, '^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)')"
            r" ORDER BY row LIMIT 1",
        )
    if found:
        raise DataError(
            "a path below the folder, or a URL of http or https",
            f"{found[1]!r}",
            f"{items}, row {found[0]}, image",
            "write it relative to the folder of the items file, without ..",
        )

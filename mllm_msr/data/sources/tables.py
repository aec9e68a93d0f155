"""A user's own data: a file of interactions, one of items, and images, all below one folder.

- ``interactions.csv`` (or ``.tsv``, ``.jsonl``, ``.parquet``): user, item, timestamp.
- ``items.csv`` (likewise): item, title, and if there are any, description and image, the path of
  an image below the folder, or its http or https URL.

Settings give other names of files and columns, the unit of timestamps, and where images are that
have no column. Ids are texts: ``007`` and ``7`` differ. The pocket world comes in the form above.
"""

import logging
import re
from pathlib import Path

import duckdb

from mllm_msr.core.errors import DataError
from mllm_msr.core.params import InteractionColumns, ItemColumns, PreprocessParams, TablesParams
from mllm_msr.data.sources.raw import (
    FORMS,
    RawFiles,
    find_named,
    find_one,
    first_row,
    list_zip,
    literal,
    place_of,
    reading,
    view_records,
)

ON_THE_WEB = "regexp_matches(image, '^https?://', 'i')"
PLAIN = TablesParams(
    interactions_file=None,
    items_file=None,
    interaction_columns=InteractionColumns(
        user="user", item="item", timestamp="timestamp", rating="rating"
    ),
    item_columns=ItemColumns(item="item", title="title", description="description", image="image"),
    timestamp_unit="milliseconds",
    min_rating=None,
    image_pattern=None,
    image_archive=None,
)
"""The layout of the pocket world."""

log = logging.getLogger(__name__)


def read(
    connection: duckdb.DuckDBPyConnection, folder: Path, settings: PreprocessParams
) -> RawFiles:
    """Make the views of :data:`mllm_msr.data.sources.raw.Reader` of a folder of tables.

    Raises:
        DataError: A file or a column is missing, a file cannot be read, a rating that is asked for
            is no number, an image's path leads out of the folder, or no image fits its pattern.
    """
    options = settings.tables
    interactions = _find(folder, "interactions", options.interactions_file)
    items = _find(folder, "items", options.items_file)
    dropped = _view_interactions(connection, interactions, options)
    names = options.item_columns.model_dump()
    setting = "preprocess.tables.item_columns"
    more = ("description", "image")
    view_records(connection, "raw_items", items, ("item", "title"), more, names, setting)
    _view_images(connection, folder, items, options)
    return RawFiles(
        interactions,
        items,
        timed=True,
        unit=options.timestamp_unit,
        unit_setting="preprocess.tables.timestamp_unit",
        dropped=dropped,
    )


def read_pocket(
    connection: duckdb.DuckDBPyConnection, folder: Path, settings: PreprocessParams
) -> RawFiles:
    """Make the same views of the pocket world, whatever the settings of a user's own files.

    Raises:
        DataError: As :func:`read`.
    """
    return read(connection, folder, settings.model_copy(update={"tables": PLAIN}))


def _find(folder: Path, table: str, name: str | None) -> Path:
    """Find the file of a table, under its own name or in one of the forms."""
    if name is not None:
        return find_named(folder, name, f"preprocess.tables.{table}_file")
    fix = f"put it there, or name yours in preprocess.tables.{table}_file"
    return find_one(folder, *(f"{table}{form}" for form in FORMS), fix=fix)


def _view_interactions(
    connection: duckdb.DuckDBPyConnection, file: Path, options: TablesParams
) -> dict[str, int]:
    """Make the views of interactions, kept and dropped; count those with a low rating."""
    names = options.interaction_columns.model_dump()
    columns = ["user", "item", "timestamp"]
    if options.min_rating is not None:
        columns.append("rating")
    setting = "preprocess.tables.interaction_columns"
    view_records(connection, "interaction_records", file, columns, (), names, setting)
    low, dropped = "false", {}
    if options.min_rating is not None:
        low = f"rating::DOUBLE < {options.min_rating!r}"
        dropped = {"interactions_with_low_rating": _count_low(connection, file, options)}
    connection.execute(
        'CREATE VIEW raw_interactions AS SELECT "user", item, timestamp, row AS position, row'
        f" FROM interaction_records WHERE NOT {low}"
    )
    connection.execute(
        f'CREATE VIEW raw_dropped AS SELECT "user", item FROM interaction_records WHERE {low}'
    )
    return dropped


def _count_low(connection: duckdb.DuckDBPyConnection, file: Path, options: TablesParams) -> int:
    """Count the interactions with a low rating.

    Raises:
        DataError: A rating is no number, or no interaction is left.
    """
    number = "coalesce(isfinite(try_cast(rating AS DOUBLE)), false)"
    with reading(file):
        wrong, total, low = first_row(
            connection,
            f"""SELECT min({{'row': row, 'rating': rating}}) FILTER (NOT {number}), count(*),
                count(*) FILTER (try_cast(rating AS DOUBLE) < {options.min_rating!r})
            FROM interaction_records""",
        ) or (None, 0, 0)
    if wrong:
        raise DataError(
            expected="a rating that is a number",
            got="an empty cell" if wrong["rating"] is None else repr(wrong["rating"][:80]),
            where=f"{place_of(file, wrong['row'])}, {options.interaction_columns.rating}",
            fix="correct it, or set preprocess.tables.min_rating to null",
        )
    if low and low == total:
        raise DataError(
            expected=f"interactions rated {options.min_rating:g} or more",
            got=f"{low:,} with less",
            where=str(file),
            fix="lower preprocess.tables.min_rating",
        )
    return int(low)


def _view_images(
    connection: duckdb.DuckDBPyConnection, folder: Path, items: Path, options: TablesParams
) -> None:
    """Make the view of images: those of the column, and for other items those of the pattern."""
    _refuse_outside(connection, items)
    connection.execute(
        "CREATE TABLE found_images (item VARCHAR, file VARCHAR, member VARCHAR, row BIGINT)"
    )
    if options.image_pattern is not None:
        _find_images(connection, folder, options.image_pattern, options.image_archive)
        _check_images(connection, folder, items, options)
    connection.execute(
        f"""CREATE VIEW raw_images AS
        SELECT item, CASE WHEN NOT {ON_THE_WEB} THEN {literal(folder)} || '/' || image END AS file,
            NULL::VARCHAR AS member, CASE WHEN {ON_THE_WEB} THEN image END AS url, row
        FROM raw_items WHERE image IS NOT NULL
        UNION ALL
        SELECT item, file, member, NULL AS url, row FROM found_images
        ANTI JOIN (SELECT item FROM raw_items WHERE image IS NOT NULL) USING (item)"""
    )


def _find_images(
    connection: duckdb.DuckDBPyConnection, folder: Path, pattern: str, archive: str | None
) -> None:
    """Fill ``found_images`` with the files whose names fit the pattern, in order."""
    before, _, after = pattern.partition("{item}")
    place = folder / (archive or before.rpartition("/")[0])
    if archive:
        names = list_zip(place, folder)
    else:
        paths = (path for path in place.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in paths]
    fits = re.compile(f"{re.escape(before)}(.+){re.escape(after)}", re.DOTALL)
    found = {name: match[1] for name in sorted(names) if (match := fits.fullmatch(name))}
    if not found:
        raise DataError(
            expected=f"images named {pattern}",
            got=", ".join(sorted(names)[:4]) or "no files",
            where=str(place),
            fix="correct preprocess.tables.image_pattern",
        )
    files = [str(place)] * len(found) if archive else [f"{folder}/{name}" for name in found]
    members = list(found) if archive else [None] * len(found)
    connection.execute(
        "INSERT INTO found_images SELECT unnest(?::VARCHAR[]), unnest(?::VARCHAR[]),"
        " unnest(?::VARCHAR[]), unnest(range(1, ? + 1))",
        [list(found.values()), files, members, len(found)],
    )


def _check_images(
    connection: duckdb.DuckDBPyConnection, folder: Path, items: Path, options: TablesParams
) -> None:
    """Count the items without an image; none with one is an error, for ids of another form."""
    with reading(items):
        total, without, fitting, first = first_row(
            connection,
            """SELECT count(*), count(*) FILTER (image IS NULL AND file IS NULL), count(file),
                arg_min(item, row) FILTER (image IS NULL AND file IS NULL)
            FROM raw_items LEFT JOIN (SELECT item, file FROM found_images) USING (item)""",
        ) or (0, 0, 0, None)
    place = folder / options.image_archive if options.image_archive else folder
    if not fitting:
        named, item = first_row(
            connection, "SELECT coalesce(member, file), item FROM found_images ORDER BY row"
        ) or ("", "")
        raise DataError(
            expected=f"images {options.image_pattern} of the items in {items.name}",
            got=f"images of others, such as {named} of {item!r}",
            where=str(place),
            fix="name them after the items' ids, or correct preprocess.tables.image_pattern",
        )
    if without:
        log.warning(
            "%s of %s items have no image %s in %s, the first %r",
            *(without, total, options.image_pattern, place, first),
        )


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
            expected="a path below the folder, or a URL of http or https",
            got=f"{found[1]!r}",
            where=f"{place_of(items, found[0])}, image",
            fix="write it relative to the folder of the items file, without ..",
        )

"""Reader of a user's own data: interactions, items and images in one folder.

- ``interactions.csv`` (or ``.tsv``, ``.jsonl``, ``.parquet``): user, item, timestamp.
- ``items.csv`` (likewise): item, title and, optionally, description and image; image is a path
  below the folder or an http or https URL.

Settings give other names of files and columns, the unit of timestamps, and a pattern for images
that are not listed in a column. Ids are text: ``007`` and ``7`` differ. The pocket world, the
project's small generated dataset, has this form too.
"""

import logging
import re
from pathlib import Path

import duckdb

from mllm_msr.core.errors import DataError
from mllm_msr.core.params import InteractionColumns, ItemColumns, PreprocessParams, TablesParams
from mllm_msr.data.sources.parsing import (
    FORMS,
    RawFiles,
    escape_file_name,
    explain_read_errors,
    fetch_first,
    find_named_file,
    find_single_file,
    list_zip,
    locate_row,
    quote_literal,
    view_records,
)

ON_THE_WEB = "regexp_matches(image, '^https?://', 'i')"
DEFAULT_LAYOUT = TablesParams(
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
"""The layout of the pocket world, whatever the settings of a user's own tables."""

log = logging.getLogger(__name__)


def read(
    connection: duckdb.DuckDBPyConnection, folder: Path, settings: PreprocessParams
) -> RawFiles:
    """Create the views of :data:`mllm_msr.data.sources.parsing.Reader` from a folder of tables.

    Raises:
        DataError: A file or a column is missing, a file is malformed, a rating to filter by is no
            number, an image's path leads out of the folder, or no image matches the pattern.
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
    """Create the same views from the pocket world, ignoring the settings of a user's own tables.

    Raises:
        DataError: As :func:`read`.
    """
    return read(connection, folder, settings.model_copy(update={"tables": DEFAULT_LAYOUT}))


def _find(folder: Path, table: str, name: str | None) -> Path:
    """Return the file of a table, by its configured name or by its default name in any format."""
    if name is not None:
        return find_named_file(folder, name, f"preprocess.tables.{table}_file")
    fix = f"put it there, or name yours in preprocess.tables.{table}_file"
    return find_single_file(folder, *(f"{table}{form}" for form in FORMS), fix=fix)


def _view_interactions(
    connection: duckdb.DuckDBPyConnection, file: Path, options: TablesParams
) -> dict[str, int]:
    """Create the views of remaining and dropped interactions; return the dropped by reason."""
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
    """Return the number of interactions with a low rating.

    Raises:
        DataError: A rating is no number, or no interaction is left.
    """
    number = "coalesce(isfinite(try_cast(rating AS DOUBLE)), false)"
    with explain_read_errors(file):
        wrong, total, low = fetch_first(
            connection,
            f"""SELECT min({{'row': row, 'rating': rating}}) FILTER (NOT {number}), count(*),
                count(*) FILTER (try_cast(rating AS DOUBLE) < {options.min_rating!r})
            FROM interaction_records""",
        ) or (None, 0, 0)
    if wrong:
        raise DataError(
            expected="a rating that is a number",
            got="an empty cell" if wrong["rating"] is None else repr(wrong["rating"][:80]),
            where=f"{locate_row(file, wrong['row'])}, {options.interaction_columns.rating}",
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
    """Create the view of images: those of the column or, for other items, of the pattern."""
    _refuse_outside(connection, items)
    connection.execute(
        "CREATE TABLE found_images (item VARCHAR, file VARCHAR, member VARCHAR, row BIGINT)"
    )
    if options.image_pattern is not None:
        _find_images(connection, folder, options.image_pattern, options.image_archive)
        _check_images(connection, folder, items, options)
    connection.execute(
        f"""CREATE VIEW raw_images AS
        SELECT item,
            CASE WHEN NOT {ON_THE_WEB} THEN {quote_literal(folder)} || '/' || image END AS file,
            NULL::VARCHAR AS member, CASE WHEN {ON_THE_WEB} THEN image END AS url, row
        FROM raw_items WHERE image IS NOT NULL
        UNION ALL
        SELECT item, file, member, NULL AS url, row FROM found_images
        ANTI JOIN (SELECT item FROM raw_items WHERE image IS NOT NULL) USING (item)"""
    )


def _find_images(
    connection: duckdb.DuckDBPyConnection, folder: Path, pattern: str, archive: str | None
) -> None:
    """Fill ``found_images`` with the files whose names match the pattern, in order."""
    before, _, after = pattern.partition("{item}")
    source = folder / (archive or before.rpartition("/")[0])
    if archive:
        names = list_zip(source, folder)
    else:
        paths = (path for path in source.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in paths]
    expression = re.compile(f"{re.escape(before)}(.+){re.escape(after)}", re.DOTALL)
    found = {name: match[1] for name in sorted(names) if (match := expression.fullmatch(name))}
    if not found:
        raise DataError(
            expected=f"images named {pattern}",
            got=", ".join(sorted(names)[:4]) or "no files",
            where=str(source),
            fix="correct preprocess.tables.image_pattern",
        )
    shown = {name: escape_file_name(name) for name in found}
    # A name that is not UTF-8 is no item's, whatever part of it is the id.
    items = [item if shown[name] == name else None for name, item in found.items()]
    files = [str(source)] * len(found) if archive else [f"{folder}/{shown[name]}" for name in found]
    members = list(found) if archive else [None] * len(found)
    connection.execute(
        "INSERT INTO found_images SELECT unnest(?::VARCHAR[]), unnest(?::VARCHAR[]),"
        " unnest(?::VARCHAR[]), unnest(range(1, ? + 1))",
        [items, files, members, len(found)],
    )


def _check_images(
    connection: duckdb.DuckDBPyConnection, folder: Path, items: Path, options: TablesParams
) -> None:
    """Warn of items without an image; refuse a pattern that matches no item, as with other ids."""
    with explain_read_errors(items):
        total, without, matched, first = fetch_first(
            connection,
            """SELECT count(*), count(*) FILTER (image IS NULL AND file IS NULL), count(file),
                arg_min(item, row) FILTER (image IS NULL AND file IS NULL)
            FROM raw_items LEFT JOIN (SELECT item, file FROM found_images) USING (item)""",
        ) or (0, 0, 0, None)
    source = folder / options.image_archive if options.image_archive else folder
    if not matched:
        name, item = fetch_first(
            connection, "SELECT coalesce(member, file), item FROM found_images ORDER BY row"
        ) or ("", "")
        raise DataError(
            expected=f"images {options.image_pattern} of the items in {items.name}",
            got=f"images of others, such as {name} of {item!r}",
            where=str(source),
            fix="name them after the items' ids, or correct preprocess.tables.image_pattern",
        )
    if without:
        log.warning(
            "%s of %s items have no image %s in %s, the first %r",
            *(without, total, options.image_pattern, source, first),
        )


def _refuse_outside(connection: duckdb.DuckDBPyConnection, items: Path) -> None:
    """Refuse paths out of the folder: a table from elsewhere must not read this machine's files."""
    with explain_read_errors(items):
        found = fetch_first(
            connection,
            rf"SELECT row, image FROM raw_items WHERE NOT {ON_THE_WEB}"
            r" AND regexp_matches(image, '^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)')"
            r" ORDER BY row LIMIT 1",
        )
    if found:
        raise DataError(
            expected="a path below the folder, or a URL of http or https",
            got=f"{found[1]!r}",
            where=f"{locate_row(items, found[0])}, image",
            fix="write it relative to the folder of the items file, without ..",
        )

"""MicroLens as published: pairs with or without timestamps, titles, and covers where present.

The release (https://github.com/westlake-repl/MicroLens) names its files after the variant, such
as ``MicroLens-50k_pairs.csv``. The TSV of the paper's authors has no header and no timestamps:
a user, a tab, and the user's items in the order of time, one space between.
"""

import zipfile
from pathlib import Path, PurePosixPath

import duckdb

from mllm_msr.errors import DataError
from mllm_msr.params import PreprocessParams
from mllm_msr.sources.raw import (
    CSV_FORM,
    RawFiles,
    find_one,
    first_row,
    literal,
    reading,
    view_records,
)

COVERS = "MicroLens-*_covers"


def read(connection: duckdb.DuckDBPyConnection, folder: Path, _: PreprocessParams) -> RawFiles:
    """Make the views of :data:`mllm_msr.sources.raw.Reader` of a MicroLens folder.

    Raises:
        DataError: A file or a column is missing, or a file is not of its form.
    """
    timed = any(folder.glob("MicroLens-*_pairs.csv"))
    pairs = find_one(folder, f"MicroLens-*_pairs.{'csv' if timed else '[ct]sv'}")
    titles = find_one(folder, "MicroLens-*_titles.csv")
    if timed:
        view_records(connection, "pairs", pairs, ("user", "item", "timestamp"))
        connection.execute("CREATE VIEW raw_interactions AS SELECT *, row AS position FROM pairs")
    else:
        _view_lists(connection, pairs)
    view_records(connection, "titles", titles, ("item", "title"))
    connection.execute(
        "CREATE VIEW raw_items AS SELECT *, NULL::VARCHAR AS description FROM titles"
    )
    _view_covers(connection, folder)
    return RawFiles(pairs, titles, timed)


def _view_lists(connection: duckdb.DuckDBPyConnection, pairs: Path) -> None:
    """Unfold a user's line into one row per item; its place in the list is its position."""
    columns = "{'user': 'VARCHAR', 'items': 'VARCHAR'}"
    connection.execute(
        "CREATE VIEW lists AS SELECT *, row_number() OVER () AS row FROM"
        f" read_csv({literal(pairs)}, {CSV_FORM}, header=false, delim='\t', quote='',"
        f" columns={columns})"
    )
    _check_lists(connection, pairs)
    connection.execute(
        'CREATE VIEW raw_interactions AS SELECT "user", unnest(list) AS item,'
        " NULL::VARCHAR AS timestamp, generate_subscripts(list, 1)::BIGINT AS position, row"
        " FROM (SELECT \"user\", string_split(items, ' ') AS list, row FROM lists)"
    )


def _check_lists(connection: duckdb.DuckDBPyConnection, pairs: Path) -> None:
    """A header, a swapped file or two lines of one user would silently become odd histories."""
    with reading(pairs):
        wrong = first_row(
            connection,
            r"""SELECT row, concat_ws(' ', "user", items) FROM lists WHERE NOT coalesce(
            regexp_full_match("user", '\d+') AND regexp_full_match(items, '\d+( \d+)*'), false)
            ORDER BY row LIMIT 1""",
        )
        again = first_row(
            connection,
            'SELECT max(row), "user" FROM lists GROUP BY "user" HAVING count(*) > 1'
            " ORDER BY 1 LIMIT 1",
        )
    if wrong:
        raise DataError(
            "a user, a tab, and items with one space between, all of digits",
            repr(wrong[1][:80].replace("  ", "␣␣")),  # errors fold spaces
            f"{pairs}, row {wrong[0]}",
            "put the file back as published, without a header",
        )
    if again:
        raise DataError(
            "one line per user", f"user {again[1]} again", f"{pairs}, row {again[0]}", "join them"
        )


def _view_covers(connection: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """Pair each cover with the item it is named after; neither folder nor zip, no images."""
    place = find_one(folder, COVERS, f"{COVERS}.zip") if _has_covers(folder) else None
    covers = sorted(_list_covers(place)) if place else []
    connection.execute(
        "CREATE TABLE raw_images AS SELECT unnest(?::VARCHAR[]) AS item,"
        " unnest(?::VARCHAR[]) AS file, unnest(?::VARCHAR[]) AS member,"
        " NULL::VARCHAR AS url, unnest(range(1, ? + 1)) AS row",
        [*map(list, zip(*covers, strict=True) if covers else ([], [], [])), len(covers)],
    )


def _has_covers(folder: Path) -> bool:
    return any(folder.glob(COVERS)) or any(folder.glob(f"{COVERS}.zip"))


def _list_covers(place: Path) -> list[tuple[str, str, str | None]]:
    """Give item, file and, in a zip, the member's name of each cover."""
    if place.is_dir():
        return [(cover.stem, str(cover), None) for cover in place.glob("*.jpg")]
    try:
        with zipfile.ZipFile(place) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise DataError("a whole zip file", str(error), str(place), "download it again") from error
    # A zip made on a Mac has a second, hidden entry for each file.
    return [
        (PurePosixPath(name).stem, str(place), name)
        for name in names
        if name.endswith(".jpg") and not name.startswith("__MACOSX/")
    ]

"""MicroLens as published: pairs with or without timestamps, titles, and covers where present.

The release (https://github.com/westlake-repl/MicroLens) names its files after the variant, such
as ``MicroLens-50k_pairs.csv``. The TSV of the paper's authors has no header and no timestamps:
a user, a tab, and the user's items in the order of time, one space between.

The titles of the larger variants have other names and are no CSV: ``MicroLens-100k_title_en.csv``
and ``MicroLens-1M_title.csv`` have a title per line, without a header, and in the second with
quotes that open and never close.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import duckdb

from mllm_msr.core.errors import DataError
from mllm_msr.core.params import MicroLensParams, PreprocessParams
from mllm_msr.data.sources.raw import (
    CSV_FORM,
    RawFiles,
    find_one,
    first_row,
    list_zip,
    reading,
    text_file,
    view_records,
)

TITLES = "MicroLens-*_titles.csv"
TITLES_BY_LINE = ("MicroLens-*_title_en.csv", "MicroLens-*_title.csv")
COVERS = "MicroLens-*_covers"
IMAGES = (".jpg", ".jpeg", ".png")


class Cover(NamedTuple):
    """The image of an item: a file, or a member of an archive."""

    item: str
    file: str
    member: str | None


class Title(NamedTuple):
    """A line of a file of titles."""

    item: str
    title: str
    row: int


def read(
    connection: duckdb.DuckDBPyConnection, folder: Path, settings: PreprocessParams
) -> RawFiles:
    """Make the views of :data:`mllm_msr.data.sources.raw.Reader` of a MicroLens folder.

    Raises:
        DataError: A file or a column is missing, a file is not of its form, or the files are of
            several variants; or there are no covers, and there must be.
    """
    timed = any(folder.glob("MicroLens-*_pairs.csv"))
    pairs = find_one(folder, f"MicroLens-*_pairs.{'csv' if timed else '[ct]sv'}")
    titles = find_one(folder, TITLES, *TITLES_BY_LINE)
    covers = _find_covers(folder, settings.microlens)
    _refuse_mixed_variants(pairs, titles, *([covers] if covers else []))
    if timed:
        view_records(connection, "pairs", pairs, ("user", "item", "timestamp"))
        connection.execute("CREATE VIEW raw_interactions AS SELECT *, row AS position FROM pairs")
    else:
        _view_lists(connection, pairs)
    _view_titles(connection, titles)
    _view_covers(connection, covers, folder)
    connection.execute(
        'CREATE VIEW raw_dropped AS FROM (SELECT "user", item FROM raw_interactions) WHERE false'
    )
    return RawFiles(pairs, titles, timed)


def _refuse_mixed_variants(*files: Path) -> None:
    """An item's number means another video in another variant."""
    variants = {file.name.split("_")[0] for file in files}
    if len(variants) > 1:
        raise DataError(
            expected="files of one variant",
            got=" and ".join(file.name for file in files),
            where=str(files[0].parent),
            fix="keep those of one variant, the numbers of another one name other items",
        )


def _view_lists(connection: duckdb.DuckDBPyConnection, pairs: Path) -> None:
    """Unfold a user's line into one row per item; its place in the list is its position."""
    columns = "{'user': 'VARCHAR', 'items': 'VARCHAR'}"
    connection.execute(
        "CREATE VIEW lists AS SELECT *, row_number() OVER () AS row FROM"
        f" read_csv({text_file(pairs)}, {CSV_FORM}, header=false, delim='\t', quote='',"
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
            expected="a user, a tab, and items with one space between, all of digits",
            got=repr(wrong[1][:80].replace("  ", "␣␣")),  # errors fold spaces
            where=f"{pairs}, row {wrong[0]}",
            fix="put the file back as published, without a header",
        )
    if again:
        raise DataError(
            expected="one line per user",
            got=f"user {again[1]} again",
            where=f"{pairs}, row {again[0]}",
            fix="join them",
        )


def _view_titles(connection: duckdb.DuckDBPyConnection, file: Path) -> None:
    """Make the view of items, in the form that the file's name tells."""
    if file.match(TITLES):
        view_records(connection, "titles", file, ("item", "title"))
    else:
        rows = list(_read_lines(file))
        connection.execute(
            "CREATE TABLE titles AS SELECT unnest(?::VARCHAR[]) AS item,"
            " nullif(unnest(?::VARCHAR[]), '') AS title, unnest(?::BIGINT[]) AS row",
            [[getattr(row, name) for row in rows] for name in Title._fields],
        )
    connection.execute(
        "CREATE VIEW raw_items AS SELECT item, title, NULL::VARCHAR AS description, row FROM titles"
    )


def _read_lines(file: Path) -> Iterator[Title]:
    """Read a title per line: what stands after the first comma, whatever quotes it has.

    Rows are counted from 1, without blank lines and the header that someone may have put there.

    Raises:
        DataError: A line is of another form, or not in UTF-8.
    """
    row = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(
                    expected="titles in UTF-8",
                    got=str(error),
                    where=f"{file}, line {number}",
                    fix="download it again",
                ) from error
            item, comma, title = text.partition(",")
            if not text or (number == 1 and re.fullmatch(r"\s*\w*title\w*\s*", title, re.I)):
                continue
            if not (comma and re.fullmatch(r"[0-9]+", item.strip())):
                raise DataError(
                    expected="the number of an item, a comma, and its title",
                    got=repr(text[:80]),
                    where=f"{file}, line {number}",
                    fix="put the file back as published",
                )
            row += 1
            yield Title(item.strip(), _unquote(title.strip()), row)


def _unquote(title: str) -> str:
    """Take quotes away that stand around all of a title; those of a part of it, or alone, stay."""
    inside = title[1:-1]
    whole = len(title) > 1 and title[0] == title[-1] == '"' and '"' not in inside.replace('""', "")
    return inside.replace('""', '"') if whole else title


def _find_covers(folder: Path, options: MicroLensParams) -> Path | None:
    """Find the covers' folder or zip; none is an error unless the setting says otherwise.

    A folder under another name would else become a run on text alone, which nobody asked for.
    """
    if any(folder.glob(COVERS)) or any(folder.glob(f"{COVERS}.zip")):
        return find_one(folder, COVERS, f"{COVERS}.zip")
    if options.covers == "required":
        raise DataError(
            expected=f"one {COVERS} or {COVERS}.zip",
            got="none",
            where=str(folder),
            fix="put the covers there, or set preprocess.microlens.covers to optional to go on text"
            " alone",
        )
    return None


def _view_covers(connection: duckdb.DuckDBPyConnection, place: Path | None, folder: Path) -> None:
    """Pair each cover with the item it is named after."""
    covers = _list_covers(place, folder) if place else []
    connection.execute(
        "CREATE TABLE raw_images AS SELECT unnest(?::VARCHAR[]) AS item,"
        " unnest(?::VARCHAR[]) AS file, unnest(?::VARCHAR[]) AS member,"
        " NULL::VARCHAR AS url, unnest(range(1, ? + 1)) AS row",
        [*([getattr(cover, name) for cover in covers] for name in Cover._fields), len(covers)],
    )


def _list_covers(place: Path, folder: Path) -> list[Cover]:
    """List the covers in a folder or zip, at any depth: some programs unpack into a second folder.

    Raises:
        DataError: There are none, an item has two, or the zip is not whole or lies elsewhere.
    """
    if place.is_dir():
        names = [path.relative_to(place).as_posix() for path in place.rglob("*")]
    else:
        names = list_zip(place, folder)
    found: dict[str, str] = {}
    for name in sorted(name for name in names if _is_cover(PurePosixPath(name))):
        item = PurePosixPath(name).stem
        if item in found:
            raise DataError(
                expected="one cover of each item",
                got=f"{found[item]} and {name}",
                where=str(place),
                fix="remove one of them",
            )
        found[item] = name
    if not found:
        raise DataError(
            expected="covers named after their items, such as 1.jpg",
            got=", ".join(sorted(names)[:4]) or "nothing",
            where=str(place),
            fix="put them there as downloaded",
        )
    if place.is_dir():
        return [Cover(item, str(place / name), None) for item, name in found.items()]
    return [Cover(item, str(place), name) for item, name in found.items()]


def _is_cover(name: PurePosixPath) -> bool:
    # A Mac adds a second, hidden entry for each file of a zip.
    return name.suffix.lower() in IMAGES and "__MACOSX" not in name.parts

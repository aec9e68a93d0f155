"""Reader of MicroLens: interactions with or without timestamps, titles, and covers if present.

Covers are MicroLens's name for its images. The release
(https://github.com/westlake-repl/MicroLens) names its files after the variant, such as
``MicroLens-50k_pairs.csv``. The TSV of the paper's authors has neither header nor timestamps: each
line has a user, a tab, and the user's items in order of time, separated by spaces.

The titles of the larger variants have other names and are no valid CSV:
``MicroLens-100k_title_en.csv`` and ``MicroLens-1M_title.csv`` have one title per line and no
header, and the second has unbalanced quotes.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import duckdb

from mllm_msr.core.errors import DataError
from mllm_msr.core.params import MicroLensParams, PreprocessParams
from mllm_msr.data.sources.parsing import (
    CSV_FORM,
    RawFiles,
    escape_file_name,
    explain_read_errors,
    fetch_first,
    find_single_file,
    hide_statistics,
    list_zip,
    text_file,
    view_records,
)

TITLES = "MicroLens-*_titles.csv"
TITLES_BY_LINE = ("MicroLens-*_title_en.csv", "MicroLens-*_title.csv")
COVERS = "MicroLens-*_covers"
IMAGES = (".jpg", ".jpeg", ".png")


class Cover(NamedTuple):
    """The image of an item: a file, or a member of an archive."""

    item: str | None  # None: the file's name is not UTF-8, so it is no item's
    file: str
    member: str | None


class Title(NamedTuple):
    """A line of a title file."""

    item: str
    title: str
    row: int


def read(
    connection: duckdb.DuckDBPyConnection, folder: Path, settings: PreprocessParams
) -> RawFiles:
    """Create the views of :data:`mllm_msr.data.sources.parsing.Reader` from a MicroLens folder.

    Raises:
        DataError: A file or a column is missing or malformed, the files are of several variants, or
            there are no covers and ``preprocess.microlens.covers`` is ``required``.
    """
    timed = any(folder.glob("MicroLens-*_pairs.csv"))
    pairs = find_single_file(folder, f"MicroLens-*_pairs.{'csv' if timed else '[ct]sv'}")
    titles = find_single_file(folder, TITLES, *TITLES_BY_LINE)
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
    """Refuse files of several variants, in which the same number means different items."""
    variants = {file.name.split("_")[0] for file in files}
    if len(variants) > 1:
        raise DataError(
            expected="files of one variant",
            got=" and ".join(file.name for file in files),
            where=str(files[0].parent),
            fix="remove those of the other variants: their numbers mean other items",
        )


def _view_lists(connection: duckdb.DuckDBPyConnection, pairs: Path) -> None:
    """Create the view of interactions: one row per item in a user's list, with its position."""
    columns = "{'user': 'VARCHAR', 'items': 'VARCHAR'}"
    with explain_read_errors(pairs):
        connection.execute(
            "CREATE TABLE lists AS SELECT *, row_number() OVER () AS row FROM"
            f" read_csv({text_file(pairs)}, {CSV_FORM}, header=false, delim='\t', quote='',"
            f" columns={columns})"
        )
    _check_lists(connection, pairs)
    user, items = hide_statistics('"user"'), hide_statistics("items")
    connection.execute(
        'CREATE VIEW raw_interactions AS SELECT "user", unnest(list) AS item,'
        " NULL::VARCHAR AS timestamp, generate_subscripts(list, 1)::BIGINT AS position, row"
        f" FROM (SELECT {user} AS \"user\", string_split({items}, ' ') AS list, row FROM lists)"
    )


def _check_lists(connection: duckdb.DuckDBPyConnection, pairs: Path) -> None:
    """Refuse a header, another file, or two lines of one user, which would corrupt histories."""
    wrong = fetch_first(
        connection,
        r"""SELECT row, concat_ws(' ', "user", items) FROM lists WHERE NOT coalesce(
        regexp_full_match("user", '\d+') AND regexp_full_match(items, '\d+( \d+)*'), false)
        ORDER BY row LIMIT 1""",
    )
    repeated = fetch_first(
        connection,
        'SELECT max(row), "user" FROM lists GROUP BY "user" HAVING count(*) > 1 ORDER BY 1 LIMIT 1',
    )
    if wrong:
        raise DataError(
            expected="a user, a tab, and items with one space between, all of digits",
            got=repr(wrong[1][:80].replace("  ", "␣␣")),  # errors fold spaces
            where=f"{pairs}, row {wrong[0]}",
            fix="use the published file, which has no header",
        )
    if repeated:
        raise DataError(
            expected="one line per user",
            got=f"user {repeated[1]} again",
            where=f"{pairs}, row {repeated[0]}",
            fix="join the user's lines",
        )


def _view_titles(connection: duckdb.DuckDBPyConnection, file: Path) -> None:
    """Create the view of items; the file's name determines its form."""
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
    """Yield a title per line: all text after the first comma, unbalanced quotes included.

    Rows are counted from 1, without blank lines and a header that a user may have added.

    Raises:
        DataError: A line is malformed or not UTF-8.
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
                    fix="use the published file",
                )
            row += 1
            yield Title(item.strip(), _unquote(title.strip()), row)


def _unquote(title: str) -> str:
    """Remove quotes that enclose the whole title; keep quotes around a part, or a single one."""
    inner = title[1:-1]
    quoted = len(title) > 1 and title[0] == title[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else title


def _find_covers(folder: Path, options: MicroLensParams) -> Path | None:
    """Return the covers' folder or zip, or None if there is none and covers are optional.

    Covers are required by default: a misnamed folder must not turn a run into one on text alone.
    """
    if any(folder.glob(COVERS)) or any(folder.glob(f"{COVERS}.zip")):
        return find_single_file(folder, COVERS, f"{COVERS}.zip")
    if options.covers == "required":
        raise DataError(
            expected=f"one {COVERS} or {COVERS}.zip",
            got="none",
            where=str(folder),
            fix="put the covers there, or set preprocess.microlens.covers to optional to use text"
            " alone",
        )
    return None


def _view_covers(connection: duckdb.DuckDBPyConnection, source: Path | None, folder: Path) -> None:
    """Create the table of images: each cover belongs to the item that it is named after."""
    covers = _list_covers(source, folder) if source else []
    connection.execute(
        "CREATE TABLE raw_images AS SELECT unnest(?::VARCHAR[]) AS item,"
        " unnest(?::VARCHAR[]) AS file, unnest(?::VARCHAR[]) AS member,"
        " NULL::VARCHAR AS url, unnest(range(1, ? + 1)) AS row",
        [*([getattr(cover, name) for cover in covers] for name in Cover._fields), len(covers)],
    )


def _list_covers(source: Path, folder: Path) -> list[Cover]:
    """List the covers in a folder or zip, at any depth: some programs unpack into a second folder.

    Raises:
        DataError: There are none, an item has two, or the zip is damaged or outside the folder.
    """
    if source.is_dir():
        names = [path.relative_to(source).as_posix() for path in source.rglob("*")]
    else:
        names = list_zip(source, folder)
    found: dict[str, str] = {}
    covers = sorted(name for name in names if _is_cover(PurePosixPath(name)))
    unknown = [name for name in covers if name != escape_file_name(name)]
    for name in (name for name in covers if name == escape_file_name(name)):
        item = PurePosixPath(name).stem
        if item in found:
            raise DataError(
                expected="one cover of each item",
                got=f"{found[item]} and {name}",
                where=str(source),
                fix="remove one of them",
            )
        found[item] = name
    if not found:
        raise DataError(
            expected="covers named after their items, such as 1.jpg",
            got=", ".join(sorted(names)[:4]) or "nothing",
            where=str(source),
            fix="put the published covers there",
        )
    if source.is_dir():
        return [
            *(Cover(item, str(source / name), None) for item, name in found.items()),
            *(Cover(None, escape_file_name(str(source / name)), None) for name in unknown),
        ]
    return [Cover(item, str(source), name) for item, name in found.items()]


def _is_cover(name: PurePosixPath) -> bool:
    # macOS adds a second, hidden entry for each file of a zip.
    return name.suffix.lower() in IMAGES and "__MACOSX" not in name.parts

"""Whole files or none: what is written stands under its name only when it is complete."""

import contextlib
import errno
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import duckdb

from mllm_msr.errors import DataError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_DISK_WORDS = ("no space left", "file too large", "disk quota", "out of disk")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Lend a temporary path beside ``path`` and rename it when the block ends well.

    The block may make a file or a folder of it. When the block fails, the temporary is removed
    and whatever stood at ``path`` before stays as it was.

    Raises:
        DataError: The disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _replace(temporary, path)
    except (OSError, duckdb.Error) as error:
        _explain(error, path)
        raise
    finally:
        _remove(temporary)


@contextlib.contextmanager
def written_together(folder: Path) -> Iterator[Path]:
    """Lend a folder inside ``folder`` and move its files up when the block ends well.

    When the block fails, its files are removed and those that stood in ``folder`` before stay.
    Sub-folders, such as DuckDB's spill, are always removed.

    Raises:
        DataError: The disk is full.
    """
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for file in [path for path in unfinished.iterdir() if path.is_file()]:
            file.replace(folder / file.name)
    except (OSError, duckdb.Error) as error:
        _explain(error, folder)
        raise
    finally:
        shutil.rmtree(unfinished)


def kept_folder() -> Path:
    """Give the folder of what outlives a run without being its output: answers, checkpoints.

    It lies in the project's root. DVC runs queued experiments in copies of the project below
    ``.dvc/tmp/exps``; they share the folder of the project itself.
    """
    root = Path(os.environ.get("DVC_ROOT", ".")).resolve()
    for folder in root.parents:
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            root = folder.parents[2]
            break
    return root / ".mllm_msr"


def duckdb_path(path: Path) -> str:
    """Return the text by which DuckDB reads or writes exactly this file.

    DuckDB takes a path for a pattern: ``games [2]`` would be the folder ``games 2``. Brackets
    around ``[``, ``*`` and ``?`` make it match only itself. The path is absolute, so that nothing
    at its start, such as ``~`` or ``file:``, has a meaning. The last name stays as it is: a link to
    DVC's cache leads to a file without a suffix.

    Readers of Parquet also need ``hive_partitioning=false``: a folder ``user=7`` would else become
    a column.

    Raises:
        DataError: The path has a backslash beside such a character; DuckDB would split it there.
    """
    literal = str(path.parent.resolve() / path.name)
    pattern = glob.escape(literal)
    if "\\" in literal and pattern != literal:
        raise DataError(
            "a path without backslashes, or without [, * and ?", "both", literal, "rename a folder"
        )
    return pattern


def is_full_disk(error: BaseException) -> bool:
    """Tell whether an error of Python's or DuckDB's says that the disk has no room."""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return True
    return any(words in str(error).lower() for words in FULL_DISK_WORDS)


def file_digest(path: Path) -> str:
    """Give a file's SHA-256; of a folder, that of its files' names and SHA-256s, in order."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path).as_posix()} {file_digest(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _replace(new: Path, path: Path) -> None:
    """Put a file or a folder in the place of another; where that fails, the other is put back."""
    if not path.is_dir():
        new.replace(path)
        return
    old = new.with_suffix(".old")  # a folder cannot be replaced in one step
    path.rename(old)
    try:
        new.replace(path)
    except OSError:
        old.rename(path)
        raise
    _remove(old)


def _explain(error: Exception, path: Path) -> None:
    """Raise a full disk as an error for people; leave any other error alone."""
    if is_full_disk(error):
        remedy = "free some space and run again; earlier outputs are untouched"
        raise DataError("room for the output", "a full disk", str(path), remedy) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""Whole files or none: what is written stands under its name only when it is complete."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import duckdb

from mllm_msr.core.errors import DataError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCK, REPLACED = ".lock", ".replaced"  # in a temporary folder: its lock; what stood at the target
MOST_WRITERS = 16  # of one target at the same time
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
FULL_DISK_WORDS = ("no space left", "file too large", "disk quota", "out of disk")

# What a path may lead to that has no end, or waits for a writer for ever.
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# What zipfile raises on archives and members that are damaged.
BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    ValueError,
    OverflowError,
    struct.error,
)


class UnreadableFileError(Exception):
    """A file cannot be read; the message says why, without its path.

    Attributes:
        fix: What to do about it.
    """

    def __init__(self, reason: str, fix: str = "replace it") -> None:
        """Take the message and what the attribute says."""
        super().__init__(reason)
        self.fix = fix


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Lend a temporary path beside ``path`` and rename it when the block ends well.

    The block may make a file or a folder of it. When the block fails, the temporary is removed
    and whatever stood at ``path`` before stays as it was. What a killed process left of the same
    ``path`` is removed first.

    Raises:
        DataError: The disk is full, or too many others write the same at this moment.
    """
    try:
        with _temporary_folder(path) as folder:
            temporary = folder / path.name
            yield temporary
            _replace(temporary, path, folder / REPLACED)
    except (OSError, duckdb.Error) as error:
        _explain(error, path)
        raise


@contextlib.contextmanager
def written_together(folder: Path) -> Iterator[Path]:
    """Lend a folder inside ``folder`` and move its files up when the block ends well.

    When the block fails, its files are removed and those that stood in ``folder`` before stay.
    Sub-folders, such as DuckDB's spill, are always removed, and so is what a killed process left.

    Raises:
        DataError: The disk is full, or too many others write the same at this moment.
    """
    try:
        with _temporary_folder(folder / "unfinished") as temporary:
            unfinished = temporary / "unfinished"
            unfinished.mkdir()
            yield unfinished
            for file in [path for path in unfinished.iterdir() if path.is_file()]:
                file.replace(folder / file.name)
    except (OSError, duckdb.Error) as error:
        _explain(error, folder)
        raise


def state_dir() -> Path:
    """Give the folder of what outlives a run without being its output: answers, checkpoints.

    It lies in the project's root. DVC runs queued experiments in copies of the project below
    ``.dvc/tmp/exps``; they share the folder of the project itself.
    """
    root = Path(os.environ.get("DVC_ROOT", ".")).resolve()
    return (find_copied_project(root) or root) / ".mllm_msr"


def find_copied_project(folder: Path) -> Path | None:
    """Give the project of which DVC made a copy for an experiment; None if this is no copy.

    Args:
        folder: The root of a project, absolute.
    """
    for above in folder.parents:
        if above.parts[-3:] == (".dvc", "tmp", "exps"):
            return above.parents[2]
    return None


def open_regular(path: Path, folder: Path | None = None) -> IO[bytes]:
    """Open a regular file of untrusted data for reading, and never wait for anything else.

    Args:
        path: The file, or a link to it.
        folder: What no link may lead out of. It may be a link itself, and DVC's cache in the
            project counts as inside: DVC can link files to there. None: any file will do.

    Raises:
        UnreadableFileError: There is no such file, it is no regular one, or it lies elsewhere.
    """
    try:
        real = Path(os.path.realpath(path, strict=True))
        if folder is not None:
            _refuse_outside(real, folder)
        _refuse_irregular(real.lstat().st_mode)  # opening a device may do something to it
        # Without waiting, and not another link that has just taken the file's place.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except (OSError, ValueError) as error:
        raise UnreadableFileError(_say_why(error)) from error
    stream = os.fdopen(descriptor, "rb")
    try:
        _refuse_irregular(os.fstat(descriptor).st_mode)
    except UnreadableFileError:
        stream.close()
        raise
    return stream


def open_zip(stream: IO[bytes]) -> zipfile.ZipFile:
    """Open a zip archive of untrusted data; who opened the stream closes it.

    Raises:
        UnreadableFileError: Its directory is damaged.
    """
    try:
        return zipfile.ZipFile(stream)
    except (*BROKEN_ZIP, OSError) as error:
        raise UnreadableFileError("no whole zip file", "download it again") from error


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
            expected="a path without backslashes, or without [, * and ?",
            got="both",
            where=literal,
            fix="rename a folder",
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


@contextlib.contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """Lend an empty folder beside ``target``, locked as long as its writer lives.

    The lock, and no process id, tells the folder of a killed process from one that is in use: it
    also holds between machines, and no other process can get it by chance. Folders are numbered,
    so that none has to be searched for among the many files of a folder.

    Raises:
        DataError: Every number is in use.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    held: tuple[Path, int] | None = None
    for number in range(MOST_WRITERS):
        folder = target.with_name(f".{target.name}.{number}.tmp")
        if held and not folder.is_dir():
            continue
        lock = _lock_folder(folder)
        if lock is None:
            continue
        _empty(folder, target)
        if held is None:
            held = folder, lock
        else:
            _release_folder(folder, lock)
    if held is None:
        got = f"{MOST_WRITERS} temporary folders in use"
        fix = "end the other runs; where there are none, delete these folders"
        pattern = target.with_name(f".{target.name}.*.tmp")
        raise DataError(expected="a free temporary folder", got=got, where=str(pattern), fix=fix)
    folder, lock = held
    try:
        yield folder
    finally:
        _release_folder(folder, lock)


def _lock_folder(folder: Path) -> int | None:
    """Lock a temporary folder, made where there is none; None where another writer has it.

    Returns:
        The descriptor that holds the lock until it is closed, or its process ends.
    """
    try:
        folder.mkdir()
        made = True
    except FileExistsError:
        made = False
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        return None  # its writer has just removed it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = os.fstat(lock).st_nlink > 0  # else its writer removed it before the lock was ours
    except OSError as error:
        # Some network file systems have no locks: there, only a folder of our own is surely free.
        free = made and error.errno in NO_LOCKS
    if free:
        return lock
    os.close(lock)
    return None


def _release_folder(folder: Path, lock: int) -> None:
    """Remove a temporary folder; the lock goes last, and from then on it may be another's."""
    try:
        _remove_all_but_lock(folder)
        (folder / LOCK).unlink()
        with contextlib.suppress(OSError):  # another writer has just taken it
            folder.rmdir()
    finally:
        os.close(lock)


def _empty(folder: Path, target: Path) -> None:
    """Remove what a killed process left; a folder that it had just moved away is put back."""
    if (folder / REPLACED).exists() and not target.exists():
        (folder / REPLACED).rename(target)
    _remove_all_but_lock(folder)


def _remove_all_but_lock(folder: Path) -> None:
    for left in list(folder.iterdir()):
        if left.name != LOCK:
            _remove(left)


def _replace(new: Path, path: Path, aside: Path) -> None:
    """Put a file or a folder in the place of another; where that fails, the other is put back.

    Args:
        new: The file or folder.
        path: Its place.
        aside: Where an earlier folder goes meanwhile: one cannot be replaced in one step.
    """
    if not path.is_dir():
        new.replace(path)
        return
    path.rename(aside)
    try:
        new.replace(path)
    except OSError:
        aside.rename(path)
        raise


def _explain(error: Exception, path: Path) -> None:
    """Raise a full disk as an error for people; leave any other error alone."""
    if is_full_disk(error):
        fix = "free some space and run again; earlier outputs are untouched"
        raise DataError(
            expected="room for the output", got="a full disk", where=str(path), fix=fix
        ) from error


def _refuse_outside(real: Path, folder: Path) -> None:
    """Refuse a file, all links followed, that is neither in a folder nor in DVC's cache.

    Raises:
        UnreadableFileError: It is elsewhere.
    """
    cache = state_dir().parent / ".dvc" / "cache"
    if not any(real.is_relative_to(inside.resolve()) for inside in (folder, cache)):
        fix = "put the file itself there, or make the folder itself the link"
        raise UnreadableFileError(f"a path or link that leads out of {folder}", fix)


def _refuse_irregular(mode: int) -> None:
    """Refuse what is no regular file.

    Raises:
        UnreadableFileError: It is none; names what it is.
    """
    if not stat.S_ISREG(mode):
        raise UnreadableFileError(KINDS.get(stat.S_IFMT(mode), "no regular file"))


def _say_why(error: OSError | ValueError) -> str:
    """Say in words why a path cannot be opened."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None or number in (errno.ENOENT, errno.ENOTDIR):  # None: it has a null character
        return "no such file"
    if number == errno.ENAMETOOLONG:
        return "a path longer than the system allows"
    return os.strerror(number).lower()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

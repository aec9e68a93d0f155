"""Whole files or none: what is written stands under its name only when it is complete."""

import contextlib
import errno
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

from mllm_msr.errors import DataError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
        remedy: What to do about it.
    """

    def __init__(self, reason: str, remedy: str = "replace it") -> None:
        """Take the message and what the attribute says."""
        super().__init__(reason)
        self.remedy = remedy


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


def _refuse_outside(real: Path, folder: Path) -> None:
    """Refuse a file, all links followed, that is neither in a folder nor in DVC's cache.

    Raises:
        UnreadableFileError: It is elsewhere.
    """
    cache = kept_folder().parent / ".dvc" / "cache"
    if not any(real.is_relative_to(inside.resolve()) for inside in (folder, cache)):
        remedy = "put the file itself there, or make the folder itself the link"
        raise UnreadableFileError(f"a path or link that leads out of {folder}", remedy)


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

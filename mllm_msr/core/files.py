"""Atomic writes, reading of untrusted files, paths for DuckDB, digests, and the state directory.

An atomic write goes to a temporary path and is renamed when it is complete, so that a file never
stands half written under its name.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mllm_msr.core.errors import DataError, UserError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCK, REPLACED = ".lock", ".replaced"  # in a temporary folder: its lock, the folder it replaces
TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # the name of a temporary folder
UNFINISHED = "unfinished"  # in the temporary folder of atomic_write_all
MAX_WRITERS = 16  # of one target at the same time
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
FULL_DISK_WORDS = ("no space left", "file too large", "disk quota", "out of disk")
# Of torch.save, where a write failed for any reason.
TORCH_WRITE_WORDS = ("iostream error", "unexpected pos", "failed writing file")
LEAST_ROOM = 1 << 20  # bytes; a write error with less free space counts as a full disk
READ_ONLY_WORDS = "read-only file system"
UNTOUCHED = "earlier outputs are untouched"

# Reading one of these may never end, or block until another process writes.
IRREGULAR_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# What zipfile raises on damaged archives and members.
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
    """A file cannot be read; the message gives the reason, without the path.

    Attributes:
        fix: What to do about it.
    """

    def __init__(self, reason: str, fix: str = "replace it") -> None:
        """Store the reason and the attribute."""
        super().__init__(reason)
        self.fix = fix


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path`` and rename it to ``path`` when the block succeeds.

    The block creates a file or a folder there. If the block fails, the temporary path is removed
    and an earlier ``path`` stays unchanged. Temporary files that a killed process left for the same
    ``path`` are removed first.

    Raises:
        DataError: The disk is full, the folder cannot be written, or too many processes write the
            same path.
    """
    with explain_write_errors(path), _temporary_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        with _explain_refusal(path.parent):
            _replace(temporary, path, folder / REPLACED)


@contextlib.contextmanager
def atomic_write_all(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder and move its files into ``folder`` when the block succeeds.

    If the block fails, its files are removed and earlier files in ``folder`` stay unchanged. All
    files are complete before the first is moved: only a kill between two moves leaves some new and
    some earlier files. Sub-folders, such as DuckDB's spill folder, are always removed, and so is
    what a killed process left.

    Raises:
        DataError: The disk is full, the folder cannot be written, or too many processes write to
            it.
    """
    with explain_write_errors(folder), _temporary_folder(folder / UNFINISHED) as temporary:
        unfinished = temporary / UNFINISHED
        unfinished.mkdir()
        yield unfinished
        for file in [path for path in unfinished.iterdir() if path.is_file()]:
            file.replace(folder / file.name)


@contextlib.contextmanager
def explain_write_errors(
    path: Path, what: str = "the output", kept: str = UNTOUCHED
) -> Iterator[None]:
    """Turn a full disk or a read-only file system within the block into a user error.

    Besides OSError it may be an error of a library that writes the file, such as DuckDB. An error
    that is for users already is not changed.

    Args:
        path: The file or folder that is written.
        what: What it holds.
        kept: What such an error leaves as it was.

    Raises:
        DataError: The disk is full or read-only.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_full_disk(error) or (_is_torch_write_error(error) and has_no_room(path)):
            fix = f"free some space and run again; {kept}"
            expected, where = f"room for {what}", str(_find_target(path))
            raise DataError(expected=expected, got="a full disk", where=where, fix=fix) from error
        if is_read_only(error):
            raise _unwritable(error, _find_target(path).parent, kept) from error
        raise


def make_folder(folder: Path) -> None:
    """Create a folder, and those above it, where they are missing.

    Raises:
        DataError: The disk is full, or one of them is read-only or no folder.
    """
    with explain_write_errors(folder), _explain_refusal(folder):
        folder.mkdir(parents=True, exist_ok=True)


def state_dir() -> Path:
    """Return the state directory: response store, downloaded images, checkpoints.

    These outlive a run without being its outputs. The directory lies in the project's root. DVC
    runs queued experiments in copies of the project below ``.dvc/tmp/exps``; all of them share the
    state directory of the project itself.
    """
    root = Path(os.environ.get("DVC_ROOT", ".")).resolve()
    return (find_experiment_project(root) or root) / ".mllm_msr"


def find_experiment_project(folder: Path) -> Path | None:
    """Return the project that a DVC experiment's copy belongs to, or None if this is no copy.

    Args:
        folder: The root of a project, absolute.
    """
    for above in folder.parents:
        if above.parts[-3:] == (".dvc", "tmp", "exps"):
            return above.parents[2]
    return None


def open_regular(path: Path, folder: Path | None = None) -> IO[bytes]:
    """Open an untrusted file for reading, without ever blocking on something other than a file.

    Args:
        path: The file, or a link to it.
        folder: The folder in which the file must lie, links resolved. The folder may be a link
            itself. DVC's cache in the project is allowed too, because DVC can link files to it.
            None allows any file.

    Raises:
        UnreadableFileError: The file is missing, not a regular file, or outside the folder.
    """
    try:
        real = Path(os.path.realpath(path, strict=True))
        if folder is not None:
            _refuse_outside(real, folder)
        _refuse_irregular(real.lstat().st_mode)  # before opening, which can act on a device
        # O_NOFOLLOW: the file may have been replaced by a link since it was resolved.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except (OSError, ValueError) as error:
        raise UnreadableFileError(_describe_open_error(error)) from error
    stream = os.fdopen(descriptor, "rb")
    try:
        _refuse_irregular(os.fstat(descriptor).st_mode)
    except UnreadableFileError:
        stream.close()
        raise
    return stream


def open_zip(stream: IO[bytes]) -> zipfile.ZipFile:
    """Open an untrusted zip archive; the caller closes the stream.

    Raises:
        UnreadableFileError: The archive's directory is damaged.
    """
    try:
        return zipfile.ZipFile(stream)
    except (*BROKEN_ZIP, OSError) as error:
        raise UnreadableFileError("a damaged zip file", "download it again") from error


def duckdb_path(path: Path) -> str:
    """Return a path escaped so that DuckDB reads or writes exactly this file.

    DuckDB treats a path as a glob pattern: ``games [2]`` would match the folder ``games 2``.
    Brackets around ``[``, ``*`` and ``?`` make them match only themselves. The path is made
    absolute, so that a prefix such as ``~`` or ``file:`` has no meaning. The file name is not
    resolved: DuckDB needs its suffix, which a link's target in DVC's cache lacks.

    Readers of Parquet also need ``hive_partitioning=false``; otherwise a folder ``user=7`` becomes
    a column.

    Raises:
        DataError: The path has both a backslash and a glob character; DuckDB would split it at the
            backslash.
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
    """Return whether an error of Python, DuckDB or another library means that the disk is full."""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return True
    return any(words in str(error).lower() for words in FULL_DISK_WORDS)


def has_no_room(path: Path) -> bool:
    """Return whether the disk of a path, or of the folder for it, has next to no free space."""
    folder = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < LEAST_ROOM
    return False


def is_read_only(error: BaseException) -> bool:
    """Return whether an error of Python, DuckDB or another library means a read-only disk."""
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return True
    return READ_ONLY_WORDS in str(error).lower()


def file_digest(path: Path) -> str:
    """Return a file's SHA-256, or for a folder that of its files' sorted names and SHA-256s."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path).as_posix()} {file_digest(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextlib.contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder next to ``target``, locked while its process lives.

    A lock instead of a process id tells the folder of a killed process from one in use: it also
    works between machines, and process ids are reused. The folders are numbered, so that stale ones
    are found without listing a large folder.

    Raises:
        DataError: All :data:`MAX_WRITERS` folders are in use, or none can be created.
    """
    make_folder(target.parent)
    with _explain_refusal(target.parent):
        held = _take_folder(target)
    if held is None:
        got = f"{MAX_WRITERS} temporary folders in use"
        fix = "end the other runs; if there are none, delete these folders"
        pattern = target.with_name(f".{target.name}.*.tmp")
        raise DataError(expected="a free temporary folder", got=got, where=str(pattern), fix=fix)
    folder, lock = held
    try:
        yield folder
    finally:
        _release_folder(folder, lock)


def _take_folder(target: Path) -> tuple[Path, int] | None:
    """Create and lock a temporary folder next to ``target``, and remove those of killed processes.

    Returns:
        The folder and its lock; None if all are in use.
    """
    held: tuple[Path, int] | None = None
    for number in range(MAX_WRITERS):
        folder = target.with_name(f".{target.name}.{number}.tmp")
        if held and not folder.is_dir():
            continue
        lock = _lock_folder(folder)
        if lock is None:
            continue
        _remove_leftovers(folder, target)
        if held is None:
            held = folder, lock
        else:
            _release_folder(folder, lock)
    return held


@contextlib.contextmanager
def _explain_refusal(folder: Path) -> Iterator[None]:
    """Turn the refusal to create or rename something in a folder into a user error.

    Raises:
        DataError: The folder, or one above it, is read-only or no folder.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise _unwritable(error, folder, UNTOUCHED) from error


def _unwritable(error: Exception, folder: Path, kept: str) -> DataError:
    """Return the error for a folder that cannot be written."""
    got = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        got = f"{os.strerror(error.errno).lower()} ({error.filename})"
    fix = f"make it writable, or name another folder; {kept}"
    return DataError(expected="a folder to write to", got=got, where=str(folder), fix=fix)


def _is_torch_write_error(error: BaseException) -> bool:
    """Return whether torch could not write a file; it does not say why."""
    return isinstance(error, RuntimeError) and any(w in str(error) for w in TORCH_WRITE_WORDS)


def _find_target(path: Path) -> Path:
    """Return where a file in a temporary folder ends up; other paths as they are."""
    folder = path.parent.parent if path.parent.name == UNFINISHED else path.parent
    return folder.parent / path.name if TEMPORARY.fullmatch(folder.name) else path


def _lock_folder(folder: Path) -> int | None:
    """Create a temporary folder if it is missing and lock it.

    Returns:
        The descriptor that holds the lock until it is closed or the process ends; None if another
        process has the lock.
    """
    try:
        folder.mkdir()
        created = True
    except FileExistsError:
        created = False
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        return None  # another process has just removed the folder
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = os.fstat(lock).st_nlink > 0  # 0: removed by its process before we got the lock
    except OSError as error:
        # On a file system without locks, only a folder that we just created is certainly free.
        free = created and error.errno in NO_LOCKS
    if free:
        return lock
    os.close(lock)
    return None


def _release_folder(folder: Path, lock: int) -> None:
    """Remove a temporary folder, its lock last: then another process may take the folder."""
    try:
        _remove_all_but_lock(folder)
        (folder / LOCK).unlink()
        with contextlib.suppress(OSError):  # another process has just taken it
            folder.rmdir()
    finally:
        os.close(lock)


def _remove_leftovers(folder: Path, target: Path) -> None:
    """Remove what a killed process left, after restoring a target that it had moved aside."""
    if (folder / REPLACED).exists() and not target.exists():
        (folder / REPLACED).rename(target)
    _remove_all_but_lock(folder)


def _remove_all_but_lock(folder: Path) -> None:
    for path in list(folder.iterdir()):
        if path.name != LOCK:
            _remove(path)


def _replace(new: Path, path: Path, aside: Path) -> None:
    """Rename ``new`` to ``path``; restore an earlier folder at ``path`` if that fails.

    Args:
        new: The new file or folder.
        path: Where it goes.
        aside: Where an earlier folder is moved first: a rename cannot replace a folder.
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


def _refuse_outside(real: Path, folder: Path) -> None:
    """Refuse a resolved file that is neither in a folder nor in DVC's cache.

    Raises:
        UnreadableFileError: It is elsewhere.
    """
    cache = state_dir().parent / ".dvc" / "cache"
    if not any(real.is_relative_to(inside.resolve()) for inside in (folder, cache)):
        fix = "put the file itself there, or make the folder itself the link"
        raise UnreadableFileError(f"a path or link that leads out of {folder}", fix)


def _refuse_irregular(mode: int) -> None:
    """Refuse a mode that is not that of a regular file.

    Raises:
        UnreadableFileError: It is another; the message names it.
    """
    if not stat.S_ISREG(mode):
        raise UnreadableFileError(IRREGULAR_KINDS.get(stat.S_IFMT(mode), "no regular file"))


def _describe_open_error(error: OSError | ValueError) -> str:
    """Return the reason why a path cannot be opened."""
    number = error.errno if isinstance(error, OSError) else None
    # ValueError: the path holds a null character.
    if number is None or number in (errno.ENOENT, errno.ENOTDIR):
        return "no such file"
    if number == errno.ENAMETOOLONG:
        return "a path longer than the system allows"
    return os.strerror(number).lower()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""The response store: a response that was computed once is never computed again.

Every response is stored under a hash of everything it depends on: the model's weights and files,
the prompt, the image's bytes, the decoding settings and the dtype. The store is not an output of
the pipeline: a killed stage resumes where it stopped, a new item costs the prompts of one item, and
an experiment that returns to earlier settings computes nothing. Responses are only ever added.

SQLite with a write-ahead log survives ``kill -9`` and serves several processes at once, but does
not detect a flipped bit in its file. Every row therefore has a digest of key and response; a row
that does not match its digest counts as missing and is computed again and replaced.

The file's ``application_id`` identifies a response store, its ``user_version`` is the version of
the schema. Stores of earlier releases have neither and no digests; opening them adds all three.
"""

import contextlib
import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from mllm_msr.core.errors import DataError, ParamsError
from mllm_msr.core.files import atomic_write, has_no_room, is_full_disk, state_dir

log = logging.getLogger(__name__)

VARIABLE = "MLLM_MSR_RESPONSES"  # the environment variable with the file of the store
FILE = "responses.sqlite"  # the default, in the state directory
IN_MEMORY = Path(":memory:")  # SQLite's name for a database without a file
# Their names in earlier releases. The table is still called answers, so that these can read it.
OLD_VARIABLE, OLD_FILE = "MLLM_MSR_ANSWERS", "answers.sqlite"

KEYS_PER_LOOKUP = 500
SECONDS_TO_WAIT = 60
SECONDS_BETWEEN_TRIES = 0.01
APPLICATION_ID = 0x4D4C4C4D  # "MLLM" in ASCII, in the header of the file
VERSION = 1  # of the schema, in the header of the file
DIGEST_BYTES = 16
# Raised by SQLite's calls; the second where a message quotes bytes of a damaged file.
FAILURES = (sqlite3.Error, UnicodeDecodeError)
COLUMNS = {
    "key": "TEXT PRIMARY KEY",
    "text": "TEXT NOT NULL",
    "complete": "INTEGER NOT NULL",
    "model": "TEXT NOT NULL DEFAULT ''",
    "added": "REAL NOT NULL DEFAULT 0",
    "digest": "BLOB NOT NULL DEFAULT x''",  # of key, text and complete
}
TABLE_NAMES = (
    "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite!_%' ESCAPE '!'"
)
UNVERSIONED = {"key", "text", "complete"}  # columns of every store without a version


class Response(NamedTuple):
    """What a model generated.

    Attributes:
        text: The text without special tokens.
        complete: False where it was truncated at the maximum number of new tokens.
    """

    text: str
    complete: bool


class StepOutput(NamedTuple):
    """The result of one step: a prefill, a decoding forward, or a whole padded batch.

    Attributes:
        finished: The responses that the step finished, by index of their prompt in the batch.
        tokens: How many tokens the step generated, those of unfinished responses too.
    """

    finished: dict[int, Response]
    tokens: int


def response_key(**depends_on: str | int | None) -> str:
    """Return the hexadecimal SHA-256 of everything that a response depends on."""
    text = json.dumps(depends_on, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def store_path() -> Path:
    """Return the store's file: ``MLLM_MSR_RESPONSES``, or one for all experiments of the project.

    The default file of an earlier release is renamed.

    Raises:
        ParamsError: The environment has the variable of an earlier release.
        DataError: The file of an earlier release is in use, and cannot be renamed.
    """
    path, old = _find_paths()
    if old and old.is_file() and not path.exists() and _is_writable(old):
        _rename_old(old, path)
    return old if old and old.is_file() and not path.exists() else path


def open_store(read_only: bool = False) -> "ResponseStore":
    """Open the project's store.

    Args:
        read_only: Whether to leave all files as they are; without a file the store is empty.

    Raises:
        ParamsError: The environment has the variable of an earlier release.
        DataError: The file is not a response store, is damaged, or cannot be read.
    """
    if not read_only:
        return ResponseStore(store_path())
    for path in _find_paths():
        if path and path.is_file():
            return ResponseStore(path, read_only=True)
    return ResponseStore(IN_MEMORY)


def _find_paths() -> tuple[Path, Path | None]:
    """Return the store's file, and the default file of an earlier release where that applies."""
    if OLD_VARIABLE in os.environ:
        fix = f"rename the variable to {VARIABLE}; the file may keep its name"
        raise ParamsError(
            expected=f"the variable {VARIABLE}",
            got=f"{OLD_VARIABLE}, its name in earlier releases",
            where="the environment",
            fix=fix,
        )
    named = os.environ.get(VARIABLE)
    return (Path(named), None) if named else (state_dir() / FILE, state_dir() / OLD_FILE)


def _rename_old(old: Path, path: Path) -> None:
    """Rename the file of an earlier release, once its write-ahead log is merged into it.

    Raises:
        DataError: Another process has it open.
    """
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(old)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    log_file = old.with_name(f"{old.name}-wal")
    if log_file.is_file():  # closing the last connection removes it
        raise DataError(
            expected=f"a response store to rename to {path.name}",
            got="one that another process has open",
            where=str(old),
            fix="run again when that process has ended",
        )
    with contextlib.suppress(FileNotFoundError):  # another process renamed it meanwhile
        old.rename(path)
        log.warning("%s: renamed to %s", old, path.name)


class Holding(NamedTuple):
    """The responses of one model in a store.

    Attributes:
        model: Folder or hub name; empty for responses older than this column.
        responses: Their number.
        characters: The length of all texts.
        newest: When the last one was added, seconds since 1970.
    """

    model: str
    responses: int
    characters: int
    newest: float


class ResponseStore:
    """An append-only map from keys to responses in one file.

    Attributes:
        read_only: Whether responses can only be looked up.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        """Open the store, creating or migrating it where necessary.

        Args:
            path: The file.
            read_only: Whether to leave the file as it is. A store whose file or folder cannot be
                written is read-only in any case.

        Raises:
            DataError: The file is not a response store, is of another version, damaged, or
                read-only and unfinished; or the disk is full.
        """
        self._path = path
        self._damaged: set[str] = set()  # keys of all damaged rows found so far
        try:
            if not read_only:
                path.parent.mkdir(parents=True, exist_ok=True)
            self.read_only = read_only or (path.is_file() and not _is_writable(path))
            self._database = self._connect()
        except (*FAILURES, OSError) as error:
            raise self._explain(error) from error
        try:
            self._prepare()
        except FAILURES as error:
            self._database.close()
            raise self._explain(error) from error
        except DataError:
            self._database.close()
            raise

    def __enter__(self) -> Self:
        """Use the store as a context."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file; log how many responses were damaged."""
        if self._damaged:
            got = f"{len(self._damaged):,} damaged responses"
            log.warning("%s: %s counted as missing; check the disk", self._path, got)
        self._database.close()

    def __len__(self) -> int:
        """Return the number of responses.

        Raises:
            DataError: The file is damaged.
        """
        try:
            return int(self._database.execute("SELECT count(*) FROM answers").fetchone()[0])
        except FAILURES as error:
            raise self._explain(error) from error

    @property
    def bytes(self) -> int:
        """The size of the file and of its log, which other processes may be writing."""
        log = self._path.with_name(f"{self._path.name}-wal")
        return sum(file.stat().st_size for file in (self._path, log) if file.is_file())

    @property
    def damaged(self) -> int:
        """How many damaged responses were found so far; they count as missing."""
        return len(self._damaged)

    def check_writable(self, missing: int) -> None:
        """Raise an error if responses are missing and cannot be stored.

        Args:
            missing: How many responses the store lacks.

        Raises:
            DataError: Some are missing, and the store cannot be written.
        """
        if missing and self.read_only:
            got = f"a read-only one that lacks {missing:,} responses"
            fix = "make file and folder writable, or name another file in MLLM_MSR_RESPONSES"
            raise DataError(
                expected="a response store to write to", got=got, where=str(self._path), fix=fix
            )

    def find(self, keys: Iterable[str]) -> dict[str, Response]:
        """Return the responses of keys; missing and damaged ones are left out.

        Raises:
            DataError: The file is damaged.
        """
        try:
            return dict(self._find(list(dict.fromkeys(keys))))
        except FAILURES as error:
            raise self._explain(error) from error

    def add(self, responses: Mapping[str, Response], model: str = "") -> int:
        """Store responses in one transaction; those that are stored already stay as they are.

        Args:
            responses: By key.
            model: The model's name, for display only: a response's key has all it depends on.

        Returns:
            How many were new.

        Raises:
            DataError: The disk is full, or the store cannot be written.
        """
        self.check_writable(len(responses))
        now = time.time()  # noqa: TID251  # a date, for prune alone
        rows = [
            (key, *response, model, now, _digest(key.encode(), *_encode(response)))
            for key, response in responses.items()
        ]
        try:
            with self._transaction():
                self._remove_damaged(responses)
                added = self._database.executemany(
                    f"INSERT OR IGNORE INTO answers ({', '.join(COLUMNS)})"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    rows,
                ).rowcount
        except FAILURES as error:
            raise self._explain(error) from error
        return max(0, added)  # -1 where there was nothing to add

    def holdings(self) -> list[Holding]:
        """Return the responses of each model.

        Raises:
            DataError: The file is damaged, or of another program.
        """
        query = (
            "SELECT model, count(*), sum(length(text)), max(added) FROM answers"
            " GROUP BY model ORDER BY model"
        )
        try:
            rows = self._database.execute(query).fetchall()
            return [Holding(model.decode(errors="replace"), *rest) for model, *rest in rows]
        except FAILURES as error:
            raise self._explain(error) from error

    def prune(self, model: str | None, before: float | None) -> int:
        """Remove responses; return how many. :meth:`shrink` then frees their space.

        Args:
            model: Of this model only; None: of all.
            before: Only those known to be added before this time, seconds since 1970; None: all.

        Raises:
            DataError: Another process writes for long.
        """
        chosen = "(? IS NULL OR model = ?) AND (? IS NULL OR (added > 0 AND added < ?))"
        try:
            return self._database.execute(
                f"DELETE FROM answers WHERE {chosen}", (model, model, before, before)
            ).rowcount
        except FAILURES as error:
            raise self._explain(error) from error

    def shrink(self) -> None:
        """Free the space of removed responses.

        Raises:
            DataError: Another process writes for long, or the disk is too full for a copy.
        """
        try:
            self._database.execute("VACUUM")
        except FAILURES as error:
            raise self._explain(error) from error

    def copy_to(self, path: Path) -> None:
        """Copy the store to a new file, with all that is stored now, while others may write.

        Copying the file itself would leave out its log, and may mix two states of it.

        Raises:
            DataError: The new file exists, the disk is full, or the store is damaged.
        """
        if path.exists():
            fix = "name a new one, or delete it"
            raise DataError(expected="a new file", got="an existing one", where=str(path), fix=fix)
        try:
            with atomic_write(path) as temporary:
                self._database.execute("VACUUM INTO ?", (str(temporary),))
        except FAILURES as error:
            raise self._explain(error) from error

    def _connect(self) -> sqlite3.Connection:
        """Open the file.

        Raises:
            DataError: It cannot be written, and its log, which is part of it, is not empty.
        """
        name: Path | str = self._path
        if self.read_only:
            log_file = self._path.with_name(f"{self._path.name}-wal")
            has_log = log_file.is_file() and log_file.stat().st_size
            is_writable = _is_writable(self._path)
            if has_log and not is_writable:
                got = "a log whose responses are not in the store yet"
                fix = "open the store once where it can be written"
                raise DataError(
                    expected="a finished store, or one to write",
                    got=got,
                    where=str(log_file),
                    fix=fix,
                )
            # SQLite creates a log beside the store even to read. Only a connection that may write
            # removes it again; where it cannot be created, nobody else writes either.
            mode = "mode=ro" if has_log else "mode=rw" if is_writable else "immutable=1"
            name = f"{self._path.resolve().as_uri()}?{mode}"
        database = sqlite3.connect(
            name, timeout=SECONDS_TO_WAIT, isolation_level=None, uri=self.read_only
        )
        database.text_factory = bytes  # a damaged text may not be UTF-8
        return database

    def _prepare(self) -> None:
        """Create or migrate the table where necessary; never write to another program's database.

        Raises:
            DataError: The file is not a store of this version, and cannot be migrated.
        """
        with self._transaction("DEFERRED"):  # another process may create the table meanwhile
            is_current = self._is_current()
        if not is_current:
            self._check_migratable()
            with self._transaction():  # one process at a time; another may have been faster
                if not self._is_current():
                    self._migrate()
        if not self.read_only:
            self._enable_log()
            self._database.execute("PRAGMA synchronous = NORMAL")

    def _enable_log(self) -> None:
        """Let writers append to a log; SQLite does not wait for other processes here, so try on."""
        stop = time.monotonic() + SECONDS_TO_WAIT
        while True:
            try:
                self._database.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > stop:
                    raise
                time.sleep(SECONDS_BETWEEN_TRIES)
            else:
                return

    def _is_current(self) -> bool:
        """Return whether the file is a store of this version; False where it can be migrated.

        Raises:
            DataError: It belongs to another program, or is of another version.
        """
        mark, version = (
            self._database.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("application_id", "user_version")
        )
        if mark == APPLICATION_ID and version == VERSION:
            return True
        where = str(self._path)
        if mark == APPLICATION_ID:
            fix = "use the release that wrote it, or name another file in MLLM_MSR_RESPONSES"
            got = f"version {version}"
            raise DataError(
                expected=f"a response store of version {VERSION}", got=got, where=where, fix=fix
            )
        tables = {name.decode() for (name,) in self._database.execute(TABLE_NAMES)}
        columns = self._columns()
        unversioned = tables == {"answers"} and UNVERSIONED <= columns < COLUMNS.keys()
        if mark or version or not (unversioned or not tables):
            got = f"another program's database, with {', '.join(sorted(tables)) or 'no table'}"
            fix = "name another file in MLLM_MSR_RESPONSES"
            raise DataError(expected="a response store", got=got, where=where, fix=fix)
        return False

    def _migrate(self) -> None:
        """Create the table, or add columns and digests to that of a store without version."""
        definitions = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
        self._database.execute(
            f"CREATE TABLE IF NOT EXISTS answers ({definitions}) WITHOUT ROWID, STRICT"
        )
        missing = [name for name in COLUMNS if name not in self._columns()]
        for name in missing:
            self._database.execute(f"ALTER TABLE answers ADD COLUMN {name} {COLUMNS[name]}")
        if missing:
            self._database.create_function("digest_of", 3, _digest, deterministic=True)
            rows = self._database.execute(
                "UPDATE answers SET"
                " digest = digest_of(CAST(key AS BLOB), CAST(text AS BLOB), complete)"
            ).rowcount
            log.warning("%s: an older store; its %d responses now have digests", self._path, rows)
        self._database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self._database.execute(f"PRAGMA user_version = {VERSION}")

    def _check_migratable(self) -> None:
        """Raise an error if the store is read-only."""
        if self.read_only:
            got = "an older one that cannot be written"
            fix = "open it once where it can be written"
            raise DataError(
                expected="a response store with digests", got=got, where=str(self._path), fix=fix
            )

    def _columns(self) -> set[str]:
        return {row[1].decode() for row in self._database.execute("PRAGMA table_info(answers)")}

    @contextlib.contextmanager
    def _transaction(self, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE") -> Iterator[None]:
        """Run the block as one transaction: IMMEDIATE locks out other writers, DEFERRED reads."""
        self._database.execute(f"BEGIN {kind}")
        try:
            yield
            self._database.execute("COMMIT")
        finally:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")

    def _find(self, keys: Sequence[str]) -> Iterator[tuple[str, Response]]:
        for start in range(0, len(keys), KEYS_PER_LOOKUP):
            part = keys[start : start + KEYS_PER_LOOKUP]
            marks = ", ".join("?" * len(part))
            query = f"SELECT key, text, complete, digest FROM answers WHERE key IN ({marks})"
            for key, *columns in self._database.execute(query, part):
                response = _decode(key, *columns)
                if response is None:
                    # A damaged key may have any type, as may any other column.
                    known = isinstance(key, bytes)
                    self._damaged.add(key.decode(errors="replace") if known else repr(key))
                else:
                    yield key.decode(), response

    def _remove_damaged(self, keys: Iterable[str]) -> None:
        """Remove damaged rows, so that new ones can replace them."""
        damaged = self._damaged.intersection(keys)
        # Another process may have replaced them since.
        for key in damaged - dict(self._find(list(damaged))).keys():
            self._database.execute("DELETE FROM answers WHERE key = ?", (key,))

    def _explain(self, error: Exception) -> DataError:
        """Return the error to raise: what happened to the file, and what to do."""
        where, name = str(self._path), getattr(error, "sqlite_errorname", "")
        if is_full_disk(error) or name == "SQLITE_FULL" or self._has_no_room(name):
            fix = "free some space and run again; responses so far are kept"
            return DataError(
                expected="space for responses", got="a full disk", where=where, fix=fix
            )
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            got = f"another process that writes for more than {SECONDS_TO_WAIT} seconds"
            fix = "run again when it is done; responses so far are kept"
            return DataError(expected="the lock for writing", got=got, where=where, fix=fix)
        if name.startswith("SQLITE_CORRUPT") or isinstance(error, UnicodeDecodeError):
            fix = "put a backup in its place, or delete it: its responses are computed again"
            return DataError(
                expected="a response store", got=f"a damaged file ({error})", where=where, fix=fix
            )
        if name == "SQLITE_NOTADB":
            fix = (
                "if it was one, put a backup in its place, or delete it: its responses are computed"
                " again; else name another file in MLLM_MSR_RESPONSES"
            )
            got = "no database, or one with a damaged header"
            return DataError(expected="a response store", got=got, where=where, fix=fix)
        if name.startswith("SQLITE_IOERR"):
            fix = "check the disk, and run again; responses so far are kept"
            return DataError(
                expected="a disk that reads and writes", got=str(error), where=where, fix=fix
            )
        fix, got = "name another file in MLLM_MSR_RESPONSES", str(error)
        if isinstance(error, OSError) or name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY")):
            fix = f"make file and folder writable, or {fix}"
            if not os.access(self._path.parent, os.W_OK):
                got = f"a folder that cannot be written ({error})"
        return DataError(expected="a response store", got=got, where=where, fix=fix)

    def _has_no_room(self, name: str) -> bool:
        """Return whether SQLite's input/output error comes from a full disk.

        SQLite reports such an error where files beside the store cannot be created or grow.
        """
        folder = self._path.parent
        is_candidate = name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN"))
        return is_candidate and os.access(folder, os.W_OK) and has_no_room(folder)


def _is_writable(path: Path) -> bool:
    """Return whether a file and its folder, in which SQLite creates the log, can be written."""
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def _encode(response: Response) -> tuple[bytes, int]:
    return response.text.encode(), int(response.complete)


def _decode(key: bytes, text: Any, complete: Any, digest: bytes) -> Response | None:
    """Return the response of a row, or None if the row is damaged."""
    try:
        is_intact = digest == _digest(key, text, complete)
        return Response(text.decode(), bool(complete)) if is_intact else None
    except (TypeError, ValueError):  # a damaged column may have any type and any bytes
        return None


def _digest(key: bytes, text: bytes, complete: int) -> bytes:
    """Return the BLAKE2b digest of a row's key and response, 16 bytes."""
    row = b"%d %d %b%b" % (complete, len(key), key, text)
    return hashlib.blake2b(row, digest_size=DIGEST_BYTES).digest()

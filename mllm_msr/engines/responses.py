"""The response store: no question is put to a model twice.

Every answer is kept under a hash of what it depends on: the model's weights and files, the prompt,
the image's bytes, the decoding settings and the dtype. It lies outside the pipeline's outputs, so
that a killed stage goes on where it was, one new item costs one item, and an experiment that comes
back to an old setting costs nothing. Answers are only ever added.

SQLite with a write-ahead log keeps it whole through ``kill -9`` and for several processes at once.
It does not notice a flipped bit in its file. Every row therefore has a digest of its key and
response, and a row that does not fit its digest counts as missing: it is asked again and replaced.

The file's ``application_id`` marks a response store, its ``user_version`` is the schema's. Stores
of earlier releases have neither and no digests; they get all three when they are opened.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from mllm_msr.core.errors import DataError
from mllm_msr.core.files import is_full_disk, state_dir

log = logging.getLogger(__name__)

KEYS_PER_LOOKUP = 500
SECONDS_TO_WAIT = 60
APPLICATION_ID = 0x4D4C4C4D  # "MLLM" in ASCII, in the header of the file
VERSION = 1  # of the schema, in the header of the file
DIGEST_BYTES = 16
# What a call of SQLite's can raise; the second where its message quotes bytes of a damaged file.
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
LEAST_ROOM = 1 << 20  # bytes; with less on the disk, an error of writing is taken for a full disk
UNVERSIONED = {"key", "text", "complete"}  # what stores without a version have at least


class Response(NamedTuple):
    """What a model said.

    Attributes:
        text: The answer without special tokens.
        complete: False where it was cut at the largest number of new tokens.
    """

    text: str
    complete: bool


def response_key(**depends_on: str | int | None) -> str:
    """Hash everything that an answer depends on, as hexadecimal SHA-256."""
    text = json.dumps(depends_on, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def store_path() -> Path:
    """Give the store's file: ``MLLM_MSR_ANSWERS``, or one for all experiments of the project."""
    named = os.environ.get("MLLM_MSR_ANSWERS")
    return Path(named) if named else state_dir() / "answers.sqlite"


class Holding(NamedTuple):
    """What a store holds of one model.

    Attributes:
        model: Its folder or hub name; empty for answers older than this record.
        answers: How many.
        characters: Of all texts.
        newest: When the last was added, seconds since 1970.
    """

    model: str
    answers: int
    characters: int
    newest: float


class ResponseStore:
    """An append-only map from keys to answers in one file.

    Attributes:
        read_only: Whether the file, or its folder, cannot be written; lookups work all the same.
    """

    def __init__(self, path: Path) -> None:
        """Open the store, making it where there is none; a store without digests gets them.

        Raises:
            DataError: The file is not a response store, of another version, damaged, or unfinished
                on a file system that cannot be written; or the disk is full.
        """
        self._path = path
        self._damaged: set[str] = set()  # keys of all rows found so
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.read_only = path.is_file() and not _is_writable(path)
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
        """Close the file; say how many responses were damaged."""
        if self._damaged:
            got = f"{len(self._damaged):,} damaged responses"
            log.warning("%s: %s counted as missing; check the disk", self._path, got)
        self._database.close()

    def __len__(self) -> int:
        """Count the answers.

        Raises:
            DataError: The file is damaged.
        """
        try:
            return int(self._database.execute("SELECT count(*) FROM answers").fetchone()[0])
        except FAILURES as error:
            raise self._explain(error) from error

    @property
    def bytes(self) -> int:
        """The size of the file and of its log, which other processes may still write."""
        log = self._path.with_name(f"{self._path.name}-wal")
        return sum(file.stat().st_size for file in (self._path, log) if file.is_file())

    @property
    def damaged(self) -> int:
        """How many responses were found that are not what was written, and count as missing."""
        return len(self._damaged)

    def refuse_read_only(self, missing: int) -> None:
        """Refuse to go on without a place for responses that are still to be computed.

        Args:
            missing: How many responses the store lacks.

        Raises:
            DataError: Some are missing, and the store cannot be written.
        """
        if missing and self.read_only:
            got = f"a read-only one that lacks {missing:,} responses"
            fix = "make file and folder writable, or name another file in MLLM_MSR_ANSWERS"
            raise DataError(
                expected="a response store to write to", got=got, where=str(self._path), fix=fix
            )

    def find(self, keys: Iterable[str]) -> dict[str, Response]:
        """Look up keys; those without an answer, or with a damaged one, are left out.

        Raises:
            DataError: The file is damaged.
        """
        try:
            return dict(self._find(list(dict.fromkeys(keys))))
        except FAILURES as error:
            raise self._explain(error) from error

    def add(self, answers: Mapping[str, Response], model: str = "") -> int:
        """Keep answers, all or none of them; an answer that is already there stays.

        Returns how many were not there.

        Args:
            answers: By key.
            model: Whose they are, for people; what an answer depends on is in its key.

        Raises:
            DataError: The disk is full, or the store cannot be written.
        """
        self.refuse_read_only(len(answers))
        now = time.time()
        rows = [
            (key, answer.text, answer.complete, model, now, _digest(key.encode(), *_encode(answer)))
            for key, answer in answers.items()
        ]
        try:
            with self._transaction():
                self._remove_damaged(answers)
                added = self._database.executemany(
                    f"INSERT OR IGNORE INTO answers ({', '.join(COLUMNS)})"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    rows,
                ).rowcount
        except FAILURES as error:
            raise self._explain(error) from error
        return max(0, added)  # -1 where there was nothing to add

    def holdings(self) -> list[Holding]:
        """Count the answers of each model.

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
        """Remove answers; returns how many. Their room is given back by :meth:`shrink`.

        Args:
            model: Of this model only; None: of all.
            before: Added before this time only, seconds since 1970, and noted so; None: whenever.

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
        """Give the room of removed answers back.

        Raises:
            DataError: Another process writes for long, or the disk is too full for a copy.
        """
        try:
            self._database.execute("VACUUM")
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
            if log_file.is_file() and log_file.stat().st_size:
                got = "a log whose responses are not in the store yet"
                fix = "open the store once where it can be written"
                raise DataError(
                    expected="a finished store, or one to write",
                    got=got,
                    where=str(log_file),
                    fix=fix,
                )
            name = f"{self._path.resolve().as_uri()}?immutable=1"  # needs no file beside it
        database = sqlite3.connect(
            name, timeout=SECONDS_TO_WAIT, isolation_level=None, uri=self.read_only
        )
        database.text_factory = bytes  # a damaged text may be no UTF-8
        return database

    def _prepare(self) -> None:
        """Make or migrate the tables where needed; nothing is written to the file of another.

        Raises:
            DataError: The file is not a store of this version, and cannot be made one.
        """
        if not self._is_current():
            self._refuse_migrating()
            with self._transaction():  # one process at a time; another may have been quicker
                if not self._is_current():
                    self._migrate()
        if not self.read_only:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")

    def _is_current(self) -> bool:
        """Tell whether the file is a store of this version; False where it can be made one.

        Raises:
            DataError: It is of another program, or of another version.
        """
        mark, version = (
            self._database.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("application_id", "user_version")
        )
        if mark == APPLICATION_ID and version == VERSION:
            return True
        where = str(self._path)
        if mark == APPLICATION_ID:
            fix = "use the release that wrote it, or name another file in MLLM_MSR_ANSWERS"
            got = f"version {version}"
            raise DataError(
                expected=f"a response store of version {VERSION}", got=got, where=where, fix=fix
            )
        tables = {name.decode() for (name,) in self._database.execute(TABLE_NAMES)}
        columns = self._columns()
        unversioned = tables == {"answers"} and UNVERSIONED <= columns < COLUMNS.keys()
        if mark or version or not (unversioned or not tables):
            got = f"another program's database, with {', '.join(sorted(tables)) or 'no table'}"
            fix = "name another file in MLLM_MSR_ANSWERS"
            raise DataError(expected="a response store", got=got, where=where, fix=fix)
        return False

    def _migrate(self) -> None:
        """Make the tables, or complete those of a store without version; compute its digests."""
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

    def _refuse_migrating(self) -> None:
        """Refuse an older store where it cannot be written."""
        if self.read_only:
            got = "an older one that cannot be written"
            fix = "open it once where it can be written"
            raise DataError(
                expected="a response store with digests", got=got, where=str(self._path), fix=fix
            )

    def _columns(self) -> set[str]:
        return {row[1].decode() for row in self._database.execute("PRAGMA table_info(answers)")}

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Write everything in the block, or nothing; one process at a time."""
        self._database.execute("BEGIN IMMEDIATE")
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
            for key, *response in self._database.execute(query, part):
                answer = _read(key, *response)
                if answer is None:
                    self._damaged.add(key.decode(errors="replace"))
                else:
                    yield key.decode(), answer

    def _remove_damaged(self, keys: Iterable[str]) -> None:
        """Remove damaged rows, so that new ones can take their place."""
        again = self._damaged.intersection(keys)
        for key in again - dict(self._find(list(again))).keys():  # another process may have mended
            self._database.execute("DELETE FROM answers WHERE key = ?", (key,))

    def _explain(self, error: Exception) -> DataError:
        """Give the error for people: what happened to the file, and the way out."""
        where, name = str(self._path), getattr(error, "sqlite_errorname", "")
        if is_full_disk(error) or name == "SQLITE_FULL" or self._has_no_room(name):
            fix = "free some space and run again; answers so far are kept"
            return DataError(expected="room for answers", got="a full disk", where=where, fix=fix)
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            got = f"another process that writes for more than {SECONDS_TO_WAIT} seconds"
            fix = "run again when it is done; answers so far are kept"
            return DataError(expected="a turn to write", got=got, where=where, fix=fix)
        if name.startswith("SQLITE_CORRUPT") or isinstance(error, UnicodeDecodeError):
            fix = "put a backup in its place, or delete it: its responses are computed again"
            return DataError(
                expected="a response store", got=f"a damaged file ({error})", where=where, fix=fix
            )
        if name.startswith("SQLITE_IOERR"):
            fix = "check the disk, and run again; answers so far are kept"
            return DataError(
                expected="a disk that reads and writes", got=str(error), where=where, fix=fix
            )
        fix = "name another file in MLLM_MSR_ANSWERS"
        if isinstance(error, OSError) or name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY")):
            fix = f"make file and folder writable, or {fix}"
        return DataError(expected="a response store", got=str(error), where=where, fix=fix)

    def _has_no_room(self, name: str) -> bool:
        """Tell whether SQLite's error of reading and writing comes from a full disk.

        Files beside the store that cannot grow are such an error, and so is opening without them.
        """
        folder = self._path.parent
        if not name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN")) or not os.access(
            folder, os.W_OK
        ):
            return False
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free < LEAST_ROOM
        return False


def _is_writable(path: Path) -> bool:
    """Tell whether a file and its folder, where SQLite keeps the log, can be written."""
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def _encode(answer: Response) -> tuple[bytes, int]:
    return answer.text.encode(), int(answer.complete)


def _read(key: bytes, text: Any, complete: Any, digest: bytes) -> Response | None:
    """Read a row as SQLite gives it; None where it is not what was written."""
    try:
        whole = digest == _digest(key, text, complete)
        return Response(text.decode(), bool(complete)) if whole else None
    except (TypeError, ValueError):  # a damaged column may be of any type, and of any bytes
        return None


def _digest(key: bytes, text: bytes, complete: int) -> bytes:
    """Digest a row's key and response by BLAKE2b, 16 bytes."""
    row = b"%d %d %b%b" % (complete, len(key), key, text)
    return hashlib.blake2b(row, digest_size=DIGEST_BYTES).digest()

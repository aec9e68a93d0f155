"""The answer store: no question is put to a model twice.

Every answer is kept under a hash of what it depends on: the model's weights and files, the prompt,
the image's bytes, the decoding settings and the dtype. It lies outside the pipeline's outputs, so
that a killed stage goes on where it was, one new item costs one item, and an experiment that comes
back to an old setting costs nothing. Answers are only ever added.

SQLite with a write-ahead log keeps it whole through ``kill -9`` and for several processes at once.
"""

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from mllm_msr.errors import DataError
from mllm_msr.files import is_full_disk, kept_folder

KEYS_PER_LOOKUP = 500
SECONDS_TO_WAIT = 60
NOTES = {"model": "TEXT NOT NULL DEFAULT ''", "added": "REAL NOT NULL DEFAULT 0"}


class Answer(NamedTuple):
    """What a model said.

    Attributes:
        text: The answer without special tokens.
        complete: False where it was cut at the largest number of new tokens.
    """

    text: str
    complete: bool


def answer_key(**depends_on: str | int | None) -> str:
    """Hash everything that an answer depends on, as hexadecimal SHA-256."""
    text = json.dumps(depends_on, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def store_path() -> Path:
    """Give the store's file: ``MLLM_MSR_ANSWERS``, or one for all experiments of the project."""
    named = os.environ.get("MLLM_MSR_ANSWERS")
    return Path(named) if named else kept_folder() / "answers.sqlite"


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


class AnswerStore:
    """An append-only map from keys to answers in one file."""

    def __init__(self, path: Path) -> None:
        """Open the store, making it where there is none.

        Raises:
            DataError: The file is not an answer store, or the disk is full.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=SECONDS_TO_WAIT, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL,"
                " complete INTEGER NOT NULL, model TEXT NOT NULL DEFAULT '',"
                " added REAL NOT NULL DEFAULT 0) WITHOUT ROWID, STRICT"
            )
            self._add_columns()
        except (sqlite3.Error, OSError) as error:
            raise self._explain(error) from error

    def __enter__(self) -> Self:
        """Use the store as a context."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._database.close()

    def __len__(self) -> int:
        """Count the answers.

        Raises:
            DataError: The file is damaged.
        """
        try:
            return int(self._database.execute("SELECT count(*) FROM answers").fetchone()[0])
        except sqlite3.Error as error:
            raise self._explain(error) from error

    @property
    def bytes(self) -> int:
        """The size of the file and of its log, which other processes may still write."""
        log = self._path.with_name(f"{self._path.name}-wal")
        return sum(file.stat().st_size for file in (self._path, log) if file.is_file())

    def find(self, keys: Iterable[str]) -> dict[str, Answer]:
        """Look up keys; those without an answer are left out.

        Raises:
            DataError: The file is damaged.
        """
        try:
            return dict(self._find(list(dict.fromkeys(keys))))
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def add(self, answers: Mapping[str, Answer], model: str = "") -> int:
        """Keep answers, all or none of them; an answer that is already there stays.

        Returns how many were not there.

        Args:
            answers: By key.
            model: Whose they are, for people; what an answer depends on is in its key.

        Raises:
            DataError: The disk is full.
        """
        now = time.time()
        rows = [(key, *answer, model, now) for key, answer in answers.items()]
        try:
            self._database.execute("BEGIN IMMEDIATE")
            added = self._database.executemany(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", rows
            ).rowcount
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
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
            return [Holding(*row) for row in self._database.execute(query)]
        except sqlite3.Error as error:
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
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def shrink(self) -> None:
        """Give the room of removed answers back.

        Raises:
            DataError: Another process writes for long, or the disk is too full for a copy.
        """
        try:
            self._database.execute("VACUUM")
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def _add_columns(self) -> None:
        """Complete a store of a time when it did not note model and time."""
        if not self._missing_columns():
            return
        self._database.execute("BEGIN IMMEDIATE")  # one process at a time
        for name in self._missing_columns():
            self._database.execute(f"ALTER TABLE answers ADD COLUMN {name} {NOTES[name]}")
        self._database.execute("COMMIT")

    def _missing_columns(self) -> list[str]:
        there = {row[1] for row in self._database.execute("PRAGMA table_info(answers)")}
        return [name for name in NOTES if name not in there]

    def _find(self, keys: Sequence[str]) -> Iterator[tuple[str, Answer]]:
        for start in range(0, len(keys), KEYS_PER_LOOKUP):
            part = keys[start : start + KEYS_PER_LOOKUP]
            marks = ", ".join("?" * len(part))
            query = f"SELECT key, text, complete FROM answers WHERE key IN ({marks})"
            for key, text, complete in self._database.execute(query, part):
                yield key, Answer(text, bool(complete))

    def _explain(self, error: Exception) -> DataError:
        if is_full_disk(error) or "disk is full" in str(error):
            remedy = "free some space and run again; answers so far are kept"
            return DataError("room for answers", "a full disk", str(self._path), remedy)
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            came = f"another process that writes for more than {SECONDS_TO_WAIT} seconds"
            remedy = "run again when it is done; answers so far are kept"
            return DataError("a turn to write", came, str(self._path), remedy)
        remedy = "name another file in MLLM_MSR_ANSWERS"
        return DataError("an answer store", str(error), str(self._path), remedy)

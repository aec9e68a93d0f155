"""Forgetting a user: the stored responses to the user's prompts, and what else holds the user.

Responses are stored under a hash of their prompt, so a user's are found by building the prompts of
that user's histories again: those of the run's sequences, and the one that ``recommend`` reads.
Prompts of other settings, templates, models or adapters are not built.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import markupsafe
import pyarrow.parquet
import torch
from tqdm import tqdm

from mllm_msr.core.errors import UnknownError
from mllm_msr.core.files import duckdb_path, state_dir
from mllm_msr.core.schemas import Histories, Preferences, Sequences
from mllm_msr.core.tables import read_rows
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import FAILURES, ResponseStore
from mllm_msr.method.inference import Conversation, StoringEngine, converse_in_rounds
from mllm_msr.recommendation.bundle import Run, list_exports
from mllm_msr.recommendation.catalogue import Catalogue, UserHistories, read_catalogue
from mllm_msr.recommendation.models import Models, Pair

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of other machines; part of the keys


class StoredResponses(NamedTuple):
    """The keys of stored responses to a user's prompts.

    Attributes:
        preferences: Of preference texts.
        scores: Of log-odds, for any item of the catalogue.
    """

    preferences: set[str]
    scores: set[str]


class Holder(NamedTuple):
    """What holds data of a user.

    Attributes:
        path: File or folder.
        content: What of the user is in it.
    """

    path: Path
    content: str


class ErasableStore(ResponseStore):
    """A response store from which responses can be removed by their keys."""

    def remove(self, keys: Collection[str]) -> int:
        """Remove responses and overwrite their text in the file; return how many there were.

        Raises:
            DataError: The store cannot be written, or another process writes for long.
        """
        try:
            with self._transaction():
                removed = sum(
                    self._database.execute("DELETE FROM answers WHERE key = ?", (key,)).rowcount
                    for key in keys
                )
            self._database.execute("VACUUM")  # a deleted row stays readable until then
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except FAILURES as error:
            raise self._explain(error) from error
        return removed


class _Collector:
    """Looks responses up in place of computing them, and collects the keys of those it finds."""

    def __init__(
        self, engine: StoringEngine, dtypes: Sequence[torch.dtype], placeholder: str
    ) -> None:
        """Take an engine, the dtypes to look for, and the response where none is stored."""
        self.encoder, self.limit = engine.encoder, engine.limit
        self.keys: set[str] = set()
        self._engine, self._dtypes, self._placeholder = engine, dtypes, placeholder

    def respond(self, prompts: Sequence[Prompt], progress: "tqdm[Any]") -> list[str]:
        """Return the stored response to each prompt, or the placeholder."""
        responses = [self._placeholder] * len(prompts)
        for dtype in self._dtypes:
            if isinstance(self._engine.model, LocalModel):
                self._engine.model.dtype = dtype
            for index, text in enumerate(self._engine.find_stored(prompts)):
                if text is not None:
                    responses[index] = text
                    self.keys.add(self._engine.key(prompts[index]))
        progress.update(len(prompts))
        return responses

    def converse(self, conversations: Iterable[Conversation], progress: "tqdm[Any]") -> None:
        """Find the stored responses of conversations, as :meth:`respond` does."""
        converse_in_rounds(self.respond, conversations, progress)


def find_responses(user: str, data: Path, run: Run) -> StoredResponses:
    """Find the stored responses to the prompts of a user's histories; write nothing.

    Args:
        user: The user's id.
        data: Folder of the stages' outputs.
        run: Settings and prompts.

    Raises:
        UnknownError: There is no such user; names a similar one.
        DataError: A table is missing.
        ModelError: There is no trained model, or it is one of another base model.
    """
    catalogue = read_catalogue(data)
    histories = _read_histories(user, data, catalogue, run)
    if run.settings.recommender.model is None or not histories:
        return StoredResponses(set(), set())
    with Models(data, run, catalogue, read_only=True) as models:
        texts, preferences = _read_preferences(user, data), set()
        if models.texts is None:  # titles in place of preferences
            texts |= {blocks[-1] for blocks in models.infer(histories)}
        elif isinstance(engine := models.texts, StoringEngine):
            for dtype in DTYPES:
                models.texts = collector = _Collector(engine, [dtype], placeholder="")
                texts |= {blocks[-1] for blocks in models.infer(histories)}
                preferences |= collector.keys
        assert isinstance(models.scores, StoringEngine), "as it was opened"
        models.scores = scores = _Collector(models.scores, DTYPES, placeholder="0")
        asked = sorted(texts - {""})  # empty where a response is not stored
        pairs = [Pair(number, item) for number in range(len(asked)) for item in catalogue.titles]
        models.score(asked, pairs)
    return StoredResponses(preferences, scores.keys)


def list_holders(user: str, data: Path, raw: Path) -> Iterator[Holder]:
    """Yield what else holds data of a user, on this machine and as far as it is known.

    Args:
        user: The user's id.
        data: Folder of the stages' outputs.
        raw: Folder of the raw files.
    """
    sequences = [row["sequence"] for row in _sequences_of(user, data)]
    for path in sorted(data.rglob("*.parquet")):
        if not path.is_relative_to(data / "raw") and (rows := _count(path, user, sequences)):
            yield Holder(path, f"{rows:,} rows")
    report = data / "report/report.html"
    if report.is_file() and markupsafe.escape(user) in report.read_text(encoding="utf-8"):
        yield Holder(report, "the user's id, and what the page tells of it")
    state = state_dir()
    for path, content in (
        (data / "sft/adapter", "weights trained on the sequences of all training users"),
        (state / "sft", "checkpoints of such weights"),
        (state / "baselines", "baselines trained on all known interactions"),
        (raw, "the raw files, from which preprocess reads the user again"),
        (state.parent / ".dvc/cache", "copies of these outputs, and of earlier runs"),
    ):
        if path.exists():
            yield Holder(path, content)
    for folder in list_exports():
        if rows := _count(folder / "preprocess/interactions.parquet", user, []):
            yield Holder(folder, f"an exported bundle, {rows:,} interactions")


def _read_histories(user: str, data: Path, catalogue: Catalogue, run: Run) -> list[list[str]]:
    """Return the histories that prompts of a user are made of, each once."""
    table = UserHistories(data / "preprocess/interactions.parquet", catalogue)
    try:
        full = table.of(user)
    except UnknownError as error:
        fix = error.fix.rpartition("; ")[2]
        raise UnknownError(
            expected=error.expected, got=error.got, where="--user", fix=fix
        ) from error
    finally:
        table.close()
    found: dict[int, list[str]] = {row["sequence"]: [] for row in _sequences_of(user, data)}
    path = data / "filter_sequences/histories.parquet"
    for row in read_rows(Histories, path, order="sequence, position"):
        if row["sequence"] in found:
            found[row["sequence"]].append(row["item"])
    latest = full[-run.settings.filter_sequences.max_history :]
    histories = [*found.values(), latest]
    return [list(history) for history in dict.fromkeys(map(tuple, histories)) if history]


def _read_preferences(user: str, data: Path) -> set[str]:
    """Return the last preference of each of a user's sequences in the table Preferences.

    A bundle has no such table: there the preferences of its own requests are inferred.
    """
    path = data / "infer_preferences/preferences.parquet"
    if not path.is_file():
        return set()
    sequences = {row["sequence"] for row in _sequences_of(user, data)}
    rows = read_rows(Preferences, path, order="sequence, block")
    last = {row["sequence"]: row["preference"] for row in rows if row["sequence"] in sequences}
    return set(last.values())


def _sequences_of(user: str, data: Path) -> list[Mapping[str, Any]]:
    path = data / "filter_sequences/sequences.parquet"
    return [row for row in read_rows(Sequences, path, order="sequence") if row["user"] == user]


def _count(path: Path, user: str, sequences: Sequence[int]) -> int:
    """Return the number of a table's rows about a user or the user's sequences."""
    if not path.is_file():
        return 0
    columns = pyarrow.parquet.read_schema(path.absolute()).names
    value: str | list[int]
    if "user" in columns:
        condition, value = "user = ?", user
    elif "sequence" in columns:
        condition, value = "list_contains(?, sequence)", list(sequences)
    else:
        return 0
    with duckdb.connect() as connection:
        query = f"SELECT count(*) FROM read_parquet(?, hive_partitioning=false) WHERE {condition}"
        (count,) = connection.execute(query, [duckdb_path(path), value]).fetchall()[0]
    return int(count)

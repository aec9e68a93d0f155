"""The response store survives kills, other processes and damage, and keeps each response once."""

import contextlib
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mllm_msr.core.errors import DataError, ParamsError
from mllm_msr.engines.response_store import (
    Response,
    ResponseStore,
    open_store,
    response_key,
    store_path,
)

WRITER = """
import sys
from pathlib import Path
from mllm_msr.engines.response_store import Response, ResponseStore
path, start, batches, size = Path(sys.argv[1]), *map(int, sys.argv[2:])
with ResponseStore(path) as store:
    for batch in range(start, start + batches):
        store.add({f"{batch}/{n}": Response(f"text {batch}/{n} " * 50, True) for n in range(size)})
        print(batch, flush=True)
"""
BATCH = 20
key_settings = st.dictionaries(
    st.text("abc", min_size=1), st.text() | st.integers() | st.none(), max_size=4
)


def start_writer(path: Path, start: int, batches: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER, str(path), str(start), str(batches), str(BATCH)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_what_was_added_is_found(tmp_path: Path) -> None:
    responses = {"a": Response("yes, “so” 咖啡\n", True), "b": Response("", False)}
    with ResponseStore(tmp_path / "new" / "responses.sqlite") as store:
        assert store.find(["a"]) == {}
        store.add(responses)
        assert store.find(["b", "a", "c", "a"]) == responses
        assert len(store) == 2
    with ResponseStore(tmp_path / "new" / "responses.sqlite") as store:
        assert store.find(["a", "b"]) == responses


def test_the_first_response_of_a_key_stays(tmp_path: Path) -> None:
    with ResponseStore(tmp_path / "responses.sqlite") as store:
        store.add({"a": Response("first", True)})
        store.add({"a": Response("second", True), "b": Response("other", True)})
        assert store.find(["a"])["a"].text == "first"
        assert len(store) == 2


def test_keys_of_several_lookups_are_all_found(tmp_path: Path) -> None:
    responses = {
        str(number): Response(str(number), complete=number % 2 == 0) for number in range(1_201)
    }
    with ResponseStore(tmp_path / "responses.sqlite") as store:
        store.add(responses)
        assert store.find(responses) == responses


def test_a_killed_writer_leaves_every_batch_it_had_stored(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    for attempt in range(4):
        writer = start_writer(path, start=attempt * 100_000, batches=100_000)
        assert writer.stdout is not None
        said = [int(writer.stdout.readline()) for _ in range(3 + 5 * attempt)]
        time.sleep(0.003 * attempt)  # so that the kill falls at another moment each time
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        said += [int(line) for line in writer.stdout]
        with sqlite3.connect(path) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        with ResponseStore(path) as store:
            keys = [f"{batch}/{number}" for batch in said for number in range(BATCH)]
            found = store.find(keys)
            assert found.keys() == set(keys)
            assert all(response.text.startswith(f"text {key} ") for key, response in found.items())
            assert len(store) % BATCH == 0  # a batch is there as a whole or not at all


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    # The second and third write the same keys.
    writers = [start_writer(path, start, batches=40) for start in (0, 40, 40)]
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    with ResponseStore(path) as store:
        assert len(store) == 80 * BATCH


def test_many_open_a_new_store_at_once(tmp_path: Path) -> None:
    openers = 6
    start = threading.Barrier(openers)

    def open_new(path: Path) -> int:
        start.wait()
        with ResponseStore(path) as store:
            return len(store)

    with ThreadPoolExecutor(openers) as pool:
        for number in range(40):
            path = tmp_path / f"{number}.sqlite"
            assert list(pool.map(open_new, [path] * openers)) == [0] * openers


def test_an_experiment_of_dvc_finds_the_store_of_its_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLLM_MSR_RESPONSES", raising=False)
    expected = tmp_path / ".mllm_msr" / "responses.sqlite"
    for root in (tmp_path, tmp_path / ".dvc" / "tmp" / "exps" / "tmp1x2y"):
        monkeypatch.setenv("DVC_ROOT", str(root))
        assert store_path() == expected
    monkeypatch.setenv("MLLM_MSR_RESPONSES", str(tmp_path / "mine"))
    assert store_path() == tmp_path / "mine"


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    path.write_text("not a database, and longer than a header of one hundred bytes" * 9)
    with pytest.raises(DataError, match=r"expected a response store.*MLLM_MSR_RESPONSES"):
        ResponseStore(path)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    with ResponseStore(tmp_path / "responses.sqlite") as store:
        store.add({"a": Response("kept", True)})
        store._database.execute("PRAGMA max_page_count = 20")  # SQLite then has no room, really
        with pytest.raises(DataError, match=r"expected space for responses; got a full disk; free"):
            store.add({str(number): Response("x" * 1000, True) for number in range(1000)})
        assert store.find(["a"]) == {"a": Response("kept", True)}
        assert len(store) == 1
        store.add({"b": Response("still works", True)})


def test_a_locked_store_is_not_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mllm_msr.engines.response_store.SECONDS_TO_WAIT", 0.1)
    path = tmp_path / "responses.sqlite"
    with ResponseStore(path) as store, ResponseStore(path) as other:
        other._database.execute("BEGIN IMMEDIATE")
        with pytest.raises(
            DataError, match=r"expected the lock for writing; got another process .*run"
        ):
            store.add({"a": Response("yes", True)})
        other._database.execute("ROLLBACK")
        store.add({"a": Response("yes", True)})


# -- damage ----------------------------------------------------------------------------------------

TRUE = {
    response_key(prompt=number): Response(f"Likes {word}. " * (number % 5), number % 3 > 0)
    for number, word in enumerate(["red", "blue", "咖啡", "“so”"] * 10)
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of a small store."""
    path = tmp_path_factory.mktemp("store") / "responses.sqlite"
    with ResponseStore(path) as store:
        store.add(TRUE, "small")
    return path.read_bytes()


def flip(content: bytes, *bits: int) -> bytes:
    changed = bytearray(content)
    for bit in bits:
        changed[bit // 8 % len(content)] ^= 1 << bit % 8
    return bytes(changed)


def check_damaged(path: Path) -> None:
    """Prove that a store gives true responses only, and true ones again when they are added."""
    with contextlib.suppress(DataError), ResponseStore(path) as store:
        found = store.find(TRUE)
        assert found.items() <= TRUE.items()
        store.add({key: response for key, response in TRUE.items() if key not in found})
        assert store.find(TRUE).items() <= TRUE.items()


@given(st.lists(st.integers(0, 8 * 4096 * 4 - 1), min_size=1, max_size=8))
@example([125_747])  # makes a key NULL
@settings(max_examples=300)
def test_no_flipped_bit_changes_a_response(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, bits: list[int]
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "responses.sqlite"
    path.write_bytes(flip(whole, *bits))
    check_damaged(path)


@pytest.mark.slow
def test_no_byte_of_a_response_can_change_unseen(whole: bytes, tmp_path: Path) -> None:
    path, first = tmp_path / "responses.sqlite", whole.index(b"Likes")
    for bit in range(8 * first - 200, 8 * first + 200):
        path.write_bytes(flip(whole, bit))
        check_damaged(path)


def test_a_damaged_response_is_missing_counted_once_and_replaced(
    whole: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "responses.sqlite"
    path.write_bytes(whole.replace(b"Likes red. Likes red. ", b"Likes rad. Likes red. "))
    with caplog.at_level(logging.WARNING):
        with ResponseStore(path) as store:
            found = store.find(TRUE)
            lost = {key: response for key, response in TRUE.items() if key not in found}
            assert {response.text[:11] for response in lost.values()} == {"Likes red. "}
            assert store.find(lost) == {}
            assert store.damaged == len(lost) > 0
            assert store.add(TRUE) == len(lost)
            assert store.find(TRUE) == TRUE
        (said,) = caplog.messages
    assert said.endswith(f": {len(lost)} damaged responses counted as missing; check the disk")
    with ResponseStore(path) as store:
        assert store.find(TRUE) == TRUE
        assert store.damaged == 0


def test_a_malformed_file_says_what_to_do(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with (
        pytest.raises(
            DataError,
            match=r"got a damaged file \(.*malformed.*\); put a backup in its place, or del",
        ) as caught,
        ResponseStore(path) as store,
    ):
        store.find(TRUE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["zeros", "page size", "text"])
def test_a_damaged_header_says_what_to_do(whole: bytes, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "responses.sqlite"
    heads = {"zeros": bytes(100), "page size": whole[:16] + b"\xff\xff", "text": b"no database"}
    head = heads[damage]
    path.write_bytes(head + whole[len(head) :])
    with pytest.raises(
        DataError, match=r"got no database, or one with a damaged header; if it was one, put a back"
    ):
        ResponseStore(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.7, 0.999])
def test_a_truncated_store_gives_true_responses_or_an_error(
    whole: bytes, tmp_path: Path, share: float
) -> None:
    path = tmp_path / "responses.sqlite"
    path.write_bytes(whole[: int(share * len(whole))])
    check_damaged(path)
    if share == 0:
        with ResponseStore(path) as store:  # an empty file is a new store
            assert store.find(TRUE) == TRUE


# -- copies ----------------------------------------------------------------------------------------


def stored_batches(path: Path, batches: list[int]) -> dict[str, Response]:
    """Return the responses of batches of :data:`WRITER`; each must have the text it had."""
    keys = [f"{batch}/{number}" for batch in batches for number in range(BATCH)]
    with ResponseStore(path) as store:
        found = store.find(keys)
    assert all(found[key] == Response(f"text {key} " * 50, True) for key in found)
    return found


def test_a_moved_store_has_all_its_responses(whole: bytes, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "responses.sqlite").write_bytes(whole)
    with ResponseStore(old / "responses.sqlite") as store:
        store.add({"late": Response("in the log", True)})
        shutil.copytree(old, new)  # with the log, as after a kill
    assert (new / "responses.sqlite-wal").stat().st_size
    with ResponseStore(new / "responses.sqlite") as store:
        assert store.find([*TRUE, "late"]) == TRUE | {"late": Response("in the log", True)}


@pytest.mark.parametrize("log", ["of now", "of a longer store", "garbage"])
def test_a_backup_beside_an_old_log_gives_true_responses_only(tmp_path: Path, log: str) -> None:
    path, backup = tmp_path / "responses.sqlite", tmp_path / "backup.sqlite"
    wal = path.with_name(f"{path.name}-wal")
    true = {str(n): Response(f"text {n} " * 50, True) for n in range(600)}
    with ResponseStore(path) as store:
        store.add({key: true[key] for key in list(true)[:300]})
        store.copy_to(backup)
        if log == "of a longer store":
            store._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        store.add(true)
        left = b"garbage" * 1_000 if log == "garbage" else wal.read_bytes()
    path.write_bytes(backup.read_bytes())
    wal.write_bytes(left)
    with contextlib.suppress(DataError), ResponseStore(path) as store:
        assert store.find(true).items() <= true.items()


def test_a_backup_made_while_others_write_has_all_that_was_stored(tmp_path: Path) -> None:
    path, backup = tmp_path / "responses.sqlite", tmp_path / "backup.sqlite"
    writer = start_writer(path, start=0, batches=100_000)
    assert writer.stdout is not None
    said = [int(writer.stdout.readline()) for _ in range(10)]
    with ResponseStore(path, read_only=True) as store:
        store.copy_to(backup)
    writer.kill()
    writer.communicate()
    assert len(stored_batches(backup, said)) == 10 * BATCH
    assert not list(tmp_path.glob("backup.sqlite-*"))
    with ResponseStore(path) as store, pytest.raises(DataError, match="got an existing one; name"):
        store.copy_to(backup)


def test_a_reader_that_opened_before_a_writer_finds_what_is_stored(tmp_path: Path) -> None:
    path, backup = tmp_path / "responses.sqlite", tmp_path / "backup.sqlite"
    many = {f"{number:05}": Response(f"text {number}" * 9, True) for number in range(6_000)}
    with ResponseStore(path) as store:
        store.add(many)
    with ResponseStore(path, read_only=True) as reader:
        assert len(reader) == len(many)
        with ResponseStore(path) as writer:
            for start in range(0, 6_000, 600):
                writer.add({f"n{n}": Response("new" * 99, True) for n in range(start, start + 600)})
                some = list(many)[start : start + 600]
                assert reader.find(some).keys() == set(some)
            reader.copy_to(backup)
    with ResponseStore(backup) as copied:
        assert len(copied) == 2 * len(many)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["backup.sqlite", path.name]


def test_files_copied_while_others_write_give_true_responses_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    writer = start_writer(path, start=0, batches=100_000)
    assert writer.stdout is not None
    for copy in range(5):
        said = [int(writer.stdout.readline()) for _ in range(40)]
        folder = tmp_path / str(copy)
        folder.mkdir()
        for name in ("responses.sqlite", "responses.sqlite-wal"):
            shutil.copy(tmp_path / name, folder)
        with contextlib.suppress(DataError):
            stored_batches(folder / "responses.sqlite", said)
    writer.kill()
    writer.communicate()


# -- versions, and databases of other programs ----------------------------------------------------


def write_database(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as database:
        for statement in statements:
            database.execute(statement)
    database.close()


UNVERSIONED = (
    "CREATE TABLE answers (key TEXT PRIMARY KEY, text TEXT NOT NULL, complete INTEGER NOT NULL,"
    " model TEXT NOT NULL DEFAULT '', added REAL NOT NULL DEFAULT 0) WITHOUT ROWID, STRICT"
)


def test_an_older_store_keeps_its_responses_and_gets_digests(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "responses.sqlite"
    write_database(
        path,
        "PRAGMA journal_mode = WAL",
        UNVERSIONED,
        "INSERT INTO answers VALUES ('a', 'yes', 1, 'small', 5.0), ('b', '咖啡', 0, '', 0)",
    )
    for said in ("an older store; its 2 responses now have digests", ""):
        caplog.clear()
        with caplog.at_level(logging.WARNING), ResponseStore(path) as store:
            assert store.find("ab") == {"a": Response("yes", True), "b": Response("咖啡", False)}
            assert [held.model for held in store.holdings()] == ["", "small"]
            assert said in " ".join(caplog.messages)
    path.write_bytes(path.read_bytes().replace(b"yes", b"yas"))
    with ResponseStore(path) as store:
        assert store.find("ab") == {"b": Response("咖啡", False)}


def test_processes_create_or_migrate_a_store_once(tmp_path: Path) -> None:
    for name in ("fresh", "older"):
        path = tmp_path / name
        if name == "older":
            write_database(path, UNVERSIONED, "INSERT INTO answers VALUES ('a', 'yes', 1, '', 0)")
        writers = [start_writer(path, start, batches=1) for start in range(4)]
        assert [writer.wait() for writer in writers] == [0] * 4
        with ResponseStore(path) as store:
            assert len(store) == 4 * BATCH + (name == "older")


@pytest.mark.parametrize(
    "statements",
    [
        ("CREATE TABLE photos (name TEXT)",),
        ("CREATE TABLE answers (key TEXT, text TEXT)",),
        ("CREATE TABLE answers (key TEXT, text TEXT, complete INTEGER, user TEXT)",),
        (UNVERSIONED, "CREATE TABLE photos (name TEXT)"),
        (UNVERSIONED, "PRAGMA user_version = 3"),
        ("PRAGMA application_id = 7",),
        ("PRAGMA journal_mode = WAL", "CREATE TABLE photos (name TEXT)"),
    ],
)
def test_the_database_of_another_program_stays_unchanged(
    tmp_path: Path, statements: tuple[str, ...]
) -> None:
    path = tmp_path / "photos.sqlite"
    write_database(path, *statements)
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"expected a response store; got another program's data"):
        ResponseStore(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["photos.sqlite"]


@pytest.mark.parametrize("version", [0, 2])
def test_a_store_of_another_version_is_refused_by_name(tmp_path: Path, version: int) -> None:
    path = tmp_path / "responses.sqlite"
    ResponseStore(path).__exit__(None, None, None)
    write_database(path, f"PRAGMA user_version = {version}")
    with pytest.raises(DataError, match=f"a response store of version 1; got version {version};"):
        ResponseStore(path)


# -- disks -----------------------------------------------------------------------------------------


@pytest.fixture
def refuse_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file look as on a read-only file system."""
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)


@pytest.mark.usefixtures("refuse_writing")
def test_a_read_only_store_serves_what_it_has(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    path.write_bytes(whole)
    with ResponseStore(path) as store:
        assert store.find(TRUE) == TRUE
        store.check_writable(0)
        for refuse in (
            lambda: store.check_writable(3),
            lambda: store.add({"a": Response("", True)}),
        ):
            with pytest.raises(DataError, match=r"a read-only one that lacks [31] responses; make"):
                refuse()
    assert [file.name for file in tmp_path.iterdir()] == ["responses.sqlite"]
    assert path.read_bytes() == whole


def test_a_read_only_store_with_an_unmerged_log_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "responses.sqlite"
    with ResponseStore(path) as store:
        store.add(TRUE)
        monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
        with pytest.raises(DataError, match=r"wal: expected a finished store"):
            ResponseStore(path)


@pytest.mark.usefixtures("refuse_writing")
def test_an_older_read_only_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    write_database(path, UNVERSIONED)
    with pytest.raises(DataError, match="got an older one that cannot be written"):
        ResponseStore(path)


@given(key_settings, key_settings)
def test_keys_are_equal_exactly_where_the_settings_are(
    first: dict[str, str | int | None], second: dict[str, str | int | None]
) -> None:
    assert (response_key(**first) == response_key(**second)) == (first == second)
    assert response_key(**dict(reversed(first.items()))) == response_key(**first)


def test_a_number_and_its_text_are_different_settings() -> None:
    assert response_key(limit=1) != response_key(limit="1")
    assert response_key(image=None) != response_key(image="None")


# -- names of earlier releases ---------------------------------------------------------------------


@pytest.fixture
def old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of the default store of earlier releases."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLLM_MSR_RESPONSES", raising=False)
    return tmp_path / ".mllm_msr" / "answers.sqlite"


def test_the_old_variable_is_an_error_that_names_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLLM_MSR_ANSWERS", "mine.sqlite")
    for find in (store_path, open_store, lambda: open_store(read_only=True)):
        with pytest.raises(ParamsError, match="rename the variable to MLLM_MSR_RESPONSES") as error:
            find()
        assert "\n" not in str(error.value)


def test_the_old_default_file_is_renamed_with_its_log(
    old_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start_writer(old_file, start=0, batches=1).communicate()
    writer = start_writer(old_file, start=1, batches=100_000)
    assert writer.stdout is not None
    writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert old_file.with_name("answers.sqlite-wal").stat().st_size  # of the killed writer
    with caplog.at_level(logging.WARNING), open_store() as store:
        assert store.find(["0/0", "1/0"]).keys() == {"0/0", "1/0"}
        assert "renamed to responses.sqlite" in caplog.text
    assert [path.name for path in old_file.parent.iterdir()] == ["responses.sqlite"]


def test_the_old_default_file_is_not_renamed_while_it_is_open(old_file: Path) -> None:
    with ResponseStore(old_file) as store:
        store.add({"a": Response("yes", True)})
        with pytest.raises(DataError, match="got one that another process has open; run again"):
            store_path()
    assert store_path().name == "responses.sqlite"


def test_an_old_file_beside_a_new_one_stays(old_file: Path) -> None:
    for name in ("answers.sqlite", "responses.sqlite"):
        ResponseStore(old_file.with_name(name)).__exit__(None, None, None)
    assert store_path().name == "responses.sqlite"
    assert old_file.is_file()


@pytest.mark.usefixtures("refuse_writing")
def test_an_old_file_that_cannot_be_renamed_is_read(old_file: Path, whole: bytes) -> None:
    old_file.parent.mkdir()
    old_file.write_bytes(whole)
    with open_store() as store:
        assert store.find(TRUE) == TRUE


@pytest.mark.parametrize("name", ["answers.sqlite", "responses.sqlite", "none"])
def test_a_store_opened_for_lookups_only_changes_no_file(
    old_file: Path, whole: bytes, name: str
) -> None:
    if name != "none":
        old_file.parent.mkdir()
        old_file.with_name(name).write_bytes(whole)
    with open_store(read_only=True) as store:
        assert store.find(TRUE) == ({} if name == "none" else TRUE)
    found = [path.name for path in old_file.parent.glob("*")]
    assert found == ([] if name == "none" else [name])
    assert name == "none" or old_file.with_name(name).read_bytes() == whole


def test_a_store_that_another_process_writes_is_read_with_its_log(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    with ResponseStore(path) as store:
        store.add({"a": Response("yes", True)})
        with ResponseStore(path, read_only=True) as other:
            assert other.find(["a"]) == {"a": Response("yes", True)}
            with pytest.raises(DataError, match="a read-only one"):
                other.add({"b": Response("no", True)})

"""The response store stays sound through kills, crowds and damage, and keeps each answer once."""

import contextlib
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_msr.core.errors import DataError
from mllm_msr.engines.responses import Response, ResponseStore, response_key, store_path

WRITER = """
import sys
from pathlib import Path
from mllm_msr.engines.responses import Response, ResponseStore
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


def test_what_was_added_is_found_and_nothing_else(tmp_path: Path) -> None:
    answers = {"a": Response("yes, “so” 咖啡\n", True), "b": Response("", False)}
    with ResponseStore(tmp_path / "new" / "responses.sqlite") as store:
        assert store.find(["a"]) == {}
        store.add(answers)
        assert store.find(["b", "a", "c", "a"]) == answers
        assert len(store) == 2
    with ResponseStore(tmp_path / "new" / "responses.sqlite") as store:
        assert store.find(["a", "b"]) == answers


def test_an_equal_key_is_kept_once_as_it_was_first(tmp_path: Path) -> None:
    with ResponseStore(tmp_path / "responses.sqlite") as store:
        store.add({"a": Response("first", True)})
        store.add({"a": Response("second", True), "b": Response("other", True)})
        assert store.find(["a"])["a"].text == "first"
        assert len(store) == 2


def test_more_keys_than_one_lookup_takes_are_all_found(tmp_path: Path) -> None:
    answers = {
        str(number): Response(str(number), complete=number % 2 == 0) for number in range(1_201)
    }
    with ResponseStore(tmp_path / "responses.sqlite") as store:
        store.add(answers)
        assert store.find(answers) == answers


def test_a_killed_writer_leaves_every_answer_it_had_given(tmp_path: Path) -> None:
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
            assert all(answer.text.startswith(f"text {key} ") for key, answer in found.items())
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


def test_a_file_that_is_no_store_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    path.write_text("not a database, and longer than a header of one hundred bytes" * 9)
    with pytest.raises(DataError, match=r"expected a response store.*MLLM_MSR_RESPONSES"):
        ResponseStore(path)


def test_a_full_disk_is_one_line_and_earlier_answers_are_kept(tmp_path: Path) -> None:
    with ResponseStore(tmp_path / "responses.sqlite") as store:
        store.add({"a": Response("kept", True)})
        store._database.execute("PRAGMA max_page_count = 20")  # SQLite then has no room, really
        with pytest.raises(DataError, match=r"expected room for answers; got a full disk; free"):
            store.add({str(number): Response("x" * 1000, True) for number in range(1000)})
        assert store.find(["a"]) == {"a": Response("kept", True)}
        assert len(store) == 1
        store.add({"b": Response("still works", True)})


def test_a_store_that_another_process_holds_for_long_is_not_taken_for_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mllm_msr.engines.responses.SECONDS_TO_WAIT", 0.1)
    path = tmp_path / "responses.sqlite"
    with ResponseStore(path) as store, ResponseStore(path) as other:
        other._database.execute("BEGIN IMMEDIATE")
        with pytest.raises(DataError, match=r"expected a turn to write; got another process .*run"):
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
    """Give the bytes of a small store."""
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
        store.add({key: answer for key, answer in TRUE.items() if key not in found})
        assert store.find(TRUE).items() <= TRUE.items()


@given(st.lists(st.integers(0, 8 * 4096 * 4 - 1), min_size=1, max_size=8))
@settings(max_examples=300)
def test_no_flipped_bit_changes_a_response(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, bits: list[int]
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "responses.sqlite"
    path.write_bytes(flip(whole, *bits))
    check_damaged(path)


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
            lost = {key: answer for key, answer in TRUE.items() if key not in found}
            assert {answer.text[:11] for answer in lost.values()} == {"Likes red. "}
            assert store.find(lost) == {}
            assert store.damaged == len(lost) > 0
            assert store.add(TRUE) == len(lost)
            assert store.find(TRUE) == TRUE
        (said,) = caplog.messages
    assert said.endswith(f": {len(lost)} damaged responses counted as missing; check the disk")
    with ResponseStore(path) as store:
        assert store.find(TRUE) == TRUE
        assert store.damaged == 0


def test_a_file_that_sqlite_calls_malformed_names_the_way_out(whole: bytes, tmp_path: Path) -> None:
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


# -- versions, and the files of others -------------------------------------------------------------


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


def test_processes_that_make_or_migrate_a_store_at_once_do_it_once(tmp_path: Path) -> None:
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
def test_the_database_of_another_program_is_refused_and_stays_as_it_is(
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
    with pytest.raises(DataError, match=f"a(n answer)? store of version 1; got version {version};"):
        ResponseStore(path)


# -- disks -----------------------------------------------------------------------------------------


@pytest.fixture
def refuse_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file look as on a read-only mount."""
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)


@pytest.mark.usefixtures("refuse_writing")
def test_a_read_only_store_is_read_and_refuses_what_is_missing(
    whole: bytes, tmp_path: Path
) -> None:
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


def test_a_read_only_store_whose_log_was_never_taken_in_is_refused(
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

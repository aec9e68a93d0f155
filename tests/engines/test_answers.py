"""The answer store stays sound through kills and crowds, and keeps each answer once."""

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_msr.engines.answers import Answer, AnswerStore, answer_key, store_path
from mllm_msr.errors import DataError

WRITER = """
import sys
from pathlib import Path
from mllm_msr.engines.answers import Answer, AnswerStore
path, start, batches, size = Path(sys.argv[1]), *map(int, sys.argv[2:])
with AnswerStore(path) as store:
    for batch in range(start, start + batches):
        store.add({f"{batch}/{n}": Answer(f"text {batch}/{n} " * 50, True) for n in range(size)})
        print(batch, flush=True)
"""
BATCH = 20


def start_writer(path: Path, start: int, batches: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER, str(path), str(start), str(batches), str(BATCH)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_what_was_added_is_found_and_nothing_else(tmp_path: Path) -> None:
    answers = {"a": Answer("yes, “so” 咖啡\n", True), "b": Answer("", False)}
    with AnswerStore(tmp_path / "new" / "answers.sqlite") as store:
        assert store.find(["a"]) == {}
        store.add(answers)
        assert store.find(["b", "a", "c", "a"]) == answers
        assert len(store) == 2
    with AnswerStore(tmp_path / "new" / "answers.sqlite") as store:
        assert store.find(["a", "b"]) == answers


def test_an_equal_key_is_kept_once_as_it_was_first(tmp_path: Path) -> None:
    with AnswerStore(tmp_path / "answers.sqlite") as store:
        store.add({"a": Answer("first", True)})
        store.add({"a": Answer("second", True), "b": Answer("other", True)})
        assert store.find(["a"])["a"].text == "first"
        assert len(store) == 2


def test_more_keys_than_one_lookup_takes_are_all_found(tmp_path: Path) -> None:
    answers = {
        str(number): Answer(str(number), complete=number % 2 == 0) for number in range(1_201)
    }
    with AnswerStore(tmp_path / "answers.sqlite") as store:
        store.add(answers)
        assert store.find(answers) == answers


def test_a_killed_writer_leaves_every_answer_it_had_given(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
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
        with AnswerStore(path) as store:
            keys = [f"{batch}/{number}" for batch in said for number in range(BATCH)]
            found = store.find(keys)
            assert found.keys() == set(keys)
            assert all(answer.text.startswith(f"text {key} ") for key, answer in found.items())
            assert len(store) % BATCH == 0  # a batch is there as a whole or not at all


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    # The second and third write the same keys.
    writers = [start_writer(path, start, batches=40) for start in (0, 40, 40)]
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    with AnswerStore(path) as store:
        assert len(store) == 80 * BATCH


def test_an_experiment_of_dvc_finds_the_store_of_its_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLLM_MSR_ANSWERS", raising=False)
    expected = tmp_path / ".mllm_msr" / "answers.sqlite"
    for root in (tmp_path, tmp_path / ".dvc" / "tmp" / "exps" / "tmp1x2y"):
        monkeypatch.setenv("DVC_ROOT", str(root))
        assert store_path() == expected
    monkeypatch.setenv("MLLM_MSR_ANSWERS", str(tmp_path / "mine"))
    assert store_path() == tmp_path / "mine"


def test_a_file_that_is_no_store_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    path.write_text("not a database, and longer than a header of one hundred bytes" * 9)
    with pytest.raises(DataError, match=r"expected an answer store.*MLLM_MSR_ANSWERS"):
        AnswerStore(path)


def test_a_full_disk_is_one_line_and_earlier_answers_are_kept(tmp_path: Path) -> None:
    with AnswerStore(tmp_path / "answers.sqlite") as store:
        store.add({"a": Answer("kept", True)})
        store._database.execute("PRAGMA max_page_count = 20")  # SQLite then has no room, really
        with pytest.raises(DataError, match=r"expected room for answers; got a full disk; free"):
            store.add({str(number): Answer("x" * 1000, True) for number in range(1000)})
        assert store.find(["a"]) == {"a": Answer("kept", True)}
        assert len(store) == 1
        store.add({"b": Answer("still works", True)})


def test_a_store_that_another_process_holds_for_long_is_not_taken_for_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mllm_msr.engines.answers.SECONDS_TO_WAIT", 0.1)
    path = tmp_path / "answers.sqlite"
    with AnswerStore(path) as store, AnswerStore(path) as other:
        other._database.execute("BEGIN IMMEDIATE")
        with pytest.raises(DataError, match=r"expected a turn to write; got another process .*run"):
            store.add({"a": Answer("yes", True)})
        other._database.execute("ROLLBACK")
        store.add({"a": Answer("yes", True)})


settings = st.dictionaries(
    st.text("abc", min_size=1), st.text() | st.integers() | st.none(), max_size=4
)


@given(settings, settings)
def test_keys_are_equal_exactly_where_the_settings_are(
    first: dict[str, str | int | None], second: dict[str, str | int | None]
) -> None:
    assert (answer_key(**first) == answer_key(**second)) == (first == second)
    assert answer_key(**dict(reversed(first.items()))) == answer_key(**first)


def test_a_number_and_its_text_are_different_settings() -> None:
    assert answer_key(limit=1) != answer_key(limit="1")
    assert answer_key(image=None) != answer_key(image="None")

"""Atomic writes, the state directory, paths for DuckDB, and digests."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import duckdb
import pytest
from folder_names import folder_names
from hypothesis import given
from small_world import names

from mllm_msr.core import files
from mllm_msr.core.errors import DataError, shorten
from mllm_msr.core.files import (
    atomic_write,
    atomic_write_all,
    duckdb_path,
    explain_write_errors,
    file_digest,
    is_full_disk,
    state_dir,
)

KILLED = """
import os, signal, sys
from pathlib import Path
from mllm_msr.core.files import atomic_write_all, atomic_write
target, kind = Path(sys.argv[1]), sys.argv[2]
with (atomic_write_all if kind == "together" else atomic_write)(target) as temporary:
    if kind == "folder":
        temporary.mkdir()
    (temporary if kind == "file" else temporary / "part").write_text("half")
    print("writing", flush=True)
    if sys.argv[3] == "at once":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def start_writer(target: Path, kind: str, when: str) -> "subprocess.Popen[str]":
    """Start a process that writes a target, and is killed at once or waits for its input to end."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, target, kind, when], **pipes, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    return writer


def write(target: Path, kind: str, text: str) -> None:
    with (atomic_write_all if kind == "together" else atomic_write)(target) as temporary:
        if kind == "folder":
            temporary.mkdir()
        (temporary if kind == "file" else temporary / "part").write_text(text)


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(path.parent) == ["file.txt"]


def test_a_folder_replaces_an_earlier_one(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for name in ("old", "new"):
        with atomic_write(folder) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert names(folder) == ["new"]
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failed_block_keeps_the_earlier_output(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    with atomic_write(path) as temporary:
        if kind == "folder":
            temporary.mkdir()
        (temporary / "x" if kind == "folder" else temporary).write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:  # noqa: PT012
        if kind == "folder":
            temporary.mkdir()
        (temporary / "x" if kind == "folder" else temporary).write_text("half")
        raise ZeroDivisionError
    assert (path / "x" if kind == "folder" else path).read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_an_empty_write_keeps_the_earlier_folder(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        (temporary / "old").touch()
    with pytest.raises(FileNotFoundError), atomic_write(folder):
        pass  # nothing is written, so the final rename fails
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("kind", ["file", "folder", "together"])
def test_leftovers_of_killed_writers_are_removed(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    write(target, kind, "old")
    whole = sorted(tmp_path.rglob("*"))
    # While both live, each has its own temporary folder, so that two are left.
    writers = [start_writer(target, kind, "later") for _ in range(2)]
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    folder = target if kind == "together" else tmp_path
    assert len([name for name in names(folder) if name.endswith(".tmp")]) == 2
    assert (target if kind == "file" else target / "part").read_text() == "old"
    write(target, kind, "new")
    assert sorted(tmp_path.rglob("*")) == whole
    assert (target if kind == "file" else target / "part").read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "folder", "together"])
def test_the_temporary_folder_of_a_living_writer_is_kept(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    writer = start_writer(target, kind, "later")
    write(target, kind, "first")
    assert (target if kind == "file" else target / "part").read_text() == "first"
    writer.communicate("")
    assert writer.returncode == 0
    assert (target if kind == "file" else target / "part").read_text() == "half"
    folder = target if kind == "together" else tmp_path
    assert names(folder) == (["part"] if kind == "together" else ["out"])


def test_concurrent_writers_leave_one_complete_file(tmp_path: Path) -> None:
    target, errors = tmp_path / "out", list[Exception]()

    def write_often(text: str) -> None:
        try:
            for _ in range(200):
                write(target, "file", text * 1000)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write_often, args=(text,)) for text in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert target.read_text() in {text * 1000 for text in "abcd"}
    assert names(tmp_path) == ["out"]


def test_a_folder_moved_aside_by_a_killed_writer_is_restored(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "folder", "only copy")
    start_writer(target, "folder", "at once").communicate()
    (left,) = (tmp_path / name for name in names(tmp_path) if name.endswith(".tmp"))
    target.rename(left / files.REPLACED)  # as if killed between the two renames
    with pytest.raises(ZeroDivisionError), atomic_write(target):
        raise ZeroDivisionError
    assert (target / "part").read_text() == "only copy"
    assert names(tmp_path) == ["out"]


def test_without_file_locks_other_temporary_folders_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    target = tmp_path / "out"
    start_writer(target, "file", "at once").communicate()
    monkeypatch.setattr(fcntl, "flock", refuse)
    write(target, "file", "new")
    assert target.read_text() == "new"
    assert names(tmp_path) == [".out.0.tmp", "out"]


def test_too_many_writers_are_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_WRITERS", 1)
    target = tmp_path / "out"
    with atomic_write(target) as temporary:
        temporary.write_text("first")
        with pytest.raises(DataError, match=r"a free temporary folder; got 1 .*; end the other"):
            write(target, "file", "second")
    assert target.read_text() == "first"


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["git", "dvc"])
def test_git_and_dvc_ignore_temporary_folders(tmp_path: Path, tool: str) -> None:
    project = Path.cwd()
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    for name in (".gitignore", ".dvcignore"):
        shutil.copy(project / name, tmp_path)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], cwd=tmp_path, check=True)
    target = tmp_path / "data" / "baselines" / "markov.parquet"
    start_writer(target, "file", "at once").communicate()
    left = f"data/baselines/.{target.name}.0.tmp"
    assert (tmp_path / left).is_dir()
    command = ["git"] if tool == "git" else [sys.executable, "-m", "dvc"]
    subprocess.run([*command, "check-ignore", "--quiet", left], cwd=tmp_path, check=True)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_user_error(tmp_path: Path, number: int) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(DataError, match="full disk"), atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise OSError(number, os.strerror(number))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_disk_that_becomes_read_only_meanwhile_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    expected = r"expected a folder to write to; got read-only file system .*; make it writable"
    with pytest.raises(DataError, match=expected), atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(temporary))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_full_disk_names_where_a_file_would_have_been(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(DataError) as caught, atomic_write_all(tmp_path) as new:  # noqa: SIM117
        with atomic_write(new / "part"):
            raise full
    assert caught.value.where == str(tmp_path / "part")


def test_write_errors_say_what_is_kept(tmp_path: Path) -> None:
    full = duckdb.IOException("Could not write file: No space left on device")
    expected = "expected room for a checkpoint; got a full disk; .* run again; it goes on"
    with (
        pytest.raises(DataError, match=expected),
        explain_write_errors(tmp_path, "a checkpoint", "it goes on"),
    ):
        raise full
    read_only = duckdb.IOException("Cannot open file: Read-only file system")
    with (
        pytest.raises(DataError, match=r"a folder to write to; got .*Read-only"),
        explain_write_errors(tmp_path / "out"),
    ):
        raise read_only


@pytest.mark.parametrize(("room", "expected"), [(0, DataError), (1 << 30, RuntimeError)])
def test_a_failed_write_of_torch_is_a_full_disk_where_there_is_no_room(
    tmp_path: Path, room: int, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=room)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    failed = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    with pytest.raises(expected), explain_write_errors(tmp_path / "none" / "checkpoint"):
        raise failed


def test_errors_show_no_character_that_a_terminal_obeys() -> None:
    error = DataError(expected="an id", got="\x1b]0;title\x07 é\ud800", where="a", fix="b")
    assert str(error) == r"a: expected an id; got \x1b]0;title\x07 é\ud800; b"
    assert shorten("\x1b[2J") == r"\x1b[2J"


def test_errors_for_users_stay_as_they_are(tmp_path: Path) -> None:
    known = DataError(expected="a", got="no space left on device", where="here", fix="that")
    with pytest.raises(DataError) as caught, explain_write_errors(tmp_path):
        raise known
    assert caught.value is known


def test_a_full_device_is_recognized() -> None:
    with pytest.raises(OSError, match="space") as caught, Path("/dev/full").open("w") as device:
        device.write("x" * 100_000)
    assert is_full_disk(caught.value)


@pytest.mark.parametrize("kind", ["file", "folder", "together"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_a_user_error(
    tmp_path: Path, kind: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    target = tmp_path / "out"
    write(target, kind, "old")
    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write wherever modes forbid it
    with pytest.raises(DataError, match=r"expected a folder to write to; got .*; make it writ"):
        write(target, kind, "new")
    assert (target if kind == "file" else target / "part").read_text() == "old"


def test_a_file_in_place_of_the_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    for kind, target in (("file", tmp_path / "data" / "out"), ("together", tmp_path / "data")):
        with pytest.raises(DataError, match="data: expected a folder to write to; got"):
            write(target, kind, "new")
    assert (tmp_path / "data").read_text() == "a file"


def test_other_errors_are_not_changed(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_write(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "not yours")


def test_the_state_directory_lies_in_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert state_dir() == tmp_path / ".mllm_msr"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "project"))
    assert state_dir() == tmp_path / "project" / ".mllm_msr"


@pytest.mark.parametrize("place", ["exps/tmpabc", "exps/standalone/tmpabc", "exps/tmpabc/below"])
def test_an_experiment_shares_the_state_directory_of_its_project(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = tmp_path / ".dvc" / "tmp" / place
    workspace.mkdir(parents=True)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(workspace)
    assert state_dir() == tmp_path / ".mllm_msr"


def test_a_folder_named_exps_outside_dvc_is_no_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for root in (tmp_path / "tmp" / "exps" / "project", Path("/tmp/exps/project")):
        monkeypatch.setenv("DVC_ROOT", str(root))
        assert state_dir() == root / ".mllm_msr"


@pytest.mark.slow
@given(folder_names)
def test_duckdb_writes_and_reads_exactly_the_named_folder(name: str) -> None:
    query = (
        "SELECT column_name, count FROM (SUMMARIZE FROM read_parquet(?, hive_partitioning=false))"
    )
    with (
        tempfile.TemporaryDirectory() as parent,
        pytest.MonkeyPatch.context() as patch,
        duckdb.connect() as connection,
    ):
        patch.chdir(parent)
        for folder in {"games 2", "my data1", "x", "a", "b"} - {name}:
            Path(folder).mkdir()
            (Path(folder) / "t.parquet").write_bytes(b"another folder's file")
        path = Path(name) / "t.parquet"
        path.parent.mkdir()
        connection.sql("SELECT 1 AS i").write_parquet(str(path.absolute()))
        assert connection.execute(query, [duckdb_path(path)]).fetchall() == [("i", 1)]


def test_a_path_with_a_backslash_and_a_glob_character_is_refused(tmp_path: Path) -> None:
    assert duckdb_path(tmp_path / "a\\b") == f"{tmp_path}/a\\b"
    with pytest.raises(DataError, match=r"expected a path without backslashes"):
        duckdb_path(tmp_path / "a\\b [2]")


def test_a_link_keeps_its_own_suffix(tmp_path: Path) -> None:
    (tmp_path / "cached").touch()
    (tmp_path / "a.csv.gz").symlink_to("cached")
    assert duckdb_path(tmp_path / "a.csv.gz") == f"{tmp_path}/a.csv.gz"


def test_a_digest_covers_names_and_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a").write_text("x")
    first = file_digest(folder)
    (folder / "deep" / "a").rename(folder / "deep" / "b")
    renamed = file_digest(folder)
    (folder / "deep" / "b").write_text("y")
    assert len({first, renamed, file_digest(folder)}) == 3
    (folder / "deep" / "b").write_text("x")
    (folder / "deep" / "b").rename(folder / "deep" / "a")
    assert file_digest(folder) == first

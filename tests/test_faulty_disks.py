"""Each stage on a disk that is full or read-only: one clear line, and nothing lost or half written.

Folders of a small pocket world are file systems in memory, which a test fills or makes read-only.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, chdir, contextmanager
from pathlib import Path

import pytest

from bench import faults

ROOT = Path(__file__).parents[1]
STATE = Path(".mllm_msr")
MEBIBYTES = 32  # of a file system; more than any stage writes
BALLAST = "ballast"  # the file that fills it
EARLIER = b"of an earlier run\n"
FULL = r"expected (room|space) for .*; got a full disk; free some space and run again; .+"
READ_ONLY = r"expected a folder to write to; got .*read-only file system.*; make it writable.*"
UNWRITABLE_STORE = r"expected a response store; got a folder that cannot be written .*; make .+"
# Stages that keep something in the state directory, and bytes that are too few for all of it.
KEEPING = {
    "summarize_items": 1 << 16,
    "infer_preferences": 1 << 16,
    "sft": 1 << 20,
    "score": 1 << 16,
    "baselines": 1 << 14,
    "feature_baselines": 1 << 14,
    "retrieve": 1 << 14,
    "rerank": 1 << 16,
}

pytestmark = pytest.mark.slow


class Disk:
    """A file system in memory over a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def full(self, room: int) -> Iterator[None]:
        """Fill it but for some bytes."""
        ballast = self.folder / BALLAST
        with ballast.open("wb") as file:
            free = os.statvfs(self.folder)
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - room)
        yield
        ballast.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        mount("-o", "remount,ro", str(self.folder))
        yield
        mount("-o", "remount,rw", str(self.folder))

    def content(self) -> dict[str, bytes | None]:
        """Return all folders and, with their bytes, files; not the ballast nor what grows."""
        paths = [path for path in self.folder.rglob("*") if path.name != BALLAST]
        return {str(path): faults.read(path) for path in paths if str(path) not in faults.GROWING}


Fault = Callable[[Disk], AbstractContextManager[None]]


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


@contextmanager
def mounted(folder: Path) -> Iterator[Disk]:
    """Mount a file system over a folder; skip the test where that is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        mount("-t", "tmpfs", "-o", f"size={MEBIBYTES}m", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"only root outside of most containers may mount a file system: {error}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class World:
    """A small pocket world, whose stages run when they are needed."""

    def __init__(self, server: "subprocess.Popen[str]") -> None:
        self.done: dict[tuple[str, ...], faults.Undisturbed] = {}
        self._server = server

    def run(self, words: Sequence[str]) -> faults.Ended:
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(words) + "\n")
        self._server.stdin.flush()
        return faults.Ended(*json.loads(self._server.stdout.readline()))

    def prepare(self, words: tuple[str, ...]) -> faults.Undisturbed:
        """Run the stages up to one, undisturbed; return what this one wrote."""
        for stage in faults.RUNS[: faults.RUNS.index(words) + 1]:
            if stage not in self.done:
                known = set(faults.list_outputs())
                ended = faults.check(self.run(stage))
                new = [name for name in faults.list_outputs() if name not in known]
                files = {name: Path(name).read_bytes() for name in new}
                self.done[stage] = faults.Undisturbed(files, 0, ended.seconds)
                shutil.rmtree(STATE, ignore_errors=True)
        return self.done[words]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with chdir(tmp_path_factory.mktemp("world")):
        faults.write_settings()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_ROOT": str(Path.cwd())}
        environment.pop(faults.VARIABLE, None)
        command = [sys.executable, str(ROOT / "tests" / "forked_stages.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, env=environment, text=True, **pipes) as server:
            yield World(server)
            assert server.stdin
            server.stdin.close()


@pytest.fixture(autouse=True)
def clean_world(world: World) -> Iterator[None]:
    """Empty the state directory after each test, and restore what a stage wrote before it."""
    yield
    shutil.rmtree(STATE, ignore_errors=True)
    for whole in world.done.values():
        for name in whole.other_files():
            Path(name).write_bytes(whole.files[name])


def list_folders(whole: faults.Undisturbed) -> list[Path]:
    """Return the folders below data with the outputs of a stage."""
    return sorted({Path(*Path(name).parts[:2]) for name in whole.files})


def check_failure(ended: faults.Ended, message: str, folders: Sequence[Path]) -> None:
    """Prove that a run ended with one line that names a path and says what to do."""
    assert ended.code == 1, ended.output
    assert "Traceback" not in ended.output, ended.output
    (line,) = re.findall(r"^error: .*", ended.output.replace("\r", "\n"), flags=re.MULTILINE)
    where = re.fullmatch(rf"error: (\S+): {message}", line)
    assert where, line
    path = Path(where[1]).absolute()
    assert any(path.is_relative_to(folder.absolute()) for folder in folders), line
    assert ".tmp" not in where[1], line


def check_rerun(ended: faults.Ended, whole: faults.Undisturbed) -> None:
    """Prove that a run ended with the bytes of an undisturbed one."""
    faults.check(ended)
    assert whole.is_equal_but_for_last_digits(), whole.other_files()


def list_runs(names: Iterable[str]) -> list[object]:
    return [pytest.param(words, id=" ".join(words)) for words in faults.RUNS if words[0] in names]


@pytest.mark.parametrize("words", list_runs([words[0] for words in faults.RUNS]))
def test_outputs_on_a_faulty_disk_stay_as_they_were(world: World, words: tuple[str, ...]) -> None:
    whole = world.prepare(words)
    size = sum(map(len, whole.files.values()))
    folders = list_folders(whole)
    found: list[tuple[Fault, str]] = [
        (Disk.read_only, READ_ONLY),
        (lambda disk: disk.full(0), FULL),
        (lambda disk: disk.full(size // 2), FULL),
    ]
    with ExitStack() as stack:
        disks = [stack.enter_context(mounted(folder)) for folder in folders]
        for name in whole.files:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(EARLIER)
        earlier = [disk.content() for disk in disks]
        for fault, message in found:
            with ExitStack() as faulty:
                for disk in disks:
                    faulty.enter_context(fault(disk))
                check_failure(world.run(words), message, folders)
                assert [disk.content() for disk in disks] == earlier
        check_rerun(world.run(words), whole)


@pytest.mark.parametrize("words", list_runs(KEEPING))
def test_a_faulty_state_directory_loses_nothing(world: World, words: tuple[str, ...]) -> None:
    whole = world.prepare(words)
    found: list[tuple[Fault, str]] = [
        (Disk.read_only, f"({READ_ONLY}|{UNWRITABLE_STORE})"),
        (lambda disk: disk.full(0), FULL),
        (lambda disk: disk.full(KEEPING[words[0]]), FULL),
    ]
    with mounted(STATE) as disk:
        for fault, message in found:
            for name in whole.files:
                Path(name).unlink(missing_ok=True)
            with fault(disk):
                check_failure(world.run(words), message, [STATE])
            assert {name for name in whole.files if Path(name).exists()} <= faults.GROWING
        check_rerun(world.run(words), whole)

"""Running a study's experiments: one study at a time, ended cleanly, and leaving nothing behind.

For about a second at its start ``dvc exp run --temp`` puts the workspace itself aside
(``git stash``) to make its copy of the project; one that is killed in this second leaves it aside.
So an experiment is never ended before that is over.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mllm_msr.core.errors import DataError
from mllm_msr.core.files import state_dir
from mllm_msr.study.experiments import environment, experiment_command, python_command
from mllm_msr.study.plans import STUDIES

COPY_IS_MADE = b"Reproducing experiment"  # DVC says so when the workspace is back in its place
SECONDS_TO_END = 20  # for a stage to end by itself before it is killed
TAIL = 15  # lines of a failed experiment's output
NAME = re.compile(rf"({'|'.join(STUDIES)})-.+-[0-9a-f]{{8}}")


def run_experiment(name: str, settings: Mapping[str, Any], lock: IO[str]) -> float:
    """Run one experiment to its end; returns its seconds.

    Args:
        name: The experiment's.
        settings: What it changes.
        lock: What :func:`lock_studies` lends; the child holds it too, so that no study begins
            beside an experiment that outlives its own.

    Raises:
        DataError: It failed; the last lines of its output are on stderr.
        KeyboardInterrupt: The study was told to stop; the experiment has ended then.
    """
    log, begun = state_dir() / "studies" / f"{name}.log", time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output, _stopped_by_signals():
        process = subprocess.Popen(  # noqa: S603
            python_command(*experiment_command(name, settings)),
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C is ours to pass on
            pass_fds=(lock.fileno(),),
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            _end(process, log)
            remove_leftovers()
            raise
    if code:
        remove_leftovers()
        _tell_failure(name, code, log)
    return time.monotonic() - begun


@contextlib.contextmanager
def lock_studies(study: str) -> Iterator[IO[str]]:
    """Lend the lock that only one study of a project can hold.

    Raises:
        DataError: Another study, or an experiment that outlived one, is running.
    """
    path = state_dir() / "study.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            got, fix = f"{lock.read().strip()}, still running", "wait for its end, or end it"
            raise DataError(
                expected="no other study at work", got=got, where=str(path), fix=fix
            ) from error
        lock.truncate(0)
        lock.write(f"study {study}, process {os.getpid()}")
        lock.flush()
        yield lock


def remove_leftovers() -> None:
    """Remove the copies that killed experiments left, which DVC would show as running for ever.

    Only those of studies, whose lock says that none is alive.
    """
    exps = Path(".dvc/tmp/exps")
    records = [file for part in ("run", "standalone/run") for file in exps.glob(f"{part}/*/*.run")]
    for record in records:
        info = json.loads(record.read_text(encoding="utf-8"))
        if NAME.fullmatch(info["name"] or "") and not info["result_ref"]:
            shutil.rmtree(exps / "standalone" / Path(info["root_dir"]).name, ignore_errors=True)
            shutil.rmtree(record.parent)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let a polite kill stop a study as Ctrl-C does."""
    polite = (signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.signal(each, signal.default_int_handler) for each in polite}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _end(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """End an experiment and its stages, once DVC has put the workspace back."""
    deaf = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.signal(each, signal.SIG_IGN) for each in deaf}
    while process.poll() is None and COPY_IS_MADE not in log.read_bytes():
        time.sleep(0.05)
    for word in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, word)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
    for each, handler in before.items():
        signal.signal(each, handler)


def _tell_failure(name: str, code: int, log: Path) -> None:
    """Show the end of an experiment's output and say how to go on."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    sys.stderr.write("\n".join(["", *lines[-TAIL:], ""]))
    fix = "mend what its last lines say, then run the study again: it goes on from here"
    raise DataError(
        expected=f"the experiment {name} to end well",
        got=f"exit code {code}",
        where=str(log),
        fix=fix,
    )

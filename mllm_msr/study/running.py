"""Running a study's experiments: one study at a time, with cleanup after interruptions.

For about a second at its start, ``dvc exp run --temp`` stashes the workspace (``git stash``) to
copy the project. If it is killed in that second, the workspace stays stashed. So an experiment is
never ended before its copy is made.
"""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mllm_msr.core.errors import DataError
from mllm_msr.core.files import state_dir
from mllm_msr.study.dvc_internals import COPY_IS_MADE, remove_unfinished
from mllm_msr.study.experiments import environment, experiment_command, python_command
from mllm_msr.study.plans import STUDIES

SECONDS_TO_END = 20  # between the signals to a stage
TAIL = 15  # lines shown of a failed experiment's output
NAME = re.compile(rf"({'|'.join(STUDIES)})-.+-[0-9a-f]{{8}}")


def run_experiment(name: str, settings: Mapping[str, Any], lock: IO[str]) -> float:
    """Run one experiment to its end; return its seconds.

    Args:
        name: The experiment's.
        settings: What it changes.
        lock: From :func:`lock_studies`. The child process holds it too, so that no other study
            starts while an experiment outlives its study.

    Raises:
        DataError: It failed; the last lines of its output are on stderr.
        KeyboardInterrupt: The study was interrupted; the experiment has ended.
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
            start_new_session=True,  # Ctrl-C is handled here
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
        _raise_failure(name, code, log)
    return time.monotonic() - begun


@contextlib.contextmanager
def lock_studies(study: str) -> Iterator[IO[str]]:
    """Hold the lock of the studies of a project, which only one study can hold.

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
            got, fix = f"{lock.read().strip()}, still running", "wait until it ends, or end it"
            raise DataError(
                expected="no other study at work", got=got, where=str(path), fix=fix
            ) from error
        lock.truncate(0)
        lock.write(f"study {study}, process {os.getpid()}")
        lock.flush()
        yield lock


def remove_leftovers() -> None:
    """Remove the copies of killed experiments of studies.

    The caller holds the lock of the studies, so none of their experiments is running.
    """
    remove_unfinished(NAME)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP as Ctrl-C."""
    handled = (signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.signal(each, signal.default_int_handler) for each in handled}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _end(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """End an experiment and its stages, once DVC has restored the workspace."""
    ignored = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.signal(each, signal.SIG_IGN) for each in ignored}
    while process.poll() is None and COPY_IS_MADE not in log.read_bytes():
        time.sleep(0.05)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
    for each, handler in before.items():
        signal.signal(each, handler)


def _raise_failure(name: str, code: int, log: Path) -> None:
    """Print the end of an experiment's output and raise a DataError."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    sys.stderr.write("\n".join(["", *lines[-TAIL:], ""]))
    fix = "correct what its last lines say, then run the study again: it continues from here"
    raise DataError(
        expected=f"the experiment {name} to end well",
        got=f"exit code {code}",
        where=str(log),
        fix=fix,
    )

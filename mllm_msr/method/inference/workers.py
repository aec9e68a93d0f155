"""A pool of workers on a Ray cluster, each of which holds one model.

The environment chooses the cluster, so that no setting changes with the hardware:

- ``MLLM_MSR_CLUSTER``: ``local`` starts one on this machine, ``auto`` finds the running one that
  this machine belongs to, and anything else is the address of its head. Without it there is no
  pool, and Ray is not imported.
- ``MLLM_MSR_WORKERS``: how many workers; one per GPU by default, and one per node without GPUs.

Every node needs the project's environment, and the files of models and images at the same paths.
Only the process that owns the pool writes the response store.
"""

import logging
import math
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mllm_msr.core.errors import ModelError, ParamsError, UserError, install_command

if TYPE_CHECKING:
    from ray import ObjectRef, ObjectRefGenerator
    from ray.actor import ActorHandle

log = logging.getLogger(__name__)

CLUSTER, WORKERS = "MLLM_MSR_CLUSTER", "MLLM_MSR_WORKERS"
# Of the driver's environment, what a worker on another node must know too.
INHERITED = ("MLLM_MSR_DEVICE", "MLLM_MSR_DTYPE", "HF_HUB_OFFLINE")
MOST_WORKERS = 4_096
ATTEMPTS = 3  # of a chunk whose workers die
WAITING_SECONDS = 60  # between two messages that workers are waited for


class Output(NamedTuple):
    """What a worker has finished.

    Attributes:
        results: By key of the task.
        tokens: Generated meanwhile.
    """

    results: Mapping[str, Any]
    tokens: int = 0


class Description(NamedTuple):
    """A worker's model; equal for all workers.

    Attributes:
        identity: The model's files, as in response keys.
        precision: The precision of the computation, as in response keys.
    """

    identity: str
    precision: str


class Work(Protocol):
    """What a worker does, with its own copy of a model."""

    def describe(self) -> Description:
        """Return the description of the model; no weights are loaded."""

    def run(self, chunk: Mapping[str, Any]) -> Iterator[Output]:
        """Yield the results of a chunk of tasks as they finish."""


class Worker:
    """The process of a worker. Errors for users are results, since Ray would wrap them."""

    def __init__(self, open_work: Callable[[], Work], folder: str, threads: int | None) -> None:
        """Take what opens the work in the worker's process.

        Args:
            open_work: Opens the work; no weights are loaded.
            folder: The driver's, on which relative paths depend.
            threads: Of torch on a CPU; None on a GPU.
        """
        self._open, self._folder, self._threads = open_work, folder, threads
        self._work: Work | None = None

    def describe(self) -> Description | UserError:
        """Open the work and describe its model."""
        try:
            os.chdir(self._folder)
            self._work = self._open()
            return self._work.describe()
        except FileNotFoundError as error:
            fix = "put it on storage that all nodes share, or copy it there"
            got = f"none on the node {socket.gethostname()}"
            return ModelError(expected="this folder", got=got, where=str(error.filename), fix=fix)
        except UserError as error:
            return error

    def run(self, chunk: Mapping[str, Any]) -> Iterator[Output | UserError]:
        """Yield the results of a chunk as they finish, or the error that ends it."""
        import torch

        assert self._work, "it is described first"
        if self._threads:
            torch.set_num_threads(self._threads)
        try:
            yield from self._work.run(chunk)
        except UserError as error:
            yield error


class Share(NamedTuple):
    """What a worker has of the cluster."""

    workers: int
    cpus: int
    gpus: int


class WorkerPool:
    """Workers that take chunks of tasks, each the next one as soon as it is free.

    A worker that dies is replaced, and what it had not finished goes to whichever worker is free.

    Attributes:
        share: The number of workers, and what each has of the cluster.
    """

    def __init__(self, open_work: Callable[[], Work], where: str) -> None:
        """Connect to the cluster, and start the workers.

        Args:
            open_work: Opens the work in a worker's process; it is pickled.
            where: The model, for errors.

        Raises:
            ModelError: Ray is missing, or there is no cluster.
            ParamsError: The number of workers is none.
        """
        self._ray = _connect(os.environ[CLUSTER])
        self.share = _divide(self._ray.nodes())
        self._open, self._where = open_work, where
        self._starting: dict[ObjectRef[Any], ActorHandle[Any]] = {}
        self._idle: list[ActorHandle[Any]] = []
        self._running: dict[ObjectRefGenerator[Any], tuple[ActorHandle[Any], dict[str, Any]]] = {}
        self._returned: deque[dict[str, Any]] = deque()  # chunks of dead workers
        self._deaths: dict[str, int] = {}  # of a task's workers
        self._deaths_at_start = 0
        self._description: Description | None = None
        for _ in range(self.share.workers):
            self._start_worker()

    def describe(self) -> Description:
        """Return the description of the workers' model; waits for the first worker.

        Raises:
            ModelError: A worker cannot open the model.
        """
        while self._description is None:
            self._wait()
        return self._description

    def run(self, take: Callable[[int], Mapping[str, Any]]) -> Iterator[Output]:
        """Yield what the workers finish, until there is nothing left to do.

        Args:
            take: Returns the next chunk of tasks by key, given the number of workers; empty where
                there is none now. It is asked whenever a worker is free.

        Raises:
            ModelError: Workers die again and again, or one computes otherwise than the others.
            UserError: A worker's.
        """
        while True:
            while self._idle and (chunk := self._next_chunk(take)):
                worker = self._idle.pop()
                self._running[worker.run.remote(chunk)] = (worker, chunk)
            if self._idle and not self._running:
                return
            if output := self._wait():
                yield output

    def close(self) -> None:
        """Stop the workers."""
        for worker in [*self._starting.values(), *self._idle, *self._busy()]:
            self._ray.kill(worker)
        self._starting, self._idle, self._running = {}, [], {}

    def _busy(self) -> list["ActorHandle[Any]"]:
        return [worker for worker, _ in self._running.values()]

    def _next_chunk(self, take: Callable[[int], Mapping[str, Any]]) -> dict[str, Any]:
        return self._returned.popleft() if self._returned else dict(take(self.share.workers))

    def _start_worker(self) -> None:
        known = {name: os.environ[name] for name in INHERITED if name in os.environ}
        threads = None if self.share.gpus else self.share.cpus
        kind = self._ray.remote(Worker).options(
            num_cpus=self.share.cpus,
            num_gpus=self.share.gpus,
            runtime_env={"env_vars": known | {"TQDM_DISABLE": "1"}},
        )
        worker = kind.remote(self._open, str(Path.cwd()), threads)
        self._starting[worker.describe.remote()] = worker

    def _wait(self) -> Output | None:
        """Wait until a worker has started, finished something, or died."""
        waiting = [*self._starting, *self._running]
        ready, _ = self._ray.wait(waiting, num_returns=1, timeout=WAITING_SECONDS)
        if not ready:
            if self._starting and not self._running:
                log.warning("waiting for free resources of the cluster: %s", self.share)
            return None
        if ready[0] in self._starting:
            self._admit(ready[0])
            return None
        return self._collect(ready[0])

    def _admit(self, described: "ObjectRef[Any]") -> None:
        """Let a worker that has started take chunks."""
        worker = self._starting.pop(described)
        try:
            description = self._ray.get(described)
        except self._lost() as error:
            self._deaths_at_start += 1
            if self._deaths_at_start > self.share.workers + ATTEMPTS:
                raise self._dead_error("workers that start", error) from error
            self._start_worker()
            return
        if isinstance(description, UserError):
            raise description
        self._description = self._description or description
        if description != self._description:
            fix = "set MLLM_MSR_DTYPE, and have the same model's files on every node"
            raise ModelError(
                expected="workers with the same model and precision",
                got=f"{description} and {self._description}",
                where=self._where,
                fix=fix,
            )
        self._idle.append(worker)

    def _collect(self, stream: "ObjectRefGenerator[Any]") -> Output | None:
        """Return what a worker has finished; None at the end of its chunk, or if it died."""
        worker, chunk = self._running[stream]
        try:
            output = self._ray.get(next(stream))
        except StopIteration:
            del self._running[stream]
            self._idle.append(worker)
            return None
        except self._lost() as error:
            del self._running[stream]
            self._return(chunk, error)
            self._start_worker()
            return None
        if isinstance(output, UserError):
            raise output
        for key in output.results:
            chunk.pop(key)
        return Output(*output)

    def _return(self, chunk: dict[str, Any], error: Exception) -> None:
        """Take back what a dead worker had not finished."""
        log.warning("a worker died with %d tasks left, which another takes", len(chunk))
        for key in chunk:
            self._deaths[key] = self._deaths.get(key, 0) + 1
        if chunk:
            self._returned.append(chunk)
        if max((self._deaths[key] for key in chunk), default=0) >= ATTEMPTS:
            raise self._dead_error(f"workers that finish {len(chunk)} tasks", error) from error

    def _dead_error(self, expected: str, error: Exception) -> ModelError:
        fix = "look at the nodes' memory and Ray's logs; what was finished is kept"
        cause = " ".join(str(error).split())
        return ModelError(
            expected=expected, got=f"ones that died: {cause}", where=self._where, fix=fix
        )

    def _lost(self) -> tuple[type[Exception], ...]:
        """Return the errors of Ray that mean that a worker or its node is gone."""
        errors = self._ray.exceptions
        return (
            errors.RayActorError,
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
            errors.ObjectLostError,
        )


def chunk_size(waiting: int, workers: int, largest: int, smallest: int = 1) -> int:
    """Return how many of the waiting tasks the next chunk takes: fewer towards the end.

    Half of a worker's fair share, so that all workers end together.
    """
    fair = math.ceil(waiting / (2 * workers))
    return min(max(fair, smallest), largest, waiting)


def has_cluster() -> bool:
    """Return whether the environment names a cluster."""
    return bool(os.environ.get(CLUSTER))


def _connect(address: str) -> Any:
    """Connect to the cluster at an address; return the package ray.

    Raises:
        ModelError: Ray is missing, or there is no cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Otherwise Ray hides all GPUs from workers that have none, and warns that this will change.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        fix = f"{install_command('ray')}, or unset it"
        raise ModelError(expected="the package ray", got="none", where=CLUSTER, fix=fix) from error
    if ray.is_initialized():
        return ray
    try:
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        fix = "start one with ray start --head, correct the address, or set it to local"
        raise ModelError(
            expected="a Ray cluster", got=str(error), where=f"{CLUSTER}={address}", fix=fix
        ) from error
    return ray


def _divide(nodes: list[dict[str, Any]]) -> Share:
    """Return what each worker has of the nodes' CPUs and GPUs.

    Raises:
        ParamsError: The number of workers in the environment is none.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in alive)
    text = os.environ.get(WORKERS, str(gpus or len(alive)))
    if not (text.isdecimal() and 1 <= int(text) <= (gpus or MOST_WORKERS)):
        fix = "correct the environment variable"
        expected = f"a number from 1 to {gpus or MOST_WORKERS:,}"
        raise ParamsError(expected=expected, got=repr(text), where=WORKERS, fix=fix)
    workers = int(text)
    if gpus:
        return Share(workers, cpus=1, gpus=1)
    per_node = math.ceil(workers / len(alive))
    smallest = min(int(node.get("CPU", 1)) for node in alive)
    return Share(workers, cpus=max(1, smallest // per_node), gpus=0)

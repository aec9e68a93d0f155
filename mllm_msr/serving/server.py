"""The server of one run: its address, its key, its logs and its end."""

import contextlib
import ipaddress
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import typer
import uvicorn
from transformers.utils import logging

from mllm_msr.core.errors import ParamsError
from mllm_msr.recommendation.recommender import Recommender
from mllm_msr.serving.app import SECONDS_TO_STOP, Service, create_app
from mllm_msr.serving.guards import LOOPBACK_NAMES, Limits
from mllm_msr.serving.observing import log_as_json

API_KEY = "MLLM_MSR_API_KEY"  # the environment variable
SHORTEST_KEY = 16  # characters
BACKLOG = 1024  # connections that the system holds


@dataclass(frozen=True)
class Run:
    """The run to serve; the attributes are arguments of :meth:`Recommender.load`."""

    data: Path
    params: Path | None
    prompts: Path | None
    retriever: str
    candidates: int

    def load(self) -> AbstractContextManager[Recommender]:
        """Open its recommender."""
        logging.disable_progress_bar()  # logs are lines of JSON
        return Recommender.load(
            self.data,
            params=self.params,
            prompts=self.prompts,
            retriever=self.retriever,
            candidates=self.candidates,
        )


def serve(run: Run, host: str, port: int, *, seconds: float, longest_queue: int) -> None:
    """Serve a run until the process is told to stop.

    Args:
        run: The run.
        host: The address to listen on; one other than loopback requires a key.
        port: The port; 0: any that is free.
        seconds: The most that an answer may take.
        longest_queue: The most requests that may wait.

    Raises:
        ParamsError: There is no key where one is required, or the address cannot be listened on.
        UserError: The run cannot be loaded.
    """
    limits = Limits(seconds, read_api_key(host), _host_names(host))
    with contextlib.closing(listen(host, port)) as listening:
        log_as_json()
        # Stops the server, which then exists.
        service = Service(
            run.load,
            run.data / "fetch_images/images.parquet",
            longest_queue=longest_queue,
            on_failure=lambda: setattr(server, "should_exit", True),
        )
        config = uvicorn.Config(
            create_app(service, limits),
            log_config=None,
            access_log=False,  # it has paths, and so ids
            server_header=False,
            timeout_graceful_shutdown=SECONDS_TO_STOP,
        )
        server = uvicorn.Server(config)
        address = f"[{host}]" if ":" in host else host
        typer.echo(f"http://{address}:{listening.getsockname()[1]}/ (loading the model)")
        with _stop_quietly():
            server.run([listening])
        if service.batcher.failure:
            raise service.batcher.failure


def read_api_key(host: str) -> str | None:
    """Return the key of the environment, None where none is set.

    Raises:
        ParamsError: It is too short, or there is none and the address is not loopback.
    """
    key = os.environ.get(API_KEY)
    if key is not None and len(key) < SHORTEST_KEY:
        raise ParamsError(
            expected=f"at least {SHORTEST_KEY} characters",
            got=str(len(key)),
            where=API_KEY,
            fix="set a longer key, or unset it to serve this machine alone",
        )
    if key is None and not _is_loopback(host):
        raise ParamsError(
            expected=f"an API key for an address other than 127.0.0.1, {host}",
            got="none",
            where=API_KEY,
            fix=f"set it, for instance export {API_KEY}=$(openssl rand -hex 32)",
        )
    return key


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ParamsError: The port is in use, or the host is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise ParamsError(
            expected="an address and a port that are free",
            got=str(error),
            where=f"{host} port {port}",
            fix="stop what listens there, or name others with --host and --port",
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_names(host: str) -> frozenset[str] | None:
    """Return the names by which a loopback address may be asked."""
    if not _is_loopback(host):
        return None  # its names are not known, and a key is required
    bracketed = f"[{host}]" if ":" in host else host
    return frozenset({*LOOPBACK_NAMES, bracketed})


@contextlib.contextmanager
def _stop_quietly() -> Iterator[None]:
    """Let uvicorn's end by a signal be the end of the command, with exit code 0.

    When it has stopped, uvicorn raises the signal again for the handlers that it found.
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    found = {each: signal.signal(each, signal.SIG_IGN) for each in signals}
    try:
        yield
    finally:
        for each, handler in found.items():
            signal.signal(each, handler)

"""What surrounds every endpoint: who may ask, how much, how long, and what is recorded."""

import asyncio
import hmac
import time
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mllm_msr.serving.observing import OTHER, Metrics, log

LARGEST_BODY = 1_000_000  # bytes
METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"}
# They hold no data: the page asks for the key, and probes have none.
OPEN_PATHS = {"/", "/docs", "/openapi.json", "/health/live", "/health/ready"}
OPEN_FOLDER = "/page/"
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]", "::1"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
HUNG_UP = 499  # the status in logs of a request whose client has gone


@dataclass(frozen=True)
class Limits:
    """Who may ask, and how long an answer may take.

    Attributes:
        seconds: From the request to its answer.
        api_key: What a client has to send; None: nothing.
        host_names: The hosts that a request may name; None: any. A name that somebody else's
            server resolves to this machine would let a web page read what is served here.
    """

    seconds: float
    api_key: str | None = None
    host_names: frozenset[str] | None = None


def problem(status: int, error: str, **headers: str) -> JSONResponse:
    """Return the answer to a request that is refused."""
    return JSONResponse({"error": error}, status, headers)


class Recorder:
    """Counts and logs every request, adds headers, and answers for code that fails."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Surround an application."""
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, recorded = time.perf_counter(), HUNG_UP, False

        def record() -> None:
            nonlocal recorded
            if not recorded:
                recorded = True
                self._record(scope, status, time.perf_counter() - start)

        async def send_recorded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            elif not message.get("more_body"):
                record()  # before the end is sent: who has an answer finds it counted
            await send(message)

        try:
            await self._app(scope, receive, send_recorded)
        except Exception:
            log.exception("request failed")
            if status == HUNG_UP:
                answer = problem(500, "the service failed; its log says where")
                await answer(scope, receive, send_recorded)
        finally:
            record()

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        endpoint = getattr(scope.get("route"), "path_format", OTHER)
        method = scope["method"] if scope["method"] in METHODS else OTHER
        self._metrics.count_request(method, endpoint, status, seconds)
        fields = {
            "method": method,
            "endpoint": endpoint,
            "status": status,
            "seconds": round(seconds, 4),
        }
        log.info("request", extra={"fields": fields})


class Guard:
    """Refuses requests without the key, for another host, with too large a body, or too slow."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        """Surround an application."""
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        refused = self._refuse(scope)
        if refused:
            await refused(scope, receive, send_noted)
            return
        try:
            async with asyncio.timeout(self._limits.seconds):
                body = await _read_body(receive)
                if isinstance(body, bytes):
                    await self._app(scope, _replay(body, receive), send_noted)
                elif body:
                    await body(scope, receive, send_noted)
        except TimeoutError:
            if not started:
                error = f"no answer within {self._limits.seconds:g} seconds; ask again later"
                await problem(504, error)(scope, receive, send)

    def _refuse(self, scope: Scope) -> JSONResponse | None:
        """Return the refusal of a request by its headers, None for one that may go on."""
        headers, limits = Headers(scope=scope), self._limits
        if limits.host_names is not None:
            name = headers.get("host", "").rpartition(":")
            named = name[0] if name[2].isdigit() and name[0] else headers.get("host", "")
            if named.lower() not in limits.host_names:
                return problem(421, "Host: expected this machine's own name; use 127.0.0.1")
        if limits.api_key is not None and not _is_open(scope["path"]):
            sent = headers.get("authorization", "").encode()
            if not hmac.compare_digest(sent, f"Bearer {limits.api_key}".encode()):
                error = "Authorization: expected Bearer and the service's API key"
                return problem(401, error, **{"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > LARGEST_BODY:
            return _too_large()
        return None


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _too_large() -> JSONResponse:
    return problem(413, f"body: expected at most {LARGEST_BODY:,} bytes; send less")


async def _read_body(receive: Receive) -> bytes | JSONResponse | None:
    """Return a request's body, the refusal of one that is too large, None if the client left."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > LARGEST_BODY:
            return _too_large()
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a function that receives a body that was read, and then what comes after it."""
    first: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return first.pop() if first else await receive()

    return receive_again

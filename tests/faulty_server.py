"""An OpenAI-compatible server of canned replies that fails in chosen ways before it answers."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FaultyServer:
    """What a server does, and what it was asked.

    Attributes:
        count_tokens: Of a prompt's text, as the server's tokenizer counts.
        reply: The choice of a completion, of a prompt's text.
        faults: What happens to the requests of a prompt before it is answered, in this order:
            a status, or the name of a method of the handler.
        models: The reply to the list of models; None: status 500.
        model: The name of the model in replies.
        key: The key that requests must have.
        requests: How often each prompt was asked.
        answered: How often each prompt was answered.
        most: The most requests that were under way at once.
        variables: What each request set in the chat template.
    """

    count_tokens: Callable[[str], int]
    reply: Callable[[str], dict[str, Any]]
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    models: list[dict[str, Any]] | None = None
    model: str = "served"
    key: str = ""
    requests: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    most: int = 0
    variables: list[dict[str, Any]] = field(default_factory=list)
    port: int = 0
    stop: Callable[[], None] = lambda: None  # while it is running
    _under_way: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve on loopback; yield the address. The port stays the same from then on."""
        owner = self

        class Handler(_Handler):
            faulty = owner

        server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        server.daemon_threads = True
        self.port = server.server_port
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()

        def stop() -> None:
            server.shutdown()
            server.server_close()

        with ExitStack() as stack:
            stack.callback(stop)
            self.stop = stack.close
            yield self.address

    def take_fault(self, text: str) -> int | str | None:
        with self._lock:
            self.requests[text] += 1
            planned = self.faults.get(text)
            return planned.pop(0) if planned else None

    @contextmanager
    def counting(self) -> Iterator[None]:
        with self._lock:
            self._under_way += 1
            self.most = max(self.most, self._under_way)
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1

    def note_answered(self, text: str) -> None:
        with self._lock:
            self.answered[text] += 1


class _Handler(BaseHTTPRequestHandler):
    faulty: FaultyServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/v1/models" and self.faulty.models is not None:
            self.send(200, {"data": self.faulty.models})
        else:
            self.send(404, {"error": "not found"})

    def do_POST(self) -> None:
        with self.faulty.counting():
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.faulty.key not in self.headers["Authorization"]:
                self.send(401, {"error": f"wrong key {self.headers['Authorization']}"})
                return
            self.faulty.variables.append(body.get("chat_template_kwargs", {}))
            content = body["messages"][-1]["content"]
            text = content if isinstance(content, str) else content[0]["text"]
            fault = self.faulty.take_fault(text)
            if isinstance(fault, str):
                getattr(self, fault)(text)
            elif fault:
                self.send(fault, {"error": f"status {fault}"}, {"Retry-After": "0.05"})
            else:
                self.answer(text)

    def answer(self, text: str) -> None:
        self.faulty.note_answered(text)
        tokens = {"prompt_tokens": self.faulty.count_tokens(text), "completion_tokens": 2}
        choice = {"index": 0, "finish_reason": "stop", **self.faulty.reply(text)}
        self.send(200, {"model": self.faulty.model, "choices": [choice], "usage": tokens})

    def change_model(self, text: str) -> None:
        self.faulty.model = "another"
        self.answer(text)

    def drop(self, text: str) -> None:
        del text
        self.close_connection = True
        self.connection.close()

    def truncate(self, text: str) -> None:
        del text
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"choices": [')
        self.close_connection = True

    def malformed(self, text: str) -> None:
        del text
        self.send(200, None, raw=b'{"choices": [')

    def slow(self, text: str) -> None:
        del text
        time.sleep(1)
        self.close_connection = True

    def send(
        self, status: int, body: Any, headers: dict[str, str] | None = None, raw: bytes = b""
    ) -> None:
        data = raw or json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        del format, args

"""Metrics for Prometheus, and logs as JSON lines that tell nothing about users.

A log line has the template of a path, never the path; the type and place of an error, never its
message, which may quote an id or a text.
"""

import json
import logging
import time
import traceback
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from mllm_msr.serving.batching import LARGEST_BATCH, Batch, Batcher

OTHER = "other"  # the endpoint of requests that no route takes
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
OWN_LOGGER = "mllm_msr.serving"
FRAMES = 5  # of an error's traceback

log = logging.getLogger(OWN_LOGGER)


class Metrics:
    """The metrics of one service."""

    def __init__(self) -> None:
        """Make all metrics, in a registry of their own."""
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        shared: dict[str, Any] = {"namespace": "mllm_msr", "registry": self._registry}
        names = ["method", "endpoint", "status"]
        self._requests = Counter("http_requests", "Answered requests.", names, **shared)
        self._seconds = Histogram(
            "http_request_seconds",
            "From the request to its answer.",
            ["endpoint"],
            buckets=SECONDS,
            **shared,
        )
        sizes = range(1, LARGEST_BATCH + 1)
        self._sizes = Histogram("batch_queries", "Queries in a batch.", buckets=sizes, **shared)
        self._batch_seconds = Histogram(
            "batch_seconds", "Time of a batch.", buckets=SECONDS, **shared
        )
        self._queue = Gauge("queue_length", "Queries that wait.", **shared)
        self._ready = Gauge("ready", "1 when queries are answered.", **shared)

    def watch(self, batcher: Batcher) -> None:
        """Read the queue of a batcher whenever metrics are read."""
        self._queue.set_function(lambda: batcher.queue_length)
        self._ready.set_function(lambda: batcher.is_ready)

    def count_batch(self, batch: Batch) -> None:
        """Count a batch."""
        self._sizes.observe(batch.queries)
        self._batch_seconds.observe(batch.seconds)

    def count_request(self, method: str, endpoint: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(method, endpoint, status).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class JsonFormatter(logging.Formatter):
    """Formats a log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; of an error, its type and place."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0]:
            frames = traceback.extract_tb(record.exc_info[2])[-FRAMES:]
            line["error"] = record.exc_info[0].__name__
            line["at"] = [f"{each.filename}:{each.lineno}" for each in frames]
        return json.dumps(line, ensure_ascii=False)


def log_as_json() -> None:
    """Write all logs of this process to standard error as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    for name in (OWN_LOGGER, "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)

"""A service of a recommender that needs no model, on a free port."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import uvicorn
from fake_recommender import FakeRecommender, wait_for

from mllm_msr.core.schemas import Images
from mllm_msr.core.tables import write_rows
from mllm_msr.serving.app import Service, create_app
from mllm_msr.serving.guards import Limits

LIMITS = Limits(seconds=5)


@pytest.fixture
def fake() -> FakeRecommender:
    return FakeRecommender()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write the image of one item."""
    from small_world import image_row

    path = tmp_path / "images.parquet"
    write_rows(Images, [image_row("i1", (8, 6))], path)
    return path


@pytest.fixture
def serve_fake(fake: FakeRecommender, images: Path) -> Iterator[Callable[..., httpx.Client]]:
    """Return a function that serves the fake on a free port, and returns a client."""
    with contextlib.ExitStack() as stack:

        def serve(limits: Limits = LIMITS, longest_queue: int = 8) -> httpx.Client:
            service = Service(
                lambda: fake, images, longest_queue=longest_queue, on_failure=lambda: None
            )
            config = uvicorn.Config(create_app(service, limits), port=0, log_config=None)
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, daemon=True)
            thread.start()
            wait_for(lambda: server.started and service.batcher.is_ready)
            port = server.servers[0].sockets[0].getsockname()[1]

            def stop() -> None:
                fake.gate.set()
                server.should_exit = True
                thread.join(10)

            stack.callback(stop)
            return stack.enter_context(
                httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False)
            )

        yield serve


@pytest.fixture
def client(serve_fake: Callable[..., httpx.Client]) -> httpx.Client:
    return serve_fake()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as opened:
        yield opened

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
SECONDS_TO_LOAD = 300  # a model, on a busy machine


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


@contextlib.contextmanager
def serving(service: Service, limits: Limits = LIMITS) -> Iterator[str]:
    """Serve on a free port until the block ends; yield the URL once the recommender is loaded."""
    config = uvicorn.Config(create_app(service, limits), port=0, log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()

    def is_ready() -> bool:
        assert service.batcher.failure is None
        return server.started and service.batcher.is_ready

    try:
        wait_for(is_ready, SECONDS_TO_LOAD)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def serve_fake(fake: FakeRecommender, images: Path) -> Iterator[Callable[..., httpx.Client]]:
    """Return a function that serves the fake on a free port, and returns a client."""
    with contextlib.ExitStack() as stack:

        def serve(limits: Limits = LIMITS, longest_queue: int = 8) -> httpx.Client:
            service = Service(
                lambda: fake, images, longest_queue=longest_queue, on_failure=lambda: None
            )
            url = stack.enter_context(serving(service, limits))
            stack.callback(fake.gate.set)
            return stack.enter_context(httpx.Client(base_url=url, timeout=20, trust_env=False))

        yield serve


@pytest.fixture(scope="session")
def url_of_run(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the small run, with its own model, on a free port."""
    from small_run import work_in

    from mllm_msr import Recommender

    data = run_folder / "data"
    service = Service(
        lambda: Recommender.load(data, candidates=20),
        data / "fetch_images/images.parquet",
        longest_queue=64,
        on_failure=lambda: None,
    )
    with contextlib.ExitStack() as serve_run:
        with work_in(run_folder, tmp_path_factory.mktemp("store") / "responses.sqlite"):
            url = serve_run.enter_context(serving(service, Limits(seconds=60)))
        yield url


@pytest.fixture
def client(serve_fake: Callable[..., httpx.Client]) -> httpx.Client:
    return serve_fake()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as opened:
        yield opened

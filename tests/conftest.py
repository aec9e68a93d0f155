"""Fixtures that several test files share."""

import atexit
import functools
import http.server
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from families import Family
    from playwright import sync_api
    from small_world import SmallWorld

    from mllm_msr.engines.encoding import Encoder
    from mllm_msr.engines.local import LocalModel
    from mllm_msr.images.gallery import Gallery
    from mllm_msr.recommendation.recommender import Recommender

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A busy machine or many rejected random inputs must not fail a test.
settings.register_profile(
    "tests",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    """Let a worker of xdist end without finalizing the interpreter, as :func:`pytest_unconfigure`.

    DuckDB's module prints what it calls leaks when a process is finalized.
    """
    if hasattr(config, "workerinput"):
        atexit.register(os._exit, 0)  # it runs last, as what was registered first does


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Store the exit status for :func:`pytest_unconfigure`."""
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End the process without finalizing the interpreter, as stages do (core/command.py)."""
    if "MUTANT_UNDER_TEST" in os.environ:  # mutmut runs pytest several times in a process
        return
    if EXIT_STATUS in config.stash and not hasattr(config, "workerinput"):  # no xdist worker
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[EXIT_STATUS])


EXIT_STATUS = pytest.StashKey[int]()


@pytest.fixture(autouse=True)
def raise_instead_of_exiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stage that runs in this process raise SystemExit instead of ending the process."""

    def raise_exit(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("mllm_msr.core.command._exit", raise_exit)
    monkeypatch.setattr("stages.sft.launch_processes", lambda _: None)


# The names of families.FAMILIES, repeated so that tests without a model do not import torch.
FAMILY_NAMES = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "smolvlm", "llama3"]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Callable[[str], Family]]":
    """Return a function that builds a model family by name, once per session."""
    import torch
    from families import Family, build_family
    from transformers.utils import logging

    logging.disable_progress_bar()
    # With models this small, threads cost more in synchronization than they gain.
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setattr("mllm_msr.engines.local.find_device", lambda: torch.device("cpu"))
    folder = tmp_path_factory.mktemp("families")
    built: dict[str, Family] = {}

    def build_once(name: str) -> Family:
        if name not in built:
            built[name] = build_family(name, folder / name)
        return built[name]

    yield build_once
    patch.undo()


@pytest.fixture(scope="session", params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest, build: "Callable[[str], Family]") -> "Family":
    """Return each model family in turn."""
    return build(request.param)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> "SmallWorld":
    """Write the tables of a few items and sequences; read only."""
    from small_world import write_small_world

    return write_small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def gallery(world: "SmallWorld") -> "Iterator[Gallery]":
    """Open the small world's images."""
    from mllm_msr.images.gallery import Gallery

    with Gallery(world.images) as opened:
        yield opened


@pytest.fixture(scope="session")
def encoder(family: "Family", gallery: "Gallery") -> "Encoder":
    """Return each family's encoder, with the small world's images."""
    from mllm_msr.engines.encoding import Encoder

    return Encoder(str(family.folder), None, gallery)


@pytest.fixture(scope="session")
def model(encoder: "Encoder") -> "LocalModel":
    """Return each family's model, loaded once."""
    from mllm_msr.engines.local import LocalModel

    return LocalModel(encoder)


@pytest.fixture(scope="session")
def llava(build: "Callable[[str], Family]", gallery: "Gallery") -> "LocalModel":
    """Return one model with images, for what does not differ between families."""
    from mllm_msr.engines.encoding import Encoder
    from mllm_msr.engines.local import LocalModel

    return LocalModel(Encoder(str(build("llava").folder), None, gallery))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a finished run of a small pocket world; read only."""
    from small_run import make_run

    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    return folder


@pytest.fixture
def in_run_folder(run_folder: Path) -> Iterator[Path]:
    """Work in the run's folder."""
    from small_run import work_in

    with work_in(run_folder):
        yield run_folder


@pytest.fixture(scope="session")
def recommender(
    run_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> "Iterator[Recommender]":
    """Load the run once."""
    from small_run import work_in

    from mllm_msr import Recommender

    with work_in(run_folder, tmp_path_factory.mktemp("store") / "responses.sqlite"):
        loaded = Recommender.load(
            run_folder / "data",
            params=run_folder / "params.yaml",
            prompts=run_folder / "prompts.yaml",
            candidates=20,
        )
    with loaded:
        yield loaded


@pytest.fixture
def serve() -> "Iterator[Callable[[Path], str]]":
    """Return a function that serves a folder by HTTP on loopback and returns its URL."""
    with ExitStack() as servers:

        def serve_folder(folder: Path) -> str:
            handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            servers.enter_context(server)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            servers.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield serve_folder


@pytest.fixture
def responses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the response store and the checkpoints of a test into a folder of its own."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "kept"))
    monkeypatch.delenv("MLLM_MSR_RESPONSES", raising=False)
    return tmp_path / "kept" / ".mllm_msr" / "responses.sqlite"


@pytest.fixture(scope="module")
def browser() -> "Iterator[sync_api.Browser]":
    """Return the machine's Chromium with an empty profile; skip where there is none."""
    from browser import start_browser

    with start_browser() as opened:
        yield opened

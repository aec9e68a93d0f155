"""The server's address, key and end."""

import os
import signal
import socket
import threading
from pathlib import Path

import httpx
import pytest
from fake_recommender import FakeRecommender, wait_for

from mllm_msr.core.errors import DataError, ParamsError
from mllm_msr.serving import server
from mllm_msr.serving.server import Run, listen, read_api_key, serve

RUN = Run(Path("none"), Path("params.yaml"), Path("prompts.yaml"), "popularity", 5)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLLM_MSR_API_KEY", raising=False)
    monkeypatch.setattr(server, "log_as_json", lambda: None)  # it would replace pytest's handlers


def test_a_port_in_use_is_refused() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(ParamsError, match="already in use"):
        listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("host", ["no such host", "203.0.113.1"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(ParamsError, match="an address and a port that are free"):
        listen(host, 0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_an_address_that_others_reach_requires_a_key(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ParamsError, match="MLLM_MSR_API_KEY: expected an API key"):
        read_api_key(host)
    monkeypatch.setenv("MLLM_MSR_API_KEY", "short")
    with pytest.raises(ParamsError, match="at least 16 characters; got 5"):
        read_api_key(host)
    monkeypatch.setenv("MLLM_MSR_API_KEY", "x" * 16)
    assert read_api_key(host) == "x" * 16


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.2"])
def test_loopback_requires_none(host: str) -> None:
    assert read_api_key(host) is None


def test_a_run_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    missing = Run(tmp_path, Path("params.yaml"), Path("prompts.yaml"), "popularity", 5)
    with pytest.raises(DataError, match=r"items\.parquet"):
        serve(missing, "127.0.0.1", 0, seconds=5, longest_queue=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_once_it_has_answered(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, answers = FakeRecommender(), list[int]()
    monkeypatch.setattr(Run, "load", lambda _: fake)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        try:
            return httpx.get(f"{url}/health/ready", trust_env=False).status_code == 200
        except httpx.ConnectError:
            return False

    def ask_and_stop() -> None:
        wait_for(is_ready)
        fake.gate.clear()
        asked = threading.Thread(target=ask)
        asked.start()
        wait_for(lambda: fake.batches)
        os.kill(os.getpid(), number)
        threading.Timer(0.3, fake.gate.set).start()
        asked.join(10)

    def ask() -> None:
        answer = httpx.get(f"{url}/recommend?user=u1", timeout=20, trust_env=False)
        answers.append(answer.status_code)

    asking = threading.Thread(target=ask_and_stop)
    asking.start()
    serve(RUN, "127.0.0.1", port, seconds=20, longest_queue=1)
    asking.join(10)
    assert answers == [200]
    assert fake.closed
    assert f"{url}/ (loading the model)" in capsys.readouterr().out

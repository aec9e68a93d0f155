"""A server's replies become responses, whatever happens in between; nothing is asked in vain."""

import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from faulty_server import FaultyServer
from tqdm import tqdm

from mllm_msr.core.errors import ModelError, ParamsError
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import ResponseStore
from mllm_msr.method.inference import CachedEngine, greedy_engine
from mllm_msr.method.inference.server import ServerModel

PROMPTS = [Prompt(f"Describe item {number}") for number in range(12)]


@pytest.fixture
def encoder(build: Any) -> Encoder:
    return Encoder(str(build("llama3").folder), None, None)


@pytest.fixture
def server(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    faulty = FaultyServer(
        lambda text: encoder.count_tokens(Prompt(text)),
        lambda text: {"message": {"content": f" It is {text}. "}},
    )
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)
    monkeypatch.setattr("mllm_msr.method.inference.server.PAUSE", 0.02)
    with faulty.running() as address:
        monkeypatch.setenv("MLLM_MSR_SERVER", address)
        yield faulty


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ResponseStore]:
    with ResponseStore(tmp_path / "responses.sqlite") as opened:
        yield opened


def open_engine(encoder: Encoder, store: ResponseStore) -> CachedEngine:
    return greedy_engine(ServerModel(encoder, "infer_preferences"), store, max_new_tokens=8)


def respond(engine: CachedEngine, prompts: list[Prompt]) -> list[str]:
    with tqdm(disable=True) as progress:
        return engine.respond(prompts, progress)


def expected(prompts: list[Prompt]) -> list[str]:
    return [f"It is {prompt.before}." for prompt in prompts]


def test_faults_that_pass_lose_nothing_and_ask_nothing_twice(
    server: FaultyServer,
    encoder: Encoder,
    store: ResponseStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mllm_msr.method.inference.server.SECONDS_PER_REQUEST", 0.5)
    faults: list[list[int | str]] = [
        *[[429], [500], [503, 429], ["drop"], ["truncate"], ["malformed"], ["slow"]],
        ["drop", 500, "malformed", 429, "truncate"],
    ]
    server.faults = {prompt.before: each for prompt, each in zip(PROMPTS, faults, strict=False)}
    failures = {prompt.before: len(each) for prompt, each in zip(PROMPTS, faults, strict=False)}
    engine = open_engine(encoder, store)
    assert respond(engine, PROMPTS) == expected(PROMPTS)
    for prompt in PROMPTS:
        assert server.requests[prompt.before] == 1 + failures.get(prompt.before, 0)
        assert server.answered[prompt.before] == 1
    assert respond(engine, PROMPTS) == expected(PROMPTS)  # all stored
    assert sum(server.answered.values()) == len(PROMPTS) + 1  # and the probe
    assert engine.computed == len(PROMPTS)


def test_a_server_that_dies_and_comes_back_is_waited_for(
    server: FaultyServer, encoder: Encoder, store: ResponseStore
) -> None:
    engine = open_engine(encoder, store)
    assert engine.key(PROMPTS[0])  # the probe
    with ExitStack() as later:
        stopped = threading.Event()

        def restart() -> None:
            stopped.wait()
            time.sleep(0.3)
            later.enter_context(server.running())

        thread = threading.Thread(target=restart)
        thread.start()
        server.stop()
        stopped.set()
        assert respond(engine, PROMPTS) == expected(PROMPTS)
        thread.join()


def test_a_server_that_stays_away_is_an_error(
    server: FaultyServer, encoder: Encoder, store: ResponseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mllm_msr.method.inference.server.PATIENCE", 0.1)
    server.stop()
    with pytest.raises(ModelError, match="expected a server that replies; got Connection error"):
        respond(open_engine(encoder, store), PROMPTS)


def test_a_prompt_at_which_the_server_always_fails_is_an_error(
    server: FaultyServer, encoder: Encoder, store: ResponseStore
) -> None:
    server.faults[PROMPTS[0].before] = [500] * 100
    with pytest.raises(ModelError, match="got status 500"):
        respond(open_engine(encoder, store), PROMPTS)
    server.faults[PROMPTS[0].before] = ["malformed"] * 100
    with pytest.raises(ModelError, match="expected a reply in JSON"):
        respond(open_engine(encoder, store), PROMPTS)
    assert server.requests[PROMPTS[0].before] < 20


def test_replies_of_another_form_are_an_error(
    server: FaultyServer, encoder: Encoder, store: ResponseStore
) -> None:
    engine = open_engine(encoder, store)
    assert engine.key(PROMPTS[0])  # the probe
    server.reply = lambda _: {"text": "as of another API"}
    with pytest.raises(ModelError, match="a reply in the form of OpenAI's; got another one"):
        respond(engine, PROMPTS)
    assert len(store) == 0


def test_a_server_is_told_not_to_think_where_the_model_can(
    build: Any, server: FaultyServer, encoder: Encoder, store: ResponseStore, tmp_path: Path
) -> None:
    folder = shutil.copytree(build("llama3").folder, tmp_path / "model")
    for path in folder.glob("*.jinja"):
        path.write_text("{{ '' if enable_thinking is defined else 'Think.' }}" + path.read_text())
    keys = set()
    for model in (encoder, Encoder(str(folder), None, None)):
        engine = open_engine(model, store)
        keys.add(engine.key(PROMPTS[0]))
        assert respond(engine, PROMPTS[:1]) == expected(PROMPTS[:1])
    assert server.variables == [{}, {}, {"enable_thinking": False}, {"enable_thinking": False}]
    assert len(keys) == 2


def test_requests_under_way_are_bounded(
    server: FaultyServer,
    encoder: Encoder,
    store: ResponseStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLLM_MSR_SERVER_REQUESTS", "3")
    prompts = [Prompt(f"Describe item {number}") for number in range(40)]
    assert respond(open_engine(encoder, store), prompts) == expected(prompts)
    assert 1 <= server.most <= 3


def test_after_an_error_the_responses_so_far_are_kept(
    server: FaultyServer, encoder: Encoder, store: ResponseStore
) -> None:
    server.faults[PROMPTS[5].before] = [400]
    with pytest.raises(ModelError, match="status 400"):
        respond(open_engine(encoder, store), PROMPTS)
    kept = len(store)
    assert kept == sum(server.answered.values()) - 1  # all but the probe
    assert respond(open_engine(encoder, store), PROMPTS) == expected(PROMPTS)
    assert all(server.answered[prompt.before] == 1 for prompt in PROMPTS)


def test_after_an_error_no_further_prompt_is_asked(
    server: FaultyServer,
    encoder: Encoder,
    store: ResponseStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLLM_MSR_SERVER_REQUESTS", "2")
    server.faults[PROMPTS[0].before] = [400]
    prompts = [*PROMPTS, *(Prompt(f"Describe item {number}") for number in range(12, 200))]
    with pytest.raises(ModelError, match="status 400"):
        respond(open_engine(encoder, store), prompts)
    assert len(store) == sum(server.answered.values()) - 1 < len(prompts) - 1


def test_after_ctrl_c_the_responses_under_way_are_kept(
    server: FaultyServer,
    encoder: Encoder,
    store: ResponseStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt_after_one(futures: list[Future[Any]]) -> Iterator[Future[Any]]:
        yield next(iter(as_completed(futures)))
        raise KeyboardInterrupt

    monkeypatch.setenv("MLLM_MSR_SERVER_REQUESTS", "3")
    monkeypatch.setattr("mllm_msr.method.inference.server.as_completed", interrupt_after_one)
    with pytest.raises(KeyboardInterrupt):
        respond(open_engine(encoder, store), PROMPTS)
    assert 1 < len(store) < len(PROMPTS)
    assert len(store) == sum(server.answered.values()) - 1  # all but the probe


def test_after_ctrl_c_no_request_is_repeated(
    server: FaultyServer,
    encoder: Encoder,
    store: ResponseStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(_: list[Future[Any]]) -> Iterator[Future[Any]]:
        raise KeyboardInterrupt
        yield

    engine = open_engine(encoder, store)
    assert engine.model.identity
    monkeypatch.setattr("mllm_msr.method.inference.server.as_completed", interrupt)
    monkeypatch.setattr("mllm_msr.method.inference.server.PAUSE", 600)
    server.faults = {prompt.before: [429] * 50 for prompt in PROMPTS}
    with pytest.raises(KeyboardInterrupt):
        respond(engine, PROMPTS)


def test_half_a_character_in_a_reply_is_replaced(
    server: FaultyServer, encoder: Encoder, store: ResponseStore
) -> None:
    server.reply = lambda _: {"message": {"content": "\ud800 red"}}
    assert respond(open_engine(encoder, store), PROMPTS[:1]) == ["? red"]


def test_a_changed_model_is_noticed(
    server: FaultyServer, encoder: Encoder, store: ResponseStore
) -> None:
    server.faults[PROMPTS[3].before] = ["change_model"]
    with pytest.raises(ModelError, match="expected one model during the run, served; got a reply"):
        respond(open_engine(encoder, store), PROMPTS)
    keys = {open_engine(encoder, store).key(PROMPTS[0])}
    server.model = "served"
    keys.add(open_engine(encoder, store).key(PROMPTS[0]))
    assert len(keys) == 2  # responses of another model are other responses


def test_the_key_is_sent_and_in_no_message(
    server: FaultyServer,
    encoder: Encoder,
    store: ResponseStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    server.key = "secret-1"
    monkeypatch.setenv("MLLM_MSR_SERVER_KEY", "secret-2")
    with pytest.raises(ModelError, match="set MLLM_MSR_SERVER_KEY") as refused:
        respond(open_engine(encoder, store), PROMPTS)
    assert "status 401" in str(refused.value)
    assert "secret" not in str(refused.value)
    monkeypatch.setenv("MLLM_MSR_SERVER_KEY", "secret-1")
    assert respond(open_engine(encoder, store), PROMPTS) == expected(PROMPTS)
    assert "secret" not in caplog.text


def test_another_chat_template_is_an_error(
    server: FaultyServer, encoder: Encoder, store: ResponseStore
) -> None:
    server.count_tokens = len
    with pytest.raises(ModelError, match="got 4 tokens for the same prompt"):
        respond(open_engine(encoder, store), PROMPTS)


def test_a_model_is_found_among_those_that_are_served(
    server: FaultyServer, encoder: Encoder, store: ResponseStore
) -> None:
    server.models = [{"id": "only", "root": "/models/1"}]
    first = open_engine(encoder, store).key(PROMPTS[0])
    server.models = [{"id": "only", "root": "/models/2"}]
    assert open_engine(encoder, store).key(PROMPTS[0]) != first
    server.models = [{"id": "x"}, {"id": encoder.name}]
    assert respond(open_engine(encoder, store), PROMPTS) == expected(PROMPTS)
    server.models = [{"id": "x"}, {"id": "y"}]
    with pytest.raises(ModelError, match="got a server of x, y"):
        respond(open_engine(encoder, store), PROMPTS)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MLLM_MSR_SERVER", "", "expected the address of a server"),
        ("MLLM_MSR_SERVER", "localhost:8000", "got localhost:8000"),
        ("MLLM_MSR_SERVER_REQUESTS", "0", "expected a number from 1"),
        ("MLLM_MSR_SERVER_REQUESTS", "many", "got 'many'"),
        ("MLLM_MSR_SERVER_LOGPROBS", "-1", "got '-1'"),
    ],
)
def test_the_environment_is_checked(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv("MLLM_MSR_SERVER", "http://127.0.0.1:1/v1")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ParamsError, match=message):
        ServerModel(encoder, "recommender")


def test_the_package_is_an_extra(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLM_MSR_SERVER", "http://127.0.0.1:1/v1")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ModelError, match=r"pip install -c constraints.txt -e '\.\[server\]'"):
        ServerModel(encoder, "recommender")


def list_logprobs(**found: float) -> dict[str, Any]:
    top = [{"token": token, "logprob": value} for token, value in found.items()]
    content = {"token": top[0]["token"], "logprob": top[0]["logprob"], "top_logprobs": top}
    return {"message": {"content": "x"}, "logprobs": {"content": [content]}}


def test_log_odds_are_read_from_log_probabilities(server: FaultyServer, encoder: Encoder) -> None:
    ids = tuple(encoder.answer_token_id(Prompt("word"), answer) for answer in ("yes", "no"))
    model = ServerModel(encoder, "recommender")
    server.reply = lambda _: list_logprobs(no=-0.25, yes=-1.5, x=-3.0)
    ((scored, _),) = model.score(PROMPTS[:1], (ids[0], ids[1]))
    assert float(scored[0].text) == -1.25
    server.reply = lambda _: list_logprobs(yes=-0.1, x=-3.0)
    with pytest.raises(ModelError, match=r"log-probabilities of 'yes' and 'no'; got 2 others"):
        list(model.score(PROMPTS[:1], (ids[0], ids[1])))
    server.reply = lambda _: {"message": {"content": "yes"}}
    with pytest.raises(ModelError, match="got none; raise MLLM_MSR_SERVER_LOGPROBS"):
        list(model.score(PROMPTS[:1], (ids[0], ids[1])))

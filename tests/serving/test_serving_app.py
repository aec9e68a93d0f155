"""The endpoints: what they answer, what they refuse, and that the service goes on."""

import asyncio
import contextlib
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import httpx
import pytest
from fake_recommender import HOSTILE, TITLES, FakeRecommender, wait_for
from PIL import Image

from mllm_msr.core.errors import DataError, ModelError
from mllm_msr.recommendation.recommender import Query
from mllm_msr.serving.app import Service, create_app
from mllm_msr.serving.guards import LARGEST_BODY, Limits


def refusal(answer: httpx.Response, status: int) -> str:
    """Return the error of an answer, which is one line of JSON."""
    assert answer.status_code == status, answer.text
    assert answer.text.count("\n") == 0
    assert set(answer.json()) == {"error"}
    return str(answer.json()["error"])


def test_a_user_gets_recommendations(client: httpx.Client, fake: FakeRecommender) -> None:
    answer = client.get("/recommend", params={"user": "u1", "k": 2}).json()
    assert fake.batches[-1] == [Query(user="u1", k=2)]
    assert answer["history"][0] == {"item": "i1", "title": "Lamp 1", "image": True}
    assert [each["item"] for each in answer["items"]] == ["i3", "i4"]
    assert answer["items"][0]["p_yes"] == 0.5
    assert answer["preferences"][-1] == "likes lamps"


def test_seen_items_are_kept_on_request(client: httpx.Client, fake: FakeRecommender) -> None:
    client.get("/recommend", params={"user": "u1", "remove_seen": "false"})
    assert fake.batches[-1] == [Query(user="u1", keep_seen=True)]


def test_a_history_gets_recommendations(client: httpx.Client, fake: FakeRecommender) -> None:
    body = {"history": ["i1", "a/b"], "k": 3}
    assert len(client.post("/recommend", json=body).json()["items"]) == 3
    client.post("/recommend", json={"history": ["i1"], "candidates": ["i5", "i4"]})
    assert fake.batches[-1] == [Query(history=["i1"], candidates=["i5", "i4"], k=2)]


def test_an_empty_history_is_a_history(client: httpx.Client, fake: FakeRecommender) -> None:
    assert client.post("/recommend", json={"history": []}).status_code == 200
    assert fake.batches[-1] == [Query(history=[])]


def test_documents_are_reranked_as_other_rerankers_do(
    client: httpx.Client, fake: FakeRecommender
) -> None:
    body = {
        "model": "any",
        "query": "likes lamps",
        "documents": ["i5", {"text": "Lamp 2"}, "a/b", "i5"],
    }
    results = client.post("/rerank", json=body).json()["results"]
    assert [each["index"] for each in results] == [1, 0, 3, 2]
    assert results[0]["relevance_score"] == 0.5
    assert results[1]["relevance_score"] == results[2]["relevance_score"]
    assert fake.batches[-1][0].preference == "likes lamps"
    shorter = client.post("/rerank", json=body | {"query": ["i1"], "top_n": 1}).json()["results"]
    assert shorter == results[:1]
    assert fake.batches[-1][0].history == ["i1"]


def test_a_preference_is_inferred(client: httpx.Client, fake: FakeRecommender) -> None:
    answer = client.post("/preference", json={"history": ["i1"]}).json()
    assert answer == {"preferences": [f"likes {HOSTILE}", "likes lamps"]}
    assert fake.batches[-1] == [Query(history=["i1"], candidates=())]


def test_items_have_titles_and_images(client: httpx.Client) -> None:
    assert client.get("/items/i1").json() == {
        "item": "i1",
        "title": "Lamp 1",
        "summary": "A lamp.",
        "interactions": 100,
        "image": True,
    }
    image = client.get("/items/i1/image")
    assert image.headers["content-type"] == "image/png"
    assert Image.open(BytesIO(image.content)).size == (8, 6)
    assert "an item with an image" in refusal(client.get("/items/i2/image"), 404)


def test_items_and_users_are_listed(client: httpx.Client) -> None:
    found = client.get("/items", params={"search": "lamp 2", "limit": 3}).json()["items"]
    assert [each["item"] for each in found] == ["i2", "i12", "i20"]
    assert client.get("/users", params={"prefix": "u"}).json() == {"users": ["u1", "u2"]}


def test_a_user_error_is_one_line_of_json(client: httpx.Client) -> None:
    assert "closest one is 'u1'" in refusal(client.get("/recommend", params={"user": "u9"}), 404)
    for path, body in {
        "/recommend": {"history": ["i99"]},
        "/preference": {"history": ["i99"]},
        "/rerank": {"query": "lamps", "documents": ["i99"]},
    }.items():
        assert "the closest id is 'i9'" in refusal(client.post(path, json=body), 404)
    assert "the closest id is" in refusal(client.get("/items/i99"), 404)
    assert "a user or a history" in refusal(client.post("/recommend", json={}), 400)
    same = {"query": "lamps", "documents": ["Same"]}
    assert "a title of 2 items, as 'i7', 'i8'" in refusal(client.post("/rerank", json=same), 404)


@pytest.mark.parametrize("k", [0, -1, 501, "many", ""])
def test_a_k_that_cannot_be_is_refused(client: httpx.Client, k: object) -> None:
    assert "query.k: " in refusal(client.get("/recommend", params={"user": "u1", "k": k}), 422)


def test_a_k_beyond_the_catalogue_is_refused(client: httpx.Client) -> None:
    assert "k: expected" in refusal(client.get("/recommend", params={"user": "u1", "k": 400}), 400)


@pytest.mark.parametrize(
    "body",
    [
        {"history": ["i1"] * 1001},
        {"history": ["x" * 257]},
        {"history": "i1"},
        {"history": [1]},
        {"histroy": ["i1"]},
        {"history": ["i1"], "candidates": []},
    ],
)
def test_a_body_out_of_its_limits_is_refused(client: httpx.Client, body: object) -> None:
    assert "body." in refusal(client.post("/recommend", json=body), 422)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_body_that_is_no_json_is_refused(client: httpx.Client, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post("/recommend", content=body, headers=headers)
    assert answer.status_code in {400, 422}
    refusal(answer, answer.status_code)
    assert client.get("/recommend", params={"user": "u1"}).status_code == 200


def test_a_body_of_100_megabytes_is_refused(client: httpx.Client, fake: FakeRecommender) -> None:
    whole = client.post("/recommend", content=b" " * 100_000_000)
    assert f"at most {LARGEST_BODY:,} bytes" in refusal(whole, 413)
    parts = client.post("/recommend", content=(b" " * 1_000_000 for _ in range(100)))
    refusal(parts, 413)
    assert not fake.batches
    assert client.get("/recommend", params={"user": "u1"}).status_code == 200


@pytest.mark.parametrize("item", [HOSTILE, "a\nb\x00\x1b[31m", "\u202e", "é" * 200, "../../etc"])
def test_ids_with_markup_or_control_characters_are_text(client: httpx.Client, item: str) -> None:
    answer = client.post("/recommend", json={"history": [item]})
    assert repr(item)[1:4] in refusal(answer, 404)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    refusal(client.get("/recommend", params={"user": item}), 404)


def test_a_long_id_of_a_path_is_refused(client: httpx.Client) -> None:
    assert "at most 256 characters" in refusal(client.get(f"/items/{'x' * 300}"), 422)


def test_a_client_that_hangs_up_leaves_the_queue(
    client: httpx.Client, fake: FakeRecommender, pool: ThreadPoolExecutor
) -> None:
    fake.gate.clear()
    first = pool.submit(client.get, "/recommend", params={"user": "u1"})
    wait_for(lambda: fake.batches)
    address = (client.base_url.host, client.base_url.port)
    with contextlib.closing(socket.create_connection(address)) as gone:
        gone.sendall(b"GET /recommend?user=u2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_for(lambda: "queue_length 1.0" in client.get("/metrics").text)
    wait_for(lambda: 'status="499"' in client.get("/metrics").text)
    fake.gate.set()
    assert first.result().status_code == 200
    assert client.get("/recommend", params={"user": "v1"}).status_code == 200
    assert "u2" not in {query.user for batch in fake.batches for query in batch}


def test_a_client_that_hangs_up_while_it_is_answered_harms_nobody(
    client: httpx.Client, fake: FakeRecommender, pool: ThreadPoolExecutor
) -> None:
    fake.gate.clear()
    address = (client.base_url.host, client.base_url.port)
    with contextlib.closing(socket.create_connection(address)) as gone:
        gone.sendall(b"GET /recommend?user=u2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_for(lambda: fake.batches)
        waiting = pool.submit(client.get, "/recommend", params={"user": "u1"})
        wait_for(lambda: "queue_length 1.0" in client.get("/metrics").text)
    wait_for(lambda: 'status="499"' in client.get("/metrics").text)
    fake.gate.set()
    assert waiting.result().json()["user"] == "u1"
    assert [[query.user for query in batch] for batch in fake.batches] == [["u2"], ["u1"]]


def test_a_client_that_hangs_up_within_its_body_harms_nobody(
    client: httpx.Client, fake: FakeRecommender
) -> None:
    address = (client.base_url.host, client.base_url.port)
    with contextlib.closing(socket.create_connection(address)) as gone:
        gone.sendall(b"POST /recommend HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{")
    wait_for(lambda: 'status="499"' in client.get("/metrics").text)
    assert not fake.batches
    assert client.get("/recommend", params={"user": "u1"}).status_code == 200


def test_requests_that_wait_together_are_answered_together(
    client: httpx.Client, fake: FakeRecommender, pool: ThreadPoolExecutor
) -> None:
    fake.gate.clear()
    first = pool.submit(client.get, "/recommend", params={"user": "u1"})
    wait_for(lambda: fake.batches)
    rest = [pool.submit(client.get, "/recommend", params={"user": "u2"}) for _ in range(4)]
    wait_for(lambda: "queue_length 4.0" in client.get("/metrics").text)
    fake.gate.set()
    assert [each.result().status_code for each in (first, *rest)] == [200] * 5
    assert [len(batch) for batch in fake.batches] == [1, 4]


def test_a_full_queue_is_said(serve_fake, fake: FakeRecommender, pool: ThreadPoolExecutor) -> None:
    client = serve_fake(longest_queue=1)
    fake.gate.clear()
    waiting = [pool.submit(client.get, "/recommend", params={"user": "u1"})]
    wait_for(lambda: fake.batches)
    waiting.append(pool.submit(client.get, "/recommend", params={"user": "u2"}))
    wait_for(lambda: "queue_length 1.0" in client.get("/metrics").text)
    answer = client.get("/recommend", params={"user": "u1"})
    assert "too many requests wait" in refusal(answer, 429)
    assert answer.headers["retry-after"] == "1"
    assert client.get("/items/i1").status_code == 200  # needs no model
    fake.gate.set()
    assert [each.result().status_code for each in waiting] == [200, 200]


def test_an_answer_that_takes_too_long_is_refused(serve_fake, fake: FakeRecommender) -> None:
    client = serve_fake(Limits(seconds=0.3))
    fake.gate.clear()
    answer = client.get("/recommend", params={"user": "u1"})
    assert "no answer within 0.3 seconds" in refusal(answer, 504)
    fake.gate.set()
    assert client.get("/recommend", params={"user": "u1"}).status_code == 200


def test_an_error_of_one_request_spares_the_others(
    client: httpx.Client, fake: FakeRecommender, pool: ThreadPoolExecutor
) -> None:
    fake.failing["u2"] = ModelError(expected="finite scores", got="nan", where="w", fix="f")
    fake.gate.clear()
    first = pool.submit(client.get, "/recommend", params={"user": "u1"})
    wait_for(lambda: fake.batches)
    rest = [pool.submit(client.get, "/recommend", params={"user": u}) for u in ("u1", "u2")]
    wait_for(lambda: "queue_length 2.0" in client.get("/metrics").text)
    fake.gate.set()
    assert first.result().status_code == rest[0].result().status_code == 200
    assert refusal(rest[1].result(), 500) == "the service failed; its log says where"


def test_an_unexpected_error_is_said_without_its_message(
    client: httpx.Client, fake: FakeRecommender
) -> None:
    fake.failing["u2"] = RuntimeError("secret u2")
    answer = client.get("/recommend", params={"user": "u2"})
    assert refusal(answer, 500) == "the service failed; its log says where"
    assert client.get("/recommend", params={"user": "u1"}).status_code == 200


def test_a_failure_of_the_service_is_logged_and_shows_no_path(
    client: httpx.Client, fake: FakeRecommender, caplog: pytest.LogCaptureFixture
) -> None:
    fake.failing["u2"] = DataError(
        expected="room on the disk", got="none", where="/srv/responses.sqlite", fix="free some"
    )
    answer = client.get("/recommend", params={"user": "u2"})
    assert refusal(answer, 500) == "the service failed; its log says where"
    assert "/srv/responses.sqlite: expected room on the disk" in caplog.text


def test_an_id_with_a_slash_is_shown(client: httpx.Client) -> None:
    assert client.get("/items/a%2Fb").json()["item"] == "a/b"
    assert client.get("/items/a%2Fb/image").status_code in {200, 404}


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/no", 404), ("PUT", "/items", 405)]
)
def test_what_is_not_served_is_json_too(client, method: str, path: str, status: int) -> None:
    refusal(client.request(method, path), status)


def test_a_refused_method_names_those_of_all_endpoints_of_the_path(client: httpx.Client) -> None:
    assert client.put("/recommend").headers["allow"] == "GET, POST"
    assert client.post("/items/i1").headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("path", "body"),
    [("/preference", {"history": []}), ("/rerank", {"query": [], "documents": ["i1"]})],
)
def test_a_history_to_infer_from_has_an_item(client: httpx.Client, path: str, body: dict) -> None:
    assert "at least 1" in refusal(client.post(path, json=body), 422)


def test_health_says_when_the_model_is_loaded(client: httpx.Client) -> None:
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json() == {"status": "ready"}


async def ask_unready(images, path: str) -> httpx.Response:
    service = Service(FakeRecommender, images, longest_queue=1, on_failure=lambda: None)
    transport = httpx.ASGITransport(create_app(service, Limits(seconds=5)))  # starts no batcher
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.get(path)


@pytest.mark.parametrize("path", ["/health/ready", "/recommend?user=u1", "/items/i1"])
def test_before_the_model_is_loaded_requests_are_refused(images, path: str) -> None:
    assert "not loaded" in refusal(asyncio.run(ask_unready(images, path)), 503)
    assert asyncio.run(ask_unready(images, "/health/live")).status_code == 200


def test_the_openapi_description_has_every_endpoint(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        *("/recommend", "/rerank", "/preference", "/items", "/items/{item}"),
        *("/items/{item}/image", "/users", "/health/live", "/health/ready", "/metrics"),
    }
    assert "http" not in json.dumps(paths).replace("httpx", "")
    assert TITLES["i9"] not in client.get("/").text

"""Who may ask: the key, the host names of this machine, and the headers of every answer."""

import httpx
import pytest

from mllm_msr.serving.guards import Limits

KEY = "a key of enough letters"
OPEN = ("/", "/docs", "/openapi.json", "/health/live", "/health/ready", "/page/page.js")
GUARDED = ("/recommend?user=u1", "/items", "/items/i1/image", "/users", "/metrics", "/no")


def test_without_the_key_nothing_of_the_run_is_told(serve_fake) -> None:
    client = serve_fake(Limits(seconds=5, api_key=KEY))
    for sent in (None, "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer é"):
        headers = {} if sent is None else {"Authorization": sent.encode()}
        for path in GUARDED:
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert KEY not in answer.text
    assert client.post("/recommend", json={"user": "u1"}).status_code == 401
    assert [client.get(path).status_code for path in OPEN] == [200] * len(OPEN)
    headers = {"Authorization": f"Bearer {KEY}"}
    answers = [client.get(path, headers=headers).status_code for path in GUARDED]
    assert answers == [200] * (len(GUARDED) - 1) + [404]


@pytest.mark.parametrize("path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd"])
def test_the_page_folder_is_the_only_one(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 404


def test_a_request_for_another_host_is_refused(serve_fake) -> None:
    client = serve_fake(Limits(seconds=5, host_names=frozenset({"localhost", "127.0.0.1"})))
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert client.get("/users", headers={"Host": host}).status_code == 421
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1"):
        assert client.get("/users", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/users", "/no", "/page/page.js", "/recommend?k=0"])
def test_every_answer_has_the_headers(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'")
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers or headers["server"] == "uvicorn"  # the command leaves it out

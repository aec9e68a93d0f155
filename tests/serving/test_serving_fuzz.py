"""Requests that Schemathesis makes from the service's own OpenAPI description, on a real run.

Right and wrong values, at their limits and beyond, other methods, and chains of requests. Every
answer has a status and a body that the description names, none is a server error, what the
description allows is not refused for its form, and what it does not allow is refused.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

EXAMPLES = 10  # of each endpoint and phase, beside those at the limits
# Whose values half of all ids are, so that requests reach the model.
PLACES = {
    "query.user": "users",
    "body.user": "users",
    "path.item": "items",
    "body.history[*]": "items",
    "body.candidates[*]": "items",
    "body.query[*]": "items",
    "body.documents[*]": "documents",
}


@pytest.fixture
def client(url_of_run: str) -> httpx.Client:
    return httpx.Client(base_url=url_of_run, trust_env=False, timeout=60)


def settings_of(client: httpx.Client) -> str:
    """Return Schemathesis' settings, with ids and titles of the run."""
    listed = client.get("/items", params={"limit": 100}).json()["items"]
    values = {
        "users": client.get("/users", params={"limit": 100}).json()["users"],
        "items": [each["item"] for each in listed],
        "documents": [each["item"] for each in listed] + [each["title"] for each in listed],
    }
    lines = ["[dictionaries]"]
    lines += [f"{name} = {{ values = {json.dumps(known)} }}" for name, known in values.items()]
    lines += ["[parameters]"]
    lines += [
        f'"{place}" = {{ dictionary = "{name}", probability = 0.5 }}'
        for place, name in PLACES.items()
    ]
    # A value of the right form may be one that the run does not have.
    lines += ["[checks]", 'positive_data_acceptance.expected-statuses = ["2xx", "400", "404"]']
    return "\n".join(lines)


@pytest.mark.slow
def test_every_answer_is_as_described(
    client: httpx.Client, url_of_run: str, tmp_path: Path
) -> None:
    (tmp_path / "schemathesis.toml").write_text(settings_of(client), encoding="utf-8")
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{url_of_run}/openapi.json"),
            *("--generation-deterministic", "--max-examples", str(EXAMPLES), "--no-color"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counted = client.get("/metrics").text
    answered = set(
        re.findall(r'http_requests_total\{endpoint="(.+?)",method="(.+?)",status="200"\}', counted)
    )
    paths = client.get("/openapi.json").json()["paths"]
    assert answered >= {(path, method.upper()) for path, each in paths.items() for method in each}
    assert not re.search(r'http_requests_total\{.*status="5', counted)

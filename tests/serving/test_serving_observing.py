"""Metrics and logs: what they count, and that they tell nothing about users."""

import json
import logging

import httpx
import pytest
from fake_recommender import FakeRecommender

from mllm_msr.serving.observing import JsonFormatter


def test_metrics_count_requests_by_the_template_of_the_path(client: httpx.Client) -> None:
    client.get("/items/i1")
    client.get("/items/i2")
    client.get("/wp-login.php")
    client.get("/recommend", params={"user": "u1"})
    shown = client.get("/metrics")
    assert shown.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = shown.text.splitlines()
    counted = 'mllm_msr_http_requests_total{endpoint="%s",method="GET",status="%d"} %s'
    assert counted % ("/items/{item}", 200, "2.0") in lines
    assert counted % ("other", 404, "1.0") in lines
    assert "mllm_msr_batch_queries_count 1.0" in lines
    assert "mllm_msr_ready 1.0" in lines
    assert "i1" not in shown.text
    assert "wp-login" not in shown.text


def test_logs_have_no_user_history_or_text(
    client: httpx.Client, fake: FakeRecommender, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fake.failing["u2"] = RuntimeError("secret u2")
    client.get("/recommend", params={"user": "u1"})
    client.get("/recommend", params={"user": "u2"})
    client.get("/items/i12")
    client.post("/rerank", json={"query": "likes lamps", "documents": ["i3"]})
    records = [each for each in caplog.records if each.name == "mllm_msr.serving"]
    lines = [JsonFormatter().format(each) for each in records]
    requests = [each for each in map(json.loads, lines) if each["message"] == "request"]
    assert [each["status"] for each in requests] == [200, 500, 200, 200]
    assert requests[2]["endpoint"] == "/items/{item}"
    failures = [each for each in map(json.loads, lines) if each["message"] == "request failed"]
    assert failures[0]["error"] == "RuntimeError"
    assert any("fake_recommender.py:" in place for place in failures[0]["at"])
    for told in ("u1", "u2", "i12", "i3", "secret", "likes"):
        assert not any(told in line for line in lines)

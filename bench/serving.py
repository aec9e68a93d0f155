"""Load on a running service: latency, throughput, errors and wrong answers.

    mllm-msr serve --candidates 20
    python -m bench.serving --candidates 20 --seconds 20
    python -m bench.serving --candidates 20 --once --users 200

Clients ask for recommendations to users, one request after the other. The first command draws from
a few users, whose responses are soon stored; with --once each user is asked for once, so that a
service with an empty response store computes every answer. Every answer is compared with that of a
recommender in this process, which has a response store of its own. Figures of floating point differ
in the last digits with the prompts that share a batch, so p(yes) may differ by 1e-4.
"""

import asyncio
import json
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import typer

from mllm_msr.core.errors import report_errors_on_one_line
from mllm_msr.engines.response_store import VARIABLE
from mllm_msr.recommendation.recommender import Recommender

TOLERANCE = 1e-4  # of p(yes)
Expected = Mapping[str, Mapping[str, float | None]]  # p(yes) by user and item


@dataclass
class Outcome:
    """What the clients saw.

    Attributes:
        seconds: The latency of each answer.
        statuses: How often each status other than 200 was answered; 0: no answer.
        wrong: How many answers differ from the recommender's own.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    wrong: int = 0


def expect(users: int, data: Path, candidates: int) -> dict[str, dict[str, float | None]]:
    """Return p(yes) of all proposals for the first users, by a recommender of this process."""
    with TemporaryDirectory() as folder:
        os.environ[VARIABLE] = f"{folder}/responses.sqlite"
        with Recommender.load(data, candidates=candidates) as recommender:
            return {
                user: {
                    item.item: item.p_yes
                    for item in recommender.recommend(user=user, k=candidates).items
                }
                for user in recommender.users()[:users]
            }


def is_right(answer: Mapping[str, Any], expected: Mapping[str, float | None], k: int) -> bool:
    """Return whether an answer has the k best items, in their order, with their p(yes)."""
    best = sorted((value or 0.0 for value in expected.values()), reverse=True)[:k]
    items = [item["item"] for item in answer["items"]]
    if len(items) != len(best) or len(set(items)) != len(best):
        return False
    for rank, item in enumerate(answer["items"]):
        if item["item"] not in expected:
            return False
        p_yes = item["p_yes"] or 0.0
        for value in (best[rank], expected[item["item"]] or 0.0):
            if abs(p_yes - value) > TOLERANCE:
                return False
    return True


def draw_users(users: Sequence[str], seconds: float) -> Iterator[str]:
    """Yield users at random until the time is over."""
    draw, end = random.Random(0), time.perf_counter() + seconds  # noqa: S311
    while time.perf_counter() < end:
        yield draw.choice(users)


async def run_client(
    client: httpx.AsyncClient, users: Iterator[str], expected: Expected, k: int, outcome: Outcome
) -> None:
    """Ask for one user after the other."""
    for user in users:
        start = time.perf_counter()
        try:
            answer = await client.get("/recommend", params={"user": user, "k": k})
        except httpx.HTTPError:
            outcome.statuses[0] = outcome.statuses.get(0, 0) + 1
            continue
        if answer.status_code != 200:
            status = answer.status_code
            outcome.statuses[status] = outcome.statuses.get(status, 0) + 1
            await asyncio.sleep(float(answer.headers.get("Retry-After", 0)))
            continue
        outcome.seconds.append(time.perf_counter() - start)
        outcome.wrong += not is_right(answer.json(), expected[user], k)


async def load(url: str, users: Iterator[str], expected: Expected, k: int, clients: int) -> Outcome:
    """Ask by several clients at once, which share the users."""
    outcome, limits = Outcome(), httpx.Limits(max_connections=clients)
    key = os.environ.get("MLLM_MSR_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(
        base_url=url, timeout=600, limits=limits, headers=headers
    ) as client:
        await asyncio.gather(
            *(run_client(client, users, expected, k, outcome) for _ in range(clients))
        )
    return outcome


def main(
    url: str = "http://127.0.0.1:8000",
    data: Path = Path("data"),
    clients: int = 50,
    seconds: float = 20,
    users: int = 24,
    k: int = 10,
    candidates: int = 100,
    once: bool = False,
) -> None:
    """Put load on a service and print one line of JSON."""
    httpx.get(f"{url}/health/ready").raise_for_status()
    expected = expect(users, data, candidates)
    start = time.perf_counter()
    asked = iter(expected) if once else draw_users(list(expected), seconds)
    outcome = asyncio.run(load(url, asked, expected, k, clients))
    elapsed = time.perf_counter() - start
    latencies = outcome.seconds or [np.nan]  # without any answer
    shown = {f"p{q}_ms": round(float(np.percentile(latencies, q)) * 1000, 1) for q in (50, 99)}
    typer.echo(
        json.dumps(
            {
                "clients": clients,
                "seconds": round(elapsed, 1),
                "answers": len(outcome.seconds),
                "requests_per_second": round(len(outcome.seconds) / elapsed, 1),
                **shown,
                "errors": outcome.statuses,
                "wrong": outcome.wrong,
            }
        )
    )


if __name__ == "__main__":
    with report_errors_on_one_line():
        typer.run(main)

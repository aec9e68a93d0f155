"""The thread that owns the recommender: how it ends, and what happens to what waits."""

from collections.abc import Callable

import pytest
from fake_recommender import FakeRecommender, wait_for

from mllm_msr.core.errors import DataError
from mllm_msr.recommendation.recommender import Query
from mllm_msr.serving import batching
from mllm_msr.serving.batching import LARGEST_BATCH, Batch, Batcher, NotReadyError, QueueFullError


def make_batcher(load: Callable, batches: list[Batch], failures: list[str]) -> Batcher:
    return Batcher(
        load,
        longest_queue=40,
        on_loaded=lambda _: None,
        on_failure=lambda: failures.append("failed"),
        on_batch=batches.append,
    )


def test_what_waits_is_answered_before_the_end() -> None:
    fake, batches = FakeRecommender(), list[Batch]()
    batcher = make_batcher(lambda: fake, batches, [])
    with pytest.raises(NotReadyError):
        batcher.submit(Query(user="u1"))
    batcher.start()
    wait_for(lambda: batcher.is_ready)
    fake.gate.clear()
    answers = [batcher.submit(Query(user="u1"))]
    wait_for(lambda: fake.batches)
    answers += [batcher.submit(Query(user="u2")) for _ in range(40)]
    with pytest.raises(QueueFullError):
        batcher.submit(Query(user="u2"))
    assert answers.pop().cancel()
    answers.append(batcher.submit(Query(user="u2")))  # in its place
    fake.gate.set()
    batcher.close(10)
    assert all(each.result(0).items for each in answers)
    assert [each.queries for each in batches] == [1, LARGEST_BATCH, LARGEST_BATCH, 8]
    assert fake.closed
    with pytest.raises(NotReadyError):
        batcher.submit(Query(user="u1"))


@pytest.mark.parametrize(("seconds", "calls"), [(60, 4), (0, 1)])
def test_a_batch_that_failed_late_is_not_answered_query_by_query(
    monkeypatch: pytest.MonkeyPatch, seconds: float, calls: int
) -> None:
    monkeypatch.setattr(batching, "SECONDS_TO_REPEAT", seconds)
    fake = FakeRecommender()
    fake.failing["u2"] = OSError("away")
    batcher = make_batcher(lambda: fake, [], [])
    batcher.start()
    wait_for(lambda: batcher.is_ready)
    fake.gate.clear()
    first = batcher.submit(Query(user="u1"))
    wait_for(lambda: fake.batches)
    rest = [batcher.submit(Query(user=user)) for user in ("u1", "u2", "u1")]
    fake.gate.set()
    batcher.close(10)
    assert first.result(0).items
    assert [each.exception(0) is None for each in rest] == [calls > 1, False, calls > 1]
    assert len(fake.batches) == 1 + calls


def test_a_recommender_that_cannot_be_loaded_is_told() -> None:
    def refuse() -> FakeRecommender:
        raise DataError(expected="a run", got="none", where="data", fix="run it")

    failures: list[str] = []
    batcher = make_batcher(refuse, [], failures)
    batcher.start()
    wait_for(lambda: failures)
    assert isinstance(batcher.failure, DataError)
    assert not batcher.is_ready

"""Workers of a Ray cluster give what one process gives, also where one of them is killed."""

import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_adapter import save_adapter
from small_world import SmallWorld, recommender_settings
from tqdm import tqdm

from mllm_msr.baselines.feature_extraction import encode_items
from mllm_msr.core.errors import ModelError, ParamsError
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import Response, ResponseStore, StepOutput
from mllm_msr.images.gallery import Gallery
from mllm_msr.method.examples import open_recommender, read_questions
from mllm_msr.method.inference import CachedEngine, StoringEngine, greedy_engine, workers
from mllm_msr.method.inference.pooled import PooledEngine, PooledModel, pooled_engine
from mllm_msr.method.inference.workers import (
    ATTEMPTS,
    CLUSTER,
    WORKERS,
    Description,
    Output,
    Share,
    Work,
    WorkerPool,
)
from mllm_msr.method.preferences import PreferenceInferrer
from mllm_msr.method.prompts import load_prompts
from mllm_msr.method.scoring import ScoringModel, scoring_engine

ray = pytest.importorskip("ray")

PROMPTS = [Prompt(f"Describe item {number}" + " again" * (number % 5)) for number in range(60)]
HISTORIES = {n: [f"thing {n} {i}" for i in range(n % 4 + 1)] for n in range(12)}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster of this machine with room for two workers."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Workers find this module's functions as pytest does.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CLUSTER, "local")
    monkeypatch.setenv(WORKERS, "2")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ResponseStore]:
    with ResponseStore(tmp_path / "responses.sqlite") as opened:
        yield opened


class Doubling(Work):
    """Doubles numbers; the names of some tasks say what else their worker does."""

    def __init__(self, folder: Path, precision: str | None = None) -> None:
        self._folder, self._precision = folder, precision

    def describe(self) -> Description:
        return Description("a model", self._precision or str(os.getpid()))

    def run(self, chunk: Mapping[str, Any]) -> Iterator[Output]:
        for key, number in chunk.items():
            if key.startswith("error"):
                raise ModelError(expected="a number", got="another", where=key, fix="mend it")
            if key == "wait":  # until the pool stops this worker
                time.sleep(300)
            if key.startswith("die") and (key == "die always" or first_time(self._folder / key)):
                os.kill(os.getpid(), signal.SIGKILL)
            yield Output({key: 2 * number}, tokens=1)


def first_time(marker: Path) -> bool:
    """Return whether this is called for the first time, in whichever process."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def run(work: Any, tasks: Mapping[str, int], size: int = 4) -> dict[str, int]:
    """Run tasks in chunks of some; check that none is finished twice."""
    waiting, results = dict(tasks), dict[str, int]()

    def take(count: int) -> dict[str, int]:
        assert count == 2
        return {key: waiting.pop(key) for key in list(waiting)[:size]}

    pool = WorkerPool(work, "here")
    try:
        for output in pool.run(take):
            assert not output.results.keys() & results.keys()
            results |= output.results
    finally:
        pool.close()
    return results


@pytest.mark.slow
def test_workers_finish_all_tasks_where_some_die(tmp_path: Path) -> None:
    names = [f"die {n}" if n in {5, 17} else str(n) for n in range(30)]
    tasks = {name: number for number, name in enumerate(names)}
    results = run(partial(Doubling, tmp_path, "exact"), tasks)
    assert results == {name: 2 * number for name, number in tasks.items()}


@pytest.mark.slow
def test_a_task_that_always_kills_its_worker_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="ones that died"):
        run(partial(Doubling, tmp_path, "exact"), {"die always": 1})


@pytest.mark.slow
def test_an_error_of_a_worker_is_that_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="error 1: expected a number; got another; mend it"):
        run(partial(Doubling, tmp_path, "exact"), {"0": 0, "error 1": 1})


@pytest.mark.slow
def test_workers_that_compute_otherwise_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the same model and precision"):
        run(partial(Doubling, tmp_path), {"wait": 0})


@pytest.mark.slow
def test_a_worker_that_cannot_open_its_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="config"):
        run(partial(open_missing, tmp_path), {"0": 0})


def open_missing(folder: Path) -> Work:
    Encoder(str(folder), None, None)
    raise AssertionError("there is none")


@pytest.mark.parametrize("text", ["0", "two", "-1", "1.5"])
def test_the_number_of_workers_is_checked(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKERS, text)
    with pytest.raises(ParamsError, match=WORKERS):
        WorkerPool(partial(Doubling, Path()), "here")


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModelError, match=r"-e '\.\[ray\]'"):
        WorkerPool(partial(Doubling, Path()), "here")


def node(cpus: int, gpus: int = 0, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}


@pytest.mark.parametrize(
    ("nodes", "number", "share"),
    [
        ([node(16, 8)], None, Share(8, 1, 1)),
        ([node(16, 8), node(16, 8), node(4)], None, Share(16, 1, 1)),
        ([node(16, 8)], "2", Share(2, 1, 1)),
        ([node(2)], None, Share(1, 2, 0)),
        ([node(16), node(16), node(64, 8, alive=False)], None, Share(2, 16, 0)),
        ([node(16), node(8)], "4", Share(4, 4, 0)),
        ([node(2)], "5", Share(5, 1, 0)),
    ],
)
def test_workers_share_the_nodes(
    nodes: Sequence[dict[str, Any]],
    number: str | None,
    share: Share,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(WORKERS)
    if number:
        monkeypatch.setenv(WORKERS, number)
    assert workers._divide(list(nodes)) == share


def test_without_a_cluster_ray_is_not_used(
    build: Any, store: ResponseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CLUSTER)
    model = LocalModel(Encoder(str(build("llama3").folder), None, None))
    assert isinstance(greedy_engine(model, store, 8, spread=True), CachedEngine)


def test_a_dry_run_uses_no_cluster(build: Any, store: ResponseStore) -> None:
    model = LocalModel(Encoder(str(build("llama3").folder), None, None))
    assert isinstance(greedy_engine(model, store, 8), CachedEngine)


def respond(engine: StoringEngine, prompts: Sequence[Prompt]) -> list[str]:
    with tqdm(disable=True) as progress:
        return engine.respond(prompts, progress)


@pytest.mark.slow
def test_texts_are_those_of_one_process_where_a_worker_is_killed(
    build: Any, store: ResponseStore, tmp_path: Path
) -> None:
    model = LocalModel(Encoder(str(build("llama3").folder), None, None))
    with ResponseStore(tmp_path / "alone.sqlite") as alone:
        single = greedy_engine(model, alone, 8)
        expected = respond(single, PROMPTS)
        engine = pooled_engine(
            model.encoder,
            partial(open_dying_engine, tmp_path / "killed", model),
            store,
            single.limit,
            len_of_text,
            decoding="greedy",
            max_new_tokens=8,
        )
        assert respond(engine, [*PROMPTS, *PROMPTS[:3]]) == [*expected, *expected[:3]]
        assert (tmp_path / "killed").exists()
        assert engine.computed == len(store) == len(PROMPTS)
        keys = [engine.key(prompt) for prompt in PROMPTS]
        assert keys == [single.key(prompt) for prompt in PROMPTS]
        assert engine.truncated >= single.truncated
        assert respond(engine, PROMPTS) == expected
        assert engine.computed == len(PROMPTS)
        engine.pool.close()


def len_of_text(prompt: Prompt) -> int:
    return len(prompt.before)


def open_dying_engine(marker: Path, model: LocalModel, store: ResponseStore) -> StoringEngine:
    """Open an engine of a worker that is killed in the middle of its first batch."""
    engine = greedy_engine(model, store, 8)
    assert isinstance(engine, CachedEngine)
    generate = engine._run_batch

    def run_batch(prompts: Sequence[Prompt]) -> Iterator[StepOutput]:
        for output in generate(prompts):
            yield output
            if output.finished and first_time(marker):
                os.kill(os.getpid(), signal.SIGKILL)

    engine._run_batch = run_batch
    return engine


def test_long_conversations_whose_responses_are_stored_are_answered(
    build: Any, store: ResponseStore
) -> None:
    def count() -> Iterator[Prompt]:
        text = "0"
        for _ in range(2_000):
            text = yield Prompt(text)

    encoder = Encoder(str(build("llama3").folder), None, None)
    pool = SimpleNamespace(
        describe=lambda: Description("model", "float32"),
        run=lambda take: iter([take(1)] if take(1) else []),
    )
    engine = PooledEngine(PooledModel(encoder, pool), pool, store, 99, len_of_text)
    keys = [engine.key(Prompt(str(number))) for number in range(2_000)]
    store.add({key: Response(str(number + 1), True) for number, key in enumerate(keys)})
    with tqdm(disable=True) as progress:
        engine.converse([count()], progress)
    assert engine.computed == 0


@pytest.mark.slow
def test_recurrent_preferences_are_those_of_one_process(
    build: Any, store: ResponseStore, tmp_path: Path
) -> None:
    templates = load_prompts("infer_preferences", Path("prompts.yaml"))
    model = LocalModel(Encoder(str(build("llama3").folder), None, None))
    spread = greedy_engine(model, store, 6, spread=True)
    assert isinstance(spread, PooledEngine)
    with ResponseStore(tmp_path / "alone.sqlite") as alone:
        single = greedy_engine(model, alone, 6)
        expected, rows = (
            PreferenceInferrer(engine, templates).infer(
                HISTORIES, "recurrent", 2, show_progress=False
            )
            for engine in (single, spread)
        )
    assert rows == expected
    assert spread.computed == single.computed
    spread.pool.close()


@pytest.mark.slow
def test_scores_are_those_of_one_process(
    build: Any, world: SmallWorld, store: ResponseStore, tmp_path: Path
) -> None:
    settings = recommender_settings(build("qwen2_5_vl").folder, image=True)
    tables = (world.preferences, world.items, world.images)
    with (
        open_recommender(settings, load_prompts("recommender"), *tables) as inputs,
        ResponseStore(tmp_path / "alone.sqlite") as alone,
    ):
        adapter = save_adapter(inputs.model.encoder, tmp_path / "adapter", strength=0.3)
        model = ScoringModel(inputs.model, adapter, inputs.answer_token_ids, trained=True)
        spread = scoring_engine(model, store, 4_000, spread=True)  # pickled before it is used
        questions = read_questions(world.candidates("test"))
        prompts = [inputs.builder.build(question).prompt for question in questions]
        assert isinstance(spread, PooledEngine)
        scores = respond(spread, prompts)
        spread.pool.close()
        expected = respond(scoring_engine(model, alone, 4_000), prompts)
    torch.testing.assert_close(numbers(scores), numbers(expected), atol=1e-5, rtol=0)


def numbers(texts: Sequence[str]) -> torch.Tensor:
    return torch.tensor([float(text) for text in texts])


@pytest.mark.slow
def test_features_are_those_of_one_process(
    gallery: Gallery, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LocalModel(Encoder(str(build("qwen2_5_vl").folder), None, gallery))
    summaries = {ref.item: f"A summary of {ref.item}" for ref in gallery.image_refs}
    summaries["without image"] = "Another"
    summaries["without both"] = ""
    spread = encode_items(model, gallery, summaries)
    monkeypatch.delenv(CLUSTER)
    for one, other in zip(spread, encode_items(model, gallery, summaries), strict=True):
        assert one.item == other.item
        for vector, expected in ((one.image, other.image), (one.summary, other.summary)):
            assert (vector is None) == (expected is None)
            if vector is not None:
                torch.testing.assert_close(torch.tensor(vector), torch.tensor(expected))


def test_what_workers_get_is_small_and_opens_again(build: Any, gallery: Gallery) -> None:
    model = LocalModel(Encoder(str(build("qwen2_5_vl").folder), None, gallery, None))
    _ = model.weights
    pickled = pickle.dumps(model)
    assert len(pickled) < 2_000
    assert pickle.loads(pickled).identity == model.identity  # made here


def test_an_error_keeps_its_parts_when_it_is_pickled() -> None:
    error = ModelError(expected="a", got="b", where="c", fix="d")
    copy = pickle.loads(pickle.dumps(error))  # made here
    assert (type(copy), str(copy), copy.fix) == (ModelError, str(error), "d")


def test_attempts_are_few() -> None:
    assert 1 < ATTEMPTS < 10

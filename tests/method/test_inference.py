"""Responses are computed once per prompt; a response key covers everything they depend on."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import Family
from generating import generate
from tqdm import tqdm

from mllm_msr.core.errors import DataError, ModelError, ParamsError
from mllm_msr.engines import decoding, local
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import Response, ResponseStore, StepOutput
from mllm_msr.images.gallery import Gallery, ImageRef
from mllm_msr.method.inference import CachedEngine, CountingEngine, greedy_engine, in_one_step

PROMPTS = [Prompt(f"Item {number}") for number in (1, 2, 3, 2)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ResponseStore]:
    with ResponseStore(tmp_path / "responses.sqlite") as opened:
        yield opened


@pytest.fixture
def progress() -> Iterator["tqdm[None]"]:
    with tqdm(disable=False, file=open("/dev/null", "w")) as bar:  # noqa: PTH123
        yield bar


def test_equal_prompts_are_computed_once(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]"
) -> None:
    engine = greedy_engine(llava, store, max_new_tokens=3)
    responses = engine.respond(PROMPTS, progress)
    assert responses == [generate(llava, [prompt], 3)[0].text for prompt in PROMPTS]
    assert engine.computed == 3
    assert progress.n == 4
    again = greedy_engine(llava, store, max_new_tokens=3)
    assert again.respond([*PROMPTS, Prompt("new")], progress)[:4] == responses
    assert again.computed == 1
    assert progress.n == 9


def test_a_killed_run_resumes_with_what_is_missing(
    llava: LocalModel,
    store: ResponseStore,
    progress: "tqdm[None]",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "PROMPTS_PER_BATCH", 1)  # one prompt a batch
    asked: list[Prompt] = []

    def killed_at_the_third(batch: Sequence[Prompt]) -> list[Response]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.extend(batch)
        return [Response("first run", complete=True)]

    with pytest.raises(KeyboardInterrupt):
        CachedEngine(
            llava, store, 99, llava.batches, in_one_step(killed_at_the_third), decoding="x"
        ).respond(PROMPTS, progress)
    second = CachedEngine(
        llava,
        store,
        99,
        llava.batches,
        in_one_step(lambda batch: [Response("second", True)] * len(batch)),
        decoding="x",
    )
    assert sorted(second.respond(PROMPTS, progress)).count("second") < 3
    assert second.computed == 1


SLOTS = 2
SLOW_RUN = f"""
import sys, time
from pathlib import Path
import torch
from tqdm import tqdm
from mllm_msr.engines import decoding
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import ResponseStore
from mllm_msr.method.inference import greedy_engine

def step_slowly(decoder, *arguments, step=decoding.Decoder._step):
    time.sleep(0.05)
    step(decoder, *arguments)

decoding.SLOTS, decoding.Decoder._step = {SLOTS}, step_slowly
torch.set_num_threads(1)
model = LocalModel(Encoder(sys.argv[1], None, None))
prompts = [Prompt(before) for before in sys.argv[3:]]
with ResponseStore(Path(sys.argv[2])) as store:
    greedy_engine(model, store, 4).respond(prompts, tqdm(disable=True))
"""


@pytest.mark.slow
def test_a_run_killed_in_a_batch_is_not_asked_again_what_it_had_finished(
    build: Callable[[str], Family],
    progress: "tqdm[None]",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = [Prompt(f"Item {number}" + " and more" * number) for number in range(12)]
    folder, path = build("llama3").folder, tmp_path / "killed.sqlite"
    words = ["-c", SLOW_RUN, str(folder), str(path), *(prompt.before for prompt in prompts)]
    with subprocess.Popen(  # the script above
        [sys.executable, *words], env=os.environ | {"MLLM_MSR_DEVICE": "cpu"}
    ) as run:
        while run.poll() is None and count_stored(path) < 2 * SLOTS:
            time.sleep(0.01)
        run.kill()
    finished = count_stored(path)
    assert 2 * SLOTS <= finished < len(prompts)  # all prompts are one batch
    monkeypatch.setattr(decoding, "SLOTS", SLOTS)
    model = LocalModel(Encoder(str(folder), None, None))
    with ResponseStore(path) as store, ResponseStore(tmp_path / "whole.sqlite") as other:
        resumed, whole = (greedy_engine(model, some, 4) for some in (store, other))
        assert resumed.respond(prompts, progress) == whole.respond(prompts, progress)
    assert resumed.computed == len(prompts) - finished
    assert whole.computed == len(prompts)


def count_stored(path: Path) -> int:
    """Return the responses in a store that another process may be writing."""
    if not path.is_file():
        return 0
    with contextlib.suppress(DataError), ResponseStore(path, read_only=True) as store:
        return len(store)
    return 0  # the other process is creating it


def test_finished_responses_are_stored_and_shown_before_the_next_step(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]"
) -> None:
    def run(batch: Sequence[Prompt]) -> Iterator[StepOutput]:
        for index, prompt in enumerate(batch):
            assert (len(store), progress.n) == (index, index)
            yield StepOutput({index: Response(prompt.before, complete=True)}, tokens=3)
            yield StepOutput({}, tokens=3)

    engine = CachedEngine(llava, store, 99, lambda all_: [list(range(len(all_)))], run, n=1)
    assert engine.respond(MANY[:5], progress) == [prompt.before for prompt in MANY[:5]]
    assert progress.postfix.endswith(" tokens/s")


def test_responses_finished_before_memory_ran_out_are_not_asked_again(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]"
) -> None:
    sizes = []

    def run(batch: Sequence[Prompt]) -> Iterator[StepOutput]:
        sizes.append(len(batch))
        for index, prompt in enumerate(batch):
            if index == 4:
                raise torch.OutOfMemoryError
            yield StepOutput({index: Response(prompt.before, complete=True)}, tokens=1)

    model = LocalModel(llava.encoder)  # with a budget of its own
    engine = CachedEngine(model, store, 99, lambda all_: [list(range(len(all_)))], run, n=1)
    assert engine.respond(MANY[:10], progress) == [prompt.before for prompt in MANY[:10]]
    assert sizes == [10, 3, 3]  # the six that are left, in halves


def test_truncated_responses_are_counted_with_stored_ones(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]"
) -> None:
    for _ in range(2):
        engine = CachedEngine(
            llava,
            store,
            99,
            llava.batches,
            in_one_step(lambda batch: [Response("x", False)] * len(batch)),
            n=1,
        )
        engine.respond(PROMPTS, progress)
        assert engine.truncated == 4


def test_no_prompts_give_no_responses(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]"
) -> None:
    assert greedy_engine(llava, store, 3).respond([], progress) == []


def test_the_limit_leaves_room_for_the_response(llava: LocalModel, store: ResponseStore) -> None:
    assert greedy_engine(llava, store, 40).limit == llava.encoder.context - 40


def key(model: LocalModel, prompt: Prompt, max_new_tokens: int = 3) -> str:
    """Return the response key that the stages use."""
    return key_of(greedy_engine(model, None, max_new_tokens), prompt)  # type: ignore[arg-type]


WITH_IMAGES = Prompt("Look:", ImageRef("a", "0" * 64), "Describe.")


def test_a_key_depends_on_the_images_bytes_and_not_on_the_item(llava: LocalModel) -> None:
    assert key(llava, WITH_IMAGES) == key(
        llava, Prompt("Look:", ImageRef("b", "0" * 64), "Describe.")
    )


@pytest.mark.parametrize(
    "other",
    [
        Prompt("Look!", WITH_IMAGES.image, "Describe."),
        Prompt("Look:", WITH_IMAGES.image, "Describe"),
        Prompt("Look:", None, "Describe."),
        Prompt("Look:", ImageRef("a", "1" * 64), "Describe."),
        Prompt("Look:Describe.", WITH_IMAGES.image, ""),
    ],
    ids=["before", "after", "no image", "image digest", "position of the image"],
)
def test_another_prompt_or_image_is_another_key(llava: LocalModel, other: Prompt) -> None:
    assert key(llava, other) != key(llava, WITH_IMAGES)


def test_another_number_of_new_tokens_is_another_key(llava: LocalModel) -> None:
    assert key(llava, WITH_IMAGES, max_new_tokens=4) != key(llava, WITH_IMAGES)


def test_another_dtype_is_another_key(llava: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(llava, WITH_IMAGES)
    monkeypatch.setattr(llava, "dtype", torch.bfloat16)
    assert key(llava, WITH_IMAGES) != before


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "model.safetensors"])
def test_another_model_file_is_another_key(
    build: Callable[[str], Family], gallery: Gallery, llava: LocalModel, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(build("llava").folder, tmp_path / "model")
    same = LocalModel(Encoder(str(folder), None, gallery))
    assert key(same, WITH_IMAGES) == key(llava, WITH_IMAGES)
    content = (folder / name).read_bytes()
    end = b"\x7f" if name.endswith("safetensors") else content[-1:] + b" "
    (folder / name).write_bytes(content[:-1] + end)
    other = LocalModel(Encoder(str(folder), None, gallery))
    assert key(other, WITH_IMAGES) != key(llava, WITH_IMAGES)


class SmallMemory:
    """Responds with the prompt, and runs out of memory above a number of tokens per batch."""

    def __init__(self, llava: LocalModel, holds: int, error: type[Exception]) -> None:
        self.model = LocalModel(llava.encoder)  # with a budget of its own
        self.holds, self._error = holds, error
        self.sizes: list[int] = []  # of the batches, in tokens

    def batches(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        lengths, batches = list(map(self.model.encoder.count_tokens, prompts)), [[]]
        for index, length in enumerate(lengths):
            if batches[-1] and sum(lengths[i] for i in batches[-1]) + length > (
                self.model.budget.tokens
            ):
                batches.append([])
            batches[-1].append(index)
        return batches

    def run_batch(self, batch: Sequence[Prompt]) -> list[Response]:
        self.sizes.append(sum(map(self.model.encoder.count_tokens, batch)))
        if self.sizes[-1] > self.holds:
            raise self._error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
        return [Response(prompt.before, complete=True) for prompt in batch]

    def engine(self, store: ResponseStore) -> CachedEngine:
        run_batch = in_one_step(self.run_batch)
        return CachedEngine(self.model, store, 99, self.batches, run_batch, decoding="x")


MANY = [Prompt(f"Item {number} of many") for number in range(300)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError], ids=["CUDA", "CPU"])
def test_batches_are_halved_after_running_out_of_memory(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]", error: type[Exception]
) -> None:
    small = SmallMemory(llava, 300, error)
    whole = small.model.budget.tokens
    assert small.engine(store).respond(MANY, progress) == [prompt.before for prompt in MANY]
    assert progress.n == len(MANY)
    failed = [size for size in small.sizes if size > small.holds]
    assert len(failed) == 2  # 1,024 and 512 tokens are too many; nothing is tried so large again
    assert small.model.budget.tokens == whole // 4
    fitting = [size for size in small.sizes if size <= small.holds]
    assert sum(fitting) == sum(map(llava.encoder.count_tokens, MANY))  # each prompt once


def test_one_prompt_too_large_for_memory_is_an_error_and_loses_nothing(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]"
) -> None:
    small = SmallMemory(llava, 60, RuntimeError)
    asked = [*PROMPTS, Prompt("long " * 60), *PROMPTS]
    with pytest.raises(ModelError, match="memory for one prompt; got too little on cpu") as raised:
        small.engine(store).respond(asked, progress)
    assert "free memory, or use a smaller model" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(store) == 3


def test_other_errors_are_raised(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]"
) -> None:
    def answer(_: Sequence[Prompt]) -> list[Response]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        CachedEngine(llava, store, 99, llava.batches, in_one_step(answer), decoding="x").respond(
            PROMPTS, progress
        )


def one_by_one(
    model: LocalModel, store: ResponseStore, answer: Callable[[Sequence[Prompt]], list[Response]]
) -> CachedEngine:
    def cut(prompts: Sequence[Prompt]) -> list[list[int]]:
        return [[index] for index in range(len(prompts))]

    return CachedEngine(model, store, 99, cut, in_one_step(answer), decoding="x")


def test_what_another_process_computes_meanwhile_is_used(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]", tmp_path: Path
) -> None:
    def say(batch: Sequence[Prompt]) -> list[Response]:
        return [Response(prompt.before, complete=True) for prompt in batch]

    def say_while_another_run_does_all(batch: Sequence[Prompt]) -> list[Response]:
        with ResponseStore(tmp_path / "responses.sqlite") as same:
            one_by_one(llava, same, say).respond(MANY, progress)
        return say(batch)

    first = one_by_one(llava, store, say_while_another_run_does_all)
    assert first.respond(MANY, progress) == [prompt.before for prompt in MANY]
    assert first.computed == 1


def test_batches_are_planned_as_they_are_needed(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]"
) -> None:
    done: list[str] = []

    def plan(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        for index in range(len(prompts)):
            done.append("plan")
            yield [index]

    def say(batch: Sequence[Prompt]) -> list[Response]:
        done.append("run")
        return [Response(prompt.before, complete=True) for prompt in batch]

    engine = CachedEngine(llava, store, 99, plan, in_one_step(say), decoding="x")
    engine.respond(MANY[:4], progress)
    assert done == ["plan", "run"] * 4


def test_two_processes_share_the_work(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]"
) -> None:
    # The other run takes the first prompt that is open, asks it while ours is asked, and is done
    # a moment before us each time. In the same order both would ask all.
    keys = [key_of(one_by_one(llava, store, lambda _: []), prompt) for prompt in MANY]
    asked_by_other = []

    def say_while_another_run_says(batch: Sequence[Prompt]) -> list[Response]:
        known = store.find(keys)
        key = next(key for key in keys if key not in known)
        store.add({key: Response("by the other", complete=True)})
        asked_by_other.append(key)
        return [Response("by ours", complete=True)] * len(batch)

    ours = one_by_one(llava, store, say_while_another_run_says)
    ours.respond(MANY, progress)
    assert len(store) == len(MANY)
    assert ours.computed + len(asked_by_other) < 1.2 * len(MANY)


def key_of(engine: CachedEngine, prompt: Prompt) -> str:
    return engine.key(prompt)


def test_new_tokens_that_leave_no_room_for_a_prompt_are_one_line(
    llava: LocalModel, store: ResponseStore
) -> None:
    context = llava.encoder.context
    message = rf"max_new_tokens, .*: expected fewer new tokens than the {context:,} .*; got 100,000"
    with pytest.raises(ParamsError, match=message):
        greedy_engine(llava, store, 100_000)
    assert greedy_engine(llava, store, context - 1).limit == 1


# -- keys of earlier releases ----------------------------------------------------------------------


def test_response_keys_are_those_of_earlier_releases(store: ResponseStore) -> None:
    # Another key would compute every stored response again.
    encoder = SimpleNamespace(name="model", context=2048)
    model = SimpleNamespace(
        **{"encoder": encoder, "identity": "model", "precision": "torch.float32"},
        **{"batches": list, "generate": list},
    )
    greedy = greedy_engine(model, store, 64)  # type: ignore[arg-type]
    assert greedy.key(Prompt("Describe", ImageRef("a", "0" * 64), "briefly")) == (
        "585d2b9d801f30207f67faf21b8e698d075013a2891d1678787e6816275a9121"
    )


# -- dry runs --------------------------------------------------------------------------------------


def test_a_counting_engine_uses_stored_responses_and_computes_nothing(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]"
) -> None:
    engine = greedy_engine(llava, store, 3)
    [stored] = engine.respond(PROMPTS[:1], progress)
    counting = CountingEngine(engine.encoder, engine.limit, engine.find_stored, "placeholder")
    assert counting.respond(PROMPTS, progress) == [stored, *["placeholder"] * 3]
    assert counting.plan() == (llava.encoder.render(PROMPTS[0]), len(PROMPTS))
    assert engine.computed == len(store) == 1


def test_a_counting_engine_without_prompts_is_an_error(llava: LocalModel) -> None:
    with pytest.raises(DataError, match="expected prompts for the model; got none"):
        CountingEngine(llava.encoder, 99).plan()

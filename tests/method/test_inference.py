"""Each prompt is put to a model once, and an answer's key holds all that it depends on."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from families import Family
from tqdm import tqdm

from mllm_msr.core.errors import ModelError, ParamsError
from mllm_msr.engines import local
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.responses import Response, ResponseStore
from mllm_msr.images.gallery import Gallery, ImageRef
from mllm_msr.method.inference import CachedEngine, greedy_engine

PROMPTS = [Prompt(f"Item {number}") for number in (1, 2, 3, 2)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ResponseStore]:
    with ResponseStore(tmp_path / "responses.sqlite") as opened:
        yield opened


@pytest.fixture
def progress() -> Iterator["tqdm[None]"]:
    with tqdm(disable=False, file=open("/dev/null", "w")) as bar:  # noqa: PTH123
        yield bar


def test_equal_prompts_are_asked_once_and_answered_each(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]"
) -> None:
    asker = greedy_engine(llava, store, max_new_tokens=3)
    answers = asker.ask(PROMPTS, progress)
    assert answers == [llava.generate([prompt], 3)[0].text for prompt in PROMPTS]
    assert asker.asked == 3
    assert progress.n == 4
    again = greedy_engine(llava, store, max_new_tokens=3)
    assert again.ask([*PROMPTS, Prompt("new")], progress)[:4] == answers
    assert again.asked == 1
    assert progress.n == 9


def test_a_killed_run_goes_on_with_what_is_missing(
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
        CachedEngine(llava, store, 99, llava.batches, killed_at_the_third, decoding="x").ask(
            PROMPTS, progress
        )
    second = CachedEngine(
        llava,
        store,
        99,
        llava.batches,
        lambda batch: [Response("second", True)] * len(batch),
        decoding="x",
    )
    assert sorted(second.ask(PROMPTS, progress)).count("second") < 3
    assert second.asked == 1


def test_cut_answers_are_counted_stored_ones_too(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]"
) -> None:
    for _ in range(2):
        asker = CachedEngine(
            llava, store, 99, llava.batches, lambda batch: [Response("x", False)] * len(batch), n=1
        )
        asker.ask(PROMPTS, progress)
        assert asker.cut == 4


def test_no_prompts_are_no_work(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]"
) -> None:
    assert greedy_engine(llava, store, 3).ask([], progress) == []


def test_the_limit_leaves_room_for_the_answer(llava: LocalModel, store: ResponseStore) -> None:
    assert greedy_engine(llava, store, 40).limit == llava.encoder.context - 40


def key(model: LocalModel, prompt: Prompt, max_new_tokens: int = 3) -> str:
    """Give the key under which the stages' own way of asking keeps an answer."""
    return key_of(greedy_engine(model, None, max_new_tokens), prompt)  # type: ignore[arg-type]


WITH_IMAGES = Prompt("Look:", ImageRef("a", "0" * 64), "Describe.")


def test_a_key_is_the_same_for_the_same_question(llava: LocalModel) -> None:
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
    ids=["before", "after", "no image", "image digest", "place of the image"],
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
    """Answers prompts by their text, and runs out of memory above so many tokens at once."""

    def __init__(self, llava: LocalModel, holds: int, error: type[Exception]) -> None:
        self.model = LocalModel(llava.encoder)  # with a budget of its own
        self.holds, self._error = holds, error
        self.sizes: list[int] = []  # of the batches, in tokens

    def cut(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        lengths, batches = list(map(self.model.encoder.count_tokens, prompts)), [[]]
        for index, length in enumerate(lengths):
            if batches[-1] and sum(lengths[i] for i in batches[-1]) + length > (
                self.model.budget.tokens
            ):
                batches.append([])
            batches[-1].append(index)
        return batches

    def answer(self, batch: Sequence[Prompt]) -> list[Response]:
        self.sizes.append(sum(map(self.model.encoder.count_tokens, batch)))
        if self.sizes[-1] > self.holds:
            raise self._error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
        return [Response(prompt.before, complete=True) for prompt in batch]

    def asker(self, store: ResponseStore) -> CachedEngine:
        return CachedEngine(self.model, store, 99, self.cut, self.answer, decoding="x")


MANY = [Prompt(f"Item {number} of many") for number in range(300)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError], ids=["CUDA", "CPU"])
def test_what_runs_out_of_memory_is_computed_in_halves_for_the_rest_of_the_run(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]", error: type[Exception]
) -> None:
    small = SmallMemory(llava, 300, error)
    whole = small.model.budget.tokens
    assert small.asker(store).ask(MANY, progress) == [prompt.before for prompt in MANY]
    assert progress.n == len(MANY)
    failed = [size for size in small.sizes if size > small.holds]
    assert len(failed) == 2  # 1,024 and 512 tokens are too many; nothing is tried so large again
    assert small.model.budget.tokens == whole // 4
    answered = [size for size in small.sizes if size <= small.holds]
    assert sum(answered) == sum(map(llava.encoder.count_tokens, MANY))  # nothing twice


def test_one_prompt_that_memory_does_not_hold_is_an_error_and_loses_no_answer(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]"
) -> None:
    small = SmallMemory(llava, 60, RuntimeError)
    asked = [*PROMPTS, Prompt("long " * 60), *PROMPTS]
    with pytest.raises(ModelError, match="memory for one prompt; got too little on cpu") as raised:
        small.asker(store).ask(asked, progress)
    assert "free memory, or use a smaller model" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(store) == 3


def test_an_error_that_is_not_of_memory_is_not_hidden(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]"
) -> None:
    def answer(_: Sequence[Prompt]) -> list[Response]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        CachedEngine(llava, store, 99, llava.batches, answer, decoding="x").ask(PROMPTS, progress)


def one_by_one(
    model: LocalModel, store: ResponseStore, answer: Callable[[Sequence[Prompt]], list[Response]]
) -> CachedEngine:
    def cut(prompts: Sequence[Prompt]) -> list[list[int]]:
        return [[index] for index in range(len(prompts))]

    return CachedEngine(model, store, 99, cut, answer, decoding="x")


def test_what_another_run_answers_meanwhile_is_not_asked_again(
    llava: LocalModel, store: ResponseStore, progress: "tqdm[None]", tmp_path: Path
) -> None:
    def say(batch: Sequence[Prompt]) -> list[Response]:
        return [Response(prompt.before, complete=True) for prompt in batch]

    def say_while_another_run_does_all(batch: Sequence[Prompt]) -> list[Response]:
        with ResponseStore(tmp_path / "responses.sqlite") as same:
            one_by_one(llava, same, say).ask(MANY, progress)
        return say(batch)

    first = one_by_one(llava, store, say_while_another_run_does_all)
    assert first.ask(MANY, progress) == [prompt.before for prompt in MANY]
    assert first.asked == 1


def test_two_runs_side_by_side_share_the_work(
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
    ours.ask(MANY, progress)
    assert len(store) == len(MANY)
    assert ours.asked + len(asked_by_other) < 1.2 * len(MANY)


def key_of(asker: CachedEngine, prompt: Prompt) -> str:
    return asker._key(prompt)


def test_new_tokens_that_leave_no_room_for_a_prompt_are_one_line(
    llava: LocalModel, store: ResponseStore
) -> None:
    context = llava.encoder.context
    message = rf"max_new_tokens, .*: expected fewer new tokens than the {context:,} .*; got 100,000"
    with pytest.raises(ParamsError, match=message):
        greedy_engine(llava, store, 100_000)
    assert greedy_engine(llava, store, context - 1).limit == 1

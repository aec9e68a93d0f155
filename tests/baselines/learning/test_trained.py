"""What was trained once is loaded, scores to the bit as it did, and trains no second time."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_task import NAMES, make_task

from mllm_msr.baselines.discovery import Baseline, Inputs, find_baseline
from mllm_msr.baselines.learning.sequential import NetworkLearner
from mllm_msr.baselines.learning.trained import compute_key, fit_or_load, score_candidates
from mllm_msr.baselines.models import item_knn, vbpr
from mllm_msr.baselines.task import Candidates, Task
from mllm_msr.core.errors import ModelError
from mllm_msr.core.params import Section
from mllm_msr.core.schemas import Features
from mllm_msr.core.tables import write_rows

CORNAC = {"width": 8, "negatives": 4, "popularity_exponent": 0.0, "seed": 1, "batch_size": 8}
CORNAC |= {"epochs": 2, "learning_rate": 0.05, "loss": "cross-entropy"}
TRANSFORMER = CORNAC | {"dropout": 0.1, "blocks": 1, "heads": 2}
NETWORK = {"ids": True, "features": ["image"], "width": 8, "layers": 1, "dropout": 0.1}
NETWORK |= {"epochs": 2, "patience": 2, "batch_size": 8, "learning_rate": 0.01, "seed": 1}
VBPR = {"width": 4, "image_width": 4, "epochs": 2, "batch_size": 8, "learning_rate": 0.05}
VBPR |= {"lambda_w": 0.01, "lambda_b": 0.01, "lambda_e": 0.0, "seed": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "fpmc": CORNAC,
    "gru4rec": CORNAC | {"dropout": 0.1},
    "sasrec": TRANSFORMER,
    "bert4rec": TRANSFORMER,
    "vbpr": VBPR,
    "gru4rec_f": NETWORK | {"network": "gru"},
    "sasrec_f": NETWORK | {"network": "attention"},
    "item_knn": {"neighbours": 3, "shrinkage": 1.0},
}
every_learner = pytest.mark.parametrize("name", SETTINGS)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLM_MSR_DEVICE", "cpu")


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    features = np.random.default_rng(3).normal(size=(len(NAMES), 3))
    rows = [
        {"item": item, "image": vector.tolist(), "summary": None}
        for item, vector in zip(NAMES, features, strict=True)
    ]
    write_rows(Features, rows, tmp_path / "features.parquet")
    return Inputs(features=tmp_path / "features.parquet")


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the trainings by class of learner."""
    counted: Counter[str] = Counter()
    learners: list[Any] = [NetworkLearner, vbpr.VbprLearner, item_knn.ItemKnnLearner]
    try:
        from mllm_msr.baselines.learning.cornac_models import NextItemLearner
    except Exception:  # Cornac is not installed
        pass
    else:
        learners.append(NextItemLearner)

    def count(learner: Any) -> None:
        fit = learner.fit

        def counting(self: Any) -> None:
            counted[learner.__name__] += 1
            fit(self)

        monkeypatch.setattr(learner, "fit", counting)

    for learner in learners:
        count(learner)
    return counted


def find(name: str) -> tuple[Baseline, Section]:
    if not name.endswith("_f") and name != "item_knn":
        pytest.importorskip("cornac")
    baseline = find_baseline(name)
    return baseline, baseline.params.model_validate(SETTINGS[name])


def small_task() -> Task:
    """Ask about six of ten users, who go on in the order a b c d e a; two took nothing."""
    log = [list((NAMES * 2)[user % 5 : user % 5 + 4]) for user in range(8)] + [[], []]
    return make_task(log, [(0, "abc"), (1, "bcd"), (2, "cde"), (3, "d"), (8, "ab"), (9, "ea")])


def ask_less(task: Task) -> Task:
    """Return the task with fewer candidates, as before a further sampling."""
    asked = task.candidates
    half = asked.items % 2 == 0
    rows = [column[half] for column in (asked.questions, asked.items, asked.labels)]
    return replace(task, candidates=Candidates(*rows))


@every_learner
def test_a_loaded_baseline_scores_to_the_bit_as_right_after_training(
    name: str, inputs: Inputs, tmp_path: Path, fits: Counter[str]
) -> None:
    (baseline, settings), task = find(name), small_task()
    trained = score_candidates(baseline, task, settings, inputs, tmp_path)
    loaded = score_candidates(baseline, task, settings, inputs, tmp_path)
    assert fits.total() == 1
    assert trained.tobytes() == loaded.tobytes()


@every_learner
def test_a_further_sampling_trains_nothing(
    name: str, inputs: Inputs, tmp_path: Path, fits: Counter[str]
) -> None:
    (baseline, settings), task = find(name), small_task()
    some = ask_less(task)
    before = score_candidates(baseline, some, settings, inputs, tmp_path)
    after = score_candidates(baseline, task, settings, inputs, tmp_path)
    assert fits.total() == 1
    assert np.array_equal(after[task.candidates.items % 2 == 0], before)


@every_learner
def test_all_items_are_scored_for_a_new_history(name: str, inputs: Inputs, tmp_path: Path) -> None:
    (baseline, settings), task = find(name), small_task()
    for _ in range(2):  # trained, then loaded
        learner = fit_or_load(baseline, task.training, settings, inputs, tmp_path)
        asked = learner.score_candidates(task).reshape(6, 5)
        one = learner.score_items(0, task.questions.histories[0])
        np.testing.assert_allclose(one, asked[0], atol=1e-6)
        anyone = learner.score_items(None, np.array([4, 0, 1, 2, 3, 4]))
        assert anyone.shape == (5,)
        assert np.isfinite(anyone).all()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError("Unable to allocate 2.00 GiB for an array"),
    ],
    ids=["CUDA", "CPU", "NumPy"],
)
@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("gru4rec_f", r"lower its batch_size \(now \d+\) or width \(now \d+\)"),
        ("item_knn", "leave it out of baselines.models"),
    ],
)
def test_a_training_that_runs_out_of_memory_says_what_to_lower(
    name: str,
    fix: str,
    error: Exception,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: object) -> None:
        raise error

    (baseline, settings), task = find(name), small_task()
    assert baseline.build
    learner = type(baseline.build(task.training, settings, inputs))
    monkeypatch.setattr(learner, "fit", fail)
    expected = f"{name}: expected memory for the training; got too little; free memory, or {fix}"
    for keep in (tmp_path / "kept", None):
        with pytest.raises(ModelError, match=expected):
            fit_or_load(baseline, task.training, settings, inputs, keep)
    assert not (tmp_path / "kept").exists()


def test_a_training_without_enough_memory_is_one_line(inputs: Inputs) -> None:
    (baseline, settings), task = find("gru4rec_f"), small_task()
    huge = settings.model_copy(update={"width": 1 << 45})  # beyond any address space
    with pytest.raises(ModelError, match=r"lower its .* width \(now 35184372088832\)"):
        fit_or_load(baseline, task.training, huge, inputs)


def test_every_baseline_that_learns_is_tested_here() -> None:
    from mllm_msr.baselines.discovery import all_baselines

    learning = {each.name for each in all_baselines() if each.build}
    assert learning == {*SETTINGS, "gru4rec_image", "gru4rec_summary"}


def test_without_a_folder_nothing_is_kept(
    inputs: Inputs, tmp_path: Path, fits: Counter[str]
) -> None:
    (baseline, settings), task = find("gru4rec_f"), small_task()
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        score_candidates(baseline, task, settings, inputs)
    assert fits.total() == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_file_counts_as_missing(
    inputs: Inputs, tmp_path: Path, fits: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    (baseline, settings), task = find("gru4rec_f"), small_task()
    trained = score_candidates(baseline, task, settings, inputs, tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    for damaged in (bytes(content), content[:20], b""):
        file.write_bytes(damaged)
        again = score_candidates(baseline, task, settings, inputs, tmp_path)
        assert trained.tobytes() == again.tobytes()
    assert fits.total() == 4
    assert caplog.text.count("is damaged and counts as missing") == 3


def test_the_key_follows_all_that_is_trained_on_and_nothing_that_is_scored(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (baseline, settings), task = find("gru4rec_f"), small_task()
    training = task.training
    key = compute_key(baseline, training, settings, inputs)
    assert key == compute_key(baseline, ask_less(task).training, settings, inputs)
    features = tmp_path / "others.parquet"
    write_rows(Features, [{"item": "a", "image": [0.0], "summary": None}], features)
    known, selection = training.known, training.selection
    others = [
        compute_key(baseline, changed, settings, inputs)
        for changed in (
            replace(training, known=replace(known, items=known.items[::-1])),
            replace(training, longest=training.longest + 1),
            replace(training, items=training.items[::-1]),
            replace(training, histories=training.histories[::-1]),
            replace(training, selection=replace(selection, labels=~selection.labels)),
        )
    ]
    others.append(compute_key(baseline, training, settings, Inputs(features=features)))
    slower = settings.model_copy(update={"learning_rate": 0.001})
    others.append(compute_key(baseline, training, slower, inputs))
    others.append(compute_key(find_baseline("sasrec_f"), training, settings, inputs))
    monkeypatch.setattr("mllm_msr.baselines.learning.trained._find_version", lambda _: "0")
    others.append(compute_key(baseline, training, settings, inputs))
    assert len({key, *others}) == len(others) + 1


def test_chance_outside_is_left_as_it_was_by_loading(inputs: Inputs, tmp_path: Path) -> None:
    (baseline, settings), task = find("gru4rec_f"), small_task()
    score_candidates(baseline, task, settings, inputs, tmp_path)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    score_candidates(baseline, task, settings, inputs, tmp_path)
    assert torch.equal(torch.rand(3), expected)

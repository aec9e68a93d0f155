"""Networks over features learn what a user follows, and see nothing that they must not."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm_msr.baselines.learning import sequential
from mllm_msr.baselines.learning.sequential import (
    NetworkLearner,
    NextItemModel,
    cut_windows,
    score_questions,
)
from mllm_msr.baselines.settings import SequentialParams
from mllm_msr.baselines.task import Candidates, Known, Questions, Task
from mllm_msr.core.arrays import Floats
from mllm_msr.core.errors import DataError, ModelError
from mllm_msr.ranking import auc, rank_targets

USERS, PER_COLOUR, COLOURS = 60, 10, 3
ITEMS = PER_COLOUR * COLOURS
NETWORKS = pytest.mark.parametrize("network", ["gru", "attention"])


def settings(network: str = "gru", **changes: Any) -> SequentialParams:
    small = {
        **{"ids": False, "features": ["image"], "width": 16, "layers": 1, "dropout": 0.1},
        **{"epochs": 8, "patience": 8, "batch_size": 16, "learning_rate": 0.01, "seed": 1},
    }
    return SequentialParams.model_validate(small | {"network": network} | changes)


def make_task(seed: int = 0) -> Task:
    """Make users who only take items of one colour; item i has the colour i % 3.

    Each user takes seven, of which the last is the target; a third of users is valid, a third test.
    """
    generator = np.random.default_rng(seed)
    colours = generator.integers(COLOURS, size=USERS)
    taken = [colour + COLOURS * generator.permutation(PER_COLOUR)[:7] for colour in colours]
    asked = np.arange(USERS // 3, USERS)
    negatives = [
        generator.choice(np.setdiff1d(np.arange(ITEMS), taken[user]), 6, replace=False)
        for user in asked
    ]
    candidates = Candidates(
        questions=np.repeat(np.arange(len(asked)), 7),
        items=np.concatenate([[taken[u][6], *n] for u, n in zip(asked, negatives, strict=True)]),
        labels=np.tile([True] + [False] * 6, len(asked)),
    )
    return Task(
        items=[f"i{item}" for item in range(ITEMS)],
        users=[f"u{user}" for user in range(USERS)],
        known=Known(
            users=np.repeat(np.arange(USERS), [7 - (user >= USERS // 3) for user in range(USERS)]),
            items=np.concatenate([t[: 7 - (u >= USERS // 3)] for u, t in enumerate(taken)]),
            timestamps=None,
        ),
        questions=Questions(
            sequences=asked,
            splits=np.array(["valid"] * (USERS // 3) + ["test"] * (USERS // 3)),
            users=asked,
            histories=[taken[user][1:6] for user in asked],
            taken=[np.sort(taken[user][:6]) for user in asked],
            timestamps=None,
        ),
        candidates=candidates,
        selection=keep_valid(candidates),
    )


def keep_valid(candidates: Candidates) -> Candidates:
    """Keep the candidates of the first third of questions, which are those of valid."""
    rows = candidates.questions < USERS // 3
    return Candidates(*(column[rows] for column in vars(candidates).values()))


def colour_features() -> np.ndarray:
    """Return each item's colour as a vector, with some noise beside it."""
    noise = np.random.default_rng(9).normal(size=(ITEMS, 4))
    return np.hstack([np.eye(COLOURS)[np.arange(ITEMS) % COLOURS], noise]).astype(np.float32)


def auc_of_test(task: Task, scores: Floats) -> float:
    rows = task.questions.splits[task.candidates.questions] == "test"
    asked = task.candidates
    placed = rank_targets(asked.questions[rows], scores[rows], asked.labels[rows])
    return float(auc(placed).mean())


def score_histories(task: Task, features: list[np.ndarray], of_model: SequentialParams) -> Floats:
    """Train a network and score the candidates."""
    learner = NetworkLearner(task.training, features, of_model)
    learner.fit()
    return learner.score_candidates(task)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setenv("MLLM_MSR_DEVICE", "cpu")
    yield
    torch.set_num_threads(threads)


def make_model(network: str, longest: int = 6, **changes: Any) -> NextItemModel:
    torch.manual_seed(3)
    return NextItemModel(ITEMS, [colour_features()], longest, settings(network, **changes)).eval()


# -- what is learned -------------------------------------------------------------------------------


@NETWORKS
def test_a_colour_that_users_follow_is_learned_from_features_alone(network: str) -> None:
    task = make_task()
    scores = score_histories(task, [colour_features()], settings(network))
    assert scores.dtype == np.float64
    assert auc_of_test(task, scores) > 0.9


@NETWORKS
def test_a_colour_is_learned_from_ids_alone(network: str) -> None:
    task = make_task()
    by_ids = settings(network, ids=True, features=[], epochs=30, patience=30)
    assert auc_of_test(task, score_histories(task, [], by_ids)) > 0.8


def test_features_that_say_nothing_of_what_users_follow_teach_nothing() -> None:
    noise = np.ones((ITEMS, 3), dtype=np.float32)
    task = make_task()
    assert (
        auc_of_test(task, score_histories(task, [noise], settings())) == 0.5
    )  # all items are alike


def test_items_without_an_image_are_scored_and_learned_from() -> None:
    features = colour_features()
    features[::5] = np.nan
    task = make_task()
    scores = score_histories(task, [features], settings(epochs=12, patience=12))
    assert np.isfinite(scores).all()
    assert auc_of_test(task, scores) > 0.75


@NETWORKS
def test_an_item_without_a_known_interaction_is_no_training_negative(network: str) -> None:
    task = make_task()
    known, cold = task.known, [4, 17]
    kept = ~np.isin(known.items, cold)
    task = replace(task, known=Known(known.users[kept], known.items[kept], None))
    learner = NetworkLearner(task.training, [], settings(network, ids=True, features=[], epochs=2))
    learner.fit()
    trained = learner.state()["vectors.ids.weight"]
    with torch.random.fork_rng():
        torch.manual_seed(learner.settings.seed)
        drawn = learner._make_model().state_dict()["vectors.ids.weight"].numpy()
    moved = (drawn != trained).any(axis=1)
    assert set(np.flatnonzero(~moved)) == set(cold)


@NETWORKS
def test_the_same_seed_gives_the_same_scores_and_another_gives_others(network: str) -> None:
    one, same, other = (
        score_histories(make_task(), [colour_features()], settings(network, epochs=2, seed=seed))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3


def test_chance_outside_is_left_as_it_was() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    score_histories(make_task(), [colour_features()], settings(epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_the_epoch_with_the_best_validation_auc_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(found: list[float], **changes: int) -> Floats:
        measured = iter(found)
        monkeypatch.setattr(sequential, "_measure", lambda *_: next(measured))
        scores = score_histories(make_task(), [colour_features()], settings(**changes))
        assert next(measured, None) is None
        return scores

    after_two = train([0.1, 0.2], epochs=2)
    after_four = train([0.1, 0.2, 0.3, 0.4], epochs=4)
    kept = train([0.5, 0.9, 0.6, 0.7], epochs=20, patience=2)
    np.testing.assert_array_equal(kept, after_two)
    assert not np.array_equal(kept, after_four)


# -- what must not be seen -------------------------------------------------------------------------


def test_labels_of_test_change_no_score() -> None:
    task = make_task()
    is_test = task.questions.splits[task.candidates.questions] == "test"
    labels = np.where(is_test, ~task.candidates.labels, task.candidates.labels)
    blind = replace(task, candidates=replace(task.candidates, labels=labels))
    one, other = (
        score_histories(t, [colour_features()], settings(epochs=4)) for t in (task, blind)
    )
    np.testing.assert_array_equal(one, other)


def test_the_questions_an_epoch_is_chosen_by_are_those_of_valid() -> None:
    task = make_task()
    training = task.training
    rows = task.questions.splits[task.candidates.questions] == "valid"
    assert len(training.histories) == USERS // 3
    np.testing.assert_array_equal(training.histories, task.questions.histories[: USERS // 3])
    np.testing.assert_array_equal(training.selection.items, task.candidates.items[rows])
    np.testing.assert_array_equal(training.selection.labels, task.candidates.labels[rows])


def test_another_target_leaves_the_scores_of_the_other_candidates() -> None:
    task = make_task()
    targets = task.candidates.labels & (task.questions.splits[task.candidates.questions] == "test")
    items = np.where(targets, (task.candidates.items + 1) % ITEMS, task.candidates.items)
    other = replace(task, candidates=replace(task.candidates, items=items))
    one, another = (
        score_histories(t, [colour_features()], settings(epochs=4)) for t in (task, other)
    )
    np.testing.assert_array_equal(one[~targets], another[~targets])


@NETWORKS
def test_a_later_item_changes_no_earlier_state(network: str) -> None:
    model = make_model(network, longest=6, layers=2)
    history = torch.tensor([[1, 2, 3, 4, 5, 6]])
    changed = torch.tensor([[1, 2, 3, 9, 8, 7]])
    with torch.no_grad():
        one, other = (model(items, model.vectors())[0] for items in (history, changed))
    torch.testing.assert_close(one[:3], other[:3], atol=1e-6, rtol=0)
    assert (one[3:] - other[3:]).abs().max() > 1e-3


@NETWORKS
def test_a_question_alone_is_scored_as_among_others(network: str) -> None:
    model = make_model(network, layers=2)
    histories = [np.array(h) for h in ([4], [1, 2, 3, 4, 5, 6], [7, 8], [9, 1, 2])]
    every = np.arange(ITEMS)
    together = score_questions(model, histories, ask_all(len(histories)))
    for number, history in enumerate(histories):
        alone = score_questions(model, [history], ask_all(1))
        np.testing.assert_allclose(together.reshape(-1, len(every))[number], alone, atol=1e-5)


def test_candidates_are_scored_alike_in_slices_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task()
    whole = score_histories(task, [], settings(ids=True, epochs=1))
    monkeypatch.setattr(sequential, "CANDIDATES_AT_ONCE", 7)
    assert np.array_equal(score_histories(task, [], settings(ids=True, epochs=1)), whole)


def ask_all(questions: int) -> Candidates:
    """Ask about all items."""
    numbers = np.repeat(np.arange(questions), ITEMS)
    return Candidates(numbers, np.tile(np.arange(ITEMS), questions), np.ones(len(numbers), bool))


# -- windows ---------------------------------------------------------------------------------------


def test_windows_by_hand() -> None:
    known = Known(
        users=np.array([0, 0, 0, 0, 0, 0, 2, 5, 5]),
        items=np.array([10, 11, 12, 13, 14, 15, 20, 30, 31]),
        timestamps=None,
    )
    windows = [window.tolist() for window in cut_windows(known, longest=3)]
    assert windows == [[12, 13, 14, 15], [10, 11, 12], [30, 31]]


@given(st.lists(st.integers(1, 12), max_size=6), st.integers(1, 5))
def test_each_item_but_a_users_first_is_predicted_once(lengths: list[int], longest: int) -> None:
    users = np.repeat(np.arange(len(lengths)), lengths)
    items = np.arange(len(users))  # each item occurs once
    windows = cut_windows(Known(users, items, None), longest)
    predicted = sorted(item for window in windows for item in window[1:].tolist())
    firsts = {int(np.flatnonzero(users == user)[0]) for user in range(len(lengths))}
    assert predicted == sorted(set(items.tolist()) - firsts)
    assert all(2 <= len(window) <= longest + 1 for window in windows)
    assert all(len(set(users[window])) == 1 for window in windows)


# -- errors ----------------------------------------------------------------------------------------


def test_no_question_of_valid_is_an_error() -> None:
    task = make_task()
    nothing = Candidates(*(column[:0] for column in vars(task.selection).values()))
    said = r"expected users with two known interactions, and questions of valid; got \d+ and 0"
    with pytest.raises(DataError, match=said):
        score_histories(replace(task, selection=nothing), [colour_features()], settings())


def test_nobody_to_learn_from_is_an_error() -> None:
    task = make_task()
    nothing = np.array([], dtype=np.int64)
    with pytest.raises(DataError, match="got 0 and 20; bring more users"):
        score_histories(replace(task, known=Known(nothing, nothing, None)), [], settings(ids=True))


def test_a_training_that_diverges_is_an_error() -> None:
    endless = np.where(colour_features() > 0, np.inf, 0).astype(np.float32)
    with pytest.raises(ModelError, match="got scores of inf or nan; lower its learning rate"):
        score_histories(make_task(), [endless], settings())

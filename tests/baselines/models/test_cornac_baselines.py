"""What Cornac's models learn of small planted worlds, and that it is ours that they are asked."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from ranx_figures import KS, ranx_figures
from small_task import NAMES, make_task, score_by

from mllm_msr.baselines.discovery import Inputs, find_baseline
from mllm_msr.baselines.learning.trained import score_candidates
from mllm_msr.baselines.models import vbpr
from mllm_msr.baselines.task import Task
from mllm_msr.core.arrays import Floats
from mllm_msr.core.errors import DataError, ModelError
from mllm_msr.core.schemas import Features
from mllm_msr.core.tables import write_rows
from mllm_msr.evaluation.metrics import measure
from mllm_msr.ranking import rank_targets

pytest.importorskip("cornac")

from mllm_msr.baselines.learning.cornac_models import PairDataset, number

TRAINING = {"width": 16, "negatives": 8, "popularity_exponent": 0.0, "seed": 1, "batch_size": 32}
TRANSFORMER = TRAINING | {"learning_rate": 0.01, "loss": "cross-entropy", "dropout": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "fpmc": TRAINING | {"epochs": 20, "learning_rate": 0.3, "loss": "bpr"},
    "gru4rec": TRAINING
    | {"epochs": 20, "learning_rate": 0.2, "loss": "cross-entropy", "dropout": 0.1},
    "sasrec": TRANSFORMER | {"epochs": 12, "blocks": 1, "heads": 1},
    "bert4rec": TRANSFORMER | {"epochs": 12, "blocks": 1, "heads": 2},
}
VBPR = {"batch_size": 16, "learning_rate": 0.05, "lambda_w": 0.01, "lambda_b": 0.01, "seed": 1}
VBPR |= {"width": 4, "image_width": 4, "epochs": 30, "lambda_e": 0.0}
OF_ITEMS = {  # what a model learns of each item
    "fpmc": ["IL_emb.weight", "LI_emb.weight", "item_biases.weight"],
    "gru4rec": ["Wy.weight", "By.weight"],
    "sasrec": ["item_emb.weight"],
    "bert4rec": ["item_emb.weight", "item_biases.weight"],
    "vbpr": ["gamma_item", "beta_item"],
}
every_model = pytest.mark.parametrize("model", SETTINGS)


def rounds(users: int = 60) -> list[list[str]]:
    """Let users begin anywhere and go on in the order a b c d e a."""
    return [list((NAMES * 2)[user % 5 : user % 5 + 4]) for user in range(users)]


def score(model: str, task: Task, **changes: Any) -> Floats:
    scores = score_by(model, task, **SETTINGS[model] | changes)
    return scores.reshape(len(task.questions.users), len(task.items))


@every_model
def test_the_item_that_always_follows_is_scored_highest(model: str) -> None:
    asked = [(0, "abc"), (1, "bcd"), (2, "cde"), (3, "dea")]
    scores = score(model, make_task(rounds(), asked))
    assert [NAMES[item] for item in scores.argmax(axis=1)] == ["d", "e", "a", "b"]


@every_model
def test_training_shows_its_progress(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    score(model, make_task(rounds(10), [(0, "abc")]), epochs=2)
    assert "2/2" in capsys.readouterr().err


@every_model
def test_the_seed_alone_decides_the_scores(model: str) -> None:
    task = make_task(rounds(10), [(0, "abc"), (7, "d")])
    first, again = (score(model, task, epochs=2) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, score(model, task, epochs=2, seed=2))


@every_model
def test_a_score_goes_with_its_question_and_item_in_any_order(model: str) -> None:
    asked = [(0, "abc"), (1, "bcd"), (2, "ab")]
    one = score(model, make_task(rounds(10), asked), epochs=1)
    other = score(model, make_task(rounds(10), asked[::-1]), epochs=1)
    assert one == pytest.approx(other[::-1], abs=1e-6)


@pytest.mark.parametrize("model", ["gru4rec", "sasrec", "bert4rec"])
def test_models_of_sequences_look_beyond_the_last_item(model: str) -> None:
    scores = score(model, make_task(rounds(10), [(0, "abc"), (0, "ebc")]), epochs=2)
    assert not np.allclose(scores[0], scores[1], atol=1e-6)


def test_fpmc_knows_every_user_that_is_asked_about() -> None:
    # After c, half of the users take d and the other half e. Cornac would give a user whom it does
    # not know a vector of zeros, and so the same scores to all of them.
    log = [["a", "c", "d", "c"] if user % 2 else ["b", "c", "e", "c"] for user in range(40)]
    scores = score("fpmc", make_task(log, [(0, "bc"), (1, "ac"), (39, "ac")]), epochs=40)
    assert [NAMES[item] for item in scores[:, 3:].argmax(axis=1) + 3] == ["e", "d", "d"]
    assert not np.allclose(scores[1], scores[2], atol=1e-6)  # alike in taste, not the same


def test_fpmc_scores_users_of_whom_it_learned_nothing_by_the_last_item_alone() -> None:
    # Two of them took nothing that is known, one an item but no next one.
    log = [*rounds(40), [], [], ["a"]]
    asked = [(40, "ab"), (41, "b"), (42, "b"), (0, "b"), (40, "c")]
    scores = score("fpmc", make_task(log, asked))
    assert np.array_equal(scores[0], scores[1])
    assert np.array_equal(scores[0], scores[2])
    assert not np.array_equal(scores[0], scores[3])
    assert [NAMES[item] for item in scores[[0, 4]].argmax(axis=1)] == ["c", "d"]


def vbpr_scores(log: list[list[str]], asked: list[tuple[int, str]], **changes: Any) -> Floats:
    """Let VBPR score where a and b are dark, c, d and e bright."""
    features: list[list[float]] = [[1, 0], [1, 0], [0, 1], [0, 1], [0, 1]]
    with TemporaryDirectory() as folder:
        table = Path(folder) / "features.parquet"
        rows = zip(NAMES, features, strict=True)
        write_rows(Features, [{"item": i, "image": f, "summary": None} for i, f in rows], table)
        settings = vbpr.VbprParams.model_validate(VBPR | changes)
        inputs = Inputs(features=table)
        scores = score_candidates(find_baseline("vbpr"), make_task(log, asked), settings, inputs)
        return scores.reshape(len(asked), 5)


def test_vbpr_scores_users_who_took_nothing_by_the_items_alone() -> None:
    log = [["a", "b"], ["c", "d"], ["a", "c"], ["a", "d"], [], []]
    cold, other, dark, bright = vbpr_scores(log, [(4, "a"), (5, "c"), (0, "a"), (1, "c")])
    assert np.array_equal(cold, other)
    assert cold.argmax() == 0  # a, which most took
    assert not np.array_equal(cold, dark)
    assert not np.array_equal(cold, bright)


def test_items_that_nobody_is_known_to_have_taken_are_scored_too() -> None:
    log = [["a", "b", "c"]] * 4
    for model in SETTINGS:
        assert np.isfinite(score(model, make_task(log, [(0, "ab")]), epochs=1)).all()


@pytest.mark.parametrize("model", OF_ITEMS)
def test_an_item_without_a_known_interaction_is_no_training_negative(
    model: str, tmp_path: Path
) -> None:
    log = [["a", "b", "d"], ["b", "e", "d"], ["e", "a", "b"], ["d", "e", "a"]] * 5
    baseline, table = find_baseline(model), tmp_path / "features.parquet"
    rows = [{"item": i, "image": [1.0, float(n)], "summary": None} for n, i in enumerate(NAMES)]
    write_rows(Features, rows, table)
    settings = baseline.params.model_validate(SETTINGS.get(model, VBPR))
    assert baseline.build
    states = []
    for epochs in (0, 3):
        training = make_task(log, [(0, "ab")]).training
        learner: Any = baseline.build(training, settings, Inputs(features=table))
        learner.model.n_epochs = epochs
        learner.fit()
        states.append({name: np.array(learner.state()[name][:5]) for name in OF_ITEMS[model]})
    for name, trained in states[1].items():
        moved = (trained != states[0][name]).reshape(5, -1).any(axis=1)
        assert moved.tolist() == [True, True, False, True, True]  # nobody took c


def test_vbpr_samples_no_item_that_a_user_took() -> None:
    users, items = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2]), np.array([0, 1, 3, 4, 0, 0, 1, 3, 4])
    log = [[NAMES[item] for item in items[users == user]] for user in range(3)]
    data = PairDataset(**number(make_task(log, [(0, "ab")]).training), seed=1)
    drawn = [
        (int(user), NAMES[negative])
        for _ in range(50)
        for batch in data.uij_iter(2, shuffle=True)
        for user, _, negative in zip(*batch, strict=True)
    ]
    # The third user took all items that anybody took, so nothing is left to sample.
    assert set(drawn) == {(0, "e"), (1, "b"), (1, "d")}
    assert len(drawn) == 50 * 5


def test_vbpr_likes_what_looks_like_what_a_user_took() -> None:
    log = [["a", "b"] if user % 2 else ["c", "d"] for user in range(40)]
    scores = vbpr_scores(log, [(0, "c"), (1, "a")])
    assert scores[0, 4] - scores[0, 0] > scores[1, 4] - scores[1, 0] + 1


def test_without_cornac_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from mllm_msr.baselines import learning

    monkeypatch.setitem(sys.modules, "cornac.data", None)
    monkeypatch.delitem(sys.modules, "mllm_msr.baselines.learning.cornac_models", raising=False)
    monkeypatch.delattr(learning, "cornac_models", raising=False)
    with pytest.raises(
        ModelError, match=r"pip install -c constraints.txt -e '\.\[baselines\]'"
    ) as error:
        score_by("fpmc", make_task([["a"]], [(0, "a")]), **SETTINGS["fpmc"])
    assert "\n" not in str(error.value)
    task = make_task([["a"]], [(0, "a")])
    assert score_by("markov", task, smoothing=1.0).size == 5


def test_gru4rec_says_where_no_user_has_a_step_to_learn_from() -> None:
    with pytest.raises(DataError, match="users with two known interactions; got none"):
        score("gru4rec", make_task([["a"]], [(0, "a")]), epochs=1)


def test_the_figures_of_a_baseline_are_ranxs() -> None:
    task = make_task(rounds(50), [(user, "".join(rounds(50)[user][:2])) for user in range(50)])
    scores = score("gru4rec", task, epochs=1)
    asked = task.candidates
    figures = measure(rank_targets(asked.questions, scores.ravel(), asked.labels), KS)
    for name, expected in ranx_figures(scores.tolist()).items():  # a, the first, is the target
        assert figures[name] == pytest.approx(expected, abs=1e-9), name

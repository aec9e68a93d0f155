"""The verdict, the first paragraph of the report, follows from the tests."""

import json

import pytest
from report_world import make_settings, write_report_world

from mllm_msr.core.errors import DataError
from mllm_msr.evaluation.comparisons import Comparison, Difference
from mllm_msr.evaluation.results import read_comparisons, read_metrics
from mllm_msr.report.inputs import Inputs, open_tables
from mllm_msr.report.page import gather
from mllm_msr.report.results import judge
from mllm_msr.report.verdict import Outcome, Relation, Verdict, conclude, reach_verdict

ABOVE, SAME, BELOW = "above", "not shown to differ from", "below"
FIGURES = {"auc": 0.6, "auc_low": 0.55, "auc_high": 0.65}


def outcome(sampling: str = "uniform", **standings: str) -> Outcome:
    """Return the model's outcome; scorers that are not named are below the model."""
    bars = {"target_popularity": ABOVE, "popularity": ABOVE, "chance": ABOVE} | standings
    relations = [
        Relation(name, 0.5, standing, best=name == "item_knn") for name, standing in bars.items()
    ]
    return Outcome(sampling, "MLLM-MSR", FIGURES, relations)


@pytest.mark.parametrize(
    ("standings", "said"),
    [
        (
            {"item_knn": ABOVE},
            "On X, MLLM-MSR is above every non-personalised baseline, and above the best"
            " baseline, Item-kNN.",
        ),
        (
            {"item_knn": SAME},
            "On X, MLLM-MSR is above every non-personalised baseline, but not shown to"
            " differ from the best baseline, Item-kNN.",
        ),
        (
            {"item_knn": BELOW},
            "On X, MLLM-MSR is above every non-personalised baseline, but below the best"
            " baseline, Item-kNN.",
        ),
        (
            {},
            "On X, MLLM-MSR is above every non-personalised baseline; no personalised baseline"
            " was measured.",
        ),
        (
            {"target_popularity": SAME, "popularity": BELOW, "item_knn": ABOVE},
            "On X, MLLM-MSR loses to popularity: a score that only counts popularity ranks better.",
        ),
        (
            {"target_popularity": BELOW, "item_knn": ABOVE},
            "On X, MLLM-MSR loses to target popularity: a score that only counts how often an item"
            " is a training target ranks better.",
        ),
        (
            {"target_popularity": SAME, "item_knn": ABOVE},
            "On X, MLLM-MSR is not significantly above target popularity: a non-personalised"
            " baseline may be as good.",
        ),
        (
            {"chance": BELOW},
            "On X, MLLM-MSR loses to chance: it ranks targets below negatives more often than above"
            " them.",
        ),
        (
            {"chance": SAME},
            "On X, MLLM-MSR is not significantly above chance: a non-personalised baseline may"
            " be as good.",
        ),
    ],
    ids=[
        *("win", "tie with the best", "behind the best", "alone", "popularity"),
        *("target popularity", "tie with target popularity", "worse than chance", "chance"),
    ],
)
def test_the_conclusion_says_the_worst_first(standings, said):
    assert conclude([outcome(**standings)], "X") == said


def test_a_loss_under_one_sampling_names_it():
    outcomes = [outcome(target_popularity=BELOW), outcome("targets")]
    assert conclude(outcomes, "X").startswith(
        "On X, MLLM-MSR loses to target popularity among uniform negatives: a score"
    )


def test_a_loss_under_both_samplings_is_said_once():
    outcomes = [outcome(popularity=BELOW), outcome("targets", popularity=BELOW)]
    assert conclude(outcomes, "X").startswith("On X, MLLM-MSR loses to popularity: a score")


def test_losses_that_differ_between_samplings_are_named_for_each():
    outcomes = [
        outcome(target_popularity=BELOW, popularity=BELOW),
        outcome("targets", popularity=BELOW),
    ]
    assert conclude(outcomes, "X").startswith(
        "On X, MLLM-MSR loses to target popularity and popularity among uniform negatives, and"
        " popularity among negatives drawn from other users' targets: a score"
    )


def test_the_best_baseline_of_the_worse_sampling_decides():
    outcomes = [outcome(item_knn=ABOVE), outcome("targets", item_knn=BELOW)]
    assert "but below the best baseline, Item-kNN among negatives drawn" in conclude(outcomes, "X")


@pytest.mark.parametrize(
    ("difference", "standing"),
    [
        (Difference(0.1, 0.05, 0.15, 0.01), ABOVE),
        (Difference(-0.1, -0.15, -0.05, 0.01), BELOW),
        (Difference(0.1, 0.05, 0.15, 0.06), SAME),
        (Difference(0.1, -0.05, 0.25, 0.04), SAME),
        (Difference(0.0, 0.0, 0.0, 1.0), SAME),
    ],
)
def test_a_difference_counts_if_both_test_and_interval_show_it(difference, standing):
    assert judge(difference) == standing
    assert Comparison("uniform", "a", "b", difference).is_above == (standing == ABOVE)


def reach(inputs: Inputs, **signs: float) -> Verdict:
    """Return the verdict with the sign of each difference set; 0 leaves it out."""
    metrics = read_metrics(inputs.evaluated / "metrics.json")
    comparisons = [
        Comparison(
            each.sampling,
            each.scorer,
            each.baseline,
            Difference(sign * 0.2, sign * 0.2 - 0.1, sign * 0.2 + 0.1, 0.001),
        )
        for each in read_comparisons(inputs.evaluated / "comparisons.parquet")
        if (sign := signs.get(each.baseline, 1))
    ]
    with open_tables(inputs, "uniform") as connection:
        return reach_verdict(connection, metrics, comparisons, "X")


def test_the_details_have_the_auc_and_all_comparisons(tmp_path):
    inputs = write_report_world(tmp_path, baselines={"item_knn": 1, "sasrec": -1})
    metrics = read_metrics(inputs.evaluated / "metrics.json")
    verdict = reach(inputs, popularity=-1)
    first, second = verdict.details
    model, best = (metrics["uniform"][name]["auc"] for name in ("test", "item_knn"))
    assert first.startswith(f"Among uniform negatives, MLLM-MSR has an AUC of {model:.3f} (90% ")
    assert f"Item-kNN ({best:.3f}, the best baseline)" in first
    assert "above target popularity (0.333); not shown" in first
    assert first.endswith("; below popularity (0.333).")
    assert second.startswith("Among negatives drawn from other users' targets, MLLM-MSR")
    assert verdict.conclusion.startswith("On X, MLLM-MSR loses to popularity: a score")


def test_an_interval_without_width_shows_nothing(tmp_path):
    inputs = write_report_world(tmp_path)
    path = inputs.evaluated / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["uniform"]["test"] |= {"auc": 0.9, "auc_low": 0.9, "auc_high": 0.9}
    path.write_text(json.dumps(metrics))
    assert "not shown to differ from chance (0.500)" in reach(inputs).details[0]


def test_equal_scores_are_not_shown_to_differ(tmp_path):
    inputs = write_report_world(tmp_path, baselines={"item_knn": 1})
    found = gather(inputs, make_settings())["verdict"]
    assert all("not shown to differ from Item-kNN (" in detail for detail in found.details)


def test_without_a_model_the_best_baseline_is_compared(tmp_path):
    inputs = write_report_world(tmp_path, baselines={"item_knn": 1, "sasrec": -1}, scored=False)
    verdict = reach(inputs)
    assert verdict.conclusion == (
        "No model was scored in this run on X; it measured baselines alone."
    )
    assert verdict.details[0].startswith(
        "Among uniform negatives, the best baseline, Item-kNN, has an AUC of 0.583 (90% interval"
    )
    assert "above target popularity (0.333) and popularity (0.333)" in verdict.details[0]


def test_a_missing_comparison_is_an_error(finished):
    with pytest.raises(DataError, match="MLLM-MSR with popularity, sampling uniform"):
        reach(finished, popularity=0)

"""What a study makes of its experiments: rows, tests, the table, the CSV and the figure."""

import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from mllm_msr.comparisons import compare
from mllm_msr.errors import DataError
from mllm_msr.evaluation import MODEL, POCKET_NOTE
from mllm_msr.metrics import Placements, auc, summarize
from mllm_msr.study import plans, results
from mllm_msr.study.experiments import Experiment, Ranked
from mllm_msr.study.plans import Study, Variant
from mllm_msr.study.results import Results, compare_rankings, gather_results
from mllm_msr.study.writing import format_comparison, format_results, write_results

SVG = "{http://www.w3.org/2000/svg}"
SEQUENCES, CANDIDATES = 60, 21
COUNTS = ("candidates", "above", "tied")
PARAMS: dict[str, Any] = {
    "preprocess": {"source": "pocket"},
    "filter_sequences": {"history": "recent", "target": "last", "test_negatives": 20},
    "infer_preferences": {"block_size": 3},
    "sft": {"seed": 7},
}
MICROLENS = {**PARAMS, "preprocess": {"source": "microlens"}}


def place(mean: float, seed: int = 0) -> Placements:
    """Make placements with about this AUC."""
    above = np.random.default_rng(seed).binomial(CANDIDATES - 1, 1 - mean, size=SEQUENCES)
    same = np.arange(SEQUENCES)
    return Placements(same, np.full(SEQUENCES, CANDIDATES), above, np.zeros_like(above))


def chance() -> Placements:
    zeros = np.zeros(SEQUENCES, dtype=int)
    full = np.full(SEQUENCES, CANDIDATES)
    return Placements(np.arange(SEQUENCES), full, zeros, full - 1)


Make = Callable[..., tuple[dict[str, Variant], dict[str, Experiment]]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Give what DVC would give: experiments of a study with the AUC of each variant."""
    kept: dict[str, Ranked] = {}
    monkeypatch.setattr(results, "read_ranked", kept.__getitem__)

    def make_experiments(
        study: Study, means: Mapping[str, float], baselines: Mapping[str, float]
    ) -> tuple[dict[str, Variant], dict[str, Experiment]]:
        names = {f"{study.name}-{each.name}-0123abcd": each for each in study.variants}
        rivals = {name: place(mean, seed=9) for name, mean in baselines.items()}
        found = {}
        for name, variant in names.items():
            placed = {MODEL: place(means[variant.name]), "chance": chance(), **rivals}
            kept[f"rev-{name}"] = Ranked(placed, "the same")
            sections = {
                "test" if each == MODEL else each: ranked for each, ranked in placed.items()
            }
            metrics = {
                each: summarize(ranked, ks=[5], samples=50, confidence=0.95, seed=0)
                for each, ranked in sections.items()
            }
            metrics["valid"] = metrics["test"]
            found[name] = Experiment(name, f"rev-{name}", {"confidence": 0.95, **metrics})
        return names, found

    return make_experiments


@pytest.fixture
def main_table(make: Make) -> Results:
    baselines = {"sasrec": 0.7, "popularity": 0.55, "oracle": 0.97, "brand_new": 0.6}
    made = make(plans.plan_table(), {"full": 0.9, "zero-shot": 0.6, "tallrec": 0.9}, baselines)
    return gather_results(plans.plan_table(), PARAMS, *made)


# -- the main table --------------------------------------------------------------------------------


def test_the_main_table_has_every_scorer_once_in_the_order_of_the_groups(main_table):
    assert [(row.group, row.label) for row in main_table.rows] == [
        ("ours", "MLLM-MSR"),
        ("LLM", "MLLM, no fine-tuning"),
        ("LLM", "TALLRec's recipe: titles only, fine-tuned"),
        ("sequential", "SASRec"),
        ("other", "brand_new"),
        ("simple", "popularity"),
        ("simple", "chance"),
        ("bound", "oracle"),
    ]


def test_every_row_but_ours_is_tested_against_ours(main_table):
    first, *others = main_table.rows
    assert first.difference is None
    assert all(row.difference is not None for row in others)
    by_key = {row.key: row.difference for row in others}
    assert by_key["zero-shot"].p < 0.01
    assert by_key["zero-shot"].high < 0 < by_key["oracle"].low
    assert (by_key["tallrec"].value, by_key["tallrec"].p) == (0, 1)  # the very same placements


def test_p_values_are_corrected_for_the_number_of_rows(main_table):
    ours, worse = auc(place(0.9)), auc(place(0.7, seed=9))
    raw = compare(worse, ours, confidence=0.95)
    sasrec = next(row for row in main_table.rows if row.key == "sasrec")
    assert sasrec.difference.value == pytest.approx(raw.value)
    assert sasrec.difference.p > raw.p


def test_the_best_row_is_compared_with_the_best_other_one_and_no_oracle(main_table):
    best, other, difference = main_table.best
    assert {best.key, other.key} == {"full", "tallrec"}
    assert difference.p == 1


def test_the_table_says_what_its_figures_are(main_table):
    text = format_results(main_table, PARAMS, "abc1234")
    assert "| group      | scorer " in text
    assert "- 60 test sequences; in brackets: 95% bootstrap intervals over sequences" in text
    assert "Holm-corrected for 7" in text
    assert "best row and best other row by these same figures (no oracle): MLLM-MSR and" in text
    assert "not corrected for the choice" in text
    assert "chosen by popularity" not in text
    assert "- commit abc1234" in text
    assert text.rstrip().endswith(POCKET_NOTE)
    assert "chance" in text
    assert "popularity" in text
    assert POCKET_NOTE not in format_results(main_table, MICROLENS, "abc1234")


def test_a_protocol_that_baselines_are_not_trained_for_is_noted(main_table):
    asked = {**PARAMS["filter_sequences"], "history": "popular"}
    text = format_results(main_table, {**PARAMS, "filter_sequences": asked}, "abc1234")
    assert "- histories or targets are chosen by popularity: baselines learned from whole" in text


def test_the_csv_has_every_number_of_the_table(main_table, tmp_path):
    write_results(main_table, PARAMS, "abc1234", tmp_path / "table")
    text = (tmp_path / "table" / "table.csv").read_text(encoding="utf-8")
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [line["key"] for line in lines] == [row.key for row in main_table.rows]
    for line, row in zip(lines, main_table.rows, strict=True):
        assert float(line["auc"]) == pytest.approx(row.figures["auc"].value, abs=1e-6)
        assert float(line["mrr@5_high"]) == pytest.approx(row.figures["mrr@5"].high, abs=1e-6)
        assert line["experiment"] == row.experiment.name
        assert line["revision"] == row.experiment.revision
    assert lines[0]["auc_difference"] == ""
    assert float(lines[2]["auc_difference_p_holm"]) == 1


def test_a_study_is_written_whole_in_place_of_the_last(main_table, tmp_path):
    folder = tmp_path / "studies" / "table"
    for commit in ("one", "two"):
        write_results(main_table, MICROLENS, commit, folder)
    assert {file.name for file in folder.iterdir()} == {
        "table.md",
        "table.csv",
        "figure.svg",
        "figure.png",
    }
    assert "commit two" in (folder / "table.md").read_text(encoding="utf-8")
    assert [path.name for path in folder.parent.iterdir()] == ["table"]


# -- above popularity? -----------------------------------------------------------------------------


def test_every_row_that_knows_the_user_is_tested_on_popularity(main_table):
    tested = {row.key: row.over_popularity for row in main_table.rows if row.over_popularity}
    assert list(tested) == ["full", "zero-shot", "tallrec", "sasrec", "brand_new"]
    ours, popularity = auc(place(0.9)), auc(place(0.55, seed=9))
    raw = compare(ours, popularity, confidence=0.95)
    assert tested["full"][:3] == raw[:3]
    assert tested["full"].p == pytest.approx(5 * raw.p)  # the smallest of five, by Holm


def test_the_rows_not_shown_to_be_above_popularity_are_named(make):
    means = {"full": 0.9, "zero-shot": 0.3, "tallrec": 0.9}
    made = make(plans.plan_table(), means, {"popularity": 0.55, "markov": 0.55, "sasrec": 0.8})
    text = format_results(gather_results(plans.plan_table(), PARAMS, *made), PARAMS, "abc")
    assert "| AUC over popularity " in text
    assert "Holm-corrected for 5; not shown to be above it (p < 0.05): MLLM, no" in text
    note = next(line for line in text.splitlines() if line.startswith("- AUC over popularity"))
    assert note.endswith("MLLM, no fine-tuning, Markov chain")


def test_an_ablation_tests_its_variants_on_popularity_too(make, tmp_path):
    means = {variant.name: 0.9 for variant in plans.ABLATION.variants}
    made = make(plans.ABLATION, means, {"popularity": 0.55, "oracle": 0.97})
    found = gather_results(plans.ABLATION, PARAMS, *made)
    tested = [row.key for row in found.rows if row.over_popularity]
    assert tested == [variant.name for variant in plans.ABLATION.variants]
    write_results(found, PARAMS, "abc", tmp_path / "ablation")
    text = (tmp_path / "ablation" / "table.csv").read_text(encoding="utf-8")
    first, *_, oracle = csv.DictReader(io.StringIO(text))
    over = found.rows[0].over_popularity
    assert float(first["auc_over_popularity_low"]) == pytest.approx(over.low, abs=1e-6)
    assert float(first["auc_over_popularity_p_holm"]) == pytest.approx(over.p, abs=1e-6)
    assert oracle["auc_over_popularity"] == ""
    assert "(p < 0.05): none" in (tmp_path / "ablation" / "table.md").read_text(encoding="utf-8")


def test_a_sweep_has_no_column_for_popularity(make):
    study = plans.plan_block_size()
    made = make(study, dict.fromkeys("12345", 0.8), {"popularity": 0.55})
    found = gather_results(study, PARAMS, *made)
    assert "AUC over popularity" not in format_results(found, PARAMS, "abc")


def test_rows_of_one_name_keep_their_own_tests(make):
    variants = (Variant("full", "same"), Variant("a", "same"), Variant("b", "same"))
    study = Study("ablation", "Rows of one name.", variants)
    made = make(study, {"full": 0.9, "a": 0.7, "b": 0.5}, {})
    full, worse, worst, _ = gather_results(study, PARAMS, *made).rows
    assert full.difference is None
    assert worst.difference.value < worse.difference.value < 0


# -- the other kinds -------------------------------------------------------------------------------


def test_an_ablation_tests_its_variants_and_shows_the_simple_scorers(make):
    means = {variant.name: 0.9 - 0.05 * i for i, variant in enumerate(plans.ABLATION.variants)}
    made = make(plans.ABLATION, means, {"popularity": 0.55, "sasrec": 0.7})
    found = gather_results(plans.ABLATION, PARAMS, *made)
    tested = [row.key for row in found.rows if row.difference]
    assert tested == [variant.name for variant in plans.ABLATION.variants[1:]]
    assert [row.key for row in found.rows][-2:] == ["popularity", "chance"]
    assert found.best is None
    assert "group" not in format_results(found, PARAMS, "abc").splitlines()[2]


def test_a_sweep_is_tested_against_the_settings_of_the_workspace(make, tmp_path):
    study = plans.plan_block_size()
    made = make(study, dict.fromkeys("12345", 0.8), {"oracle": 0.99})
    found = gather_results(study, PARAMS, *made)
    assert found.reference.key == "3"
    assert [row.key for row in found.rows if row.difference] == ["1", "2", "4", "5"]
    write_results(found, MICROLENS, "abc", tmp_path / "block-size")


def test_a_sweep_without_the_settings_of_the_workspace_is_tested_against_its_first_value(make):
    study = plans.plan_block_size()
    made = make(study, dict.fromkeys("12345", 0.8), {})
    other = {**PARAMS, "infer_preferences": {"block_size": 9}}
    assert gather_results(study, other, *made).reference.key == "1"


def test_seeds_have_a_mean_with_an_interval_over_runs(make, tmp_path):
    study = plans.plan_seeds(7, 3)
    made = make(study, {"7": 0.8, "8": 0.82, "9": 0.9}, {})
    found = gather_results(study, PARAMS, *made)
    assert [row.label for row in found.rows] == [
        "seed 7",
        "seed 8",
        "seed 9",
        "mean of 3",
        "chance",
    ]
    runs, mean = [row.figures["auc"].value for row in found.rows[:3]], found.rows[3].figures["auc"]
    assert mean.value == pytest.approx(np.mean(runs))
    assert mean.low < min(runs) < max(runs) < mean.high  # of three runs: 4.3 standard errors
    text = format_results(found, PARAMS, "abc")
    assert "Student's t over runs" in text
    assert " p:" not in text
    write_results(found, PARAMS, "abc", tmp_path / "seeds")
    table = (tmp_path / "seeds/table.csv").read_text(encoding="utf-8").splitlines()
    origins = [line.split(",")[-2:] for line in table[1:]]
    assert origins[3] == ["", ""]  # a mean is of no single experiment
    assert all(name for name, _ in origins[:3])


def test_one_seed_has_no_mean(make):
    study = plans.plan_seeds(7, 1)
    found = gather_results(study, PARAMS, *make(study, {"7": 0.8}, {}))
    assert [row.label for row in found.rows] == ["seed 7", "chance"]
    assert "Student" not in format_results(found, PARAMS, "abc")


def test_two_scorers_of_one_experiment_are_compared(make, tmp_path):
    baselines = {"gru4rec_image": 0.7, "gru4rec_summary": 0.8}
    made = make(plans.IMAGE_SUMMARY, {"gru4rec": 0.9}, baselines)
    found = gather_results(plans.IMAGE_SUMMARY, PARAMS, *made)
    labels = ["GRU4Rec on images", "GRU4Rec on summaries", "chance"]
    assert [row.label for row in found.rows] == labels
    assert found.rows[1].difference.value > 0
    write_results(found, MICROLENS, "abc", tmp_path / "image-summary")


def test_a_baseline_that_was_not_run_is_named(make):
    made = make(plans.IMAGE_SUMMARY, {"gru4rec": 0.9}, {"gru4rec_image": 0.7})
    with pytest.raises(DataError, match="metrics of gru4rec_summary"):
        gather_results(plans.IMAGE_SUMMARY, PARAMS, *made)


def test_other_cutoffs_are_shown_as_they_are():
    assert results.shown_metrics({"auc": 1, "hr@3": 1, "hr@10": 1})[1] == "hr@3"
    assert results.shown_metrics({"hr@3": 1, "hr@5": 1, "hr@10": 1})[1] == "hr@5"


# -- the paper's own figures -----------------------------------------------------------------------


def faint_marks(folder: Path) -> int:
    """Count the crosses of a figure; Matplotlib writes each as a use of one shape."""
    svg = ElementTree.parse(folder / "figure.svg")
    faint = [use for use in svg.iter(f"{SVG}use") if "#b0b0b0" in use.get("style", "")]
    return len(faint)


@pytest.mark.parametrize(
    ("study", "known"),
    [(plans.plan_table(), 9), (plans.ABLATION, 3), (plans.plan_block_size(), 5)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_papers_figures_are_drawn_on_its_data_and_not_in_the_pocket_world(
    make, tmp_path, study, known
):
    made = make(study, {variant.name: 0.8 for variant in study.variants}, {"popularity": 0.55})
    for name, params in {"microlens": MICROLENS, "pocket": PARAMS}.items():
        write_results(gather_results(study, params, *made), params, "abc", tmp_path / name)
    assert faint_marks(tmp_path / "microlens") == known + 1  # and that of the legend
    assert faint_marks(tmp_path / "pocket") == 0


# -- two revisions ---------------------------------------------------------------------------------


def test_two_revisions_are_compared_by_every_metric():
    ours, other = Ranked({MODEL: place(0.9)}, "a"), Ranked({MODEL: place(0.6, 1)}, "a")
    compared = compare_rankings(ours, other)
    assert list(compared) == ["auc", "hr@5", "ndcg@5", "mrr@5"]
    mean, others, difference = compared["auc"]
    assert mean - others == pytest.approx(difference.value)
    assert difference.p < 0.01
    text = format_comparison(("HEAD", "other"), compared, SEQUENCES)
    assert "| NDCG@5   |" in text
    assert "60 test sequences" in text
    assert "<0.001" in text


def test_revisions_with_other_candidates_are_not_compared():
    ours, other = Ranked({MODEL: place(0.9)}, "a"), Ranked({MODEL: place(0.9)}, "b")
    with pytest.raises(DataError, match="equal settings of preprocess and filter_sequences"):
        compare_rankings(ours, other)


def test_revisions_with_other_sequences_are_not_compared():
    shifted = place(0.9)
    shifted = Placements(shifted.sequences + 1, *(getattr(shifted, n) for n in COUNTS))
    with pytest.raises(DataError, match="the same candidates"):
        compare_rankings(Ranked({MODEL: place(0.9)}, "a"), Ranked({MODEL: shifted}, "a"))


def test_a_scorer_without_rankings_is_named():
    with pytest.raises(DataError, match="rankings of MLLM-MSR; got popularity"):
        compare_rankings(Ranked({"popularity": place(0.9)}, ""), Ranked({MODEL: place(0.9)}, ""))

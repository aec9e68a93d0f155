"""The studies as declared: each changes what it says, in settings that exist."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm_msr.core.errors import ParamsError
from mllm_msr.core.params import check_params
from mllm_msr.evaluation.scorers import MODEL
from mllm_msr.study import plans
from mllm_msr.study.published import DATASETS, PUBLISHED, SOURCES, find_published

ROOT = Path(__file__).parents[2]
PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
STUDIES = plans.plan_all(PARAMS)
every_study = pytest.mark.parametrize("study", STUDIES, ids=[study.name for study in STUDIES])


def params_with(key: str, value: Any) -> dict[str, Any]:
    """Return the project's settings with one changed."""
    return change(PARAMS, key, value)


def change(params: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return settings with one changed, which must be there."""
    name, _, rest = key.partition(".")
    assert name in params
    return {**params, name: change(params[name], rest, value) if rest else value}


@every_study
def test_every_variant_changes_settings_that_the_stages_accept(study):
    plans.check_study(study, PARAMS)
    for variant in study.variants:
        params = PARAMS
        for key, value in variant.settings.items():
            params = change(params, key, value)
        check_params(params, ROOT / "params.yaml")


@every_study
def test_the_variants_of_a_study_differ_in_name_label_and_settings(study):
    for seen in ("name", "label", "settings"):
        values = [str(getattr(variant, seen)) for variant in study.variants]
        assert len(values) == len(set(values))


def test_the_names_of_the_studies_are_listed():
    assert tuple(study.name for study in plans.plan_all(PARAMS)) == plans.STUDIES


def test_lengths_fit_the_data():
    assert plans.default_lengths(PARAMS) == plans.POCKET_LENGTHS
    real = params_with("preprocess.source", "microlens")
    assert plans.default_lengths(real) == plans.REAL_LENGTHS


def test_lengths_are_read_in_order_and_once():
    assert plans.parse_values("100, 50,100") == [50, 100]


@pytest.mark.parametrize("text", ["a", "", "50,", "0,10", "-5", "1.5"])
def test_other_texts_than_lengths_are_refused(text):
    with pytest.raises(ParamsError, match="whole numbers above 0"):
        plans.parse_values(text)


def test_more_seeds_keep_the_first_ones():
    three, five = plans.plan_seeds(7, 3), plans.plan_seeds(7, 5)
    assert five.variants[:3] == three.variants
    assert [dict(variant.settings) for variant in three.variants] == [
        {"sft.seed": seed} for seed in (7, 8, 9)
    ]


def test_a_learning_curve_trains_baselines_on_the_same_sequences():
    zero, *few = plans.plan_learning_curve(PARAMS, [64, 256]).variants
    assert (zero.settings, [*zero.shown()]) == ({"sft.epochs": 0}, [MODEL])
    for variant, value in zip(few, (64, 256), strict=True):
        assert variant.settings == {
            "filter_sequences.budget.train": value,
            "filter_sequences.budget.interactions": "used",
        }
        assert [*variant.shown()] == [MODEL, "sasrec", "gru4rec_f"]


def test_a_learning_curve_shows_only_baselines_that_are_named():
    params = params_with("feature_baselines.models", [])
    assert [*plans.plan_learning_curve(params, [8]).variants[1].shown()] == [MODEL, "sasrec"]


def test_a_variant_that_changes_nothing_is_refused():
    with pytest.raises(ParamsError, match="'R: direct preference' already"):
        plans.check_study(plans.ABLATION, params_with("infer_preferences.mode", "direct"))


def test_a_variant_that_still_changes_something_is_not_refused():
    plans.check_study(plans.plan_table(), params_with("recommender.image", False))


def test_a_study_of_one_variant_may_be_the_settings_of_the_workspace():
    models = plans.IMAGE_SUMMARY.variants[0].settings["feature_baselines.models"]
    plans.check_study(plans.IMAGE_SUMMARY, params_with("feature_baselines.models", models))


def test_a_revision_needs_a_model():
    with pytest.raises(ParamsError, match="expected --text-model beside --text-revision"):
        plans.plan_table(None, "abc")


def test_the_row_of_titles_may_have_a_language_model_of_its_own():
    full, zero_shot, titles = plans.plan_table("a/language-model", "abc").variants
    assert titles.settings["recommender.model"] == "a/language-model"
    assert titles.settings["recommender.revision"] == "abc"
    assert not titles.settings["recommender.image"]
    for variant in (full, zero_shot, plans.plan_table().variants[2]):
        assert "recommender.model" not in variant.settings


@pytest.mark.parametrize(
    ("study", "key", "value"),
    [
        (plans.plan_block_size(), "infer_preferences.mode", "direct"),
        (plans.plan_block_size(), "infer_preferences.mode", "none"),
        (plans.plan_summary_length([8, 16]), "infer_preferences.mode", "none"),
        (plans.plan_seeds(1, 3), "sft.epochs", 0),
    ],
)
def test_a_study_of_an_idle_setting_is_refused(study, key, value):
    with pytest.raises(ParamsError, match=f"study {study.name} varies; got {key}: {value}"):
        plans.check_study(study, params_with(key, value))


def test_a_sweep_may_pass_through_the_settings_of_the_workspace():
    plans.check_study(plans.plan_block_size(), PARAMS)


def test_a_setting_that_does_not_exist_is_named():
    with pytest.raises(ParamsError, match=r"setting sft\.nothing; got none"):
        plans.look_up(PARAMS, "sft.nothing")


# -- the paper's figures ---------------------------------------------------------------------------


def test_a_study_of_a_method_that_is_left_out_is_refused():
    params = params_with("recommender.model", None)
    with pytest.raises(ParamsError, match=r"recommender\.model: expected a model for MLLM-MSR"):
        plans.check_study(plans.ABLATION, params)
    plans.check_study(plans.IMAGE_SUMMARY, params)


def papers_params(preset: str = "microlens_paper") -> dict[str, Any]:
    """Return the project's settings with a preset of the paper's protocol applied."""
    changes = yaml.safe_load((ROOT / f"presets/{preset}.yaml").read_text(encoding="utf-8"))
    return merge(PARAMS, changes)


def merge(params: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return settings with those of a preset."""
    return params | {
        key: merge(params[key], value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }


def test_the_papers_figures_are_for_the_papers_data_only():
    papers = papers_params()
    assert find_published("ablation", "full", papers) == {"auc": 0.832}
    assert find_published("table", "full", papers) == {
        "auc": 0.8317,
        "hr@5": 0.7823,
        "mrr@5": 0.6038,
    }
    for source in ("pocket", "tables"):
        assert find_published("table", "full", change(papers, "preprocess.source", source)) == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("test_negatives", 100),
        ("split", "time"),
        ("split", "cold_items"),
        ("budget.test", 500),
        ("budget.train", 2000),
        ("budget.interactions", "used"),
        ("history", "recent"),
        ("target", "last"),
        ("max_history", 9),
        ("min_item_interactions", 1),
        ("fold", 0),
        ("test_share", 0.2),
    ],
)
def test_the_papers_figures_are_not_for_other_questions(key, value):
    changed = change(papers_params(), f"filter_sequences.{key}", value)
    assert find_published("table", "full", changed) == {}


def test_the_papers_figures_are_not_for_our_protocol():
    assert find_published("table", "full", papers_params("microlens")) == {}


@pytest.mark.parametrize(
    ("category", "auc"), [("Baby_Products", 0.844), ("Video_Games", 0.857), ("Books", None)]
)
def test_the_papers_amazon_sets_are_known_by_their_categories(category, auc):
    params = change(papers_params("amazon_baby_paper"), "preprocess.amazon.category", category)
    assert find_published("block-size", "3", params).get("auc") == auc


def test_the_presets_of_the_papers_protocol_have_the_papers_figures():
    for preset in ("microlens_paper", "amazon_baby_paper", "amazon_games_paper"):
        assert find_published("table", "full", papers_params(preset)), preset


def test_every_published_figure_has_a_source_and_a_variant_of_ours():
    studies = {study.name: study for study in plans.plan_all(PARAMS)}
    for each in PUBLISHED:
        variants = studies[each.study].variants
        known = {variant.name for variant in variants}
        known |= {scorer for variant in variants for scorer in variant.scorers}
        assert each.variant in known
        assert each.study in SOURCES
        assert len(each.values) == len(DATASETS)
        assert all(0 < value < 1 for value in each.values)


def test_a_study_of_vectors_is_refused_without_the_model_that_makes_them():
    params = params_with("encode_items.model", None)
    with pytest.raises(ParamsError, match=r"encode_items\.model: expected a model for gru4rec"):
        plans.check_study(plans.IMAGE_SUMMARY, params)


def test_folds_vary_the_fold_and_run_no_model():
    study = plans.plan_folds(PARAMS, 4)
    assert [variant.settings["filter_sequences.fold"] for variant in study.variants] == [0, 1, 2, 3]
    assert {variant.settings["filter_sequences.test_share"] for variant in study.variants} == {0.25}
    assert {variant.settings["recommender.model"] for variant in study.variants} == {None}
    shown = study.variants[0].shown()
    assert {"sasrec", "sasrec_f", "popularity", "chance"} <= shown.keys()
    assert MODEL not in shown


def test_folds_need_vectors_only_for_baselines_that_read_them():
    without = {**params_with("encode_items.model", None), "recommender": {"model": None}}
    with pytest.raises(ParamsError, match=r"encode_items.model"):
        plans.check_study(plans.plan_folds(without, 3), without)
    without["feature_baselines"] = {**PARAMS["feature_baselines"], "models": []}
    plans.check_study(plans.plan_folds(without, 3), without)

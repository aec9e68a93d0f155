"""Settings are what they say, or one line says what is wrong with them."""

import math
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from dvc.utils.serialize import modify_yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from mllm_msr.baselines.discovery import all_baselines
from mllm_msr.core.errors import ParamsError
from mllm_msr.core.params import (
    RENAMED,
    SECTIONS,
    BaselinesParams,
    FilterSequencesParams,
    Params,
    PocketWorldParams,
    SftParams,
    check_params,
    load_all_params,
    load_params,
)

SHIPPED = Path("params.yaml")


def write(folder: Path, section: str, **changes: Any) -> Path:
    document = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    document[section] |= changes
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


@pytest.mark.parametrize("section", SECTIONS)
def test_the_shipped_params_load(section: str) -> None:
    assert load_params(SECTIONS[section], SHIPPED).model_fields_set


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_and_missing_keys_are_named_in_one_line(tmp_path: Path, section: str) -> None:
    document = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    lost = next(iter(document[section]))
    document[section]["sead"] = document[section].pop(lost)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(ParamsError) as caught:
        load_params(SECTIONS[section], path)
    message = str(caught.value)
    assert f"unknown {section}.sead" in message
    assert f"missing {section}.{lost}" in message
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize("section", SECTIONS)
def test_every_number_refuses_a_text(tmp_path: Path, section: str) -> None:
    numbers = [
        name
        for name, value in yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))[section].items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    path = write(tmp_path, section, **dict.fromkeys(numbers, "three"))
    if not numbers:
        return
    with pytest.raises(ParamsError) as caught:
        load_params(SECTIONS[section], path)
    assert all(f"{section}.{name} = 'three'" in str(caught.value) for name in numbers)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("sft", {"epochs": -1}, "sft.epochs = -1"),
        ("sft", {"epochs": 1.5}, "sft.epochs = 1.5"),
        ("sft", {"epochs": True}, "sft.epochs = True"),
        ("sft", {"learning_rate": 0}, "sft.learning_rate = 0"),
        ("sft", {"warmup_share": 1}, "sft.warmup_share = 1"),
        ("sft", {"schedule": "step"}, "sft.schedule = 'step'"),
        ("sft", {"lora": {"rank": 8}}, r"missing sft.lora.alpha, sft.lora.dropout, sft.lora.lay"),
        ("recommender", {"image": "yes"}, "recommender.image = 'yes'"),
        ("evaluate", {"ks": []}, "evaluate.ks"),
        ("evaluate", {"ks": [5, 3]}, "ks must ascend"),
        ("evaluate", {"ks": [3, 3]}, "ks must ascend"),
        ("evaluate", {"confidence": 1}, "evaluate.confidence = 1"),
        ("filter_sequences", {"min_history": 10}, "min_history is larger than max_history"),
        ("filter_sequences", {"target": "popular"}, "target: popular needs history: popular"),
        ("filter_sequences", {"valid_share": 0.9}, "leave nothing to train on"),
        ("filter_sequences", {"fold": 10}, "there are 1 / test_share folds"),
        ("filter_sequences", {"fold": 0, "split": "time"}, "fold needs split: users"),
        (
            "filter_sequences",
            {"split": "cold_items", "target": "popular", "history": "popular"},
            "split: cold_items needs target: last",
        ),
        ("filter_sequences", {"split": "cold_items", "test_share": 0.0}, "a test_share above 0"),
        ("filter_sequences", {"cold_share": 0.0}, "filter_sequences.cold_share = 0.0"),
        (
            "filter_sequences",
            {"budget": {"train": None, "valid": None, "test": 0, "interactions": "all"}},
            "filter_sequences.budget.test = 0",
        ),
        (
            "filter_sequences",
            {"budget": {"train": 0, "valid": None, "test": None, "interactions": "used"}},
            "learns from training sequences, and train is 0",
        ),
        (
            "filter_sequences",
            {"valid_share": 0.0},
            "filter_sequences.valid_share: expected validation sequences, by which sft chooses",
        ),
        (
            "filter_sequences",
            {"budget": {"train": 0, "valid": None, "test": None, "interactions": "all"}},
            "filter_sequences.budget.train: expected training sequences, since sft.epochs is 3;",
        ),
        ("summarize_items", {"text": "none", "image": False}, "nothing is left to summarize"),
        ("summarize_items", {"text": True}, "text = True .*true is now model, false is now none"),
        ("infer_preferences", {"block_size": 0}, "infer_preferences.block_size = 0"),
        ("sft", {"seed": 2**32}, "sft.seed = 4294967296"),
        ("filter_sequences", {"seed": -1}, "filter_sequences.seed = -1"),
        ("sft", {"learning_rate": math.inf}, "sft.learning_rate = inf"),
        ("sft", {"learning_rate": math.nan}, "sft.learning_rate = nan"),
        ("sft", {"learning_rate": 11}, "sft.learning_rate = 11"),
        ("fetch_images", {"failed_share": math.nan}, "fetch_images.failed_share = nan"),
        ("baselines", {"markov": {"smoothing": math.inf}}, "baselines.markov.smoothing = inf"),
        ("infer_preferences", {"max_new_tokens": 10**9}, "max_new_tokens = 1000000000"),
        ("pocket_world", {"users": 10**12}, "pocket_world.users = 1000000000000"),
    ],
)
def test_impossible_values_and_contradictions_are_errors(
    tmp_path: Path, section: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParamsError, match=message) as caught:
        load_params(SECTIONS[section], write(tmp_path, section, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["sft.lora", "baselines.sasrec", "feature_baselines.sasrec_f"])
def test_a_dropout_of_everything_is_refused(tmp_path: Path, section: str) -> None:
    name, _, part = section.partition(".")
    settings = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))[name][part]
    path = write(tmp_path, name, **{part: settings | {"dropout": 1.0}})
    with pytest.raises(ParamsError, match=rf"{section}\.dropout = 1\.0"):
        load_params(SECTIONS[name], path)


def integers(section: BaseModel, above: str = "") -> Iterator[str]:
    """Yield the keys of a section's whole numbers, those of its parts too."""
    for name, value in section:
        if isinstance(value, BaseModel):
            yield from integers(value, f"{above}{name}.")
        elif type(section).model_fields[name].annotation is int:
            yield f"{above}{name}"


@pytest.mark.parametrize("key", list(integers(load_all_params(SHIPPED))))
def test_every_whole_number_and_every_seed_has_an_upper_bound(tmp_path: Path, key: str) -> None:
    document = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    name, *above, last = key.split(".")
    place = document[name]
    for part in above:
        place = place[part]
    place[last] = 2**32
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(ParamsError, match=f"{key} = 4294967296"):
        load_params(SECTIONS[name], path)


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_every_seed_is_one_that_numpy_and_torch_take(tmp_path: Path, seed: int) -> None:
    assert load_params(SftParams, write(tmp_path, "sft", seed=seed)).seed == seed
    np.random.RandomState(seed)
    torch.manual_seed(seed)


@pytest.mark.parametrize("written", ["050", "0x32", "0b11", "1_000", "1:30", "0o17"])
def test_a_number_that_yaml_1_1_and_1_2_read_differently_is_refused(
    tmp_path: Path, written: str
) -> None:
    path = tmp_path / "params.yaml"
    shipped = SHIPPED.read_text(encoding="utf-8")
    path.write_text(shipped.replace("epochs: 3 ", f"epochs: {written} "), encoding="utf-8")
    with pytest.raises(ParamsError, match=f"sft.epochs = '{written}'"):
        load_params(SftParams, path)


@pytest.mark.parametrize("asked", [SftParams, FilterSequencesParams])
@pytest.mark.parametrize(
    "line", ["  epochs: 5\n", "  lora: {rank: 1}\n", "sft:\n  epochs: 5\n", "evaluate: {}\n"]
)
def test_a_key_that_stands_twice_is_refused(
    tmp_path: Path, asked: type[SftParams], line: str
) -> None:
    path = tmp_path / "params.yaml"
    shipped = SHIPPED.read_text(encoding="utf-8")
    path.write_text(shipped.replace("\nbaselines:", f"{line}\nbaselines:"), encoding="utf-8")
    key = line.strip().partition(":")[0]
    with pytest.raises(ParamsError, match=rf"got the key {key} twice in .*line \d+") as caught:
        load_params(asked, path)
    assert "\n" not in str(caught.value)


def test_a_fault_in_the_section_of_a_later_stage_is_found_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "evaluate", confidence=95)
    with pytest.raises(ParamsError, match=r"evaluate\.confidence = 95"):
        load_params(PocketWorldParams, path)


def test_a_file_with_the_section_alone_is_enough(tmp_path: Path) -> None:
    document = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({"sft": document["sft"]}), encoding="utf-8")
    assert load_params(SftParams, path) == load_params(SftParams, SHIPPED)


ROLES = ("summarize_items", "encode_items", "infer_preferences", "recommender")


def write_many(folder: Path, changes: dict[str, dict[str, Any]]) -> Path:
    document = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    for section, keys in changes.items():
        document[section] |= keys
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    left_out=st.sets(st.sampled_from(ROLES)),
    mode=st.sampled_from(["recurrent", "direct", "none"]),
    featured=st.booleans(),
)
def test_a_stage_is_left_out_only_where_no_other_one_needs_it(
    tmp_path: Path, left_out: set[str], mode: str, featured: bool
) -> None:
    changes: dict[str, dict[str, Any]] = {role: {"model": None} for role in left_out}
    changes.setdefault("infer_preferences", {})["mode"] = mode
    changes["feature_baselines"] = {"models": ["vbpr"] if featured else []}
    path = write_many(tmp_path, changes)
    runs = {role: role not in left_out for role in ROLES}
    fits = (
        (runs["summarize_items"] or not runs["infer_preferences"] or mode == "none")
        and (runs["infer_preferences"] or not runs["recommender"] or mode == "none")
        and (runs["encode_items"] or not featured)
    )
    for section in SECTIONS.values():
        with nullcontext() if fits else pytest.raises(ParamsError, match=r"\.model: .* got null"):
            load_params(section, path)


def test_copied_texts_need_no_model(tmp_path: Path) -> None:
    path = write(tmp_path, "summarize_items", model=None, text="raw", image=False)
    assert load_all_params(path).summarize_items.copies_texts
    with pytest.raises(ParamsError, match=r"summarize_items.model: .* got null"):
        load_all_params(write(tmp_path, "summarize_items", model=None, text="raw", image=True))


@pytest.mark.parametrize(
    ("left_out", "fix"),
    [
        (
            "summarize_items",
            "infer_preferences.model to null, or infer_preferences.mode to none,"
            " or summarize_items.text to raw and image to false",
        ),
        ("infer_preferences", "recommender.model to null, or infer_preferences.mode to none"),
        ("encode_items", r"feature_baselines.models to \[\]"),
    ],
)
def test_a_missing_model_is_one_line_that_says_who_needs_it(
    tmp_path: Path, left_out: str, fix: str
) -> None:
    path = write(tmp_path, left_out, model=None)
    with pytest.raises(ParamsError, match=f"{left_out}.model: expected a model, since") as caught:
        load_params(SftParams, path)
    assert re.search(f"got null; set one, or set {fix}$", str(caught.value))


# -- baselines -------------------------------------------------------------------------------------


def test_the_settings_of_each_baseline_have_the_type_that_its_file_declares() -> None:
    settings = load_all_params(SHIPPED)
    for baseline in all_baselines():
        assert type(getattr(settings, baseline.stage).of(baseline.name)) is baseline.params


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"markov": None}, r"baselines\.markov = None"),
        ({"markov": {}}, r"missing baselines\.markov\.smoothing"),
        ({"markov": {"smoothing": 1.0, "days": 1}}, r"unknown baselines\.markov\.days"),
        ({"markow": {"smoothing": 1.0}}, r"unknown baselines\.markow"),
        ({"vbpr": {"width": 1}}, r"unknown baselines\.vbpr"),
        ({"models": ["markow"]}, r"models are among bert4rec, .*; got 'markow'"),
        ({"models": ["vbpr"]}, r"models are among bert4rec, .*; got 'vbpr'"),
        ({"models": ["markov", "markov"]}, "models names one twice"),
        ({"models": "markov"}, r"baselines\.models = 'markov'"),
    ],
)
def test_a_fault_in_the_settings_of_a_baseline_is_found_by_every_stage(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, "baselines", **changes)
    for section in (BaselinesParams, PocketWorldParams):
        with pytest.raises(ParamsError, match=message) as caught:
            load_params(section, path)
        assert "\n" not in str(caught.value)


def test_a_baseline_without_settings_is_an_error(tmp_path: Path) -> None:
    document = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    del document["feature_baselines"]["gru4rec_image"]
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(ParamsError, match=r"missing feature_baselines\.gru4rec_image"):
        load_params(SftParams, path)


def test_baselines_are_listed_in_the_order_of_the_file() -> None:
    written = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))["baselines"]
    assert list(load_params(BaselinesParams, SHIPPED).model_dump()) == list(written)


# -- the whole file --------------------------------------------------------------------------------


def test_the_model_of_the_whole_file_holds_every_section_as_it_is_loaded_alone() -> None:
    document = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    assert list(SECTIONS) == list(Params.model_fields)
    assert set(document) == set(SECTIONS)
    settings = load_all_params(SHIPPED)
    assert settings == check_params(document, SHIPPED)
    for name, section in SECTIONS.items():
        assert getattr(settings, name) == load_params(section, SHIPPED)
        assert getattr(settings, name).model_dump() == document[name]
    assert Params.model_validate(document) == settings


def test_a_file_without_a_section_is_not_the_whole(tmp_path: Path) -> None:
    document = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    del document["report"]
    with pytest.raises(ParamsError, match="expected a section report; got none"):
        check_params(document, tmp_path / "params.yaml")


@pytest.mark.parametrize("old", RENAMED)
def test_the_error_about_a_renamed_key_names_the_new_one(tmp_path: Path, old: str) -> None:
    section, _, key = old.partition(".")
    path = write(tmp_path, section, **{key: 1})
    with pytest.raises(ParamsError, match=rf"unknown {old} \(now {RENAMED[old]}\)") as caught:
        load_params(SftParams, path)
    assert "\n" not in str(caught.value)


def test_an_empty_name_is_no_model(tmp_path: Path) -> None:
    path = write(tmp_path, "recommender", model="")
    with pytest.raises(ParamsError, match=r"recommender\.model = ''"):
        load_params(SECTIONS["recommender"], path)


def test_a_rate_that_dvc_wrote_is_a_number(tmp_path: Path) -> None:
    path = write(tmp_path, "sft")
    with modify_yaml(str(path)) as document:
        document["sft"]["learning_rate"] = 0.00002
    assert "2e-05" in path.read_text(encoding="utf-8")
    assert load_params(SftParams, path).learning_rate == 2e-5


@pytest.mark.parametrize("text", ["2e-5", "2E-5", "2.0e-5", "0.2e-4", "+2e-5"])
def test_a_rate_is_a_number_however_it_is_written(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    shipped = SHIPPED.read_text(encoding="utf-8")
    path.write_text(re.sub(r"learning_rate: \S+", f"learning_rate: {text}", shipped))
    assert load_params(SftParams, path).learning_rate == 2e-5


def test_settings_cannot_be_changed_afterwards() -> None:
    loaded = load_params(FilterSequencesParams, SHIPPED)
    with pytest.raises(ValueError, match="frozen"):
        loaded.seed = 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sft: [", "expected valid YAML"),
        ("- sft", "expected sections; got list"),
        ("", "expected sections; got NoneType"),
        ("evaluate: {}", "expected a section sft; got none"),
        ("sft:", "sft"),
        ("stf: {}", "unknown section stf"),
        (b"\xff\xfe", "expected valid YAML"),
    ],
)
def test_a_file_that_holds_no_settings_is_an_error(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ParamsError, match=message) as caught:
        load_params(SftParams, path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="run from the project's folder"):
        load_params(SftParams, tmp_path / "params.yaml")

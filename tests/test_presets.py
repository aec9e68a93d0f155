"""A preset changes the settings that it names, and of ``params.yaml`` no other line."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mllm_msr.core.errors import ParamsError
from mllm_msr.core.params import SECTIONS, load_params
from mllm_msr.presets import app, describe, find_presets, plan

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "params.yaml"
PRESETS = find_presets(ROOT / "presets")
DATASETS = ["microlens", "amazon_baby", "amazon_games"]
PROTOCOLS = [*DATASETS, *(f"{name}_paper" for name in DATASETS)]

every_preset = pytest.mark.parametrize("name", PRESETS)


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_bytes(SHIPPED.read_bytes())
    return path


def run(command: str, params: Path, folder: Path = ROOT / "presets") -> str:
    options = ["--params", str(params), "--folder", str(folder)]
    ended = CliRunner().invoke(app, [*command.split(), *options], catch_exceptions=False)
    assert ended.exit_code == 0
    return ended.output


def write_preset(params: Path, content: str) -> Path:
    folder = params.parent / "presets"
    folder.mkdir()
    (folder / "mine.yaml").write_text(content, encoding="utf-8")
    return folder


def flatten(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= (
            flatten(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
        )
    return flat


def settings(path: Path) -> dict[str, Any]:
    return flatten(yaml.safe_load(path.read_text(encoding="utf-8")))


def loaded(path: Path) -> dict[str, Any]:
    """Read settings as the stages do."""
    return flatten({name: load_params(SECTIONS[name], path).model_dump() for name in SECTIONS})


# -- those that are shipped ------------------------------------------------------------------------


def test_each_dataset_has_a_preset_for_each_protocol() -> None:
    assert set(PRESETS) == {*PROTOCOLS, "tables", "qwen", "smollm2_text", "pocket", "ids_only"}


@every_preset
def test_a_preset_opens_with_what_it_is(name: str) -> None:
    assert re.fullmatch(r"[A-Z].{30,90}\.", describe(PRESETS[name]))


@every_preset
def test_every_stage_accepts_the_settings_of_a_preset(name: str, params: Path) -> None:
    run(f"apply {name}", params)
    assert loaded(params) == loaded(SHIPPED) | settings(PRESETS[name])


@every_preset
def test_only_the_lines_of_changed_values_differ(name: str, params: Path) -> None:
    changes, text = plan([PRESETS[name]], params)
    old = SHIPPED.read_text(encoding="utf-8").splitlines()
    new = text.splitlines()
    assert len(old) == len(new)
    differing = [
        (a.split(":")[0], b.split(":")[0]) for a, b in zip(old, new, strict=True) if a != b
    ]
    assert all(before == after for before, after in differing)
    keys = [before.strip() for before, _ in differing]
    assert sorted(keys) == sorted(change.key.rpartition(".")[2] for change in changes)


@every_preset
def test_every_comment_survives(name: str, params: Path) -> None:
    run(f"apply {name}", params)
    comments = [re.findall(r"#.*", path.read_text(encoding="utf-8")) for path in (SHIPPED, params)]
    assert comments[0] == comments[1]


@every_preset
def test_applying_twice_changes_nothing_more(name: str, params: Path) -> None:
    run(f"apply {name}", params)
    once = params.read_bytes()
    assert "nothing to change" in run(f"apply {name}", params)
    assert params.read_bytes() == once


@every_preset
def test_pocket_brings_back_the_settings_as_shipped(name: str, params: Path) -> None:
    run(f"apply {name}", params)
    run("apply pocket", params)
    assert loaded(params) == loaded(SHIPPED)


@pytest.mark.parametrize("name", [*PROTOCOLS, "tables"])
def test_a_dataset_keeps_nothing_of_the_preset_before_it(name: str) -> None:
    decided = {key for file in PRESETS.values() for key in settings(file)}
    # What one publisher's reader looks at, no other source asks.
    others = {
        key
        for key in decided
        for publisher in ("microlens", "amazon")
        if key.startswith(f"preprocess.{publisher}.") and not name.startswith(publisher)
    }
    assert set(settings(PRESETS[name])) == decided - others


def test_pocket_sets_every_key_that_any_preset_sets() -> None:
    decided = {key for file in PRESETS.values() for key in settings(file)}
    assert set(settings(PRESETS["pocket"])) == decided


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, {"unknown_items": "keep"}) for name in PROTOCOLS if name.startswith("micro")),
        *(
            (name, {"unknown_items": "drop", "amazon.bad_records": "drop"})
            for name in PROTOCOLS
            if name.startswith("amazon")
        ),
        ("pocket", {"unknown_items": "error", "amazon.bad_records": "error"}),
    ],
)
def test_one_setting_is_enough_for_what_a_publishers_files_are_like(
    name: str, expected: dict[str, str]
) -> None:
    set_by_it = settings(PRESETS[name])
    assert {key: set_by_it[f"preprocess.{key}"] for key in expected} == expected


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_papers_protocol_is_what_is_known_of_the_paper_and_its_code(
    dataset: str, params: Path
) -> None:
    run(f"apply {dataset}_paper", params)
    source, _, category = dataset.partition("_")
    llava, llama = "llava-hf/llava-v1.6-mistral-7b-hf", "meta-llama/Meta-Llama-3-8B-Instruct"
    expected = {
        "preprocess.source": source,
        "filter_sequences.min_user_interactions": 6,
        "filter_sequences.min_item_interactions": 5,
        # The six most popular of a user: the last of them is the target.
        "filter_sequences.history": "popular",
        "filter_sequences.max_history": 5,
        "filter_sequences.target": "popular",
        "filter_sequences.split": "users",
        "filter_sequences.valid_share": 0.1,
        "filter_sequences.test_share": 0.1,
        "filter_sequences.train_sampling": "uniform",
        "filter_sequences.evaluation_sampling": ["uniform", "targets"],
        "filter_sequences.train_negatives": 1,
        "filter_sequences.valid_negatives": 20,
        "filter_sequences.test_negatives": 20,
        "summarize_items.model": llava,
        "summarize_items.fusion": "model",
        "infer_preferences.model": llama,
        "infer_preferences.mode": "recurrent",
        "infer_preferences.block_size": 3,
        "recommender.model": llava,
        "sft.lora.rank": 8,
        "sft.epochs": 10,
        "sft.learning_rate": 2e-5,
        "sft.loss": "yes_no",
    }
    if category:
        names = {"baby": "Baby_Products", "games": "Video_Games"}
        expected["preprocess.amazon.category"] = names[category]
    found = loaded(params)
    assert {key: found[key] for key in expected} == expected


def test_qwen_caps_the_image_and_takes_every_role(params: Path) -> None:
    run("apply microlens_paper", params)
    run("apply qwen", params)
    found = loaded(params)
    roles = ("summarize_items", "encode_items", "infer_preferences", "recommender")
    assert {found[f"{role}.model"] for role in roles} == {"Qwen/Qwen3-VL-4B-Instruct"}
    assert found["fetch_images.image_side"] == 448


@pytest.mark.parametrize("name", [None, *DATASETS, "tables", "qwen"])
def test_ids_only_leaves_out_every_model_whatever_the_settings_were(
    name: str | None, params: Path
) -> None:
    if name:
        run(f"apply {name}", params)
    before = loaded(params)
    run("apply ids_only", params)
    found = loaded(params)
    changed = {key for key in before if found[key] != before[key]}
    roles = ("summarize_items", "encode_items", "infer_preferences", "recommender")
    lists = ("feature_baselines.models", "text_baselines.models")
    assert changed == {*(f"{role}.model" for role in roles), *lists}
    assert {found[f"{role}.model"] for role in roles} == {None}
    assert all(found[key] == [] for key in lists)


def test_ids_only_touches_neither_the_source_nor_the_data() -> None:
    touched = {key.partition(".")[0] for key in settings(PRESETS["ids_only"])}
    data = {"pocket_world", "preprocess", "fetch_images", "filter_sequences"}
    assert not touched & data


def test_the_docs_show_what_applying_qwen_prints(
    params: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(params.parent)
    run("apply microlens_paper", Path("params.yaml"))
    said = run("apply qwen", Path("params.yaml"))
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert f"$ mllm-msr presets apply qwen\n{said}```" in page


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_two_protocols_of_a_dataset_differ_in_who_is_asked_about_what(dataset: str) -> None:
    ours, paper = (settings(PRESETS[name]) for name in (dataset, f"{dataset}_paper"))
    assert {key: (ours[key], paper[key]) for key in ours if ours[key] != paper[key]} == {
        "filter_sequences.min_history": (3, 5),
        "filter_sequences.max_history": (9, 5),
        "filter_sequences.history": ("recent", "popular"),
        "filter_sequences.target": ("last", "popular"),
    }


def test_one_model_takes_all_roles_of_a_dataset_whose_protocol_stays(params: Path) -> None:
    run("apply microlens_paper", params)
    run("apply qwen", params)
    assert loaded(params) == loaded(SHIPPED) | settings(PRESETS["microlens_paper"]) | settings(
        PRESETS["qwen"]
    )
    models = {value for key, value in loaded(params).items() if key.endswith(".model")}
    assert len(models) == 1
    assert not any(key.startswith(("filter", "sft")) for key in settings(PRESETS["qwen"]))


@pytest.mark.parametrize("dataset", DATASETS)
def test_smollm2_text_reads_no_image_and_loads_one_model(dataset: str, params: Path) -> None:
    run(f"apply {dataset} smollm2_text", params)
    found = loaded(params)
    assert found == loaded(SHIPPED) | settings(PRESETS[dataset]) | settings(PRESETS["smollm2_text"])
    models = {value for key, value in found.items() if key.endswith(".model")}
    assert models == {"models/smollm2-135m-instruct"}
    shows = ("summarize_items.image", "recommender.image")
    assert not any(found[key] for key in shows)
    assert found["feature_baselines.gru4rec_f.features"] == ["summary"]
    assert found["preprocess.microlens.covers"] == "optional"


# -- the commands ----------------------------------------------------------------------------------


def test_list_names_each_preset_and_says_what_it_is(params: Path) -> None:
    lines = run("list", params).splitlines()
    assert [line.split("  ")[0] for line in lines] == list(PRESETS)
    assert all(line.endswith(describe(PRESETS[line.split("  ")[0]])) for line in lines)


def test_the_docs_show_what_list_prints(params: Path) -> None:
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert run("list", params) in page


def test_show_prints_old_and_new_values_and_writes_nothing(params: Path) -> None:
    folder = write_preset(params, "sft: {epochs: 1, seed: 2026}\nrecommender: {revision: abc}\n")
    shown = run("show mine", params, folder)
    assert shown.splitlines() == ["sft.epochs: 3 -> 1", "recommender.revision: null -> abc"]
    assert params.read_bytes() == SHIPPED.read_bytes()


def test_apply_prints_the_changes_and_what_to_run_next(params: Path) -> None:
    folder = write_preset(params, "preprocess: {source: tables}\n")
    assert run("apply mine", params, folder).splitlines() == [
        "preprocess.source: pocket -> tables",
        f"wrote {params}: 1 settings",
        "next: put the raw files into data/raw/tables (docs/datasets.md), then dvc repro",
    ]


@pytest.mark.parametrize("names", ["microlens qwen", "qwen microlens", "ids_only qwen pocket"])
def test_several_presets_are_applied_one_after_another(
    names: str, params: Path, tmp_path: Path
) -> None:
    one_by_one = tmp_path / "one_by_one.yaml"
    one_by_one.write_bytes(params.read_bytes())
    for name in names.split():
        run(f"apply {name}", one_by_one)
    run(f"apply {names}", params)
    assert loaded(params) == loaded(one_by_one)


def test_show_of_several_presets_has_a_line_for_each_value_that_changes_in_the_end(
    params: Path,
) -> None:
    folder = write_preset(params, "sft: {epochs: 1, seed: 7}\nrecommender: {revision: abc}\n")
    (folder / "back.yaml").write_text("sft: {epochs: 3}\nrecommender: {revision: def}\n")
    shown = run("show mine back", params, folder)
    assert shown.splitlines() == ["sft.seed: 2026 -> 7", "recommender.revision: null -> def"]


def test_an_invalid_second_preset_writes_nothing(params: Path) -> None:
    folder = write_preset(params, "sft: {epochs: 1}\n")
    (folder / "wrong.yaml").write_text("sft: {epochs: -1}\n")
    with pytest.raises(ParamsError, match=r"wrong\.yaml, sft: .*sft\.epochs = -1"):
        run("apply mine wrong", params, folder)
    assert params.read_bytes() == SHIPPED.read_bytes()


def test_presets_lie_beside_the_settings(params: Path) -> None:
    write_preset(params, "# Mine.\nsft: {epochs: 1}\n")
    ended = CliRunner().invoke(app, ["list", "--params", str(params)])
    assert ended.output == "mine  Mine.\n"


def test_without_presets_beside_the_settings_the_shipped_ones_are_listed(tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["list", "--params", str(tmp_path / "params.yaml")])
    assert [line.split("  ")[0] for line in ended.output.splitlines()] == list(PRESETS)


def test_show_reads_the_shipped_settings_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, ["show", "pocket"], catch_exceptions=False)
    assert ended.stdout.splitlines()[-1] == f"nothing to change: {SHIPPED} already says so"
    assert ended.stderr == f"no params.yaml here; reading the shipped {SHIPPED}\n"


@pytest.mark.parametrize("words", ["apply pocket", "show pocket --params other.yaml"])
def test_other_missing_settings_are_an_error(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParamsError, match="yaml: expected a file; got none"):
        CliRunner().invoke(app, words.split(), catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_list_stays_in_its_line_with_its_comment(params: Path) -> None:
    folder = write_preset(params, "evaluate: {ks: [1, 5]}\n")
    assert run("apply mine", params, folder).startswith("evaluate.ks: [3, 5, 10] -> [1, 5]\n")
    assert re.search(
        r"^  ks: \[1, 5\] +# of HR@k", params.read_text(encoding="utf-8"), re.MULTILINE
    )


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sft: {epoch: 1}", "mine.yaml, sft: expected keys among lora, loss, .*; got epoch;"),
        ("sft: {lora: {rnk: 8}}", "mine.yaml, sft.lora: expected keys among rank, .*; got rnk;"),
        (
            "sft: {epochs: {most: 3}}",
            "mine.yaml, sft.epochs: expected keys among no keys; got most",
        ),
        ("sftt: {epochs: 1}", "mine.yaml: expected keys among pocket_world, .*; got sftt;"),
        ("sft: {epochs: -1}", "mine.yaml, sft: .*sft.epochs = -1"),
        ("sft: {epochs: 2026-01-01}", "mine.yaml, sft: .*sft.epochs = "),
        ("evaluate: {ks: 5}", "mine.yaml, evaluate: .*evaluate.ks = 5"),
        ("sft: {lora: 8}", "mine.yaml, sft: .*sft.lora = 8"),
        ("sft:", "mine.yaml, sft: "),
        ("filter_sequences: {target: popular}", "mine.yaml, .*needs history: popular"),
        ("sft: [", "mine.yaml: expected valid YAML"),
        ("", "mine.yaml: expected sections"),
    ],
)
def test_a_preset_that_does_not_fit_is_one_line_and_writes_nothing(
    params: Path, content: str, message: str
) -> None:
    folder = write_preset(params, content)
    with pytest.raises(ParamsError, match=message) as caught:
        run("apply mine", params, folder)
    assert "\n" not in str(caught.value)
    assert params.read_bytes() == SHIPPED.read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs: 3", "epochs: -3", "params.yaml, sft: .*sft.epochs = -3"),
        ("  epochs: 3", "  epochs: 3\n  epochs: 4", "params.yaml: expected valid YAML"),
    ],
)
def test_settings_that_are_wrong_already_are_not_blamed_on_the_preset(
    params: Path, old: str, new: str, message: str
) -> None:
    params.write_text(SHIPPED.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(ParamsError, match=message):
        run("apply qwen", params)


def test_a_folder_without_presets_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="expected a folder of presets; got none"):
        find_presets(tmp_path / "presets")


def test_an_unknown_preset_is_one_line_and_exit_code_1() -> None:
    command = [sys.executable, "-m", "mllm_msr.presets", "apply", "../params"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: presets: expected a preset among amazon_baby, ")
    assert ended.stderr.count("\n") == 1
